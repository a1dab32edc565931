"""The local adapter by itself: real processes, and a recorder in the controller's place."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import pickle
import re
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import _workers
import anyio
import pytest
from harness import run_python

import engine
import engine_local
from engine import Engine
from engine import errors as engine_errors
from engine.control import pulse
from engine.errors import BackendStartError, EngineClosed, InvalidArgument, RemoteTraceback, ResourcesUnavailable
from engine.seam.channel import Channel, ChannelClosed, ChannelListener
from engine.seam.control_messages import Drain, LogLine, Ping, Pong, Ready, StartFailed
from engine.seam.messages import Call, Message, Reply
from engine.seam.resources import Resources
from engine.seam.serialization import unpack_exception
from engine.seam.worker import Listen, WorkerExit, WorkerSpec
from engine.testing.instruments import PATIENCE_S, Footprint, descendants, is_running
from engine_local import LocalAdapter, LocalConnector, watched
from engine_local import adapter as adapter_module
from engine_local.life import Stage
from engine_wire import vitals

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Recorder:
    """In the controller's place: writes down what the adapter reports, and lets tests wait for it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.peers: list[Any] = []
        self._changed = asyncio.Event()

    def worker_said(self, worker_id: str, body: Any) -> None:
        self.events.append((worker_id, body))
        self._changed.set()

    def worker_exited(self, exit: WorkerExit) -> None:
        self.events.append((exit.worker_id, exit))
        self._changed.set()

    def peer_connected(self, channel: Channel) -> ChannelListener:
        listener = Listener()
        self.peers.append(listener)
        self._changed.set()
        return listener

    def said(self, worker_id: str, kind: type = object) -> list[Any]:
        return [body for who, body in self.events if who == worker_id and isinstance(body, kind)]

    def lines(self, worker_id: str) -> list[tuple[str, str]]:
        return [(line.logger, line.text) for line in self.said(worker_id, LogLine)]

    async def until(self, condition: Callable[[], Any]) -> Any:
        with anyio.fail_after(PATIENCE_S):
            while not (found := condition()):
                self._changed.clear()
                await self._changed.wait()
            return found

    async def answer(self, worker_id: str) -> Any:
        def given() -> list[Any]:
            return [body for body in self.said(worker_id, tuple) if body[0] == "answer"] or self._no_more(worker_id)

        return (await self.until(given))[0][1]

    async def address(self, worker_id: str) -> str:
        return str((await self.until(lambda: self.said(worker_id, Ready) or self._no_more(worker_id)))[0].address)

    async def exit(self, worker_id: str) -> str:
        return str((await self.until(lambda: self.said(worker_id, WorkerExit)))[0].reason)

    def _no_more(self, worker_id: str) -> list[Any]:
        assert not self.said(worker_id, WorkerExit), self.events
        return []


class Listener:
    """Hears a channel."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.lost_because: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def received(self, channel: Channel, message: Message) -> None:
        self.messages.put_nowait(message)

    def lost(self, channel: Channel, reason: str) -> None:
        self.lost_because.set_result(reason)


@pytest.fixture
async def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def adapter(recorder: Recorder) -> AsyncIterator[LocalAdapter]:
    before = Footprint.now()
    adapter = LocalAdapter()
    await adapter.start("test", recorder)
    yield adapter
    await adapter.stop()
    adapter.close()
    before.check_unchanged()
    exited = [event.worker_id for _, event in recorder.events if isinstance(event, WorkerExit)]
    assert len(exited) == len(set(exited)), exited


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name leaves room for that of a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path


def write_module(directory: Path, name: str, text: str) -> None:
    (directory / f"{name}.py").write_text(text)


def spec(worker_id: str, function: Callable[..., None], *arguments: Any, **fields: Any) -> WorkerSpec:
    payload = pickle.dumps((function, *arguments))
    return WorkerSpec(worker_id, fields.pop("name", worker_id), "_workers:run", payload, **fields)


# -- serving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"blocking", b"loop"])
async def test_a_worker_serves_from_start_to_drain(adapter: LocalAdapter, recorder: Recorder, kind: bytes) -> None:
    await adapter.start_worker(WorkerSpec("w", "w", "_workers:echo", kind))
    address = await recorder.address("w")
    listener = Listener()
    channel = adapter.open_channel(address, listener, on_loop=True)
    for number in range(3):
        channel.send(Call(number, 0, "", None, "", b"", b"%d" % number))
        assert await listener.messages.get() == Reply(number, 0, b"", b"%d" % number)
    adapter.tell("w", Ping(7))
    (pong,) = await recorder.until(lambda: recorder.said("w", Pong))
    assert pong.token == 7
    adapter.tell("w", Drain(1.0))
    assert await recorder.exit("w") == "exited"
    await listener.lost_because
    with pytest.raises(ChannelClosed):
        adapter.open_channel(address, listener, on_loop=True)
    adapter.tell("w", Ping(8))  # nobody there, no error
    adapter.kill_worker("w")


def test_it_runs_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def scenario() -> None:
        recorder, adapter = Recorder(), LocalAdapter()
        await adapter.start("test", recorder)
        await adapter.start_worker(WorkerSpec("w", "w", "_workers:echo", b"loop"))
        listener = Listener()
        channel = adapter.open_channel(await recorder.address("w"), listener, on_loop=True)
        channel.send(Call(1, 0, "", None, "", b"", b"x"))
        assert await listener.messages.get() == Reply(1, 0, b"", b"x")
        channel.close()
        await adapter.stop()

    before = Footprint.now()
    loop = uvloop.new_event_loop()
    loop.run_until_complete(scenario())
    loop.close()
    before.check_unchanged()


async def test_a_thread_can_drive_a_channel(adapter: LocalAdapter, recorder: Recorder) -> None:
    await adapter.start_worker(WorkerSpec("w", "w", "_workers:echo", b""))
    address = await recorder.address("w")
    connector = pickle.loads(pickle.dumps(adapter))
    assert isinstance(connector, LocalConnector)
    got: list[Message] = []

    class Hears:
        def received(self, channel: Channel, message: Message) -> None:
            got.append(message)

        def lost(self, channel: Channel, reason: str) -> None:
            pass

    def call() -> None:
        channel = connector.open_channel(address, Hears(), on_loop=False)
        channel.send(Call(1, 0, "", None, "", b"", b"x"))
        assert channel.drive(lambda: bool(got), PATIENCE_S)
        channel.close()

    call()  # on this very thread: the worker needs no loop of ours
    assert got == [Reply(1, 0, b"", b"x")]
    connector.close()
    connector.close()


async def test_a_worker_reaches_the_controller(adapter: LocalAdapter, recorder: Recorder) -> None:
    await adapter.start_worker(spec("w", _workers.call_home))
    (peer,) = await recorder.until(lambda: recorder.peers)
    message = await peer.messages.get()
    assert message.payload == b"from the worker"
    adapter.tell("w", Drain(1.0))
    await peer.lost_because
    assert await recorder.exit("w") == "exited"


async def test_control_bodies_wait_for_their_handler(adapter: LocalAdapter, recorder: Recorder) -> None:
    await adapter.start_worker(spec("w", _workers.listen_late))
    for token in (1, 2, 3):
        adapter.tell("w", Ping(token))
    await recorder.address("w")
    adapter.tell("w", Ping(4))
    assert await recorder.answer("w") == [(1, False), (2, False), (3, False), (4, False)]
    assert ["engine.local"] == [logger for logger, text in recorder.lines("w") if "a bad handler" in text]
    assert await recorder.exit("w") == "exited"


async def test_large_payloads_and_many_workers_at_once(
    adapter: LocalAdapter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = os.urandom(3_000_000)
    for number in range(12):
        if number == 6:
            monkeypatch.delattr(os, "memfd_create", raising=False)  # not every system has it
        await adapter.start_worker(spec(f"w{number}", _workers.answer, (number, blob)))
    for number in range(12):
        assert await recorder.answer(f"w{number}") == (number, blob)
        assert await recorder.exit(f"w{number}") == "exited"


# -- ends ----------------------------------------------------------------------------------------------------------

ENDS = [
    ("return", "exited"),
    ("raise", "exited with code 1"),
    ("interrupt", "exited with code 1"),
    ("sys.exit(3)", "exited with code 3"),
    ("sys.exit()", "exited"),
    ("sys.exit('why')", "exited with code 1"),
    ("os._exit(4)", "exited with code 4"),
    ("SIGKILL", "was killed by SIGKILL (out of memory, or someone killed it)"),
    ("SIGTERM", "was killed by SIGTERM (someone asked it to end)"),
    ("SIGSEGV", "was killed by SIGSEGV (a crash in native code)"),
    ("exec", "was killed by the engine because it had closed its control channel"),
]


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize(("how", "reason"), ENDS)
async def test_every_end_is_reported(
    adapter: LocalAdapter, recorder: Recorder, how: str, reason: str, ready: bool
) -> None:
    await adapter.start_worker(spec("w", _workers.end, how, ready))
    assert await recorder.exit("w") == reason
    failures = recorder.said("w", StartFailed)
    assert bool(failures) == (not ready and (how in ("raise", "interrupt") or "sys.exit" in how))
    if ready and how in ("raise", "interrupt"):
        assert any("the worker ends because of an error" in text for _, text in recorder.lines("w"))
    if how == "SIGSEGV":
        assert any("Segmentation fault" in text for _, text in recorder.lines("w"))


async def test_a_failed_start_brings_the_error(adapter: LocalAdapter, recorder: Recorder) -> None:
    await adapter.start_worker(spec("w1", _workers.end, "raise", False))
    await adapter.start_worker(spec("w2", _workers.end, "sys.exit(3)", False))
    await adapter.start_worker(WorkerSpec("w3", "w3", "no_such_module:main", b""))
    for worker_id in ("w1", "w2", "w3"):
        await recorder.exit(worker_id)
    errors = [unpack_exception(recorder.said(name, StartFailed)[0].error) for name in ("w1", "w2", "w3")]
    assert [type(error) for error in errors] == [LookupError, BackendStartError, ModuleNotFoundError]
    assert isinstance(errors[0].__cause__, RemoteTraceback)
    assert "_raise" in errors[0].__cause__.text
    assert "SystemExit: 3" in str(errors[1])


async def test_killing(adapter: LocalAdapter, recorder: Recorder) -> None:
    await adapter.start_worker(spec("idle", _workers.sleep))
    await adapter.start_worker(spec("deaf", _workers.ignore_everything))
    pids = [await recorder.answer(name) for name in ("idle", "deaf")]
    for name in ("idle", "deaf"):
        adapter.kill_worker(name)
        assert await recorder.exit(name) == "was killed by the engine"
    assert not any(map(is_running, pids))
    await adapter.start_worker(spec("young", _workers.sleep))
    adapter.kill_worker("young")  # most likely before it was forked
    assert await recorder.exit("young") == "was killed by the engine"


async def test_the_last_words_come_before_the_exit(adapter: LocalAdapter, recorder: Recorder) -> None:
    await adapter.start_worker(spec("w", _workers.last_words))
    await recorder.exit("w")
    assert isinstance(recorder.events[-1][1], WorkerExit)
    assert recorder.lines("w") == [
        ("stdout", "printed"),
        ("mine", "logged"),
        ("stdout", "without a newline"),
        ("stderr", "an error"),
    ] or sorted(recorder.lines("w")) == [
        ("mine", "logged"),
        ("stderr", "an error"),
        ("stdout", "printed"),
        ("stdout", "without a newline"),
    ]
    assert await recorder.until(lambda: ("answer", "told") in recorder.said("w"))


async def test_atexit_functions_run_at_a_regular_end(adapter: LocalAdapter, recorder: Recorder) -> None:
    await adapter.start_worker(spec("w", _workers.register_atexit))
    assert await recorder.answer("w") == "atexit"
    assert await recorder.exit("w") == "exited"


async def test_a_worker_says_which_threads_it_waits_for(
    adapter: LocalAdapter, recorder: Recorder, tmp_path: Path
) -> None:
    leave = tmp_path / "leave"
    await adapter.start_worker(spec("w", _workers.leave_a_thread, str(leave)))
    await recorder.until(lambda: recorder.lines("w"))
    assert recorder.lines("w") == [("engine.local", "the worker waits for threads that are no daemons: lasting")]
    leave.touch()
    assert await recorder.exit("w") == "exited"


async def test_a_child_that_user_code_forked_delays_nothing(
    adapter: LocalAdapter, recorder: Recorder, tmp_path: Path
) -> None:
    leave = tmp_path / "leave"
    await adapter.start_worker(spec("w", _workers.fork_a_child, str(leave)))
    child = await recorder.answer("w")
    try:
        assert "SIGKILL" in await recorder.exit("w")
        assert ("stderr", "mine: the child logs") in recorder.lines("w")
        assert not any("has no say" in text for _, text in recorder.lines("w"))
        assert is_running(child), "it is in a session of its own"
    finally:
        leave.touch()
        await within(PATIENCE_S, lambda: not is_running(child))


# -- logs ----------------------------------------------------------------------------------------------------------


async def test_what_a_worker_writes_arrives_as_lines(adapter: LocalAdapter, recorder: Recorder) -> None:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    try:
        await adapter.start_worker(spec("w", _workers.speak))
        await recorder.exit("w")
    finally:
        root.setLevel(level)
    lines = recorder.said("w", LogLine)
    assert LogLine(logging.INFO, "mine", "3 things") in lines
    (failed,) = [line for line in lines if line.text.startswith("it failed")]
    assert failed.level == logging.ERROR
    assert "LookupError: no such thing" in failed.text
    assert LogLine(logging.INFO, "stdout", "printed") in lines
    assert LogLine(logging.WARNING, "stderr", "printed to stderr") in lines
    assert LogLine(logging.INFO, "stdout", "�ä") in lines
    assert LogLine(logging.INFO, "stdout", "by C") in lines
    assert sum(line.text.count("x") for line in lines if set(line.text) == {"x"}) == 100_000
    assert any("--- Logging error ---" in line.text for line in lines)
    assert not any("too quiet" in line.text for line in lines)


async def test_of_a_flood_of_output_all_is_delivered_in_order_or_counted(
    adapter: LocalAdapter, recorder: Recorder
) -> None:
    """What this process is too busy to read in time is dropped (`tests/test_printing.py`)."""
    await adapter.start_worker(spec("w", _workers.flood, 30_000))
    await recorder.exit("w")
    next_number = 0
    for text in (text for logger, text in recorder.lines("w") if logger == "stdout"):
        dropped = re.match(r"\[(\d+) lines were dropped here", text)
        if dropped is not None:
            next_number += int(dropped[1])
        else:
            assert text == f"{next_number} {'.' * 100}"
            next_number += 1
    assert 0 < next_number <= 30_000


# -- what a worker finds -------------------------------------------------------------------------------------------


async def test_the_callers_directories_environment_and_arguments_hold(
    adapter: LocalAdapter, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adapter.start_worker(spec("first", _workers.look, ["os.getcwd()"]))
    assert await recorder.answer("first") == {"os.getcwd()": os.getcwd()}
    (tmp_path / "fresh_module.py").write_text("VALUE = 42")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLOUR", "red")
    monkeypatch.setattr(sys, "argv", ["prog", "--flag"])
    names = ["os.getcwd()", "sys.path", "os.environ['COLOUR']", "__import__('fresh_module').VALUE", "sys.argv"]
    await adapter.start_worker(spec("second", _workers.look, names))
    assert list((await recorder.answer("second")).values()) == [str(tmp_path), sys.path, "red", 42, ["prog", "--flag"]]
    monkeypatch.delenv("COLOUR")
    await adapter.start_worker(spec("third", _workers.look, ["os.environ.get('COLOUR')", "sys.modules['__main__']"]))
    answer = await recorder.until(lambda: recorder.said("third", WorkerExit))
    assert answer


async def test_a_working_directory_that_is_gone_is_an_error_of_the_worker(
    adapter: LocalAdapter, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    await adapter.start_worker(spec("w", _workers.look, ["os.getcwd()"]))
    assert await recorder.answer("w") == {"os.getcwd()": "/"}


async def test_a_working_directory_that_vanishes_on_the_way(
    adapter: LocalAdapter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_module, "_working_directory", lambda: "/no/such/directory")
    await adapter.start_worker(spec("w", _workers.answer, 1))
    await recorder.exit("w")
    (failed,) = recorder.said("w", StartFailed)
    assert "/no/such/directory" in str(unpack_exception(failed.error))


async def test_the_core_is_found_even_if_the_caller_lost_it(
    adapter: LocalAdapter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = [Path(str(module.__file__)).parent.parent for module in (engine, engine_local)]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) not in homes])
    next(iter(adapter._launchers)).kill()
    await within(PATIENCE_S, lambda: not adapter._launchers)
    await adapter.start_worker(spec("w", _workers.answer, 1))
    assert await recorder.answer("w") == 1


async def test_streams_signals_and_modules_of_a_worker(adapter: LocalAdapter, recorder: Recorder) -> None:
    names = [
        "sys.stdin.read()",
        "signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler)",
        "signal.getsignal(signal.SIGTERM) == signal.SIG_DFL",
        "signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL",
        "hasattr(sys.modules['__main__'], '__file__')",
        "'multiprocessing' in sys.modules and 'coverage' not in sys.modules",
        "[t.name for t in threading.enumerate()]",
        "open('/proc/self/comm').read().strip()",
        "__import__('gc').isenabled()",
        "os.getpgrp() == os.getpid()",
        # whether what it starts ignores SIGINT, too, as a mask
        "int(__import__('subprocess').check_output(['grep', 'SigIgn', '/proc/self/status']).split()[1], 16) & 2",
    ]
    await adapter.start_worker(spec("w", _workers.look, names, name="replica.a long name.7"))
    found = list((await recorder.answer("w")).values())
    assert found == [
        "",
        False,
        True,
        True,
        False,
        False,
        ["MainThread", "engine-control"],
        "a long name.7",
        True,
        True,
        0,
    ]


async def test_workers_inherit_no_descriptors_of_others(adapter: LocalAdapter, recorder: Recorder) -> None:
    for name in ("w1", "w2", "w3"):
        await adapter.start_worker(spec(name, _workers.list_descriptors))
    for name in ("w1", "w2", "w3"):
        found = await recorder.answer(name)
        assert len(found) == 4, found  # three streams and the control socket


async def test_workers_draw_different_numbers(recorder: Recorder) -> None:
    adapter = LocalAdapter(preload=["random", "numpy.random"])
    await adapter.start("test", recorder)
    try:
        for name in ("w1", "w2"):
            await adapter.start_worker(spec(name, _workers.draw))
        drawn = [*(await recorder.answer("w1")), *(await recorder.answer("w2"))]
        assert len(set(drawn)) == 4
        await recorder.exit("w1")
    finally:
        await adapter.stop()


THREADS = "[os.environ.get(n) for n in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')]"


async def test_processors_become_thread_counts(
    adapter: LocalAdapter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    cases: dict[str, tuple[Resources, list[str | None]]] = {
        "default": (Resources(), [None, None, "7"]),
        "two": (Resources(num_cpus=2), ["2", "2", "7"]),
        "half": (Resources(num_cpus=0.5), ["1", "1", "7"]),
        "own": (Resources(num_cpus=2, env_vars={"OMP_NUM_THREADS": "5"}), ["5", "2", "7"]),
    }
    for name, (resources, _) in cases.items():
        await adapter.start_worker(spec(name, _workers.look, [THREADS], resources=resources))
    for name, (_, expected) in cases.items():
        assert await recorder.answer(name) == {THREADS: expected}


async def test_a_preloaded_numpy_is_limited_too(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    adapter = LocalAdapter(preload=["numpy"])
    await adapter.start("test", recorder)
    try:
        await adapter.start_worker(spec("w", _workers.look, [THREADS], resources=Resources(num_cpus=1)))
        assert (await recorder.answer("w"))[THREADS][0] == "1"
        await recorder.exit("w")
    finally:
        await adapter.stop()


async def test_a_preloaded_torch_is_limited_and_seeded_anew(
    recorder: Recorder, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    write_module(modules, "torch", STAND_IN_FOR_TORCH)
    adapter = LocalAdapter(preload=["torch"])
    await adapter.start("test", recorder)
    try:
        names = ["sys.modules['torch'].calls"]
        await adapter.start_worker(spec("w", _workers.look, names, resources=Resources(num_cpus=3)))
        assert await recorder.answer("w") == {names[0]: ["seed", 3]}
        await recorder.exit("w")
    finally:
        await adapter.stop()


STAND_IN_FOR_TORCH = """
calls = []
set_num_threads = calls.append
def seed():
    calls.append("seed")
"""


async def test_gpus_are_handed_out_and_taken_back(recorder: Recorder) -> None:
    adapter = LocalAdapter(gpus=[0, 1, "GPU-2"])
    await adapter.start("test", recorder)
    try:
        await adapter.start_worker(spec("two", _workers.sleep, resources=Resources(num_gpus=2)))
        visible = "os.environ['CUDA_VISIBLE_DEVICES']"
        for name in ("half", "other half"):
            await adapter.start_worker(spec(name, _workers.look, [visible], resources=Resources(num_gpus=0.5)))
        for name in ("half", "other half"):
            assert await recorder.answer(name) == {visible: "GPU-2"}
            await recorder.exit(name)
        with pytest.raises(ResourcesUnavailable, match=r"num_gpus=2 .* of 3 GPUs there is free: 0: 0, 1: 0, GPU-2: 1"):
            await adapter.start_worker(spec("more", _workers.sleep, resources=Resources(num_gpus=2)))
        adapter.kill_worker("two")
        await recorder.exit("two")
        await adapter.start_worker(spec("three", _workers.look, [visible], resources=Resources(num_gpus=3)))
        assert await recorder.answer("three") == {visible: "0,1,GPU-2"}
    finally:
        await adapter.stop()


async def test_what_only_a_cluster_has_is_mentioned_once(
    adapter: LocalAdapter, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine.local")
    for name in ("w1", "w2"):
        resources = Resources(other={"scheduling_strategy": "SPREAD", "memory": 1})
        await adapter.start_worker(spec(name, _workers.answer, 1, resources=resources))
        await recorder.exit(name)
    assert [record.message for record in caplog.records if record.name == "engine.local"] == [
        "ray_actor_options: only a cluster has a use for memory, scheduling_strategy; ignored here"
    ]


# -- preloading ----------------------------------------------------------------------------------------------------


async def test_modules_are_imported_once_and_shared(recorder: Recorder, modules: Path) -> None:
    write_module(modules, "heavy", "import os\nIMPORTED_BY = os.getpid()")
    write_module(modules, "theirs", "import os\nIMPORTED_BY = os.getpid()")
    adapter = LocalAdapter(preload=["heavy"])
    await adapter.start("test", recorder)
    try:
        await adapter.start_worker(spec("w1", _workers.imported_by, "heavy"))
        await adapter.start_worker(spec("w2", _workers.imported_by, "theirs", preload=("theirs",)))
        await adapter.start_worker(spec("w3", _workers.imported_by, "theirs"))
        for name in ("w1", "w2", "w3"):
            assert await recorder.answer(name) == (False, None)
        # A module may read its environment: one with variables of its own gets modules of its own.
        own = Resources(env_vars={"COLOUR": "blue"})
        await adapter.start_worker(spec("w4", _workers.imported_by, "theirs", preload=("theirs",), resources=own))
        assert await recorder.answer("w4") == (True, "blue")
        await adapter.start_worker(spec("w5", _workers.imported_by, "heavy", resources=own))
        assert await recorder.answer("w5") == (False, "blue")
    finally:
        await adapter.stop()


async def test_a_module_that_cannot_be_preloaded_for_a_backend_is_left_to_the_worker(
    adapter: LocalAdapter, recorder: Recorder, modules: Path
) -> None:
    write_module(modules, "broken", "import sys\nsys.exit(5)")
    await adapter.start_worker(spec("w", _workers.imported_by, "broken", preload=("broken", "no_such_module")))
    await recorder.exit("w")
    (failed,) = recorder.said("w", StartFailed)
    assert "SystemExit: 5" in str(unpack_exception(failed.error))
    await adapter.start_worker(spec("next", _workers.answer, 1))
    assert await recorder.answer("next") == 1


BAD_PRELOADS = {
    "raises": ("raise ValueError('of no use')", "module 'bad' cannot be imported: ValueError: of no use"),
    "exits": ("import sys; sys.exit(3)", "module 'bad' cannot be imported: SystemExit: 3"),
    "dies": ("import os; os._exit(3)", "the fork server exited with code 3 while it was importing"),
}


@pytest.mark.parametrize("how", BAD_PRELOADS)
async def test_a_bad_preload_fails_the_start(recorder: Recorder, modules: Path, how: str) -> None:
    text, message = BAD_PRELOADS[how]
    write_module(modules, "bad", text)
    before = Footprint.now()
    adapter = LocalAdapter(preload=["bad"])
    with pytest.raises(InvalidArgument, match=message):
        await adapter.start("test", recorder)
    before.check_unchanged()
    with pytest.raises(EngineClosed):
        await adapter.start_worker(spec("w", _workers.answer, 1))


async def start_stuck(adapter: LocalAdapter, modules: Path) -> Path:
    """Order a worker whose fork server imports for ever; returns the file that tells that it has begun to."""
    mark = modules / "importing"
    write_module(modules, "endless", f"open({str(mark)!r}, 'w')\nimport time\ntime.sleep(1000)")
    await adapter.start_worker(spec("stuck", _workers.answer, 1, preload=("endless",)))
    return mark


async def test_an_import_that_never_ends_does_not_stop_the_others(
    adapter: LocalAdapter, recorder: Recorder, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "older"):
        await adapter.start_worker(spec(name, _workers.sleep))
    pids = [await recorder.answer(name) for name in ("old", "older")]
    assert f"pid={pids[0]}" in repr(adapter._workers["old"])
    monkeypatch.setattr(watched, "_STUCK_AFTER_S", -1.0)
    mark = await start_stuck(adapter, modules)
    await within(PATIENCE_S, mark.exists)
    adapter.kill_worker("stuck")
    assert "took too long" in await recorder.exit("stuck")
    await adapter.start_worker(spec("next", _workers.answer, 1))
    assert await recorder.answer("next") == 1
    # Those that the stuck one forked live on, and their ends are known, if not the causes.
    monkeypatch.setattr(watched, "_EXIT_PATIENCE_S", 0.01)
    assert not recorder.said("old", WorkerExit)
    os.kill(pids[0], signal.SIGKILL)
    assert "is gone" in await recorder.exit("old")
    adapter.kill_worker("older")
    assert await recorder.exit("older")
    await within(2.0, lambda: not any(map(is_running, pids)))


async def test_whoever_is_killed_early_in_an_import_that_never_ends_is_given_up_later(
    adapter: LocalAdapter, recorder: Recorder, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adapter.start_worker(spec("old", _workers.sleep))
    pid = await recorder.answer("old")
    monkeypatch.setattr(watched, "_STUCK_AFTER_S", 0.5)
    monkeypatch.setattr(watched, "_EXIT_PATIENCE_S", 0.01)
    mark = await start_stuck(adapter, modules)
    adapter.kill_worker("stuck")
    await within(PATIENCE_S, mark.exists)
    os.kill(pid, signal.SIGKILL)
    await within(PATIENCE_S, lambda: adapter._workers["old"].stage is Stage.CUT_OFF)
    assert "took too long" in await recorder.exit("stuck")
    assert "is gone" in await recorder.exit("old")  # nobody else would tell, ever


async def test_whoever_is_killed_while_its_fork_server_is_stuck_ends_when_that_is_known(
    adapter: LocalAdapter, recorder: Recorder, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adapter.start_worker(spec("old", _workers.sleep))
    pid = await recorder.answer("old")
    monkeypatch.setattr(watched, "_STUCK_AFTER_S", 0.5)
    monkeypatch.setattr(watched, "_EXIT_PATIENCE_S", 0.01)
    mark = await start_stuck(adapter, modules)
    await within(PATIENCE_S, mark.exists)
    adapter.kill_worker("old")  # which its fork server will never read
    adapter.kill_worker("stuck")
    assert "took too long" in await recorder.exit("stuck")
    assert "is gone" in await recorder.exit("old")  # how it ended only the fork server could tell
    await within(PATIENCE_S, lambda: not is_running(pid))


async def test_whoever_is_killed_during_an_import_need_not_wait_for_its_end(
    adapter: LocalAdapter, recorder: Recorder, modules: Path
) -> None:
    await adapter.start_worker(spec("old", _workers.sleep))
    pid = await recorder.answer("old")
    os.kill(pid, signal.SIGSTOP)
    mark = await start_stuck(adapter, modules)
    await within(PATIENCE_S, mark.exists)
    adapter.kill_worker("old")
    await within(PATIENCE_S, lambda: not is_running(pid))
    (it,) = adapter._launchers
    assert not it.retired


@pytest.mark.parametrize("preload", ["torch", [1], [""]])
def test_preload_must_be_module_names(preload: Any) -> None:
    with pytest.raises(InvalidArgument, match="preload must be a list of module names"):
        LocalAdapter(preload=preload)


@pytest.mark.parametrize("gpus", ["0", [0, "0"]])
def test_gpus_must_be_a_list_of_different_devices(gpus: Any) -> None:
    with pytest.raises(InvalidArgument, match="gpus"):
        LocalAdapter(gpus=gpus)


SABOTAGE = {
    "the server": (
        "import engine_local.forkserver as it\ndef fail(self): raise RuntimeError('sabotage')\n"
        "it.ForkServer._read = fail",
        "ended with its fork server, which exited with code 1",
    ),
    "forking": (
        "import os\ndef fork(): raise BlockingIOError(11, 'Resource temporarily unavailable')\nos.fork = fork",
        "could not be forked (Resource temporarily unavailable)",
    ),
    "the worker": (
        "import engine_local.worker as it\ndef fail(*_): raise RuntimeError('sabotage')\nit.run_worker = fail",
        "exited with code 1",
    ),
}


@pytest.mark.parametrize("what", SABOTAGE)
async def test_what_breaks_between_order_and_worker_is_reported(
    recorder: Recorder, modules: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    text, reason = SABOTAGE[what]
    write_module(modules, "saboteur", text)
    adapter = LocalAdapter(preload=["saboteur"])
    await adapter.start("test", recorder)
    try:
        await adapter.start_worker(spec("w", _workers.answer, 1))
        assert await recorder.exit("w") == reason
        if what == "the server":
            assert "fork server: RuntimeError: sabotage" in caplog.messages
    finally:
        await adapter.stop()


# -- public addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
async def test_workers_share_a_public_address(adapter: LocalAdapter, recorder: Recorder, host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    listen = Listen(host, 0)
    with pytest.raises(KeyError):
        adapter.bound(listen, "local")
    for name in ("w1", "w2"):
        await adapter.start_worker(spec(name, _workers.take_a_connection, listen=listen))
        await recorder.address(name)
    bound = adapter.bound(listen, "local")
    assert (bound.host, bound.port > 0) == (host, True)
    greeted = set()
    for _ in range(2):
        with socket.create_connection((host, bound.port), PATIENCE_S) as connection:
            greeted.add(connection.recv(100).decode())
    assert greeted == {"w1", "w2"}
    for name in greeted:
        assert await recorder.exit(name) == "exited"
    with socket.create_connection((host, bound.port), PATIENCE_S):  # it is kept for the next worker
        pass
    adapter.close_ports()
    adapter.close_ports()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, bound.port), PATIENCE_S)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_addresses_that_cannot_be_bound(adapter: LocalAdapter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=rf"host '127.0.0.1', port {port} \(Address already in use\); choose"):
            await adapter.start_worker(spec("w", _workers.sleep, listen=Listen("127.0.0.1", port)))
    for host in ("192.0.2.1", "no.such.host.invalid", "x" * 300):
        with pytest.raises(InvalidArgument, match=host):
            await adapter.start_worker(spec("w", _workers.sleep, listen=Listen(host, 0)))
    with pytest.raises(InvalidArgument, match="node_id must be 'local'"):
        await adapter.start_worker(spec("w", _workers.sleep, node_id="elsewhere"))
    assert [node.node_id for node in adapter.nodes()] == ["local"]


# -- fork servers --------------------------------------------------------------------------------------------------


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_the_death_of_the_fork_server_is_survived(adapter: LocalAdapter, recorder: Recorder) -> None:
    for name in ("w1", "w2"):
        await adapter.start_worker(spec(name, _workers.ignore_everything))
    pids = [await recorder.answer(name) for name in ("w1", "w2")]
    server = parent_of(pids[0])
    os.kill(server, signal.SIGTERM)  # as service managers do to every process: for the engine to handle
    os.kill(server, signal.SIGINT)
    os.kill(server, signal.SIGKILL)
    for name in ("w1", "w2"):
        assert await recorder.exit(name) == (
            "ended with its fork server, which was killed by SIGKILL (out of memory, or someone killed it)"
        )
    await within(1.0, lambda: not any(map(is_running, pids)))
    await adapter.start_worker(spec("w3", _workers.answer, "alive"))
    assert await recorder.answer("w3") == "alive"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at fork servers as often as a test can wait for. Asked for before the adapter."""
    monkeypatch.setattr(vitals, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(vitals, "STOPPED_S", 0.1)


async def test_a_stopped_fork_server_is_replaced_and_its_workers_go_on(
    quick: None, adapter: LocalAdapter, recorder: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await adapter.start_worker(WorkerSpec("old", "old", "_workers:echo", b""))
    await recorder.address("old")
    await adapter.start_worker(spec("older", _workers.sleep))
    pid = await recorder.answer("older")
    server = parent_of(pid)
    os.kill(server, signal.SIGSTOP)
    mark = tmp_path / "marks"
    for number in range(3):
        await adapter.start_worker(spec(f"w{number}", _workers.leave_a_mark, str(mark)))
    for number in range(3):
        assert parent_of(await recorder.answer(f"w{number}")) not in (server, 0)
    assert f"a fork server (process {server}) is stopped; starting another one" in caplog.messages
    adapter.tell("old", Ping(1))
    assert await recorder.until(lambda: recorder.said("old", Pong))
    assert is_running(pid)
    adapter.kill_worker("older")
    assert await recorder.exit("older") == "is gone; its fork server, which could say why, is stopped"
    # It goes on some day, and reads its orders: nobody waits any more for what they would make.
    os.kill(server, signal.SIGCONT)
    adapter.kill_worker("old")
    assert await recorder.exit("old")
    await within(PATIENCE_S, lambda: not is_running(server))
    assert mark.read_text() == "x" * 3


async def test_a_worker_whose_fork_server_was_stopped_in_the_fork_has_an_end(
    quick: None,
    adapter: LocalAdapter,
    recorder: Recorder,
    modules: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The fork server still has the worker's end of the control channel then, which thus never ends."""
    monkeypatch.setattr(watched, "_KILL_PATIENCE_S", 0.01)
    monkeypatch.setattr(watched, "_EXIT_PATIENCE_S", 0.01)
    stopping = "import os, signal\nos.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGSTOP))"
    write_module(modules, "stopping", stopping)
    monkeypatch.setattr(vitals, "STOPPED_S", PATIENCE_S)  # else another fork server may make it before it has begun
    await adapter.start_worker(spec("held", _workers.start_and_sleep, preload=("stopping",)))
    pid = await recorder.answer("held")
    monkeypatch.setattr(vitals, "STOPPED_S", 0.1)
    await within(PATIENCE_S, lambda: "is stopped; starting another one" in caplog.text)
    os.kill(pid, signal.SIGKILL)
    await within(PATIENCE_S, lambda: vitals.vitals_of(pid).ended)
    adapter.kill_worker("held")
    assert await recorder.exit("held") == "is gone; its fork server, which could say why, is stopped"


async def test_a_fork_server_that_is_continued_in_time_is_kept(
    quick: None, adapter: LocalAdapter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitals, "STOPPED_S", PATIENCE_S)
    await adapter.start_worker(spec("old", _workers.sleep))
    server = parent_of(await recorder.answer("old"))
    os.kill(server, signal.SIGSTOP)
    await adapter.start_worker(spec("next", _workers.sleep))
    (it,) = adapter._launchers
    await within(PATIENCE_S, lambda: it._stops.stopped_s)
    os.kill(server, signal.SIGCONT)
    assert parent_of(await recorder.answer("next")) == server


def test_a_replica_is_replaced_although_its_fork_server_is_stopped_too(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "PERIOD_S", 0.02)
    monkeypatch.setattr(pulse, "STOPPED_S", 0.1)
    with Engine(backend="local", http_options={"location": None}) as engine:
        for tag in ("b", "other"):
            engine.create_backend(tag, lambda request: os.getpid())
            engine.create_endpoint(tag, backend=tag)
        handle, other = engine.get_handle("b"), engine.get_handle("other")
        pid, other_pid = handle.call(), other.call()
        os.kill(parent_of(pid), signal.SIGSTOP)
        os.kill(pid, signal.SIGSTOP)
        with contextlib.suppress(engine_errors.ReplicaDied):  # nobody knows whether it had begun the call
            assert handle.options(timeout_s=PATIENCE_S).call() != pid
        assert handle.options(timeout_s=PATIENCE_S).call() != pid
        assert other.call() == other_pid
        assert not is_running(pid)


async def test_what_a_fork_server_that_was_killed_had_to_do_is_done_by_the_next(
    adapter: LocalAdapter, recorder: Recorder
) -> None:
    await adapter.start_worker(spec("old", _workers.sleep))
    server = parent_of(await recorder.answer("old"))
    os.kill(server, signal.SIGSTOP)
    for name in ("w1", "w2"):
        await adapter.start_worker(spec(name, _workers.answer, name))
    os.kill(server, signal.SIGKILL)
    for name in ("w1", "w2"):
        assert await recorder.answer(name) == name
        assert await recorder.exit(name) == "exited"
    assert "ended with its fork server, which was killed by SIGKILL" in await recorder.exit("old")


async def test_a_module_that_ends_the_fork_server_fails_the_worker_that_needs_it(
    adapter: LocalAdapter, recorder: Recorder, modules: Path
) -> None:
    write_module(modules, "deadly", "import os\nos._exit(3)")
    await adapter.start_worker(spec("first", _workers.answer, 1))
    assert await recorder.answer("first") == 1
    await adapter.start_worker(spec("guilty", _workers.answer, 1, preload=("deadly",)))
    await adapter.start_worker(spec("innocent", _workers.answer, 1))
    assert await recorder.exit("guilty") == "ended with its fork server, which exited with code 3"
    assert await recorder.answer("innocent") == 1


async def test_signals_to_the_group_do_not_reach_the_fork_server(adapter: LocalAdapter, recorder: Recorder) -> None:
    await adapter.start_worker(spec("w1", _workers.sleep))
    pid = await recorder.answer("w1")
    server = parent_of(pid)
    os.kill(server, signal.SIGTERM)
    os.kill(server, signal.SIGINT)
    await adapter.start_worker(spec("w2", _workers.answer, "alive"))
    assert await recorder.answer("w2") == "alive"
    assert os.getpgid(server) != os.getpgid(0)


async def test_an_interpreter_that_cannot_be_started(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Footprint.now()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(InvalidArgument, match="cannot start the Python interpreter '/no/such/python'"):
        await LocalAdapter().start("test", recorder)
    before.check_unchanged()


async def test_a_lack_of_descriptors_is_told_and_leaks_none(adapter: LocalAdapter, recorder: Recorder) -> None:
    await adapter.start_worker(spec("first", _workers.sleep))
    await recorder.answer("first")
    before = Footprint.now()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(1, 6):
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + spare, hard))
        try:
            with pytest.raises(ResourcesUnavailable, match=r"no file descriptors left \(RLIMIT_NOFILE=\d+\)"):
                # however many holes there are below, three hundred workers fill them
                for number in range(300):
                    await adapter.start_worker(spec(f"{spare}-{number}", _workers.sleep))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for worker_id in list(adapter._workers):
            if worker_id != "first":
                adapter.kill_worker(worker_id)
                await recorder.exit(worker_id)
    before.check_unchanged()


# -- the adapter's own life ----------------------------------------------------------------------------------------


async def test_one_adapter_serves_one_engine_at_a_time(adapter: LocalAdapter, recorder: Recorder) -> None:
    with pytest.raises(InvalidArgument, match="already serves an engine"):
        await adapter.start("another", recorder)
    await adapter.start_worker(spec("w", _workers.sleep))
    with pytest.raises(InvalidArgument, match="there is a worker 'w' already"):
        await adapter.start_worker(spec("w", _workers.sleep))
    await adapter.stop()
    await adapter.stop()
    assert await recorder.exit("w") == "was killed by the engine"
    with pytest.raises(EngineClosed):
        await adapter.start_worker(spec("w", _workers.sleep))
    with pytest.raises(KeyError):
        adapter.bound(Listen("127.0.0.1", 0), "local")
    await adapter.start("again", recorder)
    await adapter.start_worker(spec("w2", _workers.answer, 1))
    assert await recorder.answer("w2") == 1


async def test_stopping_waits_for_nobody(adapter: LocalAdapter, recorder: Recorder) -> None:
    for name in ("w1", "w2"):
        await adapter.start_worker(spec(name, _workers.ignore_everything))
    pids = [await recorder.answer(name) for name in ("w1", "w2")]
    started = asyncio.get_running_loop().time()
    await adapter.stop()
    assert asyncio.get_running_loop().time() - started < 1.5
    assert not any(map(is_running, pids))
    assert len([event for _, event in recorder.events if isinstance(event, WorkerExit)]) == 2


async def test_stopping_in_the_middle_of_a_start(recorder: Recorder, modules: Path) -> None:
    before = Footprint.now()
    write_module(modules, "slow", "import time\ntime.sleep(1000)")
    adapter = LocalAdapter()
    await adapter.start("test", recorder)
    await adapter.start_worker(spec("w", _workers.sleep, preload=("slow",)))
    await adapter.stop()
    assert await recorder.exit("w")
    before.check_unchanged()


async def test_a_start_that_fails_leaves_nothing(
    recorder: Recorder, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Footprint.now()
    monkeypatch.setenv("TMPDIR", str(short_path))

    def refuse(path: str) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(adapter_module, "listen_unix", refuse)
        with pytest.raises(ResourcesUnavailable, match="cannot start the engine: no file descriptors left"):
            await LocalAdapter().start("test", recorder)
    assert os.listdir(short_path) == []
    (short_path / f"engine-{os.geteuid()}").touch()
    with pytest.raises(InvalidArgument, match="must be a directory"):
        await LocalAdapter(preload=["this"]).start("test", recorder)
    before.check_unchanged()


async def test_a_fork_of_the_engine_stops_nothing(adapter: LocalAdapter, recorder: Recorder) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            adapter.stop().send(None)
        except StopIteration:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0  # noqa: ASYNC222 - it ends at once
    await adapter.start_worker(spec("w", _workers.answer, "alive"))
    assert await recorder.answer("w") == "alive"


async def test_cycles_leave_nothing() -> None:
    before: Footprint | None = None
    for _ in range(20):
        recorder = Recorder()
        adapter = LocalAdapter()
        await adapter.start("test", recorder)
        await adapter.start_worker(spec("w", _workers.answer, 1, listen=Listen("127.0.0.1", 0)))
        await recorder.answer("w")
        await adapter.stop()
        adapter.close()
        if before is None:
            before = Footprint.now()
    assert before is not None
    before.check_unchanged()


# -- orphans, and processes without a file -------------------------------------------------------------------------

APPLICATION = """
import asyncio, os, pickle, sys
import _workers
from engine.seam.worker import WorkerSpec
import engine_local
from engine_local import LocalAdapter

answers = []
both = asyncio.Event()

class Events:
    def worker_said(self, worker_id, body):
        print(worker_id, body, flush=True)
        answers.append(body)
        if len(answers) == 2:
            both.set()
    def worker_exited(self, exit):
        print(exit, flush=True)
    def peer_connected(self, channel):
        raise NotImplementedError

async def main():
    adapter = LocalAdapter(preload=sys.argv[1:2])
    print("fork server", flush=True)
    await adapter.start("test", Events())
    for name in ("ignore_everything", "sleep"):
        payload = pickle.dumps((getattr(_workers, name),))
        await adapter.start_worker(WorkerSpec(name, name, "_workers:run", payload))
    await both.wait()
    if "stay" in sys.argv:
        await asyncio.sleep(1000)
    await adapter.stop()

asyncio.run(main())
"""


def python_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("through", ["-c", "-"])
def test_programs_need_no_main_guard(through: str) -> None:
    program = 'import os\nos.environ["x"] = "y"\n' + APPLICATION
    if through == "-c":
        output = run_python("-c", program, env=python_path())
    else:
        output = run_python("-", stdin=program, env=python_path())
    assert output.count("answer") == 2


async def test_workers_die_with_a_killed_engine(short_path: Path) -> None:
    environ = {**python_path(), "TMPDIR": str(short_path)}
    application = await asyncio.create_subprocess_exec(
        sys.executable, "-c", APPLICATION, "os", "stay", env=environ, stdout=asyncio.subprocess.PIPE
    )
    assert application.stdout is not None
    seen = b""
    while seen.count(b"answer") < 2:
        seen += await application.stdout.readline()
    family = descendants(application.pid)
    assert len(family) == 3
    application.kill()
    await application.wait()
    await within(2.0, lambda: not any(map(is_running, family)))
    # What it left on disk goes with the next start.
    (left,) = (short_path / f"engine-{os.geteuid()}").iterdir()
    assert list(left.glob("*.sock"))
    run_python("-c", APPLICATION, env=environ)
    assert not left.exists()
    assert not left.parent.exists()


async def test_a_fork_server_that_imports_dies_with_a_killed_engine(tmp_path: Path) -> None:
    mark = tmp_path / "importing"
    (tmp_path / "endless.py").write_text(f"open({str(mark)!r}, 'w')\nimport ctypes\nctypes.PyDLL(None).pause()")
    environ = python_path()
    environ["PYTHONPATH"] += os.pathsep + str(tmp_path)
    application = await asyncio.create_subprocess_exec(
        sys.executable, "-c", APPLICATION, "endless", "stay", env=environ, stdout=asyncio.subprocess.PIPE
    )
    family = await within(PATIENCE_S, lambda: descendants(application.pid))
    await within(PATIENCE_S, (tmp_path / "importing").exists)
    application.kill()
    await application.wait()
    await within(2.0, lambda: not any(map(is_running, family)))


async def within(timeout_s: float, condition: Callable[[], Any]) -> Any:
    """As `engine.testing.instruments.eventually`, but leaves the loop running."""
    with anyio.fail_after(timeout_s):
        while True:
            if found := condition():
                return found
            await asyncio.sleep(0.002)
