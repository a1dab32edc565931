"""The lives of workers: which stage may follow which, and what a failed start says."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from fakes import until

from engine.control import workers as workers_module
from engine.control.workers import Life, Worker, Workers
from engine.errors import BackendStartError, EngineError, ResourcesUnavailable
from engine.seam.control_messages import Drain, Drained, LogLine, Pong, Ready, Reconfigure, Reconfigured, StartFailed
from engine.seam.serialization import pack_exception
from engine.seam.worker import Listen, WorkerExit, WorkerSpec
from engine.testing.fakes import FakeAdapter

SPEC = WorkerSpec("w#1", "replica.w.1", "nowhere:main", b"")
LONG_S = 1000.0
NOW = 0.001


class World:
    """Workers on an adapter that does what the test says. Killed workers are gone at once."""

    def __init__(self) -> None:
        self.adapter = FakeAdapter(on_kill=self.exit_killed)
        self.exits: list[Worker] = []
        self.workers = Workers(self.adapter, self.exits.append)

    def exit_killed(self, worker_id: str) -> None:
        self.exit("was killed by SIGKILL", worker_id)

    def exit(self, reason: str = "left", worker_id: str = SPEC.worker_id) -> None:
        asyncio.get_running_loop().call_soon(self.workers.worker_exited, WorkerExit(worker_id, reason))

    def say(self, *bodies: Any) -> None:
        for body in bodies:
            self.workers.worker_said(SPEC.worker_id, body)

    async def ready(self) -> Worker:
        """A worker that is ready."""
        self.adapter.on_start = lambda spec: self.say(Ready("fake:w"))
        return await self.workers.start(SPEC, LONG_S)


def on_loop(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on a loop of its own, with a world of its own."""

    def run() -> None:
        async def main() -> None:
            world = World()
            await asyncio.wait_for(test(world), 20)
            assert len(world.workers) == 0, "a worker is left"

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


# -- the stages ------------------------------------------------------------------------------------------------------

ALLOWED = {
    (Life.STARTING, Life.READY),
    (Life.STARTING, Life.DRAINING),
    (Life.STARTING, Life.GONE),
    (Life.READY, Life.DRAINING),
    (Life.READY, Life.GONE),
    (Life.DRAINING, Life.GONE),
}


@pytest.mark.parametrize("before", Life)
@pytest.mark.parametrize("after", Life)
def test_which_stage_may_follow_which(before: Life, after: Life) -> None:
    async def main() -> None:
        worker = Worker(SPEC)
        worker.life = before
        if (before, after) in ALLOWED:
            worker.move(after)
            assert worker.life is after
        else:
            with pytest.raises(RuntimeError, match=f"replica.w.1 cannot go from {before.value} to {after.value}"):
                worker.move(after)
            assert worker.life is before

    asyncio.run(main())


@on_loop
async def test_a_whole_life(world: World) -> None:
    worker = await world.ready()
    assert (worker.life, worker.address) == (Life.READY, "fake:w")
    assert repr(worker) == "<Worker replica.w.1 ready>"
    assert len(world.workers) == 1
    world.adapter.on_tell = lambda worker_id, body: world.exit("left")
    await world.workers.drain(worker, 5.0)
    assert worker.life is Life.GONE
    assert world.adapter.told == [("w#1", Drain(5.0))]
    assert not world.adapter.killed
    assert not world.exits  # it was asked to


@on_loop
async def test_a_second_ready_changes_nothing(world: World) -> None:
    worker = await world.ready()
    world.say(Ready("elsewhere"), Pong(1, 0))
    assert worker.address == "fake:w"
    await world.workers.kill(worker)
    world.say(Ready("from the grave"))
    world.workers.worker_exited(WorkerExit("w#1", "left again"))
    assert worker.exit_reason == "was killed by SIGKILL"


@on_loop
async def test_one_that_is_ended_for_its_silence_has_died(world: World) -> None:
    worker = await world.ready()
    world.workers.end_useless("w#1", "has not answered for 4 s (its process is stopped)")
    await worker.gone.wait()
    assert world.adapter.killed == ["w#1"]
    assert world.exits == [worker]
    assert worker.exit_reason == "has not answered for 4 s (its process is stopped) and was killed"
    world.workers.end_useless("w#1", "is gone already")


@on_loop
async def test_whatever_a_worker_says_is_an_answer_but_for_what_it_printed(world: World) -> None:
    """It may come back on another channel than the one on which it was asked."""
    await world.ready()
    pulse = world.workers._pulses._pulses["w#1"]
    assert pulse.ask()
    world.say(LogLine(logging.INFO, "stdout", "some time ago"))
    assert not pulse.ask()
    for body in (Pong(1, 0), Ready("fake:w"), Drained()):
        world.say(body)
        assert pulse.ask()
    worker = world.workers.get("w#1")
    assert worker is not None
    await world.workers.kill(worker)


# -- starts that fail ------------------------------------------------------------------------------------------------


@on_loop
async def test_an_adapter_that_refuses(world: World) -> None:
    world.adapter.refuses = ResourcesUnavailable("no gpu")
    with pytest.raises(ResourcesUnavailable, match="no gpu"):
        await world.workers.start(SPEC, LONG_S)


@on_loop
async def test_a_start_that_takes_too_long_is_killed(world: World) -> None:
    world.adapter.on_start = lambda spec: world.say(LogLine(logging.ERROR, "stderr", "loading..."))
    with pytest.raises(BackendStartError) as caught:
        await world.workers.start(SPEC, NOW)
    assert str(caught.value) == (
        "replica.w.1 was not ready within start_timeout_s=0.001; it was killed; its last words:\nloading..."
    )
    assert world.adapter.killed == ["w#1"]


@on_loop
async def test_an_ingress_that_takes_too_long_is_not_told_of_by_a_setting_of_backends(world: World) -> None:
    with pytest.raises(BackendStartError) as caught:
        await world.workers.start(replace(SPEC, listen=Listen("127.0.0.1", 0)), NOW)
    assert str(caught.value) == "replica.w.1 was not ready within 0.001 s; it was killed"


@on_loop
async def test_a_death_before_it_is_ready_carries_the_last_lines(world: World) -> None:
    def start(spec: WorkerSpec) -> None:
        for number in range(9):
            world.say(LogLine(logging.ERROR, "stderr", f"line {number}"))
        world.say(LogLine(logging.INFO, "stdout", "not this"), LogLine(logging.INFO, "my.logger", "nor this"))
        world.exit("was killed by SIGSEGV")

    world.adapter.on_start = start
    with pytest.raises(BackendStartError) as caught:
        await world.workers.start(SPEC, LONG_S)
    assert str(caught.value) == (
        "replica.w.1 ended before it was ready: it was killed by SIGSEGV; its last words:\n"
        "line 0\nline 1\nline 2\nline 3\nline 4\nline 5\nline 6\nline 7\nline 8"
    )
    assert not world.exits  # whoever started it knows


@on_loop
async def test_a_death_without_a_word(world: World) -> None:
    world.adapter.on_start = lambda spec: world.exit("exited with code 3")
    with pytest.raises(BackendStartError, match=r"^replica.w.1 ended before it was ready: it exited with code 3$"):
        await world.workers.start(SPEC, LONG_S)


@on_loop
async def test_a_constructor_that_raises(world: World) -> None:
    world.adapter.on_start = lambda spec: world.say(StartFailed(pack_exception(LookupError("no model"))))
    with pytest.raises(LookupError, match="no model"):
        await world.workers.start(SPEC, LONG_S)
    assert world.adapter.killed == ["w#1"]


@on_loop
async def test_a_constructor_that_raises_and_a_worker_that_leaves(world: World) -> None:
    def start(spec: WorkerSpec) -> None:
        world.say(StartFailed(pack_exception(LookupError("no model"))))
        world.exit("left")

    world.adapter.on_start = start
    with pytest.raises(LookupError, match="no model"):
        await world.workers.start(SPEC, LONG_S)


@on_loop
async def test_a_start_given_up_leaves_nothing(world: World) -> None:
    starting = asyncio.ensure_future(world.workers.start(SPEC, LONG_S))
    await until(lambda: world.adapter.started)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert world.adapter.killed == ["w#1"]


# -- ends ------------------------------------------------------------------------------------------------------------


@on_loop
async def test_a_death_out_of_turn_is_reported(world: World) -> None:
    worker = await world.ready()
    world.exit("was killed by SIGKILL")
    await worker.gone.wait()
    assert world.exits == [worker]
    assert worker.exit_reason == "was killed by SIGKILL"
    await world.workers.kill(worker)
    await world.workers.drain(worker, 1.0)
    assert not world.adapter.killed
    assert not world.adapter.told


@on_loop
async def test_no_time_to_drain_is_a_kill(world: World) -> None:
    worker = await world.ready()
    await world.workers.drain(worker, 0)
    assert (world.adapter.killed, world.adapter.told) == (["w#1"], [])
    assert not world.exits


def test_a_worker_that_does_not_leave_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers_module, "_EXIT_MARGIN_S", 0.0)

    @on_loop
    async def main(world: World) -> None:
        worker = await world.ready()
        await world.workers.drain(worker, NOW)
        assert world.adapter.killed == ["w#1"]
        assert worker.life is Life.GONE

    main()
    assert "replica.w.1 did not finish within 0.001 s and is killed" in caplog.text


def test_a_worker_that_is_done_and_stays_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers_module, "_EXIT_MARGIN_S", 0.0)

    @on_loop
    async def main(world: World) -> None:
        worker = await world.ready()
        world.workers.worker_said("w#1", Drained())
        await world.workers.drain(worker, NOW)

    main()
    assert "is killed; its close(), exit functions or threads keep it" in caplog.text


@on_loop
async def test_two_may_ask_a_worker_to_leave(world: World) -> None:
    worker = await world.ready()
    draining = [asyncio.ensure_future(world.workers.drain(worker, 5.0)) for _ in range(2)]
    await until(lambda: len(world.adapter.told) == 2)
    await world.workers.kill(worker)
    await asyncio.gather(*draining)
    assert worker.life is Life.GONE


# -- reconfiguring ---------------------------------------------------------------------------------------------------


@on_loop
async def test_a_configuration_is_taken(world: World) -> None:
    worker = await world.ready()
    patience_s: list[float] = []  # meanwhile, it may be silent: that has a limit of its own

    def tell(worker_id: str, body: Any) -> None:
        patience_s.append(world.workers._patience_with(worker_id))
        world.say(Reconfigured(body.token, None), Reconfigured(99, None))

    world.adapter.on_tell = tell
    world.workers._patience = lambda worker: 7.0
    for token in (1, 2):
        await world.workers.reconfigure(worker, b"config", LONG_S, user_config_changed=True)
        assert world.adapter.told[-1] == ("w#1", Reconfigure(token, b"config", True))
    assert not worker.replies
    assert (patience_s, world.workers._patience_with("w#1")) == ([math.inf, math.inf], 7.0)
    world.say(Reconfigured(1, None))  # nobody waits for it any more
    await world.workers.kill(worker)


@on_loop
async def test_a_configuration_is_not_taken_in_time(world: World) -> None:
    worker = await world.ready()
    assert not await world.workers.reconfigure(worker, b"config", NOW, user_config_changed=True)
    assert not worker.replies
    world.say(Reconfigured(1, None))  # nobody waits for it any more
    await world.workers.kill(worker)


@on_loop
async def test_a_configuration_is_refused(world: World) -> None:
    worker = await world.ready()
    error = pack_exception(ValueError("no such model"))
    world.adapter.on_tell = lambda worker_id, body: world.say(
        Reconfigured(body.token, error), Reconfigured(body.token, None)
    )
    with pytest.raises(ValueError, match="no such model"):
        await world.workers.reconfigure(worker, b"config", LONG_S, user_config_changed=False)
    await world.workers.kill(worker)


@on_loop
async def test_a_worker_that_dies_takes_no_configuration(world: World) -> None:
    worker = await world.ready()
    world.adapter.on_tell = lambda worker_id, body: world.exit("was killed by SIGKILL")
    with pytest.raises(EngineError, match=r"^replica.w.1 was killed by SIGKILL$"):
        await world.workers.reconfigure(worker, b"config", LONG_S, user_config_changed=False)
    world.adapter.on_tell = None
    with pytest.raises(EngineError, match=r"^replica.w.1 was killed by SIGKILL$"):  # nor does one that is dead
        await world.workers.reconfigure(worker, b"config", LONG_S, user_config_changed=False)


@on_loop
async def test_an_answer_and_a_death_at_once(world: World) -> None:
    worker = await world.ready()

    def answer_and_die(worker_id: str, body: Any) -> None:
        world.say(Reconfigured(body.token, None))
        world.workers.worker_exited(WorkerExit(worker_id, "left"))

    world.adapter.on_tell = answer_and_die
    await world.workers.reconfigure(worker, b"config", LONG_S, user_config_changed=False)
    assert world.exits == [worker]


# -- what they log ---------------------------------------------------------------------------------------------------


def test_what_a_worker_says_is_logged_under_its_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    @on_loop
    async def main(world: World) -> None:
        worker = await world.ready()
        world.say(LogLine(logging.INFO, "my.logger", "100 %s"), LogLine(logging.DEBUG, "my.logger", "too quiet"))
        world.workers.worker_said("w#9", LogLine(logging.INFO, "my.logger", "of nobody"))
        await world.workers.kill(worker)

    main()
    (record,) = [record for record in caplog.records if record.name == "engine.replica.w.1"]
    assert record.getMessage() == "100 %s"
    assert record.worker_logger == "my.logger"  # type: ignore[attr-defined]
