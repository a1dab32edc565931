"""The parts of the local adapter that need no processes: directories, GPUs, environment variables, lives, phrases."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import engine_local
from engine.errors import InvalidArgument, ResourcesUnavailable
from engine.seam.resources import Resources
from engine.testing.instruments import PATIENCE_S
from engine_local import connector, directory, watched
from engine_local.directory import EngineDirectory, temporary_directory
from engine_local.environment import extra_environ, thread_limit
from engine_local.gpus import GpuTable, visible_devices
from engine_local.life import Stage
from engine_local.orders import Exited, Forked, ForkFailed, Frames, Kill, pack
from engine_local.output import LineReader
from engine_local.process import describe_exit, die_with_parent, short_name

# -- the engine's directory ----------------------------------------------------------------------------------------


@pytest.fixture
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


def make(temporary: Path) -> EngineDirectory:
    return asyncio.run(EngineDirectory.create(temporary))


def base_of(temporary: Path) -> Path:
    return temporary / f"engine-{os.geteuid()}"


def test_a_directory_is_private_and_goes_with_its_engine(temporary: Path) -> None:
    one, other = make(temporary), make(temporary)
    assert one.path.parent == other.path.parent == base_of(temporary)
    for path in (one.path, one.path.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    (one.path / "1.sock").touch()
    one.remove()
    one.remove()
    assert not one.path.exists()
    assert other.path.exists()  # somebody else's, alive
    other.remove()
    assert list(temporary.iterdir()) == []


def test_directories_of_the_dead_are_swept(temporary: Path) -> None:
    base = base_of(temporary)
    base.mkdir(0o700)
    (base / "dead").mkdir()
    (base / "dead" / "c.sock").touch()
    (base / "stray").touch()  # not a directory: not ours to judge
    alive = make(temporary)
    assert {entry.name for entry in base.iterdir()} == {"stray", alive.path.name}
    alive.remove()
    assert {entry.name for entry in base.iterdir()} == {"stray"}


def test_many_engines_at_once_do_not_disturb_each_other(temporary: Path) -> None:
    async def live() -> None:
        for _ in range(20):
            own = await EngineDirectory.create(temporary)
            await asyncio.sleep(0)
            assert own.path.is_dir()
            own.remove()

    async def crowd() -> None:
        await asyncio.gather(*(live() for _ in range(8)))

    asyncio.run(crowd())
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("how", ["mode", "link", "file"])
def test_an_unsafe_directory_is_refused(temporary: Path, how: str) -> None:
    base = base_of(temporary)
    if how == "mode":
        base.mkdir()
        base.chmod(0o755)
    elif how == "link":
        (temporary / "elsewhere").mkdir(0o700)
        base.symlink_to(temporary / "elsewhere")
    else:
        base.touch(0o700)
    with pytest.raises(InvalidArgument, match=r"mode 0700\), but belongs to user \d+ and has mode .*: remove it, or"):
        make(temporary)


def test_a_directory_that_stays_locked_is_an_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_LOCK_PATIENCE_S", 0.02)
    base = base_of(temporary)
    base.mkdir(0o700)
    lock = os.open(base, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InvalidArgument, match=r"has been locked for 0\.02 s by another process"):
            make(temporary)
    finally:
        os.close(lock)


def test_a_fork_of_the_engine_removes_nothing(temporary: Path) -> None:
    own = make(temporary)
    pid = os.fork()
    if pid == 0:
        own.remove()
        os._exit(0)
    os.waitpid(pid, 0)
    assert own.path.exists()
    rival = make(temporary)
    assert own.path.exists()  # still locked, too
    rival.remove()
    own.remove()


def test_sockets_go_where_their_names_fit(temporary: Path) -> None:
    assert temporary_directory(None) == Path("/tmp")
    assert temporary_directory(str(temporary)) == temporary
    assert temporary_directory("relative") == Path("/tmp")
    assert temporary_directory("/no/such/directory") == Path("/tmp")
    long = temporary / ("x" * 80)
    long.mkdir()
    assert temporary_directory(str(long)) == Path("/tmp")


# -- GPUs ----------------------------------------------------------------------------------------------------------


def test_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "3, GPU-a ,-1,4"}) == ["3", "GPU-a"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == []
    monkeypatch.setattr(os, "listdir", lambda path: ["nvidia10", "nvidiactl", "nvidia2", "null", "nvidia-uvm"])
    assert visible_devices({}) == ["2", "10"]

    def refuse(path: str) -> list[str]:
        raise PermissionError

    monkeypatch.setattr(os, "listdir", refuse)
    assert visible_devices({}) == []


def test_shares_fill_a_device_before_the_next_is_touched() -> None:
    table = GpuTable(["0", "1"])
    assert [table.take(f"w{number}", 0.1) for number in range(10)] == [["0"]] * 10
    assert table.take("whole", 1) == ["1"]
    with pytest.raises(ResourcesUnavailable, match=r"num_gpus=0\.1 was asked for; of 2 GPUs there is free: 0: 0, 1: 0"):
        table.take("more", 0.1)
    table.give_back("w3")
    table.give_back("w3")
    table.give_back("nobody")
    assert table.take("more", 0.1) == ["0"]


def test_what_cannot_be_had() -> None:
    with pytest.raises(ResourcesUnavailable, match="this machine shows no GPU"):
        GpuTable([]).take("w", 1)
    with pytest.raises(InvalidArgument, match=r"a whole number or a share below 1, not 1\.5"):
        GpuTable(["0", "1"]).take("w", 1.5)
    with pytest.raises(InvalidArgument, match="named twice"):
        GpuTable(["0", "0"])


# -- the environment -----------------------------------------------------------------------------------------------


def test_the_users_variables_have_the_last_word() -> None:
    resources = Resources(num_cpus=4, num_gpus=1, env_vars={"CUDA_VISIBLE_DEVICES": "9", "X": "y"})
    extra = extra_environ(resources, ["0"], {"OMP_NUM_THREADS": "3"})
    assert "OMP_NUM_THREADS" not in extra
    assert (extra["MKL_NUM_THREADS"], extra["CUDA_VISIBLE_DEVICES"], extra["X"]) == ("4", "9", "y")
    assert extra_environ(Resources(), [], {}) == {}


def test_thread_limits() -> None:
    assert thread_limit(Resources(), {}) is None
    assert thread_limit(Resources(num_cpus=0), {}) == 1
    assert thread_limit(Resources(num_cpus=2.5), {}) == 2
    assert thread_limit(Resources(num_cpus=2), {"OMP_NUM_THREADS": "3"}) is None


# -- a worker's life -----------------------------------------------------------------------------------------------


def test_a_worker_never_goes_back() -> None:
    for stage in Stage:
        if stage is not Stage.ENDED:
            assert stage.to(Stage.ENDED) is Stage.ENDED
    for stage, other in [
        *((Stage.ENDED, other) for other in Stage),
        (Stage.RUNNING, Stage.ORDERED),
        (Stage.RUNNING, Stage.CUT_OFF),  # it may still say why
        (Stage.SILENT, Stage.RUNNING),
        (Stage.SILENT, Stage.ORPHANED),  # the end of its channel would be waited for in vain
        (Stage.CUT_OFF, Stage.SILENT),
        (Stage.ORPHANED, Stage.SILENT),
    ]:
        with pytest.raises(RuntimeError, match=f"a worker cannot go from {stage.value} to {other.value}"):
            stage.to(other)


class StandInLauncher:
    """In place of a fork server: whom it was told to kill, and whether it is gone."""

    def __init__(self) -> None:
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.retired = ""
        self.killed: list[int | None] = []

    def kill_worker(self, worker_id: str, pid: int | None) -> None:
        self.killed.append(pid)

    def retire(self, why: str) -> None:
        self.retired = why


class StandInClock:
    """In place of the loop that runs, for the timers alone: they go off when the test says so."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, delay_s: float, function: Callable[[], object]) -> asyncio.TimerHandle:
        self._timer = self._loop.call_later(3600, function)
        return self._timer

    def strike(self) -> None:
        """Let the last timer go off, unless it was cancelled."""
        assert not self._timer.cancelled()
        self._timer._run()


NO_PID = 1 << 30  # larger than any
SIGKILLED = Exited("w", signal.SIGKILL)
OUT_OF_MEMORY = "was killed by SIGKILL (out of memory, or someone killed it)"
BY_THE_ENGINE = "was killed by the engine"
BECAUSE_CUT_OFF = "was killed by the engine because it had closed its control channel"
TOO_LONG = "was ended before it started: the import of a module took too long"
WITH_ITS_SERVER = "ended with its fork server, which crashed"
STUCK = "is gone; its fork server, which could say why, is stuck in an import"
ENDS: list[tuple[str, list[Any], str, int]] = [
    ("the exit first", ["forked", Exited("w", 0)], "exited", 0),
    ("the channel first", ["forked", "hung up", Exited("w", 3 << 8)], "exited with code 3", 0),
    ("the channel first of all", ["hung up", "forked", SIGKILLED], OUT_OF_MEMORY, 0),
    ("no fork", [ForkFailed("w", "could not be forked")], "could not be forked", 0),
    ("no fork, the channel first", ["hung up", ForkFailed("w", "could not be forked")], "could not be forked", 0),
    ("killed", ["forked", "kill", SIGKILLED], BY_THE_ENGINE, 1),
    ("killed as it left", ["forked", "kill", Exited("w", 0)], "exited", 1),
    ("doomed", ["forked", "doom", SIGKILLED], BY_THE_ENGINE, 0),
    ("cut off", ["forked", "hung up", "too late", SIGKILLED], BECAUSE_CUT_OFF, 1),
    ("cut off, then killed", ["forked", "hung up", "too late", "kill", SIGKILLED], BY_THE_ENGINE, 2),
    ("killed, then cut off", ["forked", "kill", "hung up", "too late", SIGKILLED], BY_THE_ENGINE, 2),
    ("orphaned", ["forked", "server gone", "hung up"], WITH_ITS_SERVER, 0),
    ("orphaned before its fork", ["server gone", "hung up"], WITH_ITS_SERVER, 0),
    (
        "orphaned, the channel first",
        ["forked", "hung up", "server gone"],
        WITH_ITS_SERVER,
        0,
    ),
    (
        "orphaned, the channel never",
        ["forked", "server gone", "too late"],
        WITH_ITS_SERVER,
        0,
    ),
    (
        "orphaned, then killed",
        ["forked", "server gone", "kill", "doom", "hung up"],
        WITH_ITS_SERVER,
        0,
    ),
    ("orphaned by the engine", ["forked", "doom", "server gone", "hung up"], BY_THE_ENGINE, 0),
    (
        "cut off and orphaned",
        ["forked", "hung up", "too late", "server gone"],
        WITH_ITS_SERVER,
        1,
    ),
    ("given up", ["server stuck", "kill", "too late"], TOO_LONG, 1),
    ("not given up", ["forked", "server stuck", "kill", SIGKILLED], BY_THE_ENGINE, 1),
    ("alone", ["forked", "retire", "hung up", "too late"], STUCK, 1),
]


@pytest.mark.parametrize(("events", "reason", "kills"), [pytest.param(*rest, id=name) for name, *rest in ENDS])
def test_whatever_comes_first_a_worker_ends_once(
    events: list[Any], reason: str, kills: int, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    async def scenario() -> None:
        launcher: Any = StandInLauncher()
        path = temporary / "w.sock"
        path.touch()
        clock: Any = StandInClock()
        worker = watched.WatchedWorker(
            "w", launcher, path, lambda *_: None, lambda worker, reason: told.append(reason), clock
        )
        control, *streams = worker.descriptors

        async def until_stage_changes(former: Stage) -> None:
            with anyio.fail_after(PATIENCE_S):
                while True:
                    if worker.stage is not former:
                        return
                    await asyncio.sleep(0.002)

        for event in events:
            assert told == []
            stage = worker.stage
            if event == "forked":
                worker.reported(Forked("w", NO_PID))
            elif event == "hung up":
                os.close(control)
                control = -1
                await until_stage_changes(stage)
            elif event == "too late":
                clock.strike()
            elif event == "kill":
                worker.kill()
            elif event == "doom":
                worker.doom()
            elif event == "retire":
                launcher.retire("is stuck in an import")
            elif event == "server gone":
                launcher.gone.set_result("crashed")
                worker.orphaned()
            elif event == "server stuck":
                monkeypatch.setattr(watched, "_STUCK_AFTER_S", -1.0)
            else:
                worker.reported(event)
        assert worker.stage is Stage.ENDED
        assert told == [reason]
        assert len(launcher.killed) == kills
        assert bool(launcher.retired) == (reason in (TOO_LONG, STUCK))
        worker.tell("nobody")
        worker.kill()
        with pytest.raises(RuntimeError, match="cannot go from ended"):
            worker.reported(Exited("w", 0))
        assert told == [reason]
        assert len(launcher.killed) == kills
        assert not path.exists()
        for descriptor in [*streams, control]:
            if descriptor >= 0:
                os.close(descriptor)

    asyncio.run(scenario())


# -- the rest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "phrase"),
    [
        (0, "exited"),
        (3 << 8, "exited with code 3"),
        (signal.SIGABRT, "was killed by SIGABRT (native code gave up; see its standard error)"),
        (signal.SIGUSR1, "was killed by SIGUSR1"),
        (50, "was killed by signal 50"),
        (signal.SIGSEGV | 0x80, "was killed by SIGSEGV (a crash in native code)"),
    ],
)
def test_exits_in_words(status: int, phrase: str) -> None:
    assert describe_exit(status) == phrase


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("engine-forks", b"engine-forks"),
        ("replica.model.3", b"replica.model.3"),
        ("replica.sentiment-analysis.12", b"sentiment-an.12"),
        ("replica.sentiment-v1.1.12", b"sentiment-v1.12"),
        ("ingress.1", b"ingress.1"),
        ("no kind and no number at all", b"no kind and no "),
        ("replica.model.123456789012345", b"model.123456789"),
        ("replica.\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9.1", b"\xc3\xa9" * 6 + b".1"),
    ],
)
def test_what_ps_shows_of_a_long_name(name: str, short: bytes) -> None:
    assert short_name(name) == short


def test_frames_arrive_whole_however_they_were_cut() -> None:
    frames = Frames()
    data = pack(Kill("a")) + pack(Kill("b"))
    assert [order for byte in data for order in frames.feed(bytes([byte]))] == [Kill("a"), Kill("b")]
    assert frames.feed(data) == [Kill("a"), Kill("b")]


def test_a_process_whose_parent_is_gone_ends() -> None:
    pid = os.fork()
    if pid == 0:
        die_with_parent(os.getpid())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 1 << 8


def test_lines_are_cut_where_they_grow_too_long() -> None:
    lines: list[str] = []

    async def scenario() -> None:
        reading, writing = os.pipe()
        reader = LineReader(reading, lines.append, asyncio.get_running_loop())
        for _ in range(5):
            os.write(writing, b"x" * 40_000)
            assert reader._read() == 40_000
        reader.finish()
        reader.finish()
        os.close(writing)

    asyncio.run(scenario())
    assert "".join(lines) == "x" * 200_000
    assert max(map(len, lines)) == 1 << 16


def test_a_connector_only_opens_channels() -> None:
    own = connector.LocalConnector("unix:/x")
    assert not {"start", "start_worker", "tell", "kill_worker", "bound", "nodes", "stop"} & set(dir(own))
    own.close()


def test_the_package_offers_its_two_names_lazily() -> None:
    assert engine_local.LocalConnector is connector.LocalConnector
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        engine_local.Nothing  # noqa: B018
