"""The controller, on an adapter that does what the test says: what is said and what dies at odd moments."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from control_fakes import Incarnation, Platform, endpoint, plan, published
from fakes import until

from engine.errors import EngineClosed, InvalidArgument, Superseded
from engine.seam.control_messages import Applied, AtRest, Drain, Ready, StartFailed, Unhealthy
from engine.seam.messages import Control
from engine.seam.serialization import pack_exception
from engine.seam.worker import WorkerSpec


def on_loop(test: Callable[[Incarnation], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Run a test on a loop of its own, with a controller of its own that has nothing to do yet."""

    def run() -> None:
        async def main() -> None:
            await test(await Platform().controller().started())

        asyncio.run(asyncio.wait_for(main(), 20))

    run.__name__ = test.__name__
    return run


def held(one: Incarnation) -> Callable[[str], None]:
    """From now on workers are ready when the test calls what is returned."""

    def start(spec: WorkerSpec) -> None:
        one.platform.alive[spec.worker_id] = f"fake:{spec.worker_id}"

    one.adapter.on_start = start
    return lambda worker_id: one.controller.worker_said(worker_id, Ready(f"fake:{worker_id}"))


def started(one: Incarnation) -> list[str]:
    return [spec.worker_id for spec in one.adapter.started]


# -- what replicas say before they are in service ----------------------------------------------------------------------


@pytest.mark.parametrize("said", [Unhealthy("is unhealthy", hung=False), Unhealthy("is old", hung=False, worn=True)])
def test_who_asks_to_be_replaced_before_the_others_are_ready_is_replaced_then(said: Unhealthy) -> None:
    @on_loop
    async def test(one: Incarnation) -> None:
        become_ready = held(one)
        creating = asyncio.ensure_future(one.controller.create_backend(plan("b", num_replicas=2)))
        await until(lambda: started(one) == ["b#1", "b#2"])
        become_ready("b#1")
        one.controller.worker_said("b#1", said)
        become_ready("b#2")
        await creating
        assert one.replicas("b") == ["b#1", "b#2"]
        await until(lambda: started(one) == ["b#1", "b#2", "b#3"])
        become_ready("b#3")
        await until(lambda: one.replicas("b") == ["b#2", "b#3"])

    test()


@on_loop
async def test_who_hangs_before_the_others_are_ready_is_ended_at_once(one: Incarnation) -> None:
    become_ready = held(one)
    creating = asyncio.ensure_future(one.controller.create_backend(plan("b", num_replicas=2)))
    await until(lambda: started(one) == ["b#1", "b#2"])
    become_ready("b#1")
    for _ in range(10):
        await asyncio.sleep(0)
    one.controller.worker_said("b#1", Unhealthy("does not return from check_health()", hung=True))
    await until(lambda: one.adapter.killed == ["b#1"])
    become_ready("b#2")
    await creating
    assert one.replicas("b") == ["b#2"]
    await until(lambda: started(one) == ["b#1", "b#2", "b#3"])


@on_loop
async def test_who_asks_while_a_controller_takes_over_is_heard(one: Incarnation) -> None:
    await one.controller.create_backend(plan("b", num_replicas=2))
    one.platform.silent.add("b#2")
    two = one.platform.controller()
    starting = asyncio.ensure_future(two.started())
    await until(lambda: len(two.adapter.adopted) == 2)
    await asyncio.sleep(0)
    two.controller.worker_said("b#1", Unhealthy("is unhealthy", hung=False))
    two.controller.worker_said("b#2", Ready("fake:b#2"))
    await starting
    await until(lambda: two.replicas("b") == ["b#2", "b#3"])


# -- what dies during a shutdown ---------------------------------------------------------------------------------------


@on_loop
async def test_deaths_are_published_while_calls_are_given_time_to_end(one: Incarnation) -> None:
    await one.controller.create_backend(plan("a", num_replicas=2))
    await one.controller.create_backend(plan("b"))
    await one.controller.create_endpoint(endpoint("e", "a"))
    caller = one.subscribe()
    stopping = asyncio.ensure_future(one.controller.shutdown(1000.0))
    await until(lambda: published(caller)[-1].draining)
    version = published(caller)[-1].version
    caller.answer(Control(Applied(version)))
    one.die("a#1", "'s node died")
    one.die("b#1", "'s node died")
    await until(lambda: published(caller)[-1].version == version + 2)
    last = published(caller)[-1]
    assert last.draining
    assert [replica.replica_tag for replica in last.backends["a"].replicas] == ["a#2"]
    assert (last.backends["a"].dead, last.backends["b"].dead) == (("a#1",), ("b#1",))
    assert not last.backends["b"].expecting, "calls that wait for it would do so until time is up"
    assert started(one) == ["a#1", "a#2", "b#1"]
    caller.answer(Control(AtRest(version)))
    await stopping


# -- who waits for whom ------------------------------------------------------------------------------------------------

ONE_BY_ONE = {"max_surge": 0, "max_unavailable": 1}
SLOWLY = {"graceful_shutdown_timeout_s": 1000.0}


def hold_leavers(one: Incarnation) -> None:
    """From now on replicas that are to leave do so when the test lets them die."""
    tell = one.adapter.on_tell
    assert tell is not None
    one.adapter.on_tell = lambda worker_id, body: None if isinstance(body, Drain) else tell(worker_id, body)


def leaving(one: Incarnation) -> list[str]:
    return [worker_id for worker_id, body in one.adapter.told if isinstance(body, Drain)]


def updating(one: Incarnation, tag: str = "b", **config: Any) -> asyncio.Future[None]:
    """Has other code take over; the configuration is changed by what is given."""
    given = replace(plan(tag), config=config)  # type: ignore[arg-type]  # as an operation has it
    return asyncio.ensure_future(one.controller.update_backend(given, keep_resources=True))


def versions(one: Incarnation, tag: str = "b") -> list[int]:
    return [worker.version for worker in one.controller._backends[tag].running]


@pytest.mark.parametrize("what", ["an update", "fewer replicas"])
def test_nobody_waits_until_those_that_leave_have_ended(what: str) -> None:
    @on_loop
    async def test(one: Incarnation) -> None:
        await one.controller.create_backend(plan("b", num_replicas=2, **SLOWLY))
        hold_leavers(one)
        if what == "an update":
            changing = updating(one)
        else:
            changing = asyncio.ensure_future(one.controller.update_backend_config("b", {"num_replicas": 1}))
        await until(lambda: leaving(one))
        await one.controller.update_backend_config("b", {"num_replicas": 3})
        assert len(one.replicas("b")) == 3
        await one.controller.statistics([])
        deleting = asyncio.ensure_future(one.controller.delete_backend("b", force=False))
        await until(lambda: set(leaving(one)) == {spec.worker_id for spec in one.adapter.started})
        assert not changing.done()
        for worker_id in set(leaving(one)):
            one.die(worker_id, "left")
        await changing
        await deleting

    test()


@pytest.mark.parametrize("holds", ["one that leaves", "one that starts"])
@pytest.mark.parametrize("said", [Unhealthy("is unhealthy", hung=False), Unhealthy("is old", hung=False, worn=True)])
def test_what_is_exchanged_in_the_background_gives_way_and_goes_on_afterwards(said: Unhealthy, holds: str) -> None:
    @on_loop
    async def test(one: Incarnation) -> None:
        room = ONE_BY_ONE if holds == "one that leaves" else {}
        await one.controller.create_backend(plan("b", num_replicas=2, **room, **SLOWLY))
        start = one.adapter.on_start
        if holds == "one that leaves":
            hold_leavers(one)
        else:
            held(one)
        one.controller.worker_said("b#1", said)
        await until(lambda: leaving(one) or started(one)[2:])
        await one.controller.update_backend_config("b", {"max_queued_requests": 7})
        assert (await one.controller.get_backend_config("b")).max_queued_requests == 7
        one.adapter.on_start = start
        if holds == "one that leaves":
            one.die("b#1", "left")
        await until(lambda: "b#1" not in one.replicas("b") and len(one.replicas("b")) == 2)
        assert len(one.platform.alive) == 2

    test()


@on_loop
async def test_an_update_during_a_recycle_takes_its_place(one: Incarnation) -> None:
    await one.controller.create_backend(plan("b", num_replicas=2, **ONE_BY_ONE, **SLOWLY))
    hold_leavers(one)
    one.controller.worker_said("b#1", Unhealthy("is old", hung=False, worn=True))
    await until(lambda: leaving(one) == ["b#1"])
    update = updating(one, max_surge="100%", max_unavailable=0)
    await until(lambda: one.replicas("b") == ["b#3", "b#4"])
    for worker_id in ("b#1", "b#2"):
        one.die(worker_id, "left")
    await update
    assert (versions(one), started(one)) == ([2, 2], ["b#1", "b#2", "b#3", "b#4"])


@pytest.mark.parametrize("half_way", [False, True])
def test_the_newest_update_rules(half_way: bool) -> None:
    """Whoever asked for the former one, perhaps another program, hears so at once; nothing is rolled back for it."""

    @on_loop
    async def test(one: Incarnation) -> None:
        await one.controller.create_backend(plan("b", num_replicas=3, max_surge=1))
        start = one.adapter.on_start
        assert start is not None
        become_ready = held(one)
        former = updating(one)
        if half_way:
            await until(lambda: started(one)[3:] == ["b#4"])
            become_ready("b#4")
        await until(lambda: started(one)[3:] == (["b#4", "b#5"] if half_way else ["b#4"]))
        one.adapter.on_start = start
        newest = updating(one)
        with pytest.raises(Superseded, match="backend 'b': a newer update came before this one was done"):
            await former
        await newest
        assert len(set(versions(one))) == 1
        assert versions(one)[0] > 1 + half_way
        assert one.replicas("b") == (["b#6", "b#7", "b#8"] if half_way else ["b#5", "b#6", "b#7"])
        assert len(one.platform.alive) == 3

    test()


@on_loop
async def test_an_update_that_is_refused_takes_the_place_of_none(one: Incarnation) -> None:
    await one.controller.create_backend(plan("b"))
    become_ready = held(one)
    update = updating(one)
    await until(lambda: started(one)[1:] == ["b#2"])
    with pytest.raises(InvalidArgument, match="max_batch_size"):
        await updating(one, max_batch_size=8)
    become_ready("b#2")
    await update
    assert versions(one) == [2]


@pytest.mark.parametrize("how", ["does not start", "is given up", "is given up while it waits"])
def test_if_the_newest_update_fails_the_version_that_rules_is_returned_to(how: str) -> None:
    @on_loop
    async def test(one: Incarnation) -> None:
        await one.controller.create_backend(plan("b", num_replicas=3, max_surge=1))
        start = one.adapter.on_start
        assert start is not None
        become_ready = held(one)
        former = updating(one)
        await until(lambda: started(one)[3:] == ["b#4"])
        become_ready("b#4")
        await until(lambda: started(one)[4:] == ["b#5"])
        if how == "does not start":

            def refuse(spec: WorkerSpec) -> None:
                one.adapter.on_start = start
                one.controller.worker_said(spec.worker_id, StartFailed(pack_exception(LookupError("no model"))))

            one.adapter.on_start = refuse
        newest = updating(one)
        with pytest.raises(Superseded):
            if how == "is given up while it waits":
                await asyncio.sleep(0)
                newest.cancel()
            await former
        if how == "does not start":
            with pytest.raises(LookupError):
                await newest
        else:
            newest.cancel()
            one.adapter.on_start = start
            with pytest.raises(asyncio.CancelledError):
                await newest
        await until(lambda: versions(one) == [1, 1, 1])
        await until(lambda: len(one.platform.alive) == 3)

    test()


@pytest.mark.parametrize("holds", ["one that leaves", "one that starts"])
@pytest.mark.parametrize("force", [False, True])
def test_a_deletion_ends_an_update(holds: str, force: bool) -> None:
    @on_loop
    async def test(one: Incarnation) -> None:
        await one.controller.create_backend(plan("b", num_replicas=2, **ONE_BY_ONE, **SLOWLY))
        if holds == "one that leaves":
            hold_leavers(one)
        else:
            held(one)
        update = updating(one)
        await until(lambda: leaving(one) if holds == "one that leaves" else started(one)[2:])
        deleting = asyncio.ensure_future(one.controller.delete_backend("b", force=force))
        with pytest.raises(InvalidArgument, match="backend 'b' was deleted meanwhile"):
            await update
        for worker_id in ("b#1", "b#2"):
            one.die(worker_id, "left")
        await deleting
        assert one.platform.alive == {}

    test()


@pytest.mark.parametrize("what", ["an update", "a creation"])
@pytest.mark.parametrize("how", ["is given up", "is deleted"])
def test_whenever_it_is_broken_off_no_replica_is_forgotten(what: str, how: str) -> None:
    """Also while those are being ended that are ready, because another one did not start."""

    async def strike(turns: int) -> None:
        one = await Platform().controller().started()
        if what == "an update":
            await one.controller.create_backend(plan("b", num_replicas=2))
        start = one.adapter.on_start
        become_ready = held(one)
        if what == "an update":
            changing = updating(one)
        else:
            changing = asyncio.ensure_future(one.controller.create_backend(plan("b", num_replicas=2)))
        await until(lambda: len(one.platform.alive) == (4 if what == "an update" else 2))
        ready, fails = started(one)[-2:]
        become_ready(ready)
        one.adapter.on_start = start
        one.controller.worker_said(fails, StartFailed(pack_exception(LookupError("no model"))))
        for _ in range(turns):
            await asyncio.sleep(0)
        if how == "is given up":
            changing.cancel()
        else:
            await asyncio.gather(one.controller.delete_backend("b", force=True), return_exceptions=True)
        await asyncio.wait([changing])
        left = set(one.client.snapshot.backends)
        assert left <= ({"b"} if what == "an update" and how == "is given up" else set()), turns
        await until(lambda: set(one.platform.alive) == {tag for b in left for tag in one.replicas(b)})
        if left:
            await until(lambda: versions(one) == [1, 1])

    async def main() -> None:
        for turns in range(20):
            await asyncio.wait_for(strike(turns), 20)

    asyncio.run(main())


@on_loop
async def test_callers_hear_of_no_backend_that_did_not_come_about(one: Incarnation) -> None:
    start = one.adapter.on_start
    held(one)
    creating = asyncio.ensure_future(one.controller.create_backend(plan("b")))
    await until(lambda: started(one) == ["b#1"])
    one.adapter.on_start = start
    await one.controller.create_backend(plan("other"))
    one.controller.worker_said("b#1", StartFailed(pack_exception(LookupError("no model"))))
    with pytest.raises(LookupError):
        await creating
    assert set(one.client.snapshot.backends) == {"other"}


@on_loop
async def test_of_two_deletions_one_that_is_given_up_leaves_the_other_in_force(one: Incarnation) -> None:
    await one.controller.create_backend(plan("b"))
    start = one.adapter.on_start
    become_ready = held(one)
    growing = asyncio.ensure_future(one.controller.update_backend_config("b", {"num_replicas": 2}))
    await until(lambda: started(one)[1:] == ["b#2"])
    given_up, other = [asyncio.ensure_future(one.controller.delete_backend("b", force=False)) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait([given_up])
    await one.controller.create_endpoint(endpoint("e", "b"))  # it was kept, as far as anybody knows
    one.adapter.on_start = start
    become_ready("b#2")
    await growing
    with pytest.raises(InvalidArgument, match="in use by endpoint"):
        await other
    assert len(one.replicas("b")) == 2


@pytest.mark.parametrize("holds", ["one that leaves", "one that starts"])
@pytest.mark.parametrize("what", ["an update", "a recycle"])
def test_a_shutdown_ends_an_exchange(holds: str, what: str) -> None:
    @on_loop
    async def test(one: Incarnation) -> None:
        room = ONE_BY_ONE if holds == "one that leaves" else {}
        await one.controller.create_backend(plan("b", num_replicas=2, **room, **SLOWLY))
        if holds == "one that leaves":
            hold_leavers(one)
        else:
            held(one)
        update = updating(one) if what == "an update" else None
        if update is None:
            one.controller.worker_said("b#1", Unhealthy("is old", hung=False, worn=True))
        await until(lambda: leaving(one) or started(one)[2:])
        await one.controller.shutdown(0.0)
        if update is not None:
            with pytest.raises(EngineClosed):
                await update
        assert one.platform.alive == {}

    test()


@pytest.mark.parametrize("how", ["an update", "a recycle"])
def test_the_next_controller_finishes_an_exchange(how: str) -> None:
    """An update by returning to what rules; a recycle as soon as the replica says again that it has done its share."""

    @on_loop
    async def test(one: Incarnation) -> None:
        await one.controller.create_backend(plan("b", num_replicas=3, max_surge=1))
        start = one.adapter.on_start
        become_ready = held(one)
        worn = Unhealthy("is old", hung=False, worn=True)
        if how == "an update":
            unfinished = updating(one)
            await until(lambda: started(one)[3:] == ["b#4"])
            become_ready("b#4")
            await until(lambda: started(one)[4:] == ["b#5"])
        else:
            unfinished = asyncio.ensure_future(asyncio.sleep(0))
            one.controller.worker_said("b#1", worn)
            await until(lambda: started(one)[3:] == ["b#4"])
        one.platform.alive.pop(started(one)[-1])  # it had not told anybody what it is to be
        two = await one.platform.controller().started()
        if how == "a recycle":
            two.controller.worker_said("b#1", worn)
        last = "b#5" if how == "an update" else "b#4"
        await until(lambda: two.replicas("b") == ["b#2", "b#3", last])
        assert versions(two) == [1, 1, 1]
        await until(lambda: len(two.platform.alive) == 3)
        one.adapter.on_start = start
        unfinished.cancel()
        await asyncio.wait([unfinished])

    test()
