"""A machine that has no more of something: what a local engine says then, and that it goes on once there is some."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import Engine
from engine.errors import BackendStartError
from engine.testing.instruments import PATIENCE_S, eventually
from engine_local import LocalAdapter

_REFUSES = """
    import errno, os
    fork = os.fork

    def refuse():
        if os.path.exists({sign!r}):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    os.fork = refuse
"""


def pid_of(request: Any) -> int:
    return os.getpid()


def test_no_process_can_be_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ``RLIMIT_NPROC`` or a limit of a container is reached, which binds no root: the fork server refuses."""
    sign = tmp_path / "none left"
    (tmp_path / "refuses_to_fork.py").write_text(textwrap.dedent(_REFUSES.format(sign=str(sign))))
    monkeypatch.syspath_prepend(tmp_path)
    adapter = LocalAdapter(preload=["refuses_to_fork"])
    with Engine(backend=adapter, http_options={"location": None}) as engine:
        engine.create_backend("b", pid_of)
        engine.create_endpoint("e", backend="b")
        handle = engine.get_handle("e")
        pid = handle.call()
        sign.touch()
        with pytest.raises(BackendStartError, match="could not be forked") as told:
            engine.create_backend("c", pid_of)
        assert os.strerror(11 if sys.platform == "linux" else 35) in str(told.value)
        assert handle.call() == pid
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: engine.statistics()["backends"]["b"]["failures"])
        waiting = handle.remote()
        sign.unlink()
        assert engine.get(waiting, timeout=PATIENCE_S) != pid
        engine.create_backend("c", pid_of)


_DISK_IS_FULL = """
    import errno, os, sys
    from pathlib import Path
    from engine import Engine
    from engine.errors import ResourcesUnavailable

    place = Path(os.environ["TMPDIR"])

    def fill():
        made = []
        try:
            while True:
                made.append(place / f"full-{len(made)}")
                made[-1].touch()
        except OSError as error:
            assert error.errno == errno.ENOSPC
        return made[:-1]

    def refused(action):
        made = fill()
        try:
            action()
        except (OSError, ResourcesUnavailable) as error:
            assert os.strerror(errno.ENOSPC) in str(error)
        else:
            raise AssertionError("there was room")
        finally:
            for path in made:
                path.unlink()

    def start():
        with Engine(backend="local", http_options={"location": None}) as engine:
            pass

    def pid_of(request):
        return os.getpid()

    refused(start)
    with Engine(backend="local", http_options={"location": None}) as engine:
        engine.create_backend("b", pid_of)
        engine.create_endpoint("e", backend="b")
        handle = engine.get_handle("e")
        pid = handle.call()
        refused(lambda: engine.create_backend("c", pid_of))
        refused(lambda: engine.update_backend_config("b", {"num_replicas": 2}))
        refused(lambda: engine.update_backend("b", pid_of))
        assert handle.call() == pid
        engine.update_backend("b", pid_of)
        assert handle.call() != pid
    assert list(place.iterdir()) == []
"""


@pytest.fixture
def small_disk() -> Iterator[list[str]]:
    """What a command is to be prefixed with, so that ``TMPDIR`` has room for few files."""
    with tempfile.TemporaryDirectory(prefix="disk-") as place:  # where sockets of a longer path would go elsewhere
        yield _on_a_small_disk(place)


def _on_a_small_disk(place: str) -> list[str]:
    unshare = shutil.which("unshare")
    mount = f'mount -t tmpfs -o nr_inodes=30,size=256k none {place} && exec env TMPDIR={place} "$@"'
    prefix = [unshare or "", "-rm", "sh", "-c", mount, "sh"]
    if unshare is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    return prefix


def test_no_room_for_sockets(small_disk: list[str]) -> None:
    ran = subprocess.run(
        [*small_disk, sys.executable, "-c", textwrap.dedent(_DISK_IS_FULL)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
