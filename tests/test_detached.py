"""Controllers that die and are started again, without a platform: what the next one takes over, what callers notice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from control_fakes import HTTP, Incarnation, Platform, endpoint, plan, published
from fakes import snapshot, until

from engine import Engine, errors
from engine.calling import connectors, subscription
from engine.calling.client import Client
from engine.calling.subscription import Subscription
from engine.control import operations, remote_runner
from engine.control.backend_plan import BackendPlan
from engine.control.checkpoint import Checkpoint, KnownBackend, KnownWorker, Picture
from engine.control.controller import Controller
from engine.control.detached import DetachedController
from engine.control.remote_runner import RemoteRunner
from engine.errors import InvalidArgument, RemoteTraceback, RetryLater
from engine.seam.channel import ChannelClosed
from engine.seam.control_messages import Drain, Publish, Ready, Reconfigure, Reconfigured, Subscribe
from engine.seam.messages import Control
from engine.seam.serialization import dumps, loads, pack_exception, unpack_exception
from engine.seam.worker import WorkerExit
from engine.testing.fakes import FakeAdapter, FakeChannel, FakeStore
from engine.testing.instruments import PATIENCE_S, eventually

# -- the checkpoint --------------------------------------------------------------------------------------------------

PICTURE = Picture(
    7,
    {"e": endpoint("e", "b")},
    {"b": KnownBackend(plan("b", num_replicas=2), 3, (KnownWorker("b#3", "replica.b.3", None),))},
    (2, (KnownWorker("ingress#2", "ingress.2", "node"),)),
)


def picture_of(*plans: BackendPlan) -> Picture:
    """As `PICTURE`, with these backends."""
    return PICTURE._replace(backends={one.tag: KnownBackend(one, 1, ()) for one in plans})


def loaded(store: FakeStore) -> Picture:
    """What the next controller finds, but for the version."""
    picture = Checkpoint(store).load()
    assert picture is not None
    assert picture.version > 7 + 100  # above whatever was published after the last word to the store
    return picture._replace(version=7)


def backend_rows(store: FakeStore) -> int:
    return sum(name.startswith("backend:") for name in store.rows)


def test_what_was_kept_is_loaded() -> None:
    store = FakeStore()
    checkpoint = Checkpoint(store)
    assert checkpoint.load() is None
    for picture in (PICTURE, picture_of(plan("b"), plan("c")), picture_of(plan("b", num_replicas=5)), picture_of()):
        checkpoint.keep(picture)
        assert loaded(store) == picture
        assert backend_rows(store) == len(picture.backends)


def test_a_plan_that_stays_is_written_once() -> None:
    store = FakeStore()
    Checkpoint(store).keep(PICTURE)
    next_one = Checkpoint(store)
    found = next_one.load() or pytest.fail("nothing was kept")
    store.log.clear()
    next_one.keep(found._replace(endpoints={}))
    assert store.log == ["picture"]


@pytest.mark.parametrize("row", ["picture", "backend:"])
def test_what_was_not_kept_whole_is_not_kept_at_all(row: str) -> None:
    store = FakeStore()
    checkpoint = Checkpoint(store)
    checkpoint.keep(PICTURE)
    store.away = (row,)
    with pytest.raises(ConnectionError):
        checkpoint.keep(picture_of(plan("b", num_replicas=9), plan("new")))
    assert loaded(store) == PICTURE
    store.away = ()
    checkpoint.keep(PICTURE)
    assert loaded(store) == PICTURE
    assert backend_rows(store) == 1


@pytest.mark.parametrize("by", ["the same", "the next"])
def test_a_row_that_could_not_be_removed_is_removed_later(by: str) -> None:
    store = FakeStore()
    checkpoint = Checkpoint(store)
    checkpoint.keep(picture_of(plan("b")))
    remove, store.remove = store.remove, lambda name: store._check(name, ("",))  # type: ignore[method-assign]
    checkpoint.keep(picture_of())
    assert loaded(store) == picture_of()
    assert backend_rows(store) == 1
    store.remove = remove  # type: ignore[method-assign]
    if by == "the next":
        checkpoint = Checkpoint(store)
        checkpoint.load()
    checkpoint.keep(picture_of())
    assert backend_rows(store) == 0


def test_without_a_store_nothing_is_kept() -> None:
    checkpoint = Checkpoint(None)
    checkpoint.keep(PICTURE)
    assert checkpoint.load() is None


# -- controllers, one after the other --------------------------------------------------------------------------------


def on_loop(test: Callable[[Platform], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on a loop of its own, with a platform of its own."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(test(Platform()), 20))

    run.__name__ = test.__name__
    return run


async def furnished(platform: Platform) -> Incarnation:
    """A controller with something of everything."""
    one = await platform.controller().started()
    await one.controller.create_backend(plan("a", num_replicas=2))
    await one.controller.create_backend(plan("b", max_queued_requests=5, max_concurrent_queries=5))
    await one.controller.create_endpoint(endpoint("e", "a", "/e"))
    await one.controller.set_traffic("e", {"a": 0.25, "b": 0.75})
    await one.controller.shadow_traffic("e", "b", 0.5)
    await one.controller.create_endpoint(endpoint("f", "b"))
    return one


@on_loop
async def test_the_next_controller_adopts_what_comes_back(platform: Platform) -> None:
    one = await furnished(platform)
    two = await platform.controller().started()
    assert two.ids(two.adapter.adopted) == ["a#1", "a#2", "b#1", "ingress#1", "ingress#2"]
    assert two.adapter.started == []
    assert two.version > one.version
    assert two.client.snapshot.endpoints == one.client.snapshot.endpoints
    assert two.client.snapshot.backends == one.client.snapshot.backends
    assert await two.controller.list_backends() == await one.controller.list_backends()
    assert await two.controller.list_endpoints() == await one.controller.list_endpoints()
    assert two.controller.http_url() == one.controller.http_url() is not None
    adopted = {spec.worker_id: spec for spec in two.adapter.adopted}
    for spec in one.adapter.started:
        again = adopted[spec.worker_id]
        assert (again.name, again.node_id, again.listen) == (spec.name, spec.node_id, spec.listen)
        assert again.resources == spec.resources


@on_loop
async def test_the_next_controller_replaces_what_does_not(platform: Platform) -> None:
    await furnished(platform)
    del platform.alive["a#1"], platform.alive["ingress#2"]
    two = await platform.controller().started()
    assert two.replicas("a") == ["a#2"]  # calls go on there at once
    await until(lambda: two.ids(two.adapter.started) == ["a#3", "ingress#3"])  # numbers are never used twice
    await until(lambda: two.replicas("a") == ["a#2", "a#3"])
    await until(lambda: "ingress#3" in repr(loaded(platform.store).ingresses))
    three = await platform.controller().started()
    assert three.ids(three.adapter.adopted) == ["a#2", "a#3", "b#1", "ingress#1", "ingress#3"]
    assert three.version > two.version


@on_loop
async def test_nothing_rules_elsewhere_until_everything_came_back_or_is_certain_not_to(platform: Platform) -> None:
    """A caller that had the last picture of the former controller, and one that has none yet."""
    one = await furnished(platform)
    platform.silent.add("a#1")
    two = platform.controller()
    starting = asyncio.ensure_future(two.started())
    await until(lambda: len(two.adapter.adopted) == 5)
    callers = [two.subscribe(), two.subscribe(ingress=True)]
    assert [published(caller) for caller in callers] == [[], []]
    two.die("a#1", "did not come back to the controller")
    await starting
    for caller in callers:
        first, *_ = published(caller)
        assert first.version > one.version
        assert first.endpoints == one.client.snapshot.endpoints
        assert [replica.replica_tag for replica in first.backends["a"].replicas] == ["a#2"]


@on_loop
async def test_a_route_is_there_when_the_ingresses_of_a_former_controller_have_it(platform: Platform) -> None:
    """They are back with their words and serve, before they have asked for what rules; or die instead."""
    await furnished(platform)
    platform.lagging |= {"ingress#1", "ingress#2"}
    two = await platform.controller().started()
    changing = asyncio.ensure_future(two.controller.create_endpoint(endpoint("new", "b", "/new")))
    await until(lambda: "new" in two.client.snapshot.endpoints)
    ingress = two.come_back("ingress#1")
    await until(lambda: "new" in published(ingress)[-1].endpoints)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not changing.done()
    two.die("ingress#2", "was killed by SIGKILL")
    await changing


@on_loop
async def test_what_dies_while_the_rest_has_yet_to_come_back_is_replaced_afterwards(platform: Platform) -> None:
    """Else callers would lose the replicas that are still to come back, and the next controller never hear of them."""
    one = await furnished(platform)
    platform.silent.add("a#1")
    two = platform.controller()
    starting = asyncio.ensure_future(two.started())
    caller = two.subscribe()

    async def until_seen(*expected: list[str]) -> None:
        for _ in range(1000):
            there = await two.controller.statistics([])
            replicas = there["backends"].get("b", {}).get("replicas", {})
            if ([*replicas], sorted(there["ingresses"])) == expected:
                return
            await asyncio.sleep(0)
        pytest.fail(f"still {there}")

    await until_seen(["b#1"], ["ingress#1", "ingress#2"])
    platform.store.log.clear()
    two.die("b#1", "was killed by SIGKILL")
    two.die("ingress#1", "was killed by SIGKILL")
    two.controller.nodes_changed()
    await until_seen([], ["ingress#2"])
    for _ in range(10):
        await asyncio.sleep(0)
    assert (published(caller), platform.store.log, two.adapter.started) == ([], [], [])
    two.die("a#1", "did not come back to the controller")
    await starting
    assert platform.store.log == ["picture"]
    (first,) = published(caller)
    assert first.endpoints == one.client.snapshot.endpoints
    entries = first.backends
    assert {tag: [replica.replica_tag for replica in entry.replicas] for tag, entry in entries.items()} == {
        "a": ["a#2"],
        "b": [],
    }
    assert {tag: entry.dead for tag, entry in entries.items()} == {"a": ("a#1",), "b": ("b#1",)}
    await until(lambda: two.replicas("a") == ["a#2", "a#3"] and two.replicas("b") == ["b#2"])
    await until(lambda: "ingress#3" in platform.alive)
    assert two.ids(two.adapter.started) == ["a#3", "b#2", "ingress#3"]


def test_without_its_store_a_controller_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def logged(words: str) -> list[str]:
        return [record.levelname for record in caplog.records if words in record.message]

    async def go_on(platform: Platform) -> None:
        one = await furnished(platform)
        platform.store.away = ("",)
        one.die("b#1", "was killed by SIGKILL")
        one.die("ingress#1", "was killed by SIGKILL")
        await until(lambda: one.replicas("b") == ["b#2"] and "ingress#3" in platform.alive)
        assert logged("could not be kept: ConnectionError('the control plane is away')") == ["ERROR"], "once"
        platform.store.away = ()
        await until(lambda: logged("is kept again"))
        two = await platform.controller().started()
        assert two.ids(two.adapter.adopted) == ["a#1", "a#2", "b#2", "ingress#2", "ingress#3"]

    asyncio.run(asyncio.wait_for(go_on(Platform()), 20))
    assert logged("is kept again") == ["WARNING"]
    assert "replacing a worker failed" not in caplog.text


@on_loop
async def test_what_could_not_be_kept_is_tried_until_something_newer_is_kept(platform: Platform) -> None:
    one = await furnished(platform)
    platform.store.away = ("",)
    one.die("b#1", "was killed by SIGKILL")
    await until(lambda: one.replicas("b") == ["b#2"])
    platform.store.away = ()
    await one.controller.set_traffic("f", {"a": 1.0})
    two = await platform.controller().started()
    assert two.ids(two.adapter.adopted) == ["a#1", "a#2", "b#2", "ingress#1", "ingress#2"]
    await nothing_is_left_to_do()


@on_loop
async def test_nothing_is_tried_once_the_engine_closes(platform: Platform) -> None:
    one = await furnished(platform)
    platform.store.away = ("",)
    one.die("b#1", "was killed by SIGKILL")
    await until(lambda: one.replicas("b") == ["b#2"])
    platform.store.log.clear()
    await one.controller.shutdown(1.0)
    await nothing_is_left_to_do()
    platform.store.away = ()
    assert platform.store.log == []


@on_loop
async def test_a_controller_that_cannot_start_keeps_nothing(platform: Platform) -> None:
    """What it found is the adapter's to clear, and must not come back."""
    await furnished(platform)
    platform.store.away = ("picture",)
    with pytest.raises(ConnectionError):
        await platform.controller().started()
    await nothing_is_left_to_do()


@on_loop
async def test_news_does_not_wait_for_a_store_that_is_tried_anyway(platform: Platform) -> None:
    """A store that is slow to fail blocks the loop each time."""
    one = await furnished(platform)
    tries = 0

    def save(name: str, state: bytes) -> None:
        nonlocal tries
        tries += 1
        raise ConnectionError("the control plane is away")

    platform.store.save = save  # type: ignore[method-assign]
    for worker_id in ("a#1", "a#2", "b#1"):
        one.controller.worker_exited(WorkerExit(worker_id, "was killed by SIGKILL"))
    assert (one.replicas("a"), one.replicas("b")) == ([], [])
    assert tries == 1
    await one.controller.shutdown(1.0)


async def nothing_is_left_to_do() -> None:
    """Give what was cancelled a few turns of the loop to end; then nobody tries anything any more."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if "_try_again" in repr(task.get_coro())]


@on_loop
async def test_callers_learn_how_often_in_a_row_a_start_failed(platform: Platform) -> None:
    one = await furnished(platform)
    caller = one.subscribe()
    one.adapter.refuses = errors.BackendStartError("replica.b.2 has had enough")
    one.die("b#1", "was killed by SIGKILL")

    def counted() -> list[tuple[bool, int, int]]:
        entries = [snapshot.backends["b"] for snapshot in published(caller)]
        return [(entry.expecting, entry.failures, len(entry.replicas)) for entry in entries]

    await until(lambda: len(counted()) >= 5)
    # The death itself is none: it may be bad luck.
    assert counted()[:5] == [(True, 0, 1), (True, 0, 0), (True, 1, 0), (True, 2, 0), (False, 3, 0)]
    assert published(caller)[4].backends["b"].last_error == "BackendStartError: replica.b.2 has had enough"
    one.adapter.refuses = None
    await until(lambda: counted()[-1][2] == 1)


# -- changes that the store does not take ----------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Controller], Coroutine[Any, Any, None]]] = {
    "a new backend": lambda one: one.create_backend(plan("c", num_replicas=2)),
    "more replicas": lambda one: one.update_backend_config("a", {"num_replicas": 4}),
    "fewer replicas": lambda one: one.update_backend_config("a", {"num_replicas": 1}),
    "another configuration": lambda one: one.update_backend_config("b", {"max_queued_requests": 9}),
    "a backend less": lambda one: one.delete_backend("spare", force=False),
    "a backend less at once": lambda one: one.delete_backend("spare", force=True),
    "a new endpoint": lambda one: one.create_endpoint(endpoint("g", "b")),
    "a new route": lambda one: one.create_endpoint(endpoint("g", "b", "/g")),
    "an endpoint less": lambda one: one.delete_endpoint("f"),
    "another split": lambda one: one.set_traffic("e", {"a": 0.5, "b": 0.5}),
    "more copies": lambda one: one.shadow_traffic("f", "a", 0.5),
    "no copies": lambda one: one.shadow_traffic("e", "b", 0.0),
}
STORES = {
    "takes nothing": {"away": ("",)},
    "takes plans": {"away": ("picture",)},
    "takes it in silence": {"mute": ("picture",)},
}


def without_times(shown: Any) -> Any:
    if not isinstance(shown, dict):
        return shown
    return {key: without_times(value) for key, value in shown.items() if not key.endswith("_s")}


async def state(one: Incarnation) -> list[Any]:
    """All that callers and applications see, and which workers there are."""
    seen = one.client.snapshot
    asked = one.controller
    return [
        seen.endpoints,
        seen.backends,
        await asked.list_backends(),
        await asked.list_endpoints(),
        without_times(await asked.statistics([])),
        {tag: await asked.get_backend_config(tag) for tag in await asked.list_backends()},
        sorted(one.platform.alive),
    ]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_not_kept_is_not_made(change: str, store: str) -> None:
    """Whoever was told of a failure finds all as it was, now and after the controller's death; and may try again."""

    async def fail(platform: Platform) -> None:
        one = await furnished(platform)
        await one.controller.create_backend(plan("spare", num_replicas=2))
        before, version, kept = await state(one), one.version, loaded(platform.store)
        vars(platform.store).update(STORES[store])
        one.adapter.told.clear()
        with pytest.raises(ConnectionError, match="the control plane is away"):
            await CHANGES[change](one.controller)
        assert await state(one) == before
        assert one.version == version, "nobody was told"
        assert not [worker for worker, body in one.adapter.told if isinstance(body, Drain)]
        platform.store.away = platform.store.mute = ()
        found = {tag: (known.plan, known.running) for tag, known in kept.backends.items()}

        def as_before() -> bool:
            now = loaded(platform.store)
            known = {tag: (known.plan, known.running) for tag, known in now.backends.items()}
            return (now.endpoints, known) == (kept.endpoints, found)

        if store != "takes it in silence":
            assert as_before()
        await until(as_before)
        two = await platform.controller().started()
        assert (await state(two))[:4] == before[:4]
        await CHANGES[change](two.controller)
        assert await state(two) != before

    asyncio.run(asyncio.wait_for(fail(Platform()), 20))


@on_loop
async def test_replicas_return_to_the_configuration_that_is_kept(platform: Platform) -> None:
    one = await furnished(platform)
    platform.store.away = ("picture",)
    with pytest.raises(ConnectionError):
        await one.controller.update_backend_config("b", {"max_concurrent_queries": 9, "num_replicas": 2})
    told = [(worker, loads(body.config)) for worker, body in one.adapter.told if isinstance(body, Reconfigure)]
    assert [(worker, config.max_concurrent_queries) for worker, config in told] == [("b#1", 9), ("b#1", 5)]
    assert "b#2" in one.adapter.killed
    assert one.replicas("b") == ["b#1"]


@on_loop
async def test_a_replica_that_does_not_return_to_it_is_replaced(platform: Platform) -> None:
    one = await furnished(platform)
    platform.store.away = ("picture",)
    never = pack_exception(ValueError("never again"))
    one.refusal = lambda config: never if config.max_concurrent_queries == 5 else None
    with pytest.raises(ConnectionError):
        await one.controller.update_backend_config("b", {"max_concurrent_queries": 9})
    await until(lambda: ("b#1", Drain(20.0, others=True)) in one.adapter.told)
    await until(lambda: one.replicas("b") == ["b#2"])
    (spec,) = [spec for spec in one.adapter.started if spec.worker_id == "b#2"]
    assert loads(spec.payload).config.max_concurrent_queries == 5


@on_loop
async def test_a_backend_whose_deletion_is_not_kept_is_looked_after(platform: Platform) -> None:
    """Also if whoever was about to replace a replica of it left that, because of the deletion."""
    one = await furnished(platform)
    await one.controller.create_backend(plan("spare", num_replicas=2))
    tell, asked = one.adapter.on_tell, dict[str, Any]()
    one.adapter.on_tell = asked.__setitem__
    configuring = asyncio.ensure_future(one.controller.update_backend_config("spare", {"max_concurrent_queries": 9}))
    await until(lambda: len(asked) == 2)
    platform.store.away = ("picture",)
    one.die("spare#1", "was killed by SIGKILL")
    await until(lambda: one.replicas("spare") == ["spare#2"])
    deleting = asyncio.ensure_future(one.controller.delete_backend("spare", force=False))
    await asyncio.sleep(0)
    one.adapter.on_tell = tell
    one.controller.worker_said("spare#2", Reconfigured(asked["spare#2"].token, None))
    with pytest.raises(errors.InvalidArgument, match="was deleted meanwhile"):
        await configuring
    with pytest.raises(ConnectionError):
        await deleting
    await until(lambda: one.replicas("spare") == ["spare#2", "spare#3"])
    assert "spare" in await one.controller.list_backends()


@on_loop
async def test_a_deletion_that_was_given_up_while_it_waited_changes_nothing(platform: Platform) -> None:
    one = await furnished(platform)
    await one.controller.create_backend(plan("spare"))
    one.adapter.on_start = None
    growing = asyncio.ensure_future(one.controller.update_backend_config("spare", {"num_replicas": 2}))
    await until(lambda: "spare#2" in one.ids(one.adapter.started))
    deleting = asyncio.ensure_future(one.controller.delete_backend("spare", force=False))
    await asyncio.sleep(0)
    deleting.cancel()
    await asyncio.wait([deleting])
    one._start(next(spec for spec in one.adapter.started if spec.worker_id == "spare#2"))
    await growing
    assert one.replicas("spare") == ["spare#1", "spare#2"]
    assert (await one.controller.get_backend_config("spare")).num_replicas == 2


@on_loop
async def test_replicas_end_though_whoever_removed_them_was_interrupted(platform: Platform) -> None:
    one = await furnished(platform)
    await one.controller.create_backend(plan("spare", num_replicas=2, graceful_shutdown_timeout_s=0.01))
    one.adapter.on_tell = None  # none leaves by itself
    for first in ("spare#2", "spare#1"):
        if first == "spare#2":
            removing = asyncio.ensure_future(one.controller.update_backend_config("spare", {"num_replicas": 1}))
        else:
            removing = asyncio.ensure_future(one.controller.delete_backend("spare", force=False))
        drained = Drain(0.01, others=first == "spare#2")  # a backend that is deleted has none
        await until(lambda first=first, drained=drained: (first, drained) in one.adapter.told)
        removing.cancel()
        await asyncio.wait([removing])
    with pytest.raises(InvalidArgument, match="'spare' is still being deleted"):
        await one.controller.create_backend(plan("spare"))
    await until(lambda: {"spare#1", "spare#2"} <= set(one.adapter.killed))
    for _ in range(10):
        await asyncio.sleep(0)
    await one.controller.create_backend(plan("spare"))


@on_loop
async def test_what_replaced_a_backend_is_what_the_next_controller_finds(platform: Platform) -> None:
    one = await furnished(platform)
    await one.controller.create_backend(plan("b", max_queued_requests=9), replace=True)
    assert one.replicas("b") == ["b#2"]
    await until(lambda: ("b#1", Drain(20.0, others=True)) in one.adapter.told)
    two = await platform.controller().started()
    assert two.replicas("b") == ["b#2"]
    assert (await two.controller.get_backend_config("b")).max_queued_requests == 9
    platform.store.away = ("picture",)
    with pytest.raises(ConnectionError):
        await two.controller.create_backend(plan("b"), replace=True)
    assert two.replicas("b") == ["b#2"]  # what is not kept is not done
    assert "b#3" in two.adapter.killed


@on_loop
async def test_a_controller_that_dies_between_two_versions_leaves_the_former_one(platform: Platform) -> None:
    """The next one takes over what serves of either, and exchanges the new ones again."""
    one = await platform.controller().started()
    await one.controller.create_backend(plan("a", num_replicas=3, max_surge=0, max_unavailable=1))
    start = one.adapter.on_start
    assert start is not None
    one.adapter.on_start = lambda spec: None if spec.worker_id == "a#5" else start(spec)  # type: ignore[func-returns-value]
    updating = asyncio.ensure_future(
        one.controller.update_backend(plan("a", max_queued_requests=9), keep_resources=True)
    )
    await until(lambda: one.replicas("a") == ["a#3", "a#4"])
    two = await platform.controller().started()
    assert two.ids(two.adapter.adopted) == ["a#3", "a#4"]
    await until(lambda: two.replicas("a") == ["a#3", "a#5", "a#6"])
    there = (await two.controller.statistics([]))["backends"]["a"]
    assert {one["version"] for one in there["details"].values()} == {there["version"]} == {1}
    assert (await two.controller.get_backend_config("a")).max_queued_requests == 1000
    await two.controller.update_backend(plan("a", max_queued_requests=9), keep_resources=True)
    three = await platform.controller().started()
    there = (await three.controller.statistics([]))["backends"]["a"]
    assert [one["version"] for one in there["details"].values()] == [2, 2, 2]
    assert (there["state"], there["version"]) == ("ready", 2)
    config = await three.controller.get_backend_config("a")
    assert (config.num_replicas, config.max_surge, config.max_queued_requests) == (3, 0, 9)
    updating.cancel()
    await asyncio.wait([updating])


@on_loop
async def test_an_endpoint_that_was_given_up_while_an_ingress_took_its_time_is_taken_back(platform: Platform) -> None:
    one = await furnished(platform)
    ingress = one.subscribe(ingress=True)
    creating = asyncio.ensure_future(one.controller.create_endpoint(endpoint("g", "b")))
    await until(lambda: "g" in published(ingress)[-1].endpoints)
    creating.cancel()
    await asyncio.wait([creating])
    assert "g" not in await one.controller.list_endpoints()
    assert "g" not in published(ingress)[-1].endpoints
    ingress.break_off()
    await one.controller.create_endpoint(endpoint("g", "b"))
    assert "g" in await one.controller.list_endpoints()


@pytest.mark.parametrize("how", ["refused", "given up"])
def test_a_configuration_that_not_all_took_is_nobodys(how: str) -> None:
    async def configure(platform: Platform) -> None:
        one = await furnished(platform)
        answers = iter([pack_exception(ValueError("refused")) if how == "refused" else None, None, None, None])
        one.refusal = lambda config: next(answers)
        tell = one.adapter.on_tell
        if how == "given up":
            one.adapter.on_tell = None
        configuring = asyncio.ensure_future(one.controller.update_backend_config("a", {"max_concurrent_queries": 9}))
        await until(lambda: len(configured(one)) >= 2)
        if how == "given up":
            one.adapter.on_tell = tell
            configuring.cancel()
        with pytest.raises((ValueError, asyncio.CancelledError)):
            await configuring
        back = [("a#2", None)] if how == "refused" else [("a#1", None), ("a#2", None)]
        assert configured(one) == [("a#1", 9), ("a#2", 9), *back]
        assert (await one.controller.get_backend_config("a")).max_concurrent_queries is None

    asyncio.run(asyncio.wait_for(configure(Platform()), 20))


def configured(one: Incarnation) -> list[tuple[str, int | None]]:
    """What replicas were told to have as ``max_concurrent_queries``, in order."""
    told = [(worker, loads(body.config)) for worker, body in one.adapter.told if isinstance(body, Reconfigure)]
    return [(worker, config.max_concurrent_queries) for worker, config in told]


@on_loop
async def test_a_backend_about_to_go_is_not_said_to_be_there(platform: Platform) -> None:
    one = await furnished(platform)
    await one.controller.create_backend(plan("spare"))
    one.adapter.on_tell = None
    configuring = asyncio.ensure_future(one.controller.update_backend_config("spare", {"max_concurrent_queries": 9}))
    await until(lambda: configured(one))
    deleting = asyncio.ensure_future(one.controller.delete_backend("spare", force=True))
    await asyncio.sleep(0)
    with pytest.raises(InvalidArgument, match=r"there is no backend 'spare'; the backends are: 'a', 'b'$"):
        await one.controller.set_traffic("f", {"spare": 1.0})
    assert sorted(await one.controller.list_backends()) == ["a", "b"]
    deleting.cancel()
    configuring.cancel()
    await asyncio.wait([deleting, configuring], timeout=0.01)


@on_loop
async def test_of_two_endpoints_of_one_name_the_first_one_ready_is_created(platform: Platform) -> None:
    """Nobody sees an endpoint before it serves; and an ingress may take its time."""
    one = await platform.controller().started()
    await one.controller.create_backend(plan("a"))
    one.adapter.on_start = None
    routed = asyncio.ensure_future(one.controller.create_endpoint(endpoint("e", "a", "/e")))
    await until(lambda: "ingress#2" in one.ids(one.adapter.started))
    assert await one.controller.list_endpoints() == {}
    await one.controller.create_endpoint(endpoint("e", "a"))
    for spec in one.adapter.started[1:]:
        one._start(spec)
    with pytest.raises(InvalidArgument, match="endpoint 'e' exists already"):
        await routed
    assert (await one.controller.list_endpoints())["e"].route is None


@on_loop
async def test_a_new_controller_tells_early_callers_that_there_is_nothing_yet(platform: Platform) -> None:
    one = platform.controller()
    caller = one.subscribe()
    await one.started()
    assert [snapshot.endpoints for snapshot in published(caller)] == [{}]


@on_loop
async def test_replicas_adopted_are_replaced_changed_and_removed_like_any_other(platform: Platform) -> None:
    await furnished(platform)
    two = await platform.controller().started()
    two.die("b#1", "was killed by SIGKILL")
    await until(lambda: two.replicas("b") == ["b#2"])
    await two.controller.update_backend_config("a", {"num_replicas": 1})
    assert two.replicas("a") == ["a#1"]
    assert ("a#2", Drain(20.0, others=True)) in two.adapter.told
    await two.controller.delete_endpoint("f")
    await two.controller.set_traffic("e", {"a": 1.0})
    await two.controller.shadow_traffic("e", "b", 0.0)
    await two.controller.delete_backend("b", force=True)
    three = await platform.controller().started()
    assert three.ids(three.adapter.adopted) == ["a#1", "ingress#1", "ingress#2"]
    assert set(await three.controller.list_backends()) == {"a"}
    assert set(await three.controller.list_endpoints()) == {"e"}


@on_loop
async def test_a_backend_that_was_being_created_does_not_exist_afterwards(platform: Platform) -> None:
    one = await furnished(platform)
    one.adapter.on_start = lambda spec: platform.alive.update({spec.worker_id: ""})  # and never gets ready
    creating = asyncio.ensure_future(one.controller.create_backend(plan("c")))
    await until(lambda: "c#1" in platform.alive)
    two = await platform.controller().started()
    assert "c" not in await two.controller.list_backends()
    assert "c#1" not in two.ids(two.adapter.adopted)
    await two.controller.create_backend(plan("c"))  # the tag is free
    creating.cancel()
    await asyncio.wait([creating])


@on_loop
async def test_a_backend_is_kept_before_it_is_announced(platform: Platform) -> None:
    """If its picture names replicas of a backend, its plan is there; the other way round it is as if it had none."""
    one = await platform.controller().started()
    platform.store.log.clear()
    await one.controller.create_backend(plan("a"))
    first, second = platform.store.log
    assert (first.startswith("backend:a:"), second) == (True, "picture")
    del platform.store.rows["picture"]  # the controller died in between
    two = await platform.controller().started()
    assert await two.controller.list_backends() == {}


@on_loop
async def test_a_shutdown_leaves_the_store_to_the_adapter(platform: Platform) -> None:
    one = await furnished(platform)
    platform.store.log.clear()
    await one.controller.shutdown(1.0)
    assert platform.store.log == []  # nothing half-ended is ever restored
    assert platform.alive == {}


# -- operations that travel --------------------------------------------------------------------------------------------


@pytest.fixture
def detached() -> Iterator[Any]:
    """A controller in a thread, whose workers are ready at once and leave when told to."""
    platform = Platform()
    adapter = FakeAdapter(store=platform.store)
    events: list[Any] = []

    async def start(engine_id: str, listener: Any) -> None:
        events.append(listener)

    def leave(worker_id: str, body: Any = None) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(events[0].worker_exited, WorkerExit(worker_id, "left"))

    adapter.start = start  # type: ignore[method-assign]
    adapter.on_start = lambda spec: events[0].worker_said(spec.worker_id, Ready("fake:" + spec.worker_id))
    adapter.on_tell, adapter.on_kill = leave, leave
    controller = DetachedController("e", adapter, HTTP)
    controller.wait_started()
    yield controller
    do(controller, operations.Stop(0.0))


def do(controller: DetachedController, operation: operations.Operation[Any] | operations.Stop) -> Any:
    return loads(controller.run(dumps(operation, "the operation")))


def test_an_operation_brings_its_result_and_the_version_that_has_it(detached: Any) -> None:
    result, error, version = do(detached, operations.CreateBackend(plan("b")))
    assert (result, error) == (None, None)
    backends, error, later = do(detached, operations.ListBackends())
    assert backends == {"b": plan("b").config}
    assert later >= version > 0


def test_an_error_travels_as_itself(detached: Any) -> None:
    result, error, _ = do(detached, operations.DeleteBackend("nothing", force=False))
    assert result is None
    assert isinstance(unpack_exception(error), InvalidArgument)


def test_the_operations_that_are_no_methods_of_the_controller(detached: Any) -> None:
    assert do(detached, operations.GetURL())[0] is None
    assert do(detached, operations.GetOptions())[0] == HTTP


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("fails", ["the adapter", "the store", "the adoption"])
def test_an_engine_whose_next_controller_cannot_start_can_be_shut_down(fails: str) -> None:
    platform = Platform()
    Checkpoint(platform.store).keep(PICTURE)
    adapter = FakeAdapter(store=platform.store)
    ended: list[str] = []

    async def failing(*args: Any) -> None:
        raise ConnectionError("the control plane is away")

    def away() -> dict[str, bytes]:
        raise ConnectionError("the control plane is away")

    async def stop() -> None:
        ended.append("stop")

    if fails == "the adapter":
        adapter.start = failing  # type: ignore[method-assign]
    elif fails == "the store":
        platform.store.load = away  # type: ignore[method-assign]
    else:
        adapter.adopt_worker = failing  # type: ignore[method-assign]
    adapter.stop = stop  # type: ignore[method-assign]
    adapter.close = lambda: ended.append("close")  # type: ignore[method-assign]
    controller = DetachedController("e", adapter, HTTP)
    with pytest.raises(ConnectionError, match="the control plane is away"):
        controller.wait_started()
    _, error, _ = do(controller, operations.ListBackends())
    assert isinstance(unpack_exception(error), ConnectionError)
    for _ in range(2):
        assert do(controller, operations.Stop(0.0))[:2] == (None, None)
    assert ended == ["stop", "close"]
    assert "picture" in platform.store.rows  # it is the adapter's to clear


# -- the application's side ------------------------------------------------------------------------------------------


class Remote:
    """A remote controller that dies as often as it is told, before or after it has done what it was asked."""

    engine_id = "e"
    control_address = "fake:controller"

    def __init__(self, deaths: int = 0) -> None:
        self.deaths = deaths
        self.asked: list[str] = []
        self.asked_at: list[float] = []  # monotonic seconds
        self.left: list[bool] = []
        self.answer: Callable[[bytes], bytes] = lambda packed: dumps((None, None, 0), "it")

    def run(self, name: str, operation: bytes) -> bytes:
        self.asked.append(name)
        self.asked_at.append(time.monotonic())
        if self.deaths:
            self.deaths -= 1
            raise RetryLater("the controller died")
        return self.answer(operation)

    def leave(self, *, ended: bool) -> None:
        self.left.append(ended)


class Waited(Client):
    """A client that says for which versions was waited."""

    def __init__(self) -> None:
        super().__init__("e", FakeAdapter())
        self.versions: list[int] = []

    def wait_applied(self, version: int, timeout_s: float) -> bool:
        self.versions.append(version)
        return True


OPERATIONS: dict[str, operations.Operation[Any] | operations.Stop] = {
    "get_backend_config": operations.GetBackendConfig("b"),
    "get_options": operations.GetOptions(),
    "get_url": operations.GetURL(),
    "list_backends": operations.ListBackends(),
    "list_endpoints": operations.ListEndpoints(),
    "set_traffic": operations.SetTraffic("e", {"b": 1.0}),
    "shadow_traffic": operations.ShadowTraffic("e", "b", 0.5),
    "statistics": operations.Statistics([]),
    "stop": operations.Stop(1.0),
    "create_backend": operations.CreateBackend(plan("b")),
    "update_backend": operations.UpdateBackend(plan("b"), keep_resources=True),
    "update_backend_config": operations.UpdateBackendConfig("b", {}),
    "delete_backend": operations.DeleteBackend("b", False),
    "create_endpoint": operations.CreateEndpoint(endpoint("e", "b")),
    "delete_endpoint": operations.DeleteEndpoint("e"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_repeated_when_the_controller_dies(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    monkeypatch.setattr(remote_runner, "_RETRY_S", 0.01)
    remote, client = Remote(deaths=2), Waited()
    runner = RemoteRunner(remote, client)
    if isinstance(OPERATIONS[operation], operations.REPEATABLE):
        runner._run(OPERATIONS[operation])
        assert remote.asked == [operation] * 3
    else:
        with pytest.raises(RetryLater, match="the controller died"):
            runner._run(OPERATIONS[operation])
        assert remote.asked == [operation]


def test_between_tries_there_is_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller takes seconds to come back, and each try costs the platform."""
    assert remote_runner._RETRY_S >= 0.1
    monkeypatch.setattr(remote_runner, "_RETRY_S", 0.05)
    remote = Remote(deaths=3)
    RemoteRunner(remote, Waited()).run(operations.ListBackends())
    assert [later - earlier > 0.04 for earlier, later in pairwise(remote.asked_at)] == [True] * 3


@pytest.mark.parametrize("how", ["shut down", "let go"])
def test_tries_end_with_the_engine(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "shut down":
        monkeypatch.setattr(remote_runner, "_RETRY_S", 0.01)
    else:
        monkeypatch.setattr(remote_runner, "_RETRY_S", 20.0)  # of which nothing must be waited for
    remote, client = Remote(deaths=2 if how == "shut down" else 1000), Waited()
    runner = RemoteRunner(remote, client)

    def answer(packed: bytes) -> bytes:
        raise errors.EngineClosed("the engine was shut down")

    remote.answer = answer
    trying: Future[Any] = Future()

    def try_it() -> None:
        try:
            trying.set_result(runner.run(operations.ListBackends()))
        except BaseException as error:
            trying.set_exception(error)

    thread = threading.Thread(target=try_it)
    thread.start()
    if how == "let go":
        eventually(lambda: remote.asked)
        runner.leave()
    with pytest.raises(errors.EngineClosed, match=how):
        trying.result(10)
    thread.join()
    assert len(remote.asked) == (3 if how == "shut down" else 1)


def test_only_what_can_be_done_twice_is_repeated() -> None:
    done_again_fails = {"create_backend", "delete_backend", "create_endpoint", "delete_endpoint"}
    assert not any(isinstance(OPERATIONS[name], operations.REPEATABLE) for name in done_again_fails)
    assert set(operations.REPEATABLE) <= set(map(type, OPERATIONS.values()))


def test_the_client_has_the_change_when_the_operation_returns(detached: Any) -> None:
    remote, client = Remote(), Waited()
    remote.answer = detached.run
    runner = RemoteRunner(remote, client)
    runner.run(operations.CreateBackend(plan("b")))
    runner.run(operations.CreateEndpoint(endpoint("f", "b")))
    assert client.versions == sorted(client.versions)
    assert client.versions[-1] == do(detached, operations.ListBackends())[2]
    assert runner.http_url() is None
    assert runner.run(operations.GetOptions()) == HTTP


def test_an_error_is_raised_as_itself_and_waits_for_nothing(detached: Any) -> None:
    remote, client = Remote(), Waited()
    remote.answer = detached.run
    with pytest.raises(InvalidArgument, match="there is no backend 'nothing'") as caught:
        RemoteRunner(remote, client).run(operations.DeleteBackend("nothing", force=False))
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert client.versions == []


@pytest.mark.parametrize("when", ["while it goes on", "before it came there"])
def test_who_is_interrupted_has_it_given_up(detached: Any, when: str) -> None:
    """Also if the word of that overtakes what it is about."""
    remote, client = Remote(), Waited()
    remote.answer = detached.run
    detached._runner._adapter.on_start = None  # no replica becomes ready
    passed_on: list[bytes] = []

    def interrupt(packed: bytes) -> bytes:
        remote.answer = detached.run
        if when == "while it goes on":
            thread = threading.Thread(target=lambda: passed_on.append(detached.run(packed)))
            thread.start()
            eventually(lambda: detached._runner._adapter.started)
            threads.append(thread)
        else:
            late.append(packed)
        raise KeyboardInterrupt

    threads: list[threading.Thread] = []
    late: list[bytes] = []
    remote.answer = interrupt
    with pytest.raises(KeyboardInterrupt):
        RemoteRunner(remote, client).run(operations.CreateBackend(plan("b")))
    assert remote.asked == ["create_backend", "give_up"]
    for packed in late:
        _, error, _ = loads(detached.run(packed))
        assert "given up" in str(unpack_exception(error))
    for thread in threads:
        thread.join(PATIENCE_S)
        assert loads(passed_on[0])[1] is not None
    eventually(lambda: not do(detached, operations.Statistics([]))[0]["backends"])


def test_waiting_for_a_version() -> None:
    client = Client("e", FakeAdapter())
    applying = threading.Thread(target=lambda: [client.apply(snapshot(version)) for version in (1, 2, 3)])
    applying.start()
    assert client.wait_applied(3, 10.0)
    assert client.snapshot.version == 3
    assert not client.wait_applied(4, 0.0)
    applying.join()
    client.close()
    assert client.wait_applied(4, 10.0)  # nothing will come any more


def test_who_waits_for_a_snapshot_is_told_that_none_will_come() -> None:
    client = Client("waited", FakeAdapter())
    waiting = threading.Thread(target=client.wait_applied, args=(1, 1000.0), daemon=True)
    waiting.start()
    eventually(lambda: client._moved._waiting)
    client.close()
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()


@pytest.mark.parametrize("failure", [None, errors.EngineClosed("it was shut down before")])
def test_leaving_and_stopping(failure: Exception | None) -> None:
    remote, client = Remote(), Waited()
    RemoteRunner(remote, client).leave()
    assert (remote.left, remote.asked, client.closed) == ([False], [], True)

    def answer(packed: bytes) -> bytes:
        if failure is not None:
            raise failure
        return dumps((None, None, 0), "it")

    remote, client = Remote(), Waited()
    remote.answer = answer
    RemoteRunner(remote, client).stop(1.0)
    assert (remote.left, remote.asked, client.closed) == ([True], ["stop"], True)


# -- callers elsewhere -----------------------------------------------------------------------------------------------


@dataclass
class Returning(FakeAdapter):
    """Its controllers come back as long as the test says so."""

    back: bool = True

    def returns(self, control_address: str) -> bool:
        return self.back


def subscribed(adapter: Returning, monkeypatch: pytest.MonkeyPatch) -> tuple[Client, FakeChannel]:
    """A client that has the first snapshot."""
    monkeypatch.setattr(subscription, "_RETRY_S", 0.01)
    client = Client("e", adapter)
    client._subscription = Subscription(client, adapter, "fake:controller", Subscribe(ingress=False))
    client._subscription.begin()
    (channel,) = adapter.channels
    channel.answer(Control(Publish(snapshot(1))))
    return client, channel


def test_a_caller_finds_the_next_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Returning()
    client, channel = subscribed(adapter, monkeypatch)
    adapter.unreachable.add("controller")
    channel.break_off()
    adapter.unreachable.clear()
    eventually(lambda: len(adapter.channels) == 2)
    eventually(lambda: adapter.channels[1].sent == [Control(Subscribe(False, ""))])
    assert not client.closed
    adapter.channels[1].answer(Control(Publish(snapshot(1001))))
    assert client.snapshot.version == 1001
    client.close()
    assert adapter.channels[1].closed


@pytest.mark.parametrize("at_once", [True, False])
def test_a_caller_gives_up_when_there_will_be_no_other(monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    adapter = Returning(back=not at_once)
    client, channel = subscribed(adapter, monkeypatch)
    adapter.unreachable.add("controller")
    channel.break_off("it died")
    adapter.back = False
    eventually(lambda: client.closed)
    assert len(adapter.channels) == 1


@pytest.mark.parametrize("back", [True, False])
def test_who_reads_the_channels_does_not_wait_for_the_adapters_word(
    monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    """A platform that is silent just then would keep the answers of all replicas from being read."""
    reader = threading.current_thread()
    askers: list[threading.Thread] = []
    word = threading.Event()

    class Slow(Returning):
        def returns(self, control_address: str) -> bool:
            askers.append(threading.current_thread())
            return askers[-1] is reader or (word.wait(PATIENCE_S) and back)

    adapter = Slow()
    client, channel = subscribed(adapter, monkeypatch)
    channel.break_off("it died")
    eventually(lambda: askers)
    assert reader not in askers
    assert (client.closed, len(adapter.channels)) == (False, 1)
    word.set()
    eventually(lambda: len(adapter.channels) == 2 if back else client.closed)
    client.close()


def test_a_caller_gives_up_at_the_end_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls made by functions registered with atexit fail then, and do not wait for ever."""
    client, channel = subscribed(Returning(), monkeypatch)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    channel.break_off("it died")
    assert client.closed


def attached(adapter: Returning) -> Future[Client]:
    """What becomes of a caller that comes now."""
    coming: Future[Client] = Future()

    def attach() -> None:
        try:
            coming.set_result(Client.subscribe("e", adapter, "fake:controller"))
        except BaseException as error:
            coming.set_exception(error)

    threading.Thread(target=attach).start()
    return coming


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("died", ["before", "meanwhile"])
def test_a_caller_that_comes_while_there_is_no_controller_waits(monkeypatch: pytest.MonkeyPatch, died: str) -> None:
    monkeypatch.setattr(subscription, "_RETRY_S", 0.01)
    adapter = Returning(unreachable={"controller"} if died == "before" else set())
    coming = attached(adapter)
    if died == "meanwhile":
        eventually(lambda: adapter.channels and adapter.channels[0].watched)
        adapter.channels.pop().break_off()
    adapter.unreachable.clear()
    (channel,) = eventually(lambda: adapter.channels)
    channel.answer(Control(Publish(snapshot(1001))))
    client = coming.result(20)
    assert client.snapshot.version == 1001
    client.close()


@pytest.fixture
def let_seekers_end(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Waits until nobody looks for a controller any more; returns how many threads have done since the last time."""
    begun: list[threading.Thread] = []

    class Seeker(threading.Thread):
        def start(self) -> None:
            begun.append(self)
            super().start()

    def let_them_end() -> int:
        seekers, begun[:] = begun[:], []
        for seeker in seekers:
            seeker.join()
        return len(seekers)

    monkeypatch.setattr(subscription, "threading", SimpleNamespace(**{**vars(threading), "Thread": Seeker}))
    return let_them_end


def test_a_word_that_does_not_arrive_is_no_second_loss(
    monkeypatch: pytest.MonkeyPatch, let_seekers_end: Callable[[], int]
) -> None:
    """The reader of the channel tells of it, once; and a channel that was given up long ago is nobody's loss."""
    adapter = Returning()
    client, channel = subscribed(adapter, monkeypatch)
    channel.raises = ChannelClosed("the peer is gone (Broken pipe)")
    channel.answer(Control(Publish(snapshot(2))))
    assert client.snapshot.version == 2
    assert let_seekers_end() == 0
    channel.break_off()
    assert let_seekers_end() == 1
    assert channel.listener is not None
    channel.listener.lost(channel, "once more")
    assert let_seekers_end() == 0
    assert len(adapter.channels) == 2
    client.close()
    assert adapter.channels[1].closed


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("opened", ["first", "again"])
@pytest.mark.parametrize("found", ["before it is known", "before it is asked", "afterwards"])
def test_a_connection_refused_at_once_is_sought_again_once(
    monkeypatch: pytest.MonkeyPatch, let_seekers_end: Callable[[], int], opened: str, found: str
) -> None:
    """The poller finds the refusal at any moment of the new channel's first ones."""
    monkeypatch.setattr(subscription, "_RETRY_S", 0.01)
    adapter = Returning()
    original = adapter.open_channel
    refused: list[FakeChannel] = []
    most = 0

    def open_channel(*args: Any, **options: Any) -> FakeChannel:
        nonlocal most
        most = max(most, sum(thread.name == "engine-subscribe" for thread in threading.enumerate()))
        channel = original(*args, **options)
        if len(adapter.channels) == (1 if opened == "first" else 2):
            refused.append(channel)
            send = channel.send

            def refuse(message: Any) -> None:
                if found == "afterwards":
                    send(message)
                channel.break_off("nobody answers")
                if found == "before it is asked":
                    send(message)

            if found == "before it is known":
                channel.break_off("nobody answers")
            else:
                channel.send = refuse  # type: ignore[method-assign]
        return channel

    adapter.open_channel = open_channel  # type: ignore[method-assign]
    coming = attached(adapter)
    expected = 2
    if opened == "again":
        expected = 3
        first, *_ = eventually(lambda: adapter.channels)
        eventually(lambda: first.watched)
        first.break_off()
    eventually(lambda: len(adapter.channels) >= expected and adapter.channels[-1].watched)
    let_seekers_end()
    assert len(adapter.channels) == expected
    assert most == 1
    adapter.channels[-1].answer(Control(Publish(snapshot(1001))))
    client = coming.result(20)
    client.close()
    assert [channel.closed for channel in adapter.channels] == [True] * expected


@pytest.mark.usefixtures("leaves_nothing")
def test_a_caller_that_leaves_while_it_connects_closes_what_it_opened(
    monkeypatch: pytest.MonkeyPatch, let_seekers_end: Callable[[], int]
) -> None:
    adapter = Returning()
    client, channel = subscribed(adapter, monkeypatch)
    original = adapter.open_channel

    def open_channel(*args: Any, **options: Any) -> FakeChannel:
        client.close()
        return original(*args, **options)

    adapter.open_channel = open_channel  # type: ignore[method-assign]
    channel.break_off()
    assert let_seekers_end() == 1
    assert [(one.closed, one.sent) for one in adapter.channels[1:]] == [(True, [])]


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("why", ["there is none", "it is shut down meanwhile", "it does not come"])
def test_a_caller_that_comes_too_late(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(subscription, "_RETRY_S", 0.01)
    if why == "it does not come":
        monkeypatch.setattr("engine.calling.client._ATTACH_TIMEOUT_S", 0.01)
        monkeypatch.setattr("engine.calling.client._RETURN_TIMEOUT_S", 0.02)
    adapter = Returning(unreachable={"controller"}, back=why != "there is none")
    coming = attached(adapter)
    if why == "it is shut down meanwhile":
        adapter.back = False
    with pytest.raises(errors.EngineClosed):
        coming.result(20)


@pytest.mark.usefixtures("leaves_nothing")
def test_a_caller_that_has_left_looks_for_no_controller(
    monkeypatch: pytest.MonkeyPatch, let_seekers_end: Callable[[], int]
) -> None:
    """The one that shuts a detached engine down loses its controller, too."""
    adapter = Returning()
    client, channel = subscribed(adapter, monkeypatch)
    monkeypatch.setattr(subscription, "_RETRY_S", 0.2)
    channel.break_off()
    client.close()
    assert let_seekers_end() == 1
    assert len(adapter.channels) == 1


# -- applications that come later ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("fails", ["the subscription", "the first operation", "nothing"])
def test_an_application_that_cannot_take_an_engine_over_keeps_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    hooks: list[Any] = []
    at_exit = SimpleNamespace(register=hooks.append, unregister=hooks.remove)
    monkeypatch.setattr("engine.engine.atexit", at_exit)
    remote = Remote()
    adapter = FakeAdapter(unreachable={"controller"} if fails == "the subscription" else set())
    adapter.detach = lambda name, http: remote  # type: ignore[method-assign]
    opened = adapter.open_channel

    def open_channel(*args: Any, **options: Any) -> FakeChannel:
        channel = opened(*args, **options)
        channel.on_send = lambda message: (
            channel.answer(Control(Publish(snapshot(1)))) if isinstance(message.body, Subscribe) else None
        )
        return channel

    def answer(packed: bytes) -> bytes:
        if fails != "nothing":
            raise errors.EngineClosed("it was shut down meanwhile")
        return dumps((HTTP, None, 1), "it")

    adapter.open_channel = open_channel  # type: ignore[method-assign]
    remote.answer = answer
    if fails == "nothing":
        engine = Engine.connect("n", backend=adapter)
        (hook,) = hooks
        hook()
        with pytest.raises(errors.EngineClosed):
            engine.list_backends()
    else:
        with pytest.raises(errors.EngineClosed):
            Engine.connect("n", backend=adapter)
    assert hooks == []
    assert "e" not in connectors._connectors
    assert Client.find("e") is None
    assert remote.left == [False]
    assert [channel.closed for channel in adapter.channels] == [True] * (fails != "the subscription")


# -- adapters whose engines end with their process -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["local", "inline"])
def test_where_nothing_outlives_its_creator(backend: str) -> None:
    with pytest.raises(InvalidArgument, match="detached"):
        Engine(backend=backend, name="n", detached=True)
    with pytest.raises(InvalidArgument, match="detached"):
        Engine.connect("n", backend=backend)


@pytest.mark.parametrize("name", [None, ""])
@pytest.mark.parametrize("backend", ["local", "inline", "ray"])
def test_a_detached_engine_needs_a_name(backend: str, name: str | None) -> None:
    with pytest.raises(InvalidArgument, match="detached=True needs a name to connect to later"):
        Engine(backend=backend, name=name, detached=True)
    with pytest.raises(InvalidArgument, match="name must be a non-empty str"):
        Engine.connect(name, backend=backend)  # type: ignore[arg-type]


def test_detached_is_yes_or_no() -> None:
    with pytest.raises(InvalidArgument, match="detached must be True or False, not 'yes'"):
        Engine(detached="yes")  # type: ignore[arg-type]
