"""The hosts that tests of Ray run on: different to each other, mortal, and gone without a trace."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_hosts
from ray_hosts import Host, Hosts, why_not

from engine.testing.instruments import eventually

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.usefixtures("leaves_nothing"),
]

_DRIVER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import ray, socket, time
from harness import take_stdout

answers = take_stdout()

def alive():
    return sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])

@ray.remote(num_cpus=0)
class Place:
    def where(self):
        context = ray.get_runtime_context()
        return context.get_node_id(), ray.util.get_node_ip_address(), socket.gethostname()

ray.init(sys.argv[1], log_to_driver=False)
places = {{host: Place.options(resources={{host: 1}}).remote() for host in ("host1", "host2")}}
for command, host in map(str.split, sys.stdin):
    if command == "where":
        print(*ray.get(places[host].where.remote()), *alive(), file=answers)
    else:
        try:
            ray.get(places[host].where.remote(), timeout=30)
        except ray.exceptions.RayActorError:
            pass
        while len(left := alive()) > 1:
            time.sleep(0.05)
        print(*left, file=answers)
"""
_ABANDON = """
import sys
from ray_hosts import Hosts
with Hosts() as hosts:
    hosts.add().run("sh", "-c", "nohup sleep 1000 >/dev/null 2>&1 &")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """Whatever the test starts inherits it in its environment."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("RUN_OF_TEST_RAY_HOSTS", mark)
    return mark


@pytest.fixture
def hosts(mark: str) -> Iterator[Hosts]:
    interfaces = socket.if_nameindex()
    with Hosts() as hosts:
        yield hosts
        assert socket.if_nameindex() == interfaces
    assert marked(mark) == []


def marked(mark: str) -> list[str]:
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        if environment.parent.name == str(os.getpid()):
            continue
        try:
            if mark.encode() in environment.read_bytes():
                found.append((environment.parent / "cmdline").read_text())
        except OSError:  # it is gone, or another user's
            continue
    return found


def ask(driver: subprocess.Popen[str], *words: str) -> list[str]:
    say(driver, *words)
    return answer(driver)


def answer(driver: subprocess.Popen[str]) -> list[str]:
    assert driver.stdout is not None
    line = driver.stdout.readline()
    assert line, f"the driver ended with exit code {driver.wait()}"
    return line.split()


def say(driver: subprocess.Popen[str], *words: str) -> None:
    assert driver.stdin is not None
    driver.stdin.write(" ".join(words) + "\n")
    driver.stdin.flush()


def web_server(host: Host, directory: Path) -> subprocess.Popen[str]:
    (directory / "hello").write_text("hello")
    log = (directory / "log").open("w")
    with log:
        server = host.popen(sys.executable, "-m", "http.server", "8000", cwd=directory, stdout=log, stderr=log)

    def answers() -> bool:
        try:
            host.connect("localhost", 8000).close()
        except ConnectionRefusedError:
            return False
        return True

    eventually(answers)
    return server


def test_a_node_survives_a_short_cut_and_its_death_is_noticed(hosts: Hosts) -> None:
    a, b = hosts.add(), hosts.add()
    a.start_head(resources={a.name: 1})
    b.join(a, resources={b.name: 1})
    session = a.run("readlink", "/dev/shm/ray/session_latest").strip()

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with a.popen(sys.executable, "-c", _DRIVER, a.ray_address, **pipes) as driver:
        node_a, *where_a = ask(driver, "where", a.name)
        node_b, *where_b = ask(driver, "where", b.name)
        assert node_a != node_b
        assert where_a == [a.address, a.name, a.address, b.address]
        assert where_b == [b.address, b.name, a.address, b.address]

        b.cut()
        say(driver, "where", b.name)
        assert driver.stdout is not None
        assert select.select([driver.stdout], [], [], 1.0)[0] == [], "an answer came through a cut cable"
        b.mend()
        assert answer(driver) == [node_b, *where_b]

        b.kill()
        assert ask(driver, "alone", b.name) == [a.address]
    assert driver.returncode == 0
    assert not Path(session).exists(), "Ray wrote to the machine's own directories"


def test_a_test_makes_requests_from_any_host(hosts: Hosts, tmp_path: Path) -> None:
    a, b, c = hosts.add(), hosts.add(), hosts.add()
    with web_server(a, tmp_path) as server:
        assert b.get(f"http://{a.address}:8000/hello?x=1") == (200, b"hello")
        assert c.get(f"http://{a.name}:8000/nobody")[0] == 404

        a.cut()
        with pytest.raises(TimeoutError):
            b.get(f"http://{a.address}:8000/hello", timeout_s=0.5)
        a.mend()
        assert b.get(f"http://{a.address}:8000/hello") == (200, b"hello")
        server.terminate()
    with pytest.raises(ConnectionRefusedError, match=r"8000 from <host2"):
        b.connect(a.address, 8000)


_ECHO = """
import socket
with socket.create_server(("", 8000)) as server:
    print("ready", flush=True)
    connection = server.accept()[0]
    while data := connection.recv(1 << 16):
        connection.sendall(data)
"""


def test_a_long_cable_takes_its_time_and_loses_nothing_for_good(hosts: Hosts) -> None:
    near, far = hosts.add(), hosts.add()
    far.slow_down(0.05, 0.1)
    with far.popen(sys.executable, "-c", _ECHO, stdout=subprocess.PIPE) as echo:
        assert echo.stdout is not None and echo.stdout.readline() == "ready\n"
        with near.connect(far.address, 8000) as connection:
            begun = time.monotonic()
            connection.sendall(b"x" * 20_000)  # several packets, unless devices are trusted to cut them
            received = 0
            while received < 20_000:
                received += len(connection.recv(1 << 16))
            assert time.monotonic() - begun >= 0.1
    far.kill()


def test_signals_reach_the_process_itself(hosts: Hosts) -> None:
    host = hosts.add()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with host.popen("sleep", "1000") as process:
            process.send_signal(number)
        assert process.returncode == -number
        process.send_signal(number)  # too late, so nothing


def test_a_run_that_fails_says_what_it_printed(hosts: Hosts) -> None:
    host = hosts.add()
    with pytest.raises(AssertionError, match=r"host1 .*exit code 3\nout\n\nerr"):
        host.run("sh", "-c", "echo out; echo err >&2; exit 3")
    with pytest.raises(AssertionError, match=r"not done after 0\.2 s"):
        host.run("sleep", "1000", timeout_s=0.2)


def test_a_host_dies_with_all_that_runs_on_it(hosts: Hosts, mark: str) -> None:
    a, b = hosts.add(), hosts.add()
    a.run("sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &")
    with a.popen("sleep", "1000") as process:
        eventually(lambda: marked(mark).count("sleep\x001000\x00") == 2)
        a.kill()
        assert process.poll() == -signal.SIGKILL
    assert "sleep\x001000\x00" not in marked(mark)
    a.kill()
    assert b.run("hostname") == "host2\n"


def test_a_process_that_nobody_waits_for_leaves_nothing(hosts: Hosts) -> None:
    hosts.add().popen("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_failure_beside_a_process_ends_it(hosts: Hosts) -> None:
    with pytest.raises(ZeroDivisionError), hosts.add().popen("sleep", "1000"):
        raise ZeroDivisionError


def test_orphans_are_reaped(hosts: Hosts) -> None:
    host = hosts.add()
    host.run("sh", "-c", "sleep 0 >/dev/null 2>&1 &")
    eventually(lambda: sum(name.isdecimal() for name in host.run("ls", "/proc").split()) == 2)  # the first, and ls


def test_a_refusal_of_the_system_is_a_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_hosts, "_BOOT", "echo mount: permission denied; exit 1")
    assert why_not.__wrapped__() == "not allowed to make namespaces: mount: permission denied"


def test_nothing_survives_the_process_that_made_the_hosts(mark: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _ABANDON],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    ) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
        eventually(lambda: "sleep\x001000\x00" in marked(mark))
        maker.kill()
    eventually(lambda: not marked(mark), timeout_s=5)
