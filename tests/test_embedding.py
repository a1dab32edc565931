"""What the engine does to the process that embeds it: as little as can be, and nothing that outlasts it."""

from __future__ import annotations

import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
from harness import Footprint, descendants, eventually, is_running, run_python

from engine import Engine, errors

HTTP = {"host": "127.0.0.1", "port": 0}


def process_id(request):
    return os.getpid()


def test_importing_is_light():
    heavy = "{'starlette', 'hypercorn', 'multiprocessing', 'uvloop', 'ray', 'numpy', 'fastapi'}"
    code = f"import sys, engine; sys.stdout.write(' '.join(sorted({heavy} & set(sys.modules))))"
    assert run_python("-c", code) == ""


def test_importing_starts_nothing():
    code = """
    import os, threading
    import engine
    assert threading.active_count() == 1
    assert len(os.listdir('/proc/self/fd')) == 4, os.listdir('/proc/self/fd')
    """
    run_python("-c", textwrap.dedent(code))


HOST_UNCHANGED = """
import asyncio, logging, os, signal, sys, warnings
from engine import Engine

def state():
    return {
        'signals': [signal.getsignal(number) for number in range(1, signal.NSIG) if number not in (9, 19)],
        'wakeup': signal.set_wakeup_fd(-1),
        'environment': dict(os.environ), 'path': list(sys.path), 'arguments': list(sys.argv), 'cwd': os.getcwd(),
        'root handlers': list(logging.root.handlers), 'root level': logging.root.level,
        'hooks': (sys.excepthook, sys.displayhook, sys.stdout, sys.stderr), 'warnings': list(warnings.filters),
        'umask': os.umask(0o22),
    }

before = state()
with Engine(backend='local', http_options={'port': 0}) as engine:
    engine.create_backend('b', lambda request: 'ok')
    engine.create_endpoint('b', backend='b', route='/b')
    assert engine.get_handle('b').call() == 'ok'
    during = state()
after = state()
for name in before:
    assert before[name] == during[name] == after[name], name
"""


def test_the_host_process_is_left_as_it_was():
    run_python("-c", HOST_UNCHANGED)


# -- without a guard -----------------------------------------------------------------------------------------------

UNGUARDED = """
import os, sys
from engine import Engine

constant = 20

class OfMain:
    def __init__(self, start):
        self.start = start
    def __call__(self, request):
        return Answer(helper(self.start) + request.data, os.getpid())

class Answer:
    def __init__(self, value, pid):
        self.value, self.pid = value, pid

def helper(number):
    return number + constant

engine = Engine(backend='local', http_options={'port': 0})
engine.create_backend('main', OfMain, 1)
engine.create_endpoint('main', backend='main')
answer = engine.get_handle('main').call(100)
assert isinstance(answer, Answer)
assert answer.pid != os.getpid()
engine.shutdown()
sys.stdout.write(str(answer.value))
"""


def test_from_a_script_without_a_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    assert run_python(str(script)) == "121"


def test_from_the_command_line():
    assert run_python("-c", UNGUARDED) == "121"


def test_from_standard_input():
    assert run_python("-", stdin=UNGUARDED) == "121"


def test_from_a_module(tmp_path):
    (tmp_path / "as_module.py").write_text(UNGUARDED)
    assert run_python("-m", "as_module", cwd=tmp_path) == "121"


def test_from_code_that_has_no_file():
    """As a notebook runs a cell: compiled under a made-up name, executed in the namespace of ``__main__``."""
    cell = f"import __main__\nexec(compile({UNGUARDED!r}, '<cell 1>', 'exec'), __main__.__dict__)"
    assert run_python("-c", cell) == "121"


def test_from_a_running_loop_as_in_a_notebook():
    inner = textwrap.indent(UNGUARDED, "    ").replace("constant = 20", "global constant; constant = 20")
    assert run_python("-c", f"import asyncio\nasync def cell():\n{inner}\nasyncio.run(cell())") == "121"


def test_without_standard_streams(tmp_path):
    """Daemons close them; the descriptors 0, 1 and 2 then belong to whoever opens something next."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.replace("sys.stdout.write(", "open('answer', 'w').write("))
    subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} {script} <&- >&- 2>&-"], cwd=tmp_path, check=True, timeout=50
    )
    assert (tmp_path / "answer").read_text() == "121"


# -- endings -------------------------------------------------------------------------------------------------------

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
        assert stderr == "" or ending == "exception", stderr
    else:
        run_python("-c", ENDING, env=environment)
        assert left_in(temporary) == [], "the next engine sweeps up"


def test_control_c_ends_the_program_and_not_the_replicas_first():
    """Ctrl-C in a terminal reaches the whole process group: replicas must leave it to the engine to end them."""
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
        os.killpg(program.pid, signal.SIGINT)
        stdout, stderr = program.communicate(timeout=30)
    assert (stdout, stderr) == ("ended well", "")


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


# -- other processes -----------------------------------------------------------------------------------------------

FORKING = """
import os, sys, traceback
from engine import Engine, errors

engine = Engine(backend={backend!r}, http_options={{'port': 0}})
engine.create_backend('b', lambda request: request.data)
engine.create_endpoint('b', backend='b')
handle, unused = engine.get_handle('b'), engine.get_handle('b').options(timeout_s=5)
assert handle.call(1) == 1

def refused(attempt):
    try:
        attempt()
    except errors.EngineClosed as error:
        assert 'fork' in str(error), error
        return True
    return False

child = os.fork()
if child == 0:
    code = 1
    try:
        assert refused(lambda: handle.call(1))
        assert refused(lambda: engine.get(handle.remote(1)))
        assert refused(lambda: engine.create_backend('new', len))
        assert refused(lambda: engine.get_handle('b'))
        assert refused(engine.list_backends)
        assert refused(lambda: unused.call(1))
        engine.shutdown()
        with Engine(backend={backend!r}, http_options={{'port': 0}}) as own:
            own.create_backend('b', lambda request: request.data + 1)
            own.create_endpoint('b', backend='b')
            assert own.get_handle('b').call(1) == 2
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        {leave}
assert os.waitpid(child, 0)[1] == 0
assert handle.call(3) == 3, 'the parent goes on'
engine.shutdown()
"""


@pytest.mark.parametrize("leave", ["os._exit(code)", "sys.exit(code)"])
@pytest.mark.parametrize("backend", ["inline", "local"])
def test_a_fork_of_the_program(backend, leave):
    run_python("-W", "ignore::DeprecationWarning", "-c", FORKING.format(backend=backend, leave=leave))


@pytest.fixture
def doubling():
    with Engine(backend="local", http_options=HTTP) as engine:
        engine.create_backend("double", lambda request: request.data * 2)
        engine.create_endpoint("double", backend="double")
        yield engine


def test_a_handle_in_a_process_of_its_own(doubling):
    handle = doubling.get_handle("double").options(timeout_s=30)
    code = "import pickle, sys; sys.stdout.write(str(pickle.load(sys.stdin.buffer).call(21)))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(handle), capture_output=True, timeout=50, check=False
    )
    assert (done.stdout, done.stderr) == (b"42", b"")


def test_an_async_handle_in_a_process_of_its_own(doubling):
    code = """
    import asyncio, pickle, sys
    handle = pickle.load(sys.stdin.buffer)
    async def main():
        ref = await handle.remote(21)
        return await ref + await handle.call(1)
    sys.stdout.write(str(asyncio.run(main())))
    """
    handle = pickle.dumps(doubling.get_handle("double", sync=False))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], input=handle, capture_output=True, timeout=50, check=False
    )
    assert (done.stdout, done.stderr) == (b"44", b"")


def test_a_foreign_process_is_told_when_the_engine_is_gone(doubling, tmp_path):
    code = """
    import pickle, sys
    from engine import errors
    handle = pickle.load(open(sys.argv[1], 'rb'))
    assert handle.call(1) == 2
    sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()
    try:
        handle.call(1)
    except errors.EngineClosed:
        sys.stdout.write('closed')
    """
    (tmp_path / "handle").write_bytes(pickle.dumps(doubling.get_handle("double").options(timeout_s=20)))
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "handle"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "ready\n"
        doubling.shutdown()
        assert other.communicate("go on\n", timeout=40)[0] == "closed"


def test_a_handle_from_a_process_that_is_gone(tmp_path):
    code = """
    import pickle, sys
    from engine import Engine
    engine = Engine(backend='local', http_options={'port': 0})
    engine.create_backend('b', len)
    engine.create_endpoint('b', backend='b')
    sys.stdout.write(pickle.dumps(engine.get_handle('b')).hex())
    """
    handle = pickle.loads(bytes.fromhex(run_python("-c", textwrap.dedent(code))))
    with pytest.raises(errors.EngineClosed):
        handle.call()


def test_an_inline_engine_cannot_be_reached_from_elsewhere():
    with Engine(backend="inline", http_options=HTTP) as engine:
        engine.create_backend("b", process_id)
        engine.create_endpoint("b", backend="b")
        handle = pickle.dumps(engine.get_handle("b"))
    code = """
    import pickle, sys
    from engine import errors
    try:
        pickle.load(sys.stdin.buffer).call()
    except errors.EngineError as error:
        sys.stdout.write(str(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], input=handle, capture_output=True, timeout=50, check=False
    )
    assert b"inline" in done.stdout, done.stderr
