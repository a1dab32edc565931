"""However the program ends that embeds the engine, nothing outlives it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from harness import run_python

from engine import Engine
from engine.testing.instruments import Footprint, descendants, eventually, is_running

HTTP = {"host": "127.0.0.1", "port": 0}


def process_id(request):
    return os.getpid()


ENDING = """
import os, sys, time, signal
from engine import Engine

def backend(request):
    if request.data == 'sleep':
        time.sleep(1000)
    if request.data == 'spin':
        sum(range(10 ** 15))  # never lets another thread run
    return 'ok'

engine = Engine(backend='local', http_options={'port': 0})
engine.create_backend('b', backend, config={'num_replicas': 2, 'graceful_shutdown_timeout_s': 0.2})
engine.create_endpoint('b', backend='b', route='/b')
handle = engine.get_handle('b')
assert handle.call() == 'ok'
"""
WAIT = "sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()\n"

FORKED = """
import multiprocessing, socket, sys
from engine import Engine

def backend(request):
    return 'ok'

def refused(port):
    try:
        socket.create_connection(('127.0.0.1', port), 20).close()
    except ConnectionRefusedError:
        return True
    return False

def child(reader):
    reader.recv()

port = 0
children = []
for _ in range(2):  # the second engine takes the port that the first had, and its child still holds
    engine = Engine(backend=sys.argv[1], http_options={'port': port})
    engine.create_backend('b', backend)
    engine.create_endpoint('b', backend='b', route='/b')
    port = int(engine.http_url.rpartition(':')[2])
    assert not refused(port)
    reader, writer = multiprocessing.Pipe()
    process = multiprocessing.get_context('fork').Process(target=child, args=(reader,))
    process.start()
    children.append((process, writer))
    engine.shutdown()
    assert refused(port), 'the child has kept the port'
for process, writer in children:
    writer.send(None)
    process.join()
    assert process.exitcode == 0
print('all right')
"""

DRAINED = """
import asyncio, atexit, os, pathlib, signal, sys, threading
from engine import Engine
from engine.testing.instruments import Gate, eventually

where = pathlib.Path(sys.argv[2])
gate = Gate(where / 'gate')

def held(request):
    gate.pass_through()
    return 'finished'

def ask():
    try:
        (where / 'answer').write_text(handle.call())
    except BaseException as error:
        (where / 'answer').write_text(repr(error))

asking = threading.Thread(target=ask, daemon=True)
atexit.register(asking.join, 20)  # after what the engine does then, because before that
engine = Engine(backend=sys.argv[1], http_options={'location': None})
engine.create_backend('held', held)
engine.create_endpoint('held', backend='held')
handle = engine.get_handle('held')
asking.start()
gate.wait_for_arrivals(1)
threading.Thread(target=lambda: (eventually(lambda: 'closed' in repr(engine)), gate.open()), daemon=True).start()
"""
DRAINS = {
    "end of the program": ("", 0),
    "sys.exit": ("sys.exit(0)", 0),
    "SIGTERM that exits": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nwith engine:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    signal.pause()",
        0,
    ),
    "a task that is cancelled": (
        "async def main():\n    async with engine:\n        asyncio.current_task().cancel()\n"
        "        await asyncio.sleep(1000)\n"
        "try:\n    asyncio.run(main())\nexcept asyncio.CancelledError:\n    pass",
        0,
    ),
}
ENDINGS = {
    "end of the program": (WAIT, 0),
    "exception": (WAIT + "raise KeyError('mine')", 1),
    "sys.exit": (WAIT + "sys.exit(3)", 3),
    "sys.exit in with": (f"with engine:\n    {WAIT}    sys.exit(3)", 3),
    "os._exit": (WAIT + "os._exit(4)", 4),
    "end while calls run": ("refs = [handle.remote('sleep'), handle.remote('spin')]\n" + WAIT, 0),
    "SIGKILL": (WAIT + "os.kill(os.getpid(), signal.SIGKILL)", -9),
    "SIGTERM": (WAIT + "os.kill(os.getpid(), signal.SIGTERM)", -15),
    "SIGKILL while calls run": (
        "refs = [handle.remote('sleep'), handle.remote('spin')]\n" + WAIT + "os.kill(os.getpid(), signal.SIGKILL)",
        -9,
    ),
}
CLEAN = ["end of the program", "exception", "sys.exit", "sys.exit in with", "end while calls run"]


@pytest.fixture
def temporary():
    """A directory for temporary files with a name short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        yield Path(directory)


def left_in(directory: Path) -> list[Path]:
    """Sockets, and directories of single engines; the one they share and its lock may stay."""
    return [path for path in directory.glob("*/**/*") if path.is_dir() or stat.S_ISSOCK(path.lstat().st_mode)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_outlives_the_program(ending, temporary):
    code, expected = ENDINGS[ending]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", ENDING + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as program:
        assert program.stdout.readline() == "ready\n", program.stderr.read()
        workers = descendants(program.pid)
        assert len(workers) >= 4, "a fork server, two replicas and an ingress"
        _, stderr = program.communicate("go on\n", timeout=30)
    assert program.returncode == expected, stderr
    eventually(lambda: not any(map(is_running, workers)), timeout_s=2)
    if ending in CLEAN:
        assert left_in(temporary) == []
        if ending == "end while calls run":  # they got their time, and the log says who did not use it
            stderr = "".join(line for line in stderr.splitlines() if not line.endswith("is killed; its calls fail"))
        assert stderr == "" or ending == "exception", stderr
    else:
        run_python("-c", ENDING, env=environment)
        assert left_in(temporary) == [], "the next engine sweeps up"


@pytest.mark.parametrize("backend", ["inline", "local"])
@pytest.mark.parametrize("ending", DRAINS)
def test_an_orderly_end_lets_calls_finish(ending, backend, tmp_path):
    code, expected = DRAINS[ending]
    done = subprocess.run(
        [sys.executable, "-c", DRAINED + code, backend, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (expected, "")
    assert (tmp_path / "answer").read_text() == "finished"


def test_control_c_ends_the_program_and_not_the_replicas_first():
    """Whoever signals all processes signals replicas, too: they must leave it to the engine to end them."""
    code = ENDING + (
        "try:\n    " + WAIT + "except KeyboardInterrupt:\n    pass\n"
        "assert handle.call() == 'ok'\nengine.shutdown()\nsys.stdout.write('ended well')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout.readline() == "ready\n", program.stderr.read()
        for pid in descendants(program.pid):
            os.kill(pid, signal.SIGINT)
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does
        stdout, stderr = program.communicate(timeout=30)
    assert (stdout, stderr) == ("ended well", "")


POOLED = """
import os, signal, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
from engine import Engine

class Pooled:
    def __init__(self):
        self.pool = ProcessPoolExecutor(1)
        self.subprocess = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])

    def __call__(self, request):
        return os.getpid(), self.pool.submit(os.getpid).result(), self.subprocess.pid, os.getppid()

engine = Engine(backend='local', http_options={'location': None})
engine.create_backend('b', Pooled)
engine.create_endpoint('b', backend='b')
handle = engine.get_handle('b')
sys.stdout.write(' '.join(map(str, handle.call())) + '\\n')
sys.stdout.flush()
sys.stdin.readline()
"""


@pytest.mark.parametrize("dies", ["program", "replica", "fork server"])
def test_what_a_replica_has_started_ends_with_it(dies):
    """Also if it is killed, or all of the engine is: the pool would wait for ever."""
    with subprocess.Popen(
        [sys.executable, "-c", POOLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 4
        server = pids.pop()
        os.kill({"program": program.pid, "replica": pids[0], "fork server": server}[dies], signal.SIGKILL)
        eventually(lambda: not any(map(is_running, pids)))
        program.communicate("go on\n", timeout=30)


def test_what_a_replica_has_started_ends_with_the_program_while_the_fork_server_imports(tmp_path):
    """It does so when there is nothing else to do, and so most likely soon after the first replica has come."""
    (tmp_path / "uvloop.py").write_text("import time; open(__file__ + '.begun', 'w').close(); time.sleep(100)")
    with subprocess.Popen(
        [sys.executable, "-c", POOLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as program:
        pids = [int(pid) for pid in program.stdout.readline().split()]
        eventually((tmp_path / "uvloop.py.begun").exists)
        program.kill()
        eventually(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize("backend", ["inline", "local"])
def test_cycles_leave_nothing(backend, client):
    """Twenty lives of an engine, some with HTTP; what one of them keeps for good shows in the count."""
    before = None
    for number in range(21):
        with Engine(backend=backend, http_options=HTTP) as engine:
            engine.create_backend("b", process_id)
            engine.create_endpoint("b", backend="b", route="/b" if number % 5 == 0 else None)
            engine.get_handle("b").call()
            if engine.http_url is not None:
                assert client.get(f"{engine.http_url}/b").status_code == 200
        if number == 0:
            before = Footprint.now()
    before.check_unchanged()


class Named:
    def reconfigure(self, name):
        self.name = name

    def __call__(self, request):
        return self.name, os.getpid()


@pytest.mark.parametrize("how", ["update", "update a limit", "delete", "delete by force", "shutdown"])
def test_a_stopped_replica_holds_nobody_up(how, client):
    """It hears nothing and says nothing, until it is killed in the end."""
    config = {"user_config": "old", "reconfigure_timeout_s": 0.1, "graceful_shutdown_timeout_s": 0.1}
    with Engine(backend="local", http_options={"location": None}) as engine:
        engine.create_backend("b", Named, config=config)
        engine.create_endpoint("b", backend="b")
        handle = engine.get_handle("b")
        name, pid = handle.call()
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        if how == "update":
            engine.update_backend_config("b", {"user_config": "new"})
            assert handle.call()[0] == "new"
        elif how == "update a limit":
            engine.update_backend_config("b", {"max_concurrent_queries": 3})
            assert handle.call()[0] == name
        elif how.startswith("delete"):
            engine.delete_endpoint("b")
            engine.delete_backend("b", force="force" in how)
    assert not is_running(pid)


def test_an_engine_outlives_the_thread_that_made_it():
    """The kernel ties "die with your parent" to the parent's thread, so it must be one that stays."""
    made = []

    def make():
        engine = Engine(backend="local", http_options=HTTP)
        engine.create_backend("b", process_id)
        engine.create_endpoint("b", backend="b")
        made.append(engine)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    with made[0] as engine:
        pid = engine.get_handle("b").call()
        assert is_running(pid)
        assert engine.get_handle("b").call() == pid


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a listening socket ends with its last holder")
@pytest.mark.parametrize("adapter", ["local", "inline"])
def test_a_fork_of_the_program_keeps_no_port(adapter):
    assert run_python("-c", FORKED, adapter).strip() == "all right"
