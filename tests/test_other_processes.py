"""Processes beside the one that owns the engine: its forks, and those that were given a handle."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap

import pytest
from harness import run_python

from engine import Engine, errors

HTTP = {"host": "127.0.0.1", "port": 0}


def process_id(request):
    return os.getpid()


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


CALLING = """
import pickle, sys
from concurrent.futures import ThreadPoolExecutor
from engine.testing.instruments import eventually

handle, gate = pickle.load(sys.stdin.buffer)

def refused():
    try:
        handle.options(timeout_s=0.01).call()
    except Exception as error:
        return 'shut down' in str(error)

def queued():
    return handle._client is not None and any(
        one['queued'] == 3 for counts in handle._client.statistics() for one in counts['backends'].values()
    )

with ThreadPoolExecutor(4) as pool:
    calls = [pool.submit(handle.call) for _ in range(4)]
    gate.wait_for_arrivals(1)
    eventually(queued)
    print('ready', flush=True)
    eventually(refused)
    gate.open()
    print([call.result(20) for call in calls])
"""


def test_an_engine_that_ends_serves_what_foreign_processes_have_called(gate):
    """Also what waits there for a replica; but nothing new."""

    def held(request):
        gate.pass_through()
        return "finished"

    with Engine(backend="local", http_options=HTTP) as engine:
        engine.create_backend("held", held, config={"max_concurrent_queries": 1})
        engine.create_endpoint("held", backend="held")
        program = subprocess.Popen([sys.executable, "-c", CALLING], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        program.stdin.write(pickle.dumps((engine.get_handle("held"), gate)))
        program.stdin.close()
        assert program.stdout.readline() == b"ready\n"
    assert program.stdout.read() == b"['finished', 'finished', 'finished', 'finished']\n"
    assert program.wait(20) == 0
    program.stdout.close()


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


PASSED_ON = """
import os, pickle, traceback
from engine import Engine

engine = Engine(backend='local', http_options={'port': 0})
engine.create_backend('b', lambda request: request.data)
engine.create_endpoint('b', backend='b')
handle = engine.get_handle('b')
assert engine.get([handle.remote(1), handle.remote(2)]) == [1, 2]  # a thread of this process reads the answers
passed_on = pickle.dumps(handle)
child = os.fork()
if child == 0:
    code = 1
    try:
        own = pickle.loads(passed_on).options(timeout_s=5)
        code = 0 if own.call(3) == 3 and own.remote(4).result(5) == 4 else 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
assert engine.get([handle.remote(1), handle.remote(2)]) == [1, 2]
engine.shutdown()
"""


def test_a_handle_passed_on_to_a_fork():
    run_python("-W", "ignore::DeprecationWarning", "-c", PASSED_ON)
