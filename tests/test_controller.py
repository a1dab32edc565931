"""The controller, on an adapter that does what the test says: what is said and what dies at odd moments."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest
from control_fakes import Incarnation, Platform, endpoint, plan, published
from fakes import until

from engine.seam.control_messages import Applied, AtRest, Ready, Unhealthy
from engine.seam.messages import Control
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
