"""The replicas of one backend, on an adapter that does what the test says."""

from __future__ import annotations

import asyncio
import logging
import pickle
import re
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from control_fakes import replicas_of
from fakes import until

from engine.config import BackendConfig
from engine.control.restarts import Restarts
from engine.control.workers import Worker, Workers
from engine.errors import EngineClosed
from engine.seam.control_messages import (
    Answered,
    Drain,
    Drained,
    LogLine,
    Ready,
    Reconfigure,
    Reconfigured,
    StartFailed,
    Unhealthy,
)
from engine.seam.serialization import pack_exception
from engine.seam.worker import WorkerExit, WorkerSpec
from engine.testing.fakes import FakeAdapter


@pytest.mark.parametrize("ends", ["they fail", "it is given up"])
def test_what_does_not_start_is_gone_when_that_is_told(ends: str) -> None:
    """However many of them fail or are killed at a time: the next ones may have the same names."""

    async def main() -> None:
        adapter = FakeAdapter()
        workers = Workers(adapter, lambda worker: None)
        backend = replicas_of(adapter, workers, count=3)

        def fail(spec: WorkerSpec) -> None:
            told = StartFailed(pack_exception(ValueError("not today")))
            asyncio.get_running_loop().call_soon(workers.worker_said, spec.worker_id, told)

        adapter.on_start = fail if ends == "they fail" else None
        creating = asyncio.ensure_future(backend.create())
        await until(lambda: len(adapter.started) == 3)
        if ends != "they fail":
            creating.cancel()
        await until(lambda: len(set(adapter.killed)) == 3)
        for number in (1, 2, 3):
            for _ in range(20):
                await asyncio.sleep(0)
            assert not creating.done(), f"{len(workers)} of them are left"
            workers.worker_exited(WorkerExit(f"b#{number}", "was killed"))
        with pytest.raises(ValueError if ends == "they fail" else asyncio.CancelledError):
            await creating

    asyncio.run(asyncio.wait_for(main(), 20))


def test_the_log_has_the_traceback_of_what_keeps_a_replica_from_starting(caplog: pytest.LogCaptureFixture) -> None:
    """Once for each reason, not each time."""

    def of_the_model(reason: str) -> bytes:
        try:
            raise RuntimeError(reason)  # the line that raises
        except RuntimeError as error:
            return pack_exception(error)

    reasons = ["model file is gone", "model file is gone", "no disk"]

    async def main() -> None:
        adapter = FakeAdapter()
        workers = Workers(adapter, lambda worker: None)
        backend = replicas_of(adapter, workers, count=1)

        def fail(spec: WorkerSpec) -> None:
            told = StartFailed(of_the_model(reasons[min(len(adapter.started), len(reasons)) - 1]))
            loop = asyncio.get_running_loop()
            loop.call_soon(workers.worker_said, spec.worker_id, told)
            loop.call_soon(workers.worker_exited, WorkerExit(spec.worker_id, "ended"))

        adapter.on_start = fail
        refilling = asyncio.ensure_future(backend.refill())
        await until(lambda: len(caplog.records) >= len(reasons))
        backend.deleted = True
        await refilling

    asyncio.run(asyncio.wait_for(main(), 20))
    texts = [logging.Formatter().format(record) for record in caplog.records[: len(reasons)]]
    assert [text.splitlines()[0] for text in texts] == [
        f"backend 'b': a replica could not be replaced: RuntimeError: {reason}" for reason in reasons
    ]
    assert ["# the line that raises" in text for text in texts] == [True, False, True]


# -- replacing those that died ---------------------------------------------------------------------------------------


class Caught(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class SlowAfter(Restarts):
    """Lets places wait for long after so many failures."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self._most = failures

    def failed(self, began: float, now: float) -> bool:
        counts = super().failed(began, now)
        if self.failures >= self._most:
            self.not_before = now + 1000.0
        return counts


class Dying:
    """Replicas in service, on an adapter where new ones become ready when the test lets them."""

    def __init__(self, count: int = 4) -> None:
        self.adapter = FakeAdapter(on_kill=lambda worker_id: self.soon_gone(worker_id, "was killed"))
        self.adapter.on_tell = self._told
        self.workers = Workers(self.adapter, self._lost)
        self.backend = replicas_of(self.adapter, self.workers, count=count)
        self.backend.announce = self._announced
        self.announced: list[tuple[str, bool, int]] = []  # what callers and applications were told
        self._refills: list[asyncio.Future[None]] = []

    def _announced(self) -> None:
        entry = self.backend.entry()
        self.announced.append((self.backend.state, entry.expecting, len(entry.replicas)))

    def _lost(self, worker: Worker) -> None:
        if self.backend.lost(worker):
            self._announced()
            self.refill()

    def _told(self, worker_id: str, body: object) -> None:
        if isinstance(body, Drain):
            self.workers.worker_said(worker_id, Drained())
            self.soon_gone(worker_id, "left")

    def refill(self) -> None:
        self._refills.append(asyncio.ensure_future(self.backend.refill()))

    def soon_gone(self, worker_id: str, reason: str) -> None:
        asyncio.get_running_loop().call_soon(self.workers.worker_exited, WorkerExit(worker_id, reason))

    def become_ready(self, worker_id: str) -> None:
        self.workers.worker_said(worker_id, Ready("fake"))

    def ready_at_once(self, spec: WorkerSpec) -> None:
        asyncio.get_running_loop().call_soon(self.become_ready, spec.worker_id)

    def die(self, *worker_ids: str) -> None:
        for worker_id in worker_ids:
            self.workers.worker_exited(WorkerExit(worker_id, "was killed by SIGKILL"))

    @property
    def in_service(self) -> list[str]:
        return [worker.spec.worker_id for worker in self.backend.running]

    @property
    def started(self) -> list[str]:
        return [spec.worker_id for spec in self.adapter.started]


def dying(count: int) -> Callable[[Callable[[Dying], Coroutine[Any, Any, None]]], Callable[[], None]]:
    def decorate(test: Callable[[Dying], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        def run() -> None:
            async def main() -> None:
                world = Dying(count)
                world.adapter.on_start = world.ready_at_once
                await world.backend.create()
                world.adapter.on_start = None
                await asyncio.wait_for(test(world), 20)
                world.backend.deleted = True
                await world.backend.end_fills()
                await world.backend.end(world.backend.all_ready(), at_once=True)
                assert len(world.workers) == 0, "a worker is left"

            asyncio.run(main())

        run.__name__ = test.__name__
        return run

    return decorate


@dying(4)
async def test_those_that_die_together_are_replaced_side_by_side(world: Dying) -> None:
    world.die("b#1", "b#3", "b#4")
    await until(lambda: world.started[4:] == ["b#5", "b#6", "b#7"])
    world.become_ready("b#7")  # those that are slow hold up nobody
    await until(lambda: world.in_service == ["b#2", "b#7"])
    world.die("b#7", "b#2")
    await until(lambda: world.started[7:] == ["b#8", "b#9"])
    for number in (5, 6, 8, 9):
        world.become_ready(f"b#{number}")
    await until(lambda: len(world.in_service) == 4)


@dying(1)
async def test_how_one_ended_is_told(world: Dying) -> None:
    """In the log and in the statistics: the exit, and what it wrote to its standard error before."""
    for stream, text in (("stderr", "Traceback"), ("stdout", "not this"), ("stderr", "MemoryError")):
        world.workers.worker_said("b#1", LogLine(logging.WARNING, stream, text))
    caught = Caught()
    logging.getLogger("engine.controller").addHandler(caught)
    try:
        world.workers.worker_exited(WorkerExit("b#1", "exited with code 3"))
    finally:
        logging.getLogger("engine.controller").removeHandler(caught)
    told = r"replica\.b\.1 exited with code 3 after \d+\.\d s"
    assert re.fullmatch(rf"{told}; its last words:\nTraceback\nMemoryError", world.backend.describe()["last_error"])
    assert re.fullmatch(rf"{told}; replacing it; its last words:\nTraceback\nMemoryError", caught.texts[0])


@dying(4)
async def test_deaths_of_the_young_are_no_failures(world: Dying) -> None:
    """All of them die as soon as they are ready, as often as is plausible."""
    world.adapter.on_start = world.ready_at_once
    for round in range(3):
        first = 1 + 4 * round
        world.die(*[f"b#{number}" for number in range(first, first + 4)])
        await until(lambda first=first: world.in_service == [f"b#{n}" for n in range(first + 4, first + 8)])  # type: ignore[misc]
    assert {state for state, _, _ in world.announced} <= {"starting", "ready"}
    assert all(expecting for _, expecting, _ in world.announced)
    assert world.backend.describe()["failures"] == 0


@dying(3)
async def test_a_start_that_fails_delays_no_other(world: Dying) -> None:
    def start(spec: WorkerSpec) -> None:
        if spec.worker_id == "b#4":
            world.soon_gone(spec.worker_id, "exited with code 3")

    world.adapter.on_start = start
    world.backend.restarts = SlowAfter(1)
    world.die("b#1")
    await until(lambda: world.backend.describe()["failures"] == 1)
    world.die("b#2")
    await until(lambda: world.started[3:] == ["b#4", "b#5"])
    assert world.backend.state == "failing"
    world.become_ready("b#5")  # so the other place may be tried again
    await until(lambda: world.started[5:] == ["b#6"])
    world.become_ready("b#6")
    await until(lambda: world.in_service == ["b#3", "b#5", "b#6"])
    assert world.backend.describe()["failures"] == 0


@dying(1)
async def test_callers_wait_while_anything_can_come_back(world: Dying) -> None:
    """A backend whose starts fail is unhealthy after the third try; any success, or an update, ends that."""
    world.backend.restarts = SlowAfter(3)
    world.adapter.refuses = ValueError("no model")
    world.die("b#1")
    await until(lambda: world.backend.state == "unhealthy")
    assert [told[:2] for told in world.announced] == [
        ("starting", True),
        ("failing", True),
        ("failing", True),
        ("unhealthy", False),
    ]
    assert world.backend.entry().last_error == "ValueError: no model"
    world.adapter.refuses = None
    world.adapter.on_start = world.ready_at_once
    updating = asyncio.ensure_future(world.backend.update({"num_replicas": 1}))
    await until(lambda: world.backend.state != "unhealthy")
    await updating
    await until(lambda: world.backend.state == "ready" and len(world.backend.running) == 1)
    assert world.backend.entry().last_error == ""


@dying(50)
async def test_many_that_do_not_start_are_told_of_once_a_round_and_heal_together(world: Dying) -> None:
    """Each has its own name, process and port in what it says."""
    caught = Caught()
    world.backend.restarts = SlowAfter(3)

    def fail(spec: WorkerSpec) -> None:
        world.soon_gone(spec.worker_id, f"exited with code 3 (port {len(world.started)} is taken)")

    world.adapter.on_start = fail
    world.die(*[f"b#{number}" for number in range(1, 51)])
    logging.getLogger("engine.controller").addHandler(caught)
    try:
        await until(lambda: len(world.started) == 200)
        await until(lambda: len(world.workers) == 0)
        assert world.backend.state == "unhealthy"
        assert [text.partition(":")[0] for text in caught.texts] == ["backend 'b'"] * 3
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(world.started) == 200, "they wait"
    finally:
        logging.getLogger("engine.controller").removeHandler(caught)
    world.adapter.on_start = world.ready_at_once
    await world.backend.update({"max_queued_requests": 7})
    await until(lambda: world.backend.state == "ready" and len(world.in_service) == 50)
    assert len(world.started) == 250


@dying(1)
async def test_while_one_start_goes_on_others_that_fail_leave_hope(world: Dying) -> None:
    world.die("b#1")
    await until(lambda: world.started[1:] == ["b#2"])  # takes its time
    world.backend.plan = replace(world.backend.plan, config=BackendConfig(num_replicas=2))
    world.adapter.refuses = ValueError("no room for two")
    world.refill()
    await until(lambda: world.backend.describe()["failures"] >= 3)
    assert world.backend.state == "failing"
    world.die("b#2")
    await until(lambda: world.backend.state == "unhealthy")


@dying(2)
async def test_a_change_that_takes_long_delays_no_replacement(world: Dying) -> None:
    async with world.backend.turns.turn():
        world.die("b#1")
        await until(lambda: world.started[2:] == ["b#3"])
        world.become_ready("b#3")
        await until(lambda: world.in_service == ["b#2", "b#3"])


@dying(2)
async def test_none_is_started_with_what_is_being_changed(world: Dying) -> None:
    """Neither before nor while the others are told: it would not know."""
    world.die("b#1")
    await until(lambda: world.started[2:] == ["b#3"])
    told: list[Reconfigure] = []
    world.adapter.on_tell = lambda worker_id, body: told.append(body)  # type: ignore[arg-type]
    updating = asyncio.ensure_future(world.backend.update({"max_concurrent_queries": 3}))
    await until(lambda: told and "b#3" in world.adapter.killed)
    world.refill()
    world.workers.worker_said("b#2", Reconfigured(told[0].token, None))
    world.adapter.on_tell = None
    await until(lambda: world.started[3:] == ["b#4"])
    assert pickle.loads(world.adapter.started[-1].payload).config.max_concurrent_queries == 3
    world.become_ready("b#4")
    await updating
    assert world.in_service == ["b#2", "b#4"]


@dying(2)
async def test_one_that_dies_while_it_is_told_a_change_refuses_nothing(world: Dying) -> None:
    """The one in its place takes it."""
    await change_that_one_dies_of(world, starts=True)


@dying(2)
async def test_a_change_of_which_one_dies_is_taken_back_if_no_other_starts(world: Dying) -> None:
    await change_that_one_dies_of(world, starts=False)


async def change_that_one_dies_of(world: Dying, *, starts: bool) -> None:
    told: list[tuple[str, object]] = []

    def tell(worker_id: str, body: object) -> None:
        told.append((worker_id, body))
        if len(told) == 1:
            world.soon_gone(worker_id, "was killed by SIGKILL")
        elif isinstance(body, Reconfigure):
            asyncio.get_running_loop().call_soon(world.workers.worker_said, worker_id, Reconfigured(body.token, None))

    world.adapter.on_tell = tell
    world.adapter.on_start = world.ready_at_once
    world.adapter.refuses = None if starts else ValueError("no model")
    update = world.backend.update({"max_concurrent_queries": 3})
    if starts:
        await update
    else:
        with pytest.raises(ValueError, match="no model"):
            await update
    rules = 3 if starts else None
    assert world.backend.config.max_concurrent_queries == rules
    (last,) = [body for worker_id, body in told[-1:] if worker_id == "b#2" and isinstance(body, Reconfigure)]
    assert pickle.loads(last.config).max_concurrent_queries == rules
    assert world.in_service == (["b#2", "b#3"] if starts else ["b#2"])


@dying(2)
async def test_fewer_are_wanted_when_one_becomes_ready(world: Dying) -> None:
    world.die("b#1")
    await until(lambda: world.started[2:] == ["b#3"])
    await world.backend.update({"num_replicas": 1})
    world.become_ready("b#3")
    await until(lambda: world.adapter.killed == ["b#3"])
    assert world.in_service == ["b#2"]


@dying(2)
async def test_one_that_is_too_many_is_not_kept_for_having_been_due(world: Dying) -> None:
    world.backend.mark_worn(world.backend.running[1], "is old")
    await world.backend.update({"num_replicas": 1})
    assert world.in_service == ["b#1"]
    assert not world.backend.marked


@dying(1)
async def test_a_new_version_heals_what_does_not_start(world: Dying) -> None:
    world.backend.restarts = SlowAfter(3)
    world.adapter.refuses = ValueError("no model")
    world.die("b#1")
    await until(lambda: world.backend.state == "unhealthy")
    world.adapter.refuses = None
    world.adapter.on_start = world.ready_at_once
    await world.backend.replace(world.backend.plan)
    assert world.backend.state == "ready"
    assert [worker.version for worker in world.backend.running] == [2]
    assert world.backend.entry().last_error == ""
    await until(lambda: not world.backend.dismissals)  # the former version is not tried any more
    assert not world.backend._refill.fills


@pytest.mark.parametrize("version", [True, False])
def test_what_was_starting_has_gone_before_others_start(version: bool) -> None:
    """They may need what it holds: the only GPU."""

    @dying(1)
    async def test(world: Dying) -> None:
        world.die("b#1")
        await until(lambda: world.started[1:] == ["b#2"])
        seen: list[bool] = []

        def on_start(spec: WorkerSpec) -> None:
            seen.append(world.workers.get("b#2") is not None)
            world.ready_at_once(spec)

        world.adapter.on_start = on_start
        if version:
            await world.backend.replace(world.backend.plan)
        else:
            await world.backend.update({"max_concurrent_queries": 3})
        assert seen == [False]
        assert world.in_service == ["b#3"]

    test()


@dying(1)
async def test_what_waits_to_be_tried_again_is_given_up_for_a_change(world: Dying) -> None:
    """Though it is woken in the same moment, which keeps some versions of Python from ending it."""
    world.backend.restarts = SlowAfter(1)
    world.adapter.refuses = ValueError("no model")
    world.die("b#1")
    await until(lambda: world.backend.describe()["last_error"] == "ValueError: no model")
    assert world.backend._refill.fills
    with pytest.raises(ValueError, match="no model"):
        await world.backend.update({"max_concurrent_queries": 3})
    assert not world.backend._refill.fills


@dying(2)
async def test_an_exchange_that_meets_a_shutdown_ends_with_it(world: Dying) -> None:
    plan = world.backend.plan
    world.backend.plan = plan = replace(plan, config=plan.config.updated({"max_surge": 0, "max_unavailable": 1}))
    world.adapter.on_tell = None  # those that leave take their time
    replacing = asyncio.ensure_future(world.backend.replace(plan))
    await until(lambda: len(world.adapter.told) == 1)
    await world.workers.close()
    ending = asyncio.ensure_future(world.backend.end(world.backend.all_ready()))
    await until(lambda: len(world.adapter.told) == 3)
    world.die("b#1")
    with pytest.raises(EngineClosed):
        await replacing
    world.die("b#2")
    await ending


@dying(2)
async def test_one_that_dies_while_a_new_version_starts_is_replaced(world: Dying) -> None:
    replacing = asyncio.ensure_future(world.backend.replace(world.backend.plan))
    await until(lambda: world.started[2:] == ["b#3", "b#4"])
    world.die("b#1")
    await until(lambda: world.started[4:] == ["b#5"])
    world.become_ready("b#5")
    await until(lambda: world.in_service == ["b#2", "b#5"])
    world.become_ready("b#3")
    world.become_ready("b#4")
    await replacing
    assert world.in_service == ["b#3", "b#4"]
    assert [worker.version for worker in world.backend.running] == [2, 2]


@dying(3)
async def test_no_more_stay_than_are_wanted(world: Dying) -> None:
    """Whoever exchanges one starts also what is missing: for both at once there might be no room."""
    world.die("b#2")
    await until(lambda: world.started[3:] == ["b#4"])
    exchanging = asyncio.ensure_future(world.backend.replace_one(world.backend.running[0], "is old"))
    await until(lambda: world.started[4:] == ["b#5", "b#6"])
    assert world.adapter.killed == ["b#4"]
    for number in (5, 6):
        world.become_ready(f"b#{number}")
    await exchanging
    assert world.in_service == ["b#3", "b#5", "b#6"]
    assert world.started[6:] == []
    await until(lambda: len(world.workers) == 3)


@dying(1)
async def test_one_that_leaves_as_soon_as_it_is_ready_does_not_spin(world: Dying) -> None:
    """Unless it has answered a call before."""
    world.adapter.on_start = world.ready_at_once
    for number in range(1, 31):
        world.workers.worker_said(f"b#{number}", Answered())
        world.die(f"b#{number}")
        await until(lambda number=number: world.in_service == [f"b#{number + 1}"])  # type: ignore[misc]
    slept: list[float] = []
    world.backend._refill._fill = lambda wait_s: slept.append(wait_s) or asyncio.sleep(0)  # type: ignore[method-assign, func-returns-value]
    for number in range(31, 43):
        world.die(f"b#{number}")
        await until(lambda number=number: len(slept) == number - 30)  # type: ignore[misc]
        world.backend._refill.fills.clear()
        world.backend.running += await world.backend.start(world.backend.plan, 1)
    assert [wait_s > 0 for wait_s in slept] == [False] * 10 + [True] * 2
    assert 0 < slept[10] < slept[11] < 4


@dying(1)
async def test_one_that_made_room_in_vain_is_missed(world: Dying) -> None:
    """It has left already when the other one does not start: that is tried until one does."""
    plan = world.backend.plan
    world.backend.plan = replace(plan, config=plan.config.updated({"max_surge": 0, "max_unavailable": 1}))
    world.adapter.on_start = world.ready_at_once
    for worn in (True, False):
        world.adapter.refuses = ValueError(f"not today, {worn}")
        (first,) = world.backend.running
        if worn:
            world.backend.mark_worn(first, "has begun 3 calls")
            exchanging = asyncio.ensure_future(world.backend.renew())
        else:
            exchanging = asyncio.ensure_future(world.backend.replace_one(first, "is unhealthy"))
        await until(lambda: f"not today, {worn}" in str(world.backend.describe()["last_error"]))  # noqa: B023
        world.adapter.refuses = None
        await until(lambda: len(world.in_service) == 1)
        await exchanging
        assert first not in world.backend.running


# -- replacing one -------------------------------------------------------------------------------------------------


class Replacing:
    """Two replicas in service, on an adapter where new ones are ready at once and killed ones gone at once."""

    def __init__(self) -> None:
        self.adapter = FakeAdapter(on_kill=lambda worker_id: self._soon_gone(worker_id, "was killed"))
        self.adapter.on_start = lambda spec: self._soon(self.workers.worker_said, spec.worker_id, Ready("fake"))
        self.adapter.on_tell = self._told
        self.asked: list[Unhealthy] = []
        self.workers = Workers(self.adapter, lambda worker: None, self._asks)
        self.backend = replicas_of(self.adapter, self.workers, count=2)

    def _asks(self, worker: Worker, told: Unhealthy) -> bool:
        self.asked.append(told)
        return worker in self.backend.running

    @staticmethod
    def _soon(function: Callable[..., object], *args: object) -> None:
        asyncio.get_running_loop().call_soon(function, *args)

    def _soon_gone(self, worker_id: str, reason: str) -> None:
        self._soon(self.workers.worker_exited, WorkerExit(worker_id, reason))

    def _told(self, worker_id: str, body: object) -> None:
        if isinstance(body, Drain):
            self.workers.worker_said(worker_id, Drained())
            self._soon_gone(worker_id, "left")

    @property
    def in_service(self) -> list[str]:
        return [worker.spec.worker_id for worker in self.backend.running]


def replacing(test: Callable[[Replacing], Coroutine[Any, Any, None]]) -> Any:
    def run() -> None:
        async def main() -> None:
            world = Replacing()
            await world.backend.create()
            assert world.in_service == ["b#1", "b#2"]
            await asyncio.wait_for(test(world), 20)

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


@replacing
async def test_one_that_serves_is_replaced_before_it_leaves(world: Replacing) -> None:
    first = world.backend.running[0]
    at_start: list[list[str]] = []
    become_ready = world.adapter.on_start
    assert become_ready is not None
    world.adapter.on_start = lambda spec: (at_start.append(world.in_service), become_ready(spec))  # type: ignore[func-returns-value]
    asking = [world.backend.replace_one(first, "is old") for _ in range(3)]  # it may say so more than once
    await asyncio.gather(*asking)
    assert at_start == [["b#1", "b#2"]]
    assert world.in_service == ["b#2", "b#3"]
    await until(first.gone.is_set)
    assert world.adapter.killed == []
    assert world.backend.describe()["last_error"] == "replica.b.1 is old"
    await world.backend.replace_one(first, "is old")
    assert len(world.adapter.started) == 3


@replacing
async def test_one_that_hangs_is_out_of_service_at_once(world: Replacing) -> None:
    first = world.backend.running[0]
    async with world.backend.turns.turn():  # somebody else's change takes long
        task = asyncio.ensure_future(world.backend.replace_one(first, "hangs", at_once=True))
        await until(lambda: first not in world.backend.running)
        await until(first.gone.is_set)
        assert world.adapter.killed == ["b#1"]
        assert world.backend.entry().dead == ("b#1",)
        await task
        assert world.in_service == ["b#2", "b#3"]


@replacing
async def test_one_that_serves_goes_on_if_no_other_starts(world: Replacing) -> None:
    world.adapter.refuses = ValueError("not today")
    replacing = asyncio.ensure_future(world.backend.replace_one(world.backend.running[0], "is old"))
    await until(lambda: world.backend.describe()["last_error"] == "ValueError: not today")
    assert world.in_service == ["b#1", "b#2"]
    world.adapter.refuses = None
    await replacing
    assert world.in_service == ["b#2", "b#4"]


@replacing
async def test_one_that_dies_meanwhile_leaves_its_place_to_the_other(world: Replacing) -> None:
    first, second = world.backend.running
    become_ready = world.adapter.on_start
    assert become_ready is not None
    world.adapter.on_start = lambda spec: (world.backend.lost(first), become_ready(spec))  # type: ignore[func-returns-value]
    await world.backend.replace_one(first, "is old")
    assert world.in_service == ["b#2", "b#3"]
    assert second in world.backend.running


@replacing
async def test_what_a_replica_says_of_itself_is_passed_on_while_it_serves(world: Replacing) -> None:
    world.workers.worker_said("b#1", Unhealthy("hangs", hung=True))
    assert world.asked == [Unhealthy("hangs", hung=True)]
    await world.workers.kill(world.backend.running[0])
    world.workers.worker_said("b#1", Unhealthy("hangs", hung=True))
    assert len(world.asked) == 1
