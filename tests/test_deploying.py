"""docs/deploying.md tells the truth: its programs run and end as it says, its files are what they look like."""

from __future__ import annotations

import ast
import configparser
import http.client
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from test_docs import blocks

from engine.testing.instruments import eventually

PAGE = "docs/deploying.md"
LIMIT_S = 30


def block(language: str, section: str, number: int = 0) -> str:
    return [source for heading, source in blocks(language, PAGE) if heading == section][number]


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


NAMESPACE = ["unshare", "--fork", "--pid", "--kill-child", "--mount-proc"]
"""Has a program be process 1, as in a container: the system gives it only the signals that it handles."""


def in_namespaces() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    )


@pytest.mark.parametrize("command", [[], NAMESPACE], ids=["a process", "process 1"])
def test_the_service_serves_until_it_is_sent_sigterm(tmp_path: Path, command: list[str]) -> None:
    if command and not in_namespaces():
        pytest.skip("needs the right to make namespaces")
    source = block("python", "A service of your own").replace('"port": 8000, "workers": 2', '"port": 0')
    assert '"port": 0' in source
    (tmp_path / "serve.py").write_text(source)
    service = subprocess.Popen([*command, sys.executable, "serve.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert service.stdout is not None
        url = service.stdout.readline().removeprefix("serving on ").strip()
        assert urllib.request.urlopen(f"{url}/hello?name=Ada", timeout=LIMIT_S).read() == b"hello Ada"
        children = Path(f"/proc/{service.pid}/task/{service.pid}/children")
        os.kill(int(children.read_text()) if command else service.pid, signal.SIGTERM)
        assert service.wait(LIMIT_S) == 0
    finally:
        end(service)


def test_a_program_of_asyncio_ends_in_order() -> None:
    source = block("python", "A service of your own", 1)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=LIMIT_S)
        self.path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(self.path)


def get(path: Path, target: str) -> bytes:
    connection = UnixConnection(path)
    try:
        connection.request("GET", target)
        return connection.getresponse().read()
    finally:
        connection.close()


@pytest.mark.parametrize("options", [[], ["--preload", "-k", "gthread"]], ids=["plain", "preload"])
def test_gunicorns_workers_share_the_engine_of_its_master(tmp_path: Path, options: list[str]) -> None:
    if importlib.util.find_spec("gunicorn") is None:
        pytest.skip("needs gunicorn: pip install '.[examples]'")
    section = "gunicorn: one engine for all workers"
    for number in (0, 1):
        source = block("python", section, number)
        name = re.match(r"# (\S+\.py)\n", source)
        assert name is not None
        answer = "squares().options(timeout_s=5).call(number)"
        source = source.replace(answer, f"(os.getppid(), os.getpid(), {answer})")
        (tmp_path / name[1]).write_text(source)
    (command,) = (source.split() for heading, source in blocks("sh", PAGE) if heading == section)
    bound = tmp_path / "bound"
    gunicorn = subprocess.Popen(
        [sys.executable, "-m", *command, *options, "--workers", "2", "--bind", f"unix:{bound}"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},  # it keeps a socket there
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        seen: set[Any] = set()

        def both_have_answered() -> bool:
            try:
                parent, worker, result = ast.literal_eval(get(bound, "/?12").decode())
            except OSError:
                return False  # it does not listen yet
            assert (parent, result) == (gunicorn.pid, 144)
            seen.add(worker)
            return len(seen) == 2

        eventually(both_have_answered, timeout_s=LIMIT_S)
        gunicorn.send_signal(signal.SIGTERM)
        _, log = gunicorn.communicate(timeout=LIMIT_S)
        assert gunicorn.returncode == 0, log
        assert "Traceback" not in log
    finally:
        end(gunicorn)


def test_the_unit_of_systemd_has_the_options_that_the_text_speaks_of() -> None:
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(block("ini", "systemd"))
    assert unit["Service"]["KillMode"] == "mixed"
    grace = re.search(r"serve_forever\(timeout_s=(\d+)\)", block("python", "A service of your own"))
    assert grace is not None
    assert int(unit["Service"]["TimeoutStopSec"]) > int(grace[1])


def test_the_deployment_of_kubernetes_is_one() -> None:
    yaml = pytest.importorskip("yaml")
    pod = yaml.safe_load(block("yaml", "Kubernetes"))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/-/readyz"
    _, sleep_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= int(sleep_s) + 25
