"""Which Python runs local replicas: where the application's own cannot, that is said in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from harness import run_python

import engine
from engine import Engine, errors
from engine.seam.scribe import scribe
from engine.testing.instruments import PATIENCE_S
from engine_local import LocalAdapter

NO_HTTP = {"location": None}


def called(executable: Path) -> str:
    """An executable that notes that it was started."""
    executable.write_text(f'#!/bin/sh\necho "$@" >> {executable}.started\n')
    executable.chmod(0o755)
    return str(executable)


def where(request: object) -> tuple[str, bool]:
    return sys.executable, hasattr(sys, "frozen")


def test_a_frozen_application_does_not_start_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    application = called(tmp_path / "application")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", application)
    with pytest.raises(errors.InvalidArgument, match=r"is frozen: .*application' starts the application.*python="):
        Engine(http_options=NO_HTTP).__enter__()
    assert not Path(f"{application}.started").exists()


def test_a_frozen_application_names_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, application = sys.executable, called(tmp_path / "application")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", application)
    with Engine(LocalAdapter(python=python), http_options=NO_HTTP) as engine:
        engine.create_backend("where", where)
        engine.create_endpoint("where", backend="where")
        assert engine.get_handle("where").call() == (python, False)
    assert not Path(f"{application}.started").exists()


def test_its_own_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen application's path lacks the standard library that the interpreter needs."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_the_application.py").write_text("value = 5")
    (tmp_path / "random.py").write_text("value = 6")

    def look(request: object) -> tuple[int, bool]:
        import random

        import of_the_application  # type: ignore[import-not-found]

        return of_the_application.value, hasattr(random, "random")

    with Engine(LocalAdapter(python=sys.executable), http_options=NO_HTTP) as engine:
        engine.create_backend("look", look)
        engine.create_endpoint("look", backend="look")
        assert engine.get_handle("look").call() == (5, True)


@pytest.mark.parametrize("executable", ["", None])
def test_a_process_that_does_not_know_its_interpreter(executable: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(errors.InvalidArgument, match=r"sys.executable is ('')?(None)?: .* LocalAdapter\(python="):
        Engine(http_options=NO_HTTP).__enter__()


def test_something_else_than_an_interpreter(tmp_path: Path) -> None:
    with (
        Engine(LocalAdapter(python=called(tmp_path / "other")), http_options=NO_HTTP) as engine,
        pytest.raises(errors.BackendStartError, match=r"exited before it did anything .*other', with the engine"),
    ):
        engine.create_backend("where", where)


def test_an_interpreter_of_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other"
    fake = "import sys; sys.version_info = (3, 1, 4); from engine_local.boot import main; main()"
    other.write_text(f'#!/bin/sh\nfor last in "$@"; do :; done\nexec {sys.executable} -c "{fake}" "$last"\n')
    other.chmod(0o755)
    with Engine(LocalAdapter(python=other), http_options=NO_HTTP) as engine:
        with pytest.raises(errors.BackendStartError):
            engine.create_backend("where", where)
    mine = "{}.{}".format(*sys.version_info[:2])
    scribe().flush(PATIENCE_S)
    assert f"is Python 3.1, and cannot run what Python {mine} has pickled" in caplog.text


@pytest.mark.parametrize("python", ["", 3, ["python"]])
def test_what_is_no_path_is_refused(python: object) -> None:
    with pytest.raises(errors.InvalidArgument, match="python must be the path of an interpreter or None"):
        LocalAdapter(python=python)  # type: ignore[arg-type]


def test_from_a_zip_archive(tmp_path: Path) -> None:
    """``python application.pyz``, with the engine inside."""
    archive = tmp_path / "application.pyz"
    root = Path(engine.__path__[0]).parent
    main = """
import os, sys
import engine
from engine import Engine

class Adding:
    def __init__(self, number):
        self.number = number
    def __call__(self, request):
        import engine_local
        return helper(self.number) + request.data, os.getpid(), engine_local.__file__

def helper(number):
    return number + 1

with Engine(http_options={"location": None}) as running:
    running.create_backend("adding", Adding, 1)
    running.create_endpoint("adding", backend="adding")
    value, pid, file = running.get_handle("adding").call(100)
assert pid != os.getpid()
assert engine.__file__.startswith(sys.argv[0] + os.sep) and file.startswith(sys.argv[0] + os.sep), file
sys.stdout.write(str(value))
"""
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("__main__.py", main)
        for base in (root, root / "adapters"):
            for path in base.glob("engine*/**/*.py"):
                file.write(path, path.relative_to(base))
    assert run_python(str(archive)) == "102"


# -- a module of the user's that is called engine ---------------------------------------------------------------------


def test_replicas_find_the_engine_beside_a_module_of_that_name(tmp_path: Path) -> None:
    """The application has imported the engine before its path leads to the other one."""
    (tmp_path / "engine.py").write_text("raise SystemExit('the wrong one')")
    program = f"""
import sys
from engine import Engine
sys.path.insert(0, {str(tmp_path)!r})
with Engine(http_options={{"location": None}}) as engine:
    engine.create_backend("b", lambda request: sys.path[0])
    engine.create_endpoint("b", backend="b")
    assert engine.get_handle("b").call() == {str(tmp_path)!r}
"""
    run_python("-c", program)


@pytest.mark.parametrize("package", ["engine_local", "engine_inline", "engine_ray"])
def test_an_adapter_says_that_a_module_of_that_name_is_in_the_way(tmp_path: Path, package: str) -> None:
    (tmp_path / "engine.py").write_text(f"import {package}")
    done = subprocess.run(
        [sys.executable, "engine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    path = os.path.join(str(tmp_path), "engine.py")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"ImportError: {path!r} is imported in place of the package engine of engineroom: rename it"
