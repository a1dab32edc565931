"""Workers that fall silent: who is ended for it, who is not, and whose time counts."""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from engine import Engine
from engine.control import pulse as pulse_module
from engine.control.pulse import FROZEN_S, PERIOD_S, STOPPED_S, Pulse, PulseWatch
from engine.errors import ReplicaDied
from engine.seam.adapter import Vitals
from engine.testing.fakes import FakeAdapter
from engine.testing.instruments import PATIENCE_S, eventually, is_running
from engine_wire import look_at
from engine_wire import vitals as vitals_module

STOPPED = Vitals(True, 1.0)
IDLE = Vitals(False, 1.0)


# -- the rule --------------------------------------------------------------------------------------------------------


def silent_for(pulse: Pulse, seconds: float, look: Callable[[float], Vitals | None], step_s: float = 0.5) -> str:
    """Let time pass for a worker that was asked; returns why it is ended, and when, or nothing."""
    for _ in range(round(seconds / step_s)):
        if pulse.passed(step_s):
            why = pulse.verdict(look(pulse.silent_s))
            if why:
                return why
    return ""


FROZEN = "has not answered for 60 s (its process does nothing)"


@pytest.mark.parametrize(
    ("look", "why"),
    [
        pytest.param(lambda at: STOPPED, "has not answered for 4 s (its process is stopped)", id="stopped"),
        pytest.param(lambda at: IDLE, FROZEN, id="frozen"),
        pytest.param(
            lambda at: Vitals(False, 1.0, ended=True), "has not answered for 2 s (its process has ended)", id="ended"
        ),
        pytest.param(lambda at: Vitals(False, 0.01 * at), FROZEN, id="no more than threads of libraries do"),
        pytest.param(lambda at: Vitals(False, 0.5 * at), "", id="works"),
        pytest.param(lambda at: None, "", id="unseen"),
        pytest.param(
            lambda at: Vitals(at > 18, 0.5 * at),
            "has not answered for 20 s (its process is stopped)",
            id="stopped later",
        ),
        pytest.param(lambda at: Vitals(at < STOPPED_S, at), "", id="continued in time"),
    ],
)
def test_who_is_ended_for_its_silence(look: Callable[[float], Vitals | None], why: str) -> None:
    pulse = Pulse()
    assert pulse.ask()
    assert silent_for(pulse, 2 * FROZEN_S, look) == why


@pytest.mark.parametrize("seen", [Vitals(False, 0.0), None], ids=["busy", "unseen"])
def test_what_is_limited_is_ended_for_its_silence_alone(seen: Vitals | None) -> None:
    """Native code keeps it from seeing to its own limit."""

    def silent(patience_s: float) -> str:
        pulse = Pulse()
        pulse.ask()
        for _ in range(1000):
            vitals = seen and Vitals(False, pulse.silent_s)
            if pulse.passed(0.5, patience_s) and (why := pulse.verdict(vitals, patience_s)):
                return why
        return ""

    why = "(no Python runs in its process, or its event loop does not turn; nothing may take so long there)"
    assert silent(10.0) == f"has not answered for 10 s {why}"
    assert silent(0.1) == f"has not answered for 4 s {why}"
    assert silent(math.inf) == ""


@pytest.mark.parametrize(
    ("share", "held_up", "ended_at"),
    [
        (0.0, False, (10, 10)),  # native code that waits for something else, and keeps the lock
        (1.0, True, (10, 10)),  # native code that computes
        (0.5, True, (20, 30)),  # that, on a busy machine: it has run for 10 s, of which the last look came later
        (0.01, True, None),  # it would answer if it could, or is read back from a disk
    ],
)
def test_what_is_held_up_by_others_is_not_ended_for_that(
    share: float, held_up: bool, ended_at: tuple[float, float] | None
) -> None:
    pulse = Pulse()
    pulse.ask()
    for _ in range(100):
        vitals = Vitals(False, share * pulse.silent_s, held_up)
        if pulse.passed(0.5, 10.0) and pulse.verdict(vitals, 10.0):
            assert ended_at is not None
            assert ended_at[0] <= pulse.silent_s <= ended_at[1]
            return
    assert ended_at is None


def test_who_answers_is_not_looked_at() -> None:
    pulse = Pulse()
    for _ in range(100):
        assert pulse.ask()
        assert not pulse.ask(), "one question at a time"
        assert not pulse.passed(PERIOD_S)
        pulse.answered()
        assert not pulse.passed(PERIOD_S)


def test_an_answer_in_time_begins_anew() -> None:
    pulse = Pulse()
    assert pulse.ask()
    assert not silent_for(pulse, STOPPED_S - 0.5, lambda at: STOPPED)
    pulse.answered()
    assert not pulse.verdict(STOPPED), "it was looked at before"
    assert pulse.ask()
    assert not silent_for(pulse, STOPPED_S - 0.5, lambda at: STOPPED)


def test_it_is_looked_at_less_and_less_often() -> None:
    pulse = Pulse()
    pulse.ask()
    looks = [at for at in range(1, 1001) if pulse.passed(1.0)]
    assert looks[:4] == [3, 4, 5, 6]
    assert len(looks) < 20


# -- asking ----------------------------------------------------------------------------------------------------------


class Untimed(PulseWatch):
    """Comes by when the test says so."""

    def _wait(self) -> None:
        pass


class World(FakeAdapter):
    """An adapter whose workers answer or not, a clock, and what was ended."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.seen: Vitals | Exception | None = IDLE
        self.looks = 0
        self.ended: list[tuple[str, str]] = []
        self.watch = Untimed(self, lambda *end: self.ended.append(end), lambda worker_id: worker_id, self.clock)

    def clock(self) -> float:
        return self.now

    async def vitals(self, worker_id: str) -> Vitals | None:
        self.looks += 1
        if isinstance(self.seen, Exception):
            raise self.seen
        return self.seen

    async def pass_time(self, seconds: float = PERIOD_S, times: int = 1) -> None:
        for _ in range(times):
            self.now += seconds
            self.watch.tick()
            for _ in range(5):  # a look that was begun
                await asyncio.sleep(0)


def in_world(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on a loop, with a world whose timer does not come by itself."""

    def run() -> None:
        async def main() -> None:
            world = World()
            try:
                await asyncio.wait_for(test(world), PATIENCE_S)
            finally:
                world.watch.close()

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


@in_world
async def test_a_stopped_worker_ends_within_five_seconds(world: World) -> None:
    world.seen = STOPPED
    world.watch.add("w")
    world.watch.add("other")
    world.watch.tick()
    world.watch.answered("w")  # and then it is stopped
    begin = world.now
    while not world.ended:
        world.watch.answered("other")
        await world.pass_time()
    assert world.ended[0] == ("w", "has not answered for 4 s (its process is stopped)")
    assert {worker_id for worker_id, _ in world.ended} == {"w"}
    assert world.now - begin < 5.0
    assert world.asked.count("w") == 2, "it is not asked again while it owes an answer"


@in_world
async def test_only_own_time_counts(world: World) -> None:
    """A process that was stopped itself, or slept with its machine, comes back to find everybody silent."""
    world.seen = STOPPED  # they are continued after it
    world.watch.add("w")
    await world.pass_time(times=2)
    for _ in range(3):
        await world.pass_time(3600.0)
    assert not world.ended
    world.watch.answered("w")
    await world.pass_time()
    assert not world.ended


@in_world
async def test_a_loop_that_is_always_late_finds_them_all_the_same(world: World) -> None:
    world.seen = STOPPED
    world.watch.add("w")
    await world.pass_time(10 * PERIOD_S, times=8)
    assert [worker_id for worker_id, _ in world.ended[:1]] == ["w"]


@in_world
async def test_what_cannot_be_ended_is_tried_again(world: World) -> None:
    world.seen = STOPPED
    world.watch.add("w")
    await world.pass_time(times=30)
    assert len(world.ended) > 1
    world.watch.remove("w")
    count = len(world.ended)
    await world.pass_time(times=30)
    assert len(world.ended) == count


@in_world
async def test_workers_that_cannot_be_looked_at_go_on(world: World) -> None:
    for world.seen in (None, OSError("no such node")):
        world.watch.add("w")
        await world.pass_time(times=200)
        assert world.looks
    assert not world.ended


@pytest.mark.parametrize(
    ("patience_s", "cure"),
    [
        (math.inf, "is not replaced for it (set max_call_s to have such a replica replaced)"),
        (60.0, "is replaced if that goes on for 60 s"),
    ],
)
def test_people_are_told_once_of_one_that_works_without_answering(
    patience_s: float, cure: str, caplog: pytest.LogCaptureFixture
) -> None:
    @in_world
    async def scenario(world: World) -> None:
        world.watch._patience = lambda worker_id: patience_s
        world.watch.add("w")
        await world.pass_time(times=20)
        world.watch.answered("w")
        await world.pass_time(times=20)

    scenario()
    told = [record.getMessage() for record in caplog.records if record.name == "engine.controller"]
    assert len(told) == 1
    assert told[0].startswith("w has not answered for 4 s, though its process is not stopped: native code")
    assert told[0].endswith(cure)


@in_world
async def test_workers_of_this_process_are_not_asked(world: World) -> None:
    world.shares_process = True
    world.watch.add("w")
    await world.pass_time(times=10)
    assert not world.asked


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_process_seen_from_outside(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)

    def seen() -> Vitals:
        vitals = asyncio.run(look_at(process.pid))
        assert vitals is not None
        return vitals

    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        eventually(lambda: seen().stopped)
        os.kill(process.pid, signal.SIGCONT)
        eventually(lambda: not seen().stopped)
        before = seen()
        if platform == "linux":  # ps counts whole seconds
            eventually(lambda: seen().cpu_s > before.cpu_s)
        eventually(lambda: seen().held_up)
    finally:
        process.kill()
        process.wait()
    assert asyncio.run(look_at(process.pid)) is None
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        eventually(lambda: not seen().held_up)
    finally:
        process.kill()
        process.communicate()


def test_how_ps_writes_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, seconds in (("0:01.25", 1.25), ("01:02:03", 3723.0), ("2-01:00:00", 176400.0), ("0:01,50", 1.5)):
        told = subprocess.CompletedProcess((), 0, stdout=f"Ss+  {text}\n")
        monkeypatch.setattr(vitals_module.subprocess, "run", lambda *args, told=told, **kwargs: told)
        assert vitals_module._asked_of_ps(1) == Vitals(False, seconds)


@pytest.mark.parametrize(
    ("times", "config", "why"),
    [
        pytest.param({"STOPPED_S": 0.1, "FROZEN_S": 0.4}, {}, "its process does nothing", id="in the end"),
        pytest.param(
            {"STOPPED_S": 0.2, "_FIRST_LOOK_S": 0.1},
            {"max_call_s": 0.4},
            "no Python runs in its process, or its event loop does not turn; nothing may take so long there",
            id="at its limit",
        ),
    ],
)
def test_a_replica_that_does_nothing_but_keep_the_lock_is_replaced(
    times: dict[str, float], config: Any, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"PERIOD_S": 0.02, **times}.items():
        monkeypatch.setattr(pulse_module, name, value)

    def backend(request: Any) -> int:
        if request.data:
            ctypes.PyDLL(None).poll(None, 0, -1)  # it neither comes back nor lets go of the lock
        return os.getpid()

    with Engine(backend="local", http_options={"location": None}) as engine:
        engine.create_backend("b", backend, config=config)
        engine.create_endpoint("e", backend="b")
        handle = engine.get_handle("e")
        pid = handle.call(False)
        with pytest.raises(ReplicaDied):
            handle.call(True)
        assert handle.call(False) != pid
    assert re.search(rf"replica\.b\.1 has not answered for \d s \({why}\) and was killed", caplog.text)


PROGRAM = """
import os, sys
from engine import Engine
from engine.control import pulse
pulse.PERIOD_S, pulse.STOPPED_S = 0.05, 0.7
with Engine(backend="local") as engine:
    engine.create_backend("b", lambda request: os.getpid())
    engine.create_endpoint("e", backend="b")
    handle = engine.get_handle("e")
    for line in sys.stdin:
        if line == "look\\n":
            for _ in range(3):  # rounds of the controller's loop
                engine.statistics()
        print(os.getpid() if line == "look\\n" else handle.call(), flush=True)
"""


def test_an_application_that_is_stopped_and_continued_has_its_workers_still() -> None:
    """Also those that are continued after it."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as program:

        def ask(what: str) -> int:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write(f"{what}\n")
            return int(program.stdout.readline())

        def let_pass(seconds: float) -> None:
            with pytest.raises(subprocess.TimeoutExpired):
                program.wait(seconds)

        replica = ask("call")
        os.kill(replica, signal.SIGSTOP)
        let_pass(0.2)  # some rounds: it owes an answer now
        os.kill(program.pid, signal.SIGSTOP)
        let_pass(0.9)  # longer than a worker may be silent
        os.kill(program.pid, signal.SIGCONT)
        assert ask("look") == program.pid  # it runs again, and has looked
        os.kill(replica, signal.SIGCONT)
        assert ask("call") == replica
    assert program.returncode == 0
    eventually(lambda: not is_running(replica))
