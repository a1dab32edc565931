"""The versions of one backend, one after the other, on an adapter that does what the test says."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from control_fakes import plan_of, replicas_of
from fakes import until

from engine.config import BackendConfig
from engine.control.ages import Age, Ages, lifetime_s
from engine.control.recycling import Recycling
from engine.control.rollout import Room
from engine.control.workers import Worker, Workers
from engine.errors import BackendStartError
from engine.seam.control_messages import Drain, Drained, Ready, StartFailed
from engine.seam.serialization import pack_exception
from engine.seam.worker import WorkerExit, WorkerSpec
from engine.serving.wear import Memory
from engine.testing.fakes import FakeAdapter


class Fleet:
    """Replicas of backend ``b`` that start and leave when the test says so; `log` tells what happened to them."""

    def __init__(self, count: int, **config: Any) -> None:
        self.log: list[str] = []
        self.broken: set[str] = set()  # names of those that do not start
        self.fragile: set[str] = set()  # names of those that die as soon as they are in service
        self.leave_at_once = True
        self.leaving: dict[str, None] = {}  # those that take their time
        self.holds_starts = False
        self.held: dict[str, None] = {}  # those that start, and take their time
        self.refills = False
        self._refills: list[asyncio.Future[None]] = []
        self.kept_from_publishing = False
        self.adapter = FakeAdapter(on_start=self._start, on_tell=self._tell, on_kill=self.end)
        self.workers = Workers(self.adapter, self._lost)
        self.backend = replicas_of(self.adapter, self.workers, count=count, publish=self._publish, **config)

    def _soon(self, call: Callable[..., Any], *args: Any) -> None:
        asyncio.get_running_loop().call_soon(call, *args)

    def _start(self, spec: WorkerSpec) -> None:
        self.log.append(f"+{spec.worker_id}")
        if self.holds_starts:
            self.held[spec.worker_id] = None
        elif spec.worker_id in self.broken:
            self._soon(self.workers.worker_said, spec.worker_id, StartFailed(pack_exception(LookupError("no model"))))
        else:
            self._soon(self.workers.worker_said, spec.worker_id, Ready(f"fake:{spec.worker_id}"))

    def _tell(self, worker_id: str, body: object) -> None:
        if isinstance(body, Drain):
            self.log.append(f"-{worker_id}")
            self.leaving[worker_id] = None
            if self.leave_at_once:
                self.let(worker_id)

    def let(self, worker_id: str) -> None:
        """Let one that starts be ready, or one that leaves go."""
        if worker_id in self.held:
            del self.held[worker_id]
            self._soon(self.workers.worker_said, worker_id, Ready(f"fake:{worker_id}"))
        else:
            self.workers.worker_said(worker_id, Drained())
            self.end(worker_id)

    def end(self, worker_id: str, reason: str = "left") -> None:
        for those in (self.held, self.leaving):
            those.pop(worker_id, None)
        self._soon(self.workers.worker_exited, WorkerExit(worker_id, reason))

    def _lost(self, worker: Worker) -> None:
        if self.backend.lost(worker) and self.refills:
            self._refills.append(asyncio.ensure_future(self.backend.refill()))

    def _publish(self) -> int:
        if self.kept_from_publishing:
            raise ConnectionError("the store is away")
        self.log.append(" ".join(self.serving) or "none")
        for name in self.fragile.intersection(self.serving):
            self.end(name)
        return 1

    @property
    def serving(self) -> list[str]:
        return [one.replica_tag for one in self.backend.entry().replicas]

    @property
    def versions(self) -> list[int]:
        return [one.version for one in self.backend.running]

    async def replace(self, count: int, **config: Any) -> None:
        self.log.clear()
        async with self.backend.turns.turn():
            departures = await self.backend.replace(plan_of(count, **config))
        await asyncio.gather(*departures)


def in_fleet(count: int, **config: Any) -> Callable[[Callable[[Fleet], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Run a test on a loop of its own, with replicas that are in service."""

    def decorate(test: Callable[[Fleet], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def main() -> None:
            fleet = Fleet(count, **config)
            await fleet.backend.create()
            await test(fleet)

        def run() -> None:
            asyncio.run(asyncio.wait_for(main(), 20))

        run.__name__ = test.__name__
        run.__doc__ = test.__doc__
        return run

    return decorate


@in_fleet(2)
async def test_all_new_ones_are_ready_before_an_old_one_leaves(fleet: Fleet) -> None:
    await fleet.replace(2)
    assert fleet.log == ["+b#3", "+b#4", "b#3 b#4", "-b#1", "-b#2"]
    assert fleet.backend.plan.version == 2
    assert fleet.versions == [2, 2]


@in_fleet(3, max_surge=1)
async def test_with_one_more_at_a_time_they_are_exchanged_one_by_one(fleet: Fleet) -> None:
    await fleet.replace(3, max_surge=1)
    assert [entry for entry in fleet.log if entry[0] == "b"] == ["b#2 b#3 b#4", "b#3 b#4 b#5", "b#4 b#5 b#6"]
    assert [entry for entry in fleet.log if entry[0] != "b"] == ["+b#4", "-b#1", "+b#5", "-b#2", "+b#6", "-b#3"]


@in_fleet(2, max_surge=0, max_unavailable=1)
async def test_where_there_is_no_room_one_ends_before_another_starts(fleet: Fleet) -> None:
    fleet.leave_at_once = False
    replacing = asyncio.ensure_future(fleet.replace(2, max_surge=0, max_unavailable=1))
    await until(lambda: fleet.log == ["b#2", "-b#1"])
    for _ in range(20):
        await asyncio.sleep(0)
    assert fleet.log == ["b#2", "-b#1"]  # it has not ended
    fleet.let("b#1")
    await until(lambda: fleet.log[2:] == ["+b#3", "b#3", "-b#2"])
    assert fleet.backend.plan.version == 1
    fleet.let("b#2")
    await replacing
    assert fleet.log[5:] == ["+b#4", "b#3 b#4"]
    assert fleet.backend.plan.version == 2


@pytest.mark.parametrize("how", ["does not start", "is not kept", "is given up"])
def test_what_fails_half_way_is_rolled_back_and_what_made_room_is_started_again(how: str) -> None:
    """With as many in service as ever: what of the new version serves already does so until it is exchanged again."""

    @in_fleet(3, max_surge=0, max_unavailable=1)
    async def check(fleet: Fleet) -> None:
        if how == "does not start":
            fleet.broken = {"b#5"}
            with pytest.raises(LookupError, match="no model"):
                await fleet.replace(3, max_surge=0, max_unavailable=1)
        else:
            start = fleet.adapter.on_start
            assert start is not None
            fleet.adapter.on_start = lambda spec: None if spec.worker_id == "b#5" else start(spec)
            replacing = asyncio.ensure_future(fleet.replace(3, max_surge=0, max_unavailable=1))
            await until(lambda: [one.worker_id for one in fleet.adapter.started][-1] == "b#5")
            if how == "is given up":
                replacing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await replacing
            else:
                fleet.kept_from_publishing = True
                start(fleet.adapter.started[-1])
                with pytest.raises(ConnectionError):
                    await replacing
                fleet.kept_from_publishing = False
        assert fleet.serving == ["b#3", "b#6", "b#7"]
        assert fleet.versions == [1, 1, 1]
        assert fleet.backend.plan.version == 1
        assert not fleet.backend.outdated
        await until(lambda: len(fleet.workers) == 3)
        assert all(len(entry.split()) >= 2 for entry in fleet.log if entry[0] == "b"), fleet.log
        fleet.broken = set()
        await fleet.replace(3)  # nothing of it is left that would keep the next one from being
        assert fleet.versions == [2, 2, 2]

    check()


@in_fleet(2)
async def test_what_does_not_start_at_all_changes_nothing(fleet: Fleet) -> None:
    fleet.broken = {"b#4"}
    with pytest.raises(LookupError, match="no model"):
        await fleet.replace(2)
    assert (fleet.log, fleet.serving) == (["+b#3", "+b#4"], ["b#1", "b#2"])
    assert len(fleet.workers) == 2


@in_fleet(3, max_surge=1)
async def test_a_version_that_dies_while_it_takes_over_is_one_that_does_not_start(fleet: Fleet) -> None:
    fleet.fragile = {"b#4", "b#5", "b#6"}
    with pytest.raises(
        BackendStartError, match="replicas of the new version end soon after they are ready; the last one: replica"
    ):
        await fleet.replace(3, max_surge=1)
    assert fleet.versions == [1, 1, 1]
    assert fleet.backend.plan.version == 1


@in_fleet(2, max_surge=1)
async def test_one_that_dies_while_the_others_take_over_is_made_up_for(fleet: Fleet) -> None:
    fleet.fragile = {"b#3"}
    await fleet.replace(2, max_surge=1)
    assert (fleet.versions, fleet.backend.plan.version) == ([2, 2], 2)


@in_fleet(2, max_surge=0, max_unavailable=1, max_concurrent_queries=8)
async def test_each_replica_is_listed_with_the_limit_of_its_version(fleet: Fleet) -> None:
    listed = []
    publish = fleet._publish

    def note() -> int:
        entry = fleet.backend.entry()
        listed.append((entry.max_concurrent_queries, [one.limit for one in entry.replicas]))
        return publish()

    fleet.backend.publish = note
    await fleet.replace(2, max_surge=0, max_unavailable=1, max_concurrent_queries=2)
    assert listed == [(8, [None]), (8, [2]), (2, [None, None])]


@in_fleet(2)
async def test_what_an_exchange_left_behind_is_exchanged_in_the_background(fleet: Fleet) -> None:
    """However often the version that rules does not start at first."""
    backend = fleet.backend
    backend.plan = replace(backend.plan, version=7)
    fleet.broken = {"b#3", "b#4"}
    renewing = asyncio.ensure_future(backend.renew())
    await until(lambda: "+b#4" in fleet.log)
    fleet.broken = set()
    await renewing
    assert fleet.versions == [7, 7]
    assert not backend.outdated


@pytest.mark.parametrize("surge", [0, 1, 2, "100%"])
@pytest.mark.parametrize("what", ["another version", "those that are due"])
def test_there_are_never_too_many_whoever_dies_meanwhile(what: str, surge: int | str) -> None:
    """Those that are started in the places of the dead take up room, too; and all of it comes to an end."""
    for seed in range(12):
        chance = random.Random(seed)

        @in_fleet(4, max_surge=surge, max_unavailable=1)
        async def exchange_among_deaths(fleet: Fleet, chance: random.Random = chance) -> None:
            backend = fleet.backend
            config = backend.config
            most = (Room.between(config, config) if what == "another version" else Room.for_few(config)).most
            fleet.leave_at_once = False
            fleet.holds_starts = True
            fleet.refills = True
            if what == "another version":
                changing = asyncio.ensure_future(fleet.replace(4, max_surge=surge, max_unavailable=1))
            else:
                for worker in backend.running:
                    backend.mark_worn(worker, "is old")
                changing = asyncio.ensure_future(backend.renew())
            deaths = 6
            while not changing.done():
                for _ in range(20):
                    await asyncio.sleep(0)
                assert len(fleet.workers) <= most, fleet.log
                steps = [*fleet.held, *fleet.leaving]
                if deaths and backend.running and chance.random() < 0.3:
                    deaths -= 1
                    fleet.end(chance.choice(backend.running).spec.worker_id)
                elif steps:
                    fleet.let(chance.choice(steps))
            with suppress(BackendStartError):  # so many died
                await changing
            fleet.holds_starts, fleet.leave_at_once = False, True
            for one in [*fleet.held, *fleet.leaving]:
                fleet.let(one)
            await backend.renew()
            await until(lambda: len(backend.running) == 4 == len(fleet.workers))
            assert not backend.due

        exchange_among_deaths()


@in_fleet(2, max_surge=0, max_unavailable=1)
async def test_what_is_left_of_a_version_that_was_rolled_back_is_not_taken_for_the_next(fleet: Fleet) -> None:
    """Neither is it returned to the one that rules, while that does not start."""
    fleet.broken = {"b#4", "b#5"}
    with pytest.raises(LookupError):
        await fleet.replace(2, max_surge=0, max_unavailable=1)
    assert (fleet.serving, fleet.versions) == (["b#3"], [2])
    await fleet.replace(2)
    assert fleet.serving == ["b#6", "b#7"]


@in_fleet(1, graceful_shutdown_timeout_s=1000.0)
async def test_callers_are_told_of_one_that_dies_while_it_leaves(fleet: Fleet) -> None:
    """Its calls fail then, also if its whole machine fell silent: no channel to it breaks."""
    fleet.leave_at_once = False
    replacing = asyncio.ensure_future(fleet.replace(1))
    await until(lambda: fleet.log[-1:] == ["-b#1"])
    fleet.log.clear()
    fleet.end("b#1", "'s node died")
    await replacing
    assert fleet.backend.entry().dead == ("b#1",)
    assert fleet.log == ["b#2"]
    replacing = asyncio.ensure_future(fleet.replace(1))
    await until(lambda: fleet.log[-1:] == ["-b#2"])
    fleet.let("b#2")  # as it should
    await replacing
    assert fleet.backend.entry().dead == ("b#1",)
    assert fleet.log[-1] == "-b#2"


# -- recycling -------------------------------------------------------------------------------------------------------


@in_fleet(3)
async def test_worn_replicas_are_exchanged_one_by_one_and_others_come_first(fleet: Fleet) -> None:
    """Each ends before the next one is exchanged; who says it again meanwhile is heard once."""
    backend = fleet.backend
    fleet.leave_at_once = False
    fleet.log.clear()
    marked = [backend.mark_worn(worker, "is old") for worker in [*backend.running[:2], *backend.running[:2]]]
    assert marked == [True, True, False, False]
    renewing = asyncio.ensure_future(backend.renew())
    await until(lambda: fleet.log == ["+b#4", "b#2 b#3 b#4", "-b#1"])
    await backend.renew()  # somebody is at it
    async with backend.turns.turn():  # while one takes its time to end, changes go on
        assert len(fleet.log) == 3
    fleet.let("b#1")
    await until(lambda: fleet.log[3:] == ["+b#5", "b#3 b#4 b#5", "-b#2"])
    fleet.let("b#2")
    await renewing
    assert not backend.due
    assert backend.plan.version == 1


@in_fleet(2, max_surge=0, max_unavailable=1)
async def test_where_there_is_no_room_a_worn_one_ends_first(fleet: Fleet) -> None:
    fleet.log.clear()
    for worker in fleet.backend.running:
        fleet.backend.mark_worn(worker, "is old")
    await fleet.backend.renew()
    assert fleet.log == ["b#2", "-b#1", "+b#3", "b#2 b#3", "b#3", "-b#2", "+b#4", "b#3 b#4"]


@in_fleet(2)
async def test_a_worn_one_goes_on_until_another_one_starts(fleet: Fleet) -> None:
    first, second = fleet.backend.running
    fleet.broken = {"b#3", "b#4"}
    fleet.backend.mark_worn(first, "is old")
    await fleet.backend.renew()
    assert fleet.serving == ["b#2", "b#5"]
    fleet.backend.mark_worn(second, "is old")
    fleet.workers.worker_exited(WorkerExit("b#2", "was killed"))  # which replaces it once, for either reason
    await fleet.backend.renew()
    await until(lambda: fleet.serving == ["b#5", "b#6"])
    await fleet.backend.renew()
    assert fleet.serving == ["b#5", "b#6"]


def test_recycling_that_is_no_help_is_tried_less_and_less_often() -> None:
    for jitter, share in ((0.0, 0.5), (1.0, 1.0)):
        recycling = Recycling(lambda jitter=jitter: jitter)
        now = 50.0
        for pause_s in (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0):
            assert recycling.allows(now)
            assert not recycling.allows(now + share * pause_s - 0.1)
            now += share * pause_s
        recycling.reset()
        assert recycling.allows(now)


@in_fleet(2)
async def test_replicas_that_need_more_than_they_may_from_the_start_serve_on(fleet: Fleet) -> None:
    """They say so once a second; one is exchanged, people are told, and a change begins anew."""
    backend = fleet.backend
    for _ in range(2):
        too_much = partial(backend.mark_worn, reason="has 99 MB in memory (max_rss_mb=9)", from_start=True)
        assert [too_much(worker) for worker in backend.running] == [True, False]
        await backend.renew()
        assert not any(too_much(worker) for worker in backend.running)
        notice = backend.describe()["notice"]
        assert re.match(
            r"replica\.b\.\d has 99 MB in memory \(max_rss_mb=9\), and so it was at its first calls", notice
        )
        assert backend.mark_worn(backend.running[0], "has begun 9 calls")  # for other reasons it is as before
        await backend.renew()
        await backend.update({"max_queued_requests": 10 + len(fleet.log)})
        assert backend.describe()["notice"] is None


def test_what_a_replica_has_had_in_memory_from_the_start() -> None:
    mb: list[float | None] = []
    looks = 0

    def resident() -> float | None:
        nonlocal looks
        looks += 1
        return mb.pop(0)

    def look(config: BackendConfig, calls: int) -> tuple[str, bool]:
        return memory.look(config, calls)

    free, bound = BackendConfig(), BackendConfig(max_rss_mb=100)
    over = "has 150 MB in memory (max_rss_mb=100)"
    memory = Memory(resident)
    mb[:] = [50, 150]
    assert [look(bound, 0), look(bound, 0)] == [("", False), (over, True)], "it cannot even begin"
    mb[:] = [90, 150]
    assert [look(bound, 1), look(bound, 9)] == [("", False), (over, False)], "it has grown"
    memory = Memory(resident)
    mb[:] = [50, None, 150, 150]
    assert [look(bound, calls) for calls in (0, 1, 2, 3)] == [("", False)] * 2 + [(over, True)] * 2, (
        "by its first calls"
    )
    memory, looks = Memory(resident), 0
    mb[:] = [90, 150]
    assert [look(free, calls) for calls in (0, 1, 2, 3)] == [("", False)] * 4
    assert looks == 1, "nobody need look where there is no limit, but for what it had"
    assert look(bound, 4) == (over, False), "a limit that was set later"


@in_fleet(1)
async def test_a_worn_one_that_hangs_is_ended_at_once(fleet: Fleet) -> None:
    worker = fleet.backend.running[0]
    fleet.backend.mark_worn(worker, "is old")
    async with fleet.backend.turns.turn():
        ending = asyncio.ensure_future(fleet.backend.replace_one(worker, "hangs", at_once=True))
        await until(worker.gone.is_set)
    await ending
    assert fleet.serving == ["b#2"]


@in_fleet(2)
async def test_replicas_that_wear_out_during_an_update_do_not_hold_it_up(fleet: Fleet) -> None:
    backend = fleet.backend
    publish = fleet._publish

    def wear() -> int:
        for worker in backend.running:
            backend.mark_worn(worker, "is old")
        return publish()

    backend.publish = wear
    await fleet.replace(2, max_surge=1)
    assert backend.plan.version == 2
    assert backend.due


def test_each_replica_may_become_nearly_as_old_as_it_may() -> None:
    lifetimes = [lifetime_s(f"b#{number}", 100.0) for number in range(20)]
    assert 90.0 <= min(lifetimes) < 93.0 < 97.0 < max(lifetimes) <= 100.0


@in_fleet(3)
async def test_one_timer_finds_who_is_too_old(fleet: Fleet) -> None:
    workers = fleet.backend.running
    for worker, ready_at in zip(workers, (0.0, 50.0, 1000.0), strict=True):
        worker.ready_at = ready_at
    told: list[str] = []
    ages = Ages(
        lambda: [Age(worker, 100.0) for worker in workers],
        lambda worker, why: told.append(f"{worker.spec.worker_id} {why}"),
        clock=lambda: 120.0,
    )
    loop = asyncio.get_running_loop()
    before = loop.time()
    ages.look()
    assert told == ["b#1 is 120.0 s old (max_age_s=100)"]
    assert ages._timer is not None
    left_s = ages._timer.when() - before
    assert left_s == pytest.approx(50.0 + lifetime_s("b#2", 100.0) - 120.0, abs=1.0)
    ages.close()
    assert ages._timer is None
