"""What a controller on Ray knows of the cluster, without one: public ports, strangers, nodes, leftovers."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from ray_cluster import why_not

from engine.seam.adapter import Node, Vitals
from engine.seam.control_messages import Drain, Ready
from engine.seam.messages import Control
from engine.seam.worker import Listen, WorkerSpec
from engine.testing.fakes import FakeChannel
from engine.testing.instruments import PATIENCE_S, Footprint, eventually
from engine_wire import SocketChannel, Undriven

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
if why_not() is None:
    from engine_ray.controlling import asking as asking_module
    from engine_ray.controlling import leftovers, nodes, strangers
    from engine_ray.controlling.asking import Asking
    from engine_ray.controlling.cluster import ClusterAdapter
    from engine_ray.controlling.nodes import NodeWatch
    from engine_ray.controlling.public_ports import PublicPorts
    from engine_ray.controlling.strangers import Newcomer, Strangers
    from engine_ray.controlling.watched import WatchedWorker
    from engine_ray.working.bodies import Bound, Hello

# -- public ports ----------------------------------------------------------------------------------------------------

ANY_PORT = Listen("127.0.0.1", 0)


def ingress(name: str, bound: Callable[[WatchedWorker, int], None]) -> WatchedWorker:
    spec = WorkerSpec(name, name, "nowhere:main", b"", node_id="n", listen=ANY_PORT)
    return WatchedWorker(spec, None, lambda worker_id, body: None, bound, lambda worker, why: None)


def test_the_first_one_on_a_node_chooses_the_port_and_the_others_wait_for_it() -> None:
    async def main() -> None:
        ports = PublicPorts()
        listen, first = await ports.place(ANY_PORT, "n")
        assert (listen, first is not None) == (ANY_PORT, True)
        waiting = [asyncio.ensure_future(ports.place(ANY_PORT, "n")) for _ in range(2)]
        _, elsewhere = await ports.place(ANY_PORT, "m")
        assert elsewhere is not None, "nobody there says anything of this node"
        ports.learn(ANY_PORT, "n", 4000)
        ports.learn(ANY_PORT, "n", 4001)
        for placed in waiting:
            assert await placed == (Listen("127.0.0.1", 4000), None)
        assert ports.bound(ANY_PORT, "n").port == 4000

    asyncio.run(main())


def test_the_first_one_that_could_not_be_started_at_all_is_waited_for_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(kind: type) -> None:
        raise ConnectionError("the control plane is away")

    async def main() -> None:
        adapter = ClusterAdapter(None, {}, {})
        adapter._running = object()  # type: ignore[assignment]
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        monkeypatch.setattr("ray.remote", fail)
        spec = WorkerSpec("ingress#1", "ingress.1", "nowhere:main", b"", node_id="ab" * 28, listen=ANY_PORT)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(adapter.start_worker(spec), PATIENCE_S)

    asyncio.run(main())


def test_when_the_first_one_ends_before_it_listens_the_next_one_chooses() -> None:
    async def main() -> None:
        ports = PublicPorts()
        worker = ingress("ingress#1", lambda worker, port: None)
        _, worker.port = await ports.place(ANY_PORT, "n")
        waiting = asyncio.ensure_future(ports.place(ANY_PORT, "n"))
        await asyncio.sleep(0)
        worker.finish()
        listen, first = await waiting
        assert (listen, first is not None) == (ANY_PORT, True)

    asyncio.run(main())


def test_the_ports_of_nodes_that_left_are_forgotten() -> None:
    async def main() -> None:
        ports = PublicPorts()
        ports.learn(ANY_PORT, "n", 4000)
        ports.learn(ANY_PORT, "m", 5000)
        ports.keep_only({"m", "another"})
        assert ports.bound(ANY_PORT, "m").port == 5000
        with pytest.raises(KeyError):
            ports.bound(ANY_PORT, "n")
        _, first = await ports.place(ANY_PORT, "n")
        assert first is not None

    asyncio.run(main())


def test_adopted_ingresses_share_a_port_whichever_of_them_lives() -> None:
    """The first one may have died with the former controller: the port is then what another one says."""

    async def main() -> None:
        adapter = ClusterAdapter(None, {}, {})
        dead, alive, other = (ingress(f"ingress#{number}", adapter._on_bound) for number in (1, 2, 3))
        dead.finish()
        for worker, port in ((alive, 4000), (other, 4000)):
            channel = FakeChannel("worker", worker)
            worker.connected(channel)
            channel.answer(Control(Bound(port)))
        assert adapter.bound(ANY_PORT, "n").port == 4000
        _, first = await adapter._ports.place(ANY_PORT, "n")
        assert first is None, "a replacement is not alone there"

    asyncio.run(main())


# -- strangers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def connection() -> Iterator[SocketChannel]:
    """A channel that nobody reads."""
    ours, theirs = socket.socketpair()
    with theirs:
        channel = SocketChannel(ours, None, Undriven(), greet=False)
        yield channel
        channel.close()


def test_the_first_word_decides_who_hears_all_others(connection: SocketChannel) -> None:
    heard: list[Any] = []

    def introduced(channel: SocketChannel, first: Any) -> None:
        assert channel is connection
        heard.append(("newcomer", first))
        channel.listener = Listener()

    class Listener:
        def received(self, channel: Any, message: Any) -> None:
            heard.append(("worker", message))

        def lost(self, channel: Any, reason: str) -> None: ...

    newcomer = connection.listener = Newcomer(introduced)
    for word in (Control(Hello("w")), Control(Ready("a"))):  # the reader had both in hand, and the listener of then
        newcomer.received(connection, word)
    assert heard == [("newcomer", Control(Hello("w"))), ("worker", Control(Ready("a")))]


class Returned(FakeChannel):
    """The control channel of a worker that has come back; notes in `done` that something was sent."""

    def __init__(self) -> None:
        super().__init__("worker")
        self.done = asyncio.Event()
        self.on_send = lambda message: self.done.set()


def test_what_a_stranger_says_is_kept_for_whoever_adopts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "_ADOPTED_WITHIN_S", 1000.0)

    async def main() -> None:
        waiting, channel = Strangers(), Returned()
        waiting.take_in("w", channel)  # type: ignore[arg-type]
        channel.answer(Control(Ready("a")))
        assert waiting.hand_over("another") is None
        stranger = waiting.hand_over("w")
        assert stranger is not None
        assert (stranger.channel, stranger.heard) == (channel, [Control(Ready("a"))])
        assert waiting.hand_over("w") is None, "it is no stranger any more"

    asyncio.run(main())


def test_a_stranger_that_has_left_is_handed_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "_ADOPTED_WITHIN_S", 1000.0)

    async def main() -> None:
        waiting, channel = Strangers(), Returned()
        waiting.take_in("w", channel)  # type: ignore[arg-type]
        channel.break_off()
        assert waiting.hand_over("w") is None

    asyncio.run(main())


def test_a_stranger_that_nobody_asks_for_is_sent_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if another one was adopted meanwhile, has left, or has come back once more on another channel."""
    monkeypatch.setattr(strangers, "_ADOPTED_WITHIN_S", 0.0)

    async def main() -> None:
        waiting = Strangers()
        adopted, left, former, last = (Returned() for _ in range(4))
        for worker_id, channel in (("adopted", adopted), ("left", left), ("twice", former), ("twice", last)):
            waiting.take_in(worker_id, channel)  # type: ignore[arg-type]
        assert waiting.hand_over("adopted") is not None
        left.closed = True
        await asyncio.wait_for(last.done.wait(), PATIENCE_S)
        assert last.sent == [Control(Drain(strangers._DISMISSED_WITHIN_S))]
        assert adopted.sent == left.sent == former.sent == []
        assert waiting.hand_over("twice") is None

    asyncio.run(main())


# -- nodes -----------------------------------------------------------------------------------------------------------


def as_ray_says(*node_ids: str, dead: str = "") -> list[dict[str, Any]]:
    return [
        {"NodeID": node_id, "NodeManagerAddress": f"10.0.0.{node_id}", "Alive": node_id not in dead}
        for node_id in node_ids
    ]


def test_the_own_node_is_named_first_and_dead_ones_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: as_ray_says("3", "1", "2", "4", dead="4"))

    async def main() -> None:
        watch = NodeWatch(lambda: "2", lambda: None)
        assert watch.nodes == ()
        assert await watch.look()
        assert watch.nodes == (Node("2", "10.0.0.2"), Node("1", "10.0.0.1"), Node("3", "10.0.0.3"))
        assert not await watch.look()
        await watch.end()

    asyncio.run(main())


def test_the_watch_tells_of_every_change_and_outlives_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nodes, "_LOOK_EVERY_S", 0.0)
    answers: list[Any] = [["1"], ["1"], ConnectionError("it is away"), ["1", "2"], ["2"]]

    def ask() -> list[dict[str, Any]]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return as_ray_says(*answer)

    monkeypatch.setattr("ray.nodes", ask)
    seen: list[list[str]] = []

    async def main() -> None:
        settled = asyncio.Event()

        def changed() -> None:
            seen.append([node.node_id for node in watch.nodes])
            if seen[-1] == ["2"]:
                settled.set()

        watch = NodeWatch(lambda: "1", changed)
        await watch.look()
        watch.begin()
        watch.begin()
        await asyncio.wait_for(settled.wait(), PATIENCE_S)
        await watch.end()
        await watch.end()
        assert len(asyncio.all_tasks()) == 1

    with caplog.at_level(logging.WARNING, "engine.ray"):
        asyncio.run(main())
    assert seen == [["1", "2"], ["2"]]
    assert [record.getMessage() for record in caplog.records] == ["cannot ask Ray for the cluster's nodes: it is away"]


# -- leftovers -------------------------------------------------------------------------------------------------------


def test_an_engine_is_left_over_when_its_job_is_over_and_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was made in a detached actor outlives the job of the program that made the actor."""
    from engine_ray.link.registry import Entry, Registry

    jobs = [{"JobID": "1", "IsDead": True}, {"JobID": "2", "IsDead": False}]
    monkeypatch.setattr("ray._private.state.jobs", lambda: jobs)
    with socket.create_server(("127.0.0.1", 0)) as alive, socket.create_server(("127.0.0.1", 0)) as gone:
        answering, silent = (f"ray:e:n:unix:@x|tcp:127.0.0.1:{one.getsockname()[1]}" for one in (alive, gone))
        gone.close()
        entries = {job + address: Entry(b"", job, address) for job in ("1", "2", "") for address in (answering, silent)}
        swept: list[Entry] = []

        def sweep(is_over: Callable[[Entry], bool]) -> None:
            swept.extend(entry for entry in entries.values() if is_over(entry))

        monkeypatch.setattr(Registry, "sweep", sweep)
        leftovers.sweep_leftovers()
    assert swept == [Entry(b"", "1", silent)]


# -- asking other nodes ------------------------------------------------------------------------------------------------


def test_no_node_is_asked_once_the_engine_is_about_to_disconnect() -> None:
    begun, ended = threading.Event(), threading.Event()

    def look(node_id: str, pids: Mapping[int, bool], over: threading.Event) -> Mapping[int, Vitals | None]:
        begun.set()
        assert over.wait(PATIENCE_S)
        ended.set()
        return {}

    async def main() -> None:
        asking = Asking(look)
        asks = asyncio.ensure_future(asking.ask("there", 1))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        waits = asyncio.ensure_future(asking.ask("there", 2))  # until the first one is answered
        await asyncio.sleep(0)
        asks.cancel()  # who asked does not wait any more
        with pytest.raises(asyncio.CancelledError):
            await asks
        assert not ended.is_set()
        await asking.end()
        assert ended.is_set()
        assert await waits is None
        assert await asking.ask("there", 1) is None
        await asking.end()

    asyncio.run(main())


class Nodes:
    """Answers questions about the processes of nodes once it is told to, and writes them down."""

    def __init__(self) -> None:
        self.looks: list[tuple[str, dict[int, bool]]] = []
        self._gates: dict[str, threading.Event] = {}

    def look(self, node_id: str, pids: Mapping[int, bool], over: threading.Event) -> Mapping[int, Vitals | None]:
        self.looks.append((node_id, dict(pids)))
        assert self.gate(node_id).wait(PATIENCE_S)
        if node_id == "broken":
            raise RuntimeError("no such node")
        return {pid: Vitals(kill, 0.0) for pid, kill in pids.items() if pid < 100}

    def gate(self, node_id: str) -> threading.Event:
        return self._gates.setdefault(node_id, threading.Event())


async def settled(done: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, done)


def test_a_node_is_asked_one_thing_at_a_time_and_all_that_is_wanted_meanwhile_next(leaves_nothing: Footprint) -> None:
    async def main() -> None:
        nodes = Nodes()
        asking = Asking(nodes.look)
        ask = asyncio.ensure_future
        first = ask(asking.ask("a", 1))
        await settled(lambda: len(nodes.looks) == 1)
        later = [ask(asking.ask("a", pid)) for pid in (2, 3, 2, 100)]
        kills = ask(asking.ask("a", 3, kill=True))
        other = ask(asking.ask("b", 1))
        await settled(lambda: len(nodes.looks) == 2)
        nodes.gate("b").set()  # one that is silent holds up no other
        assert await other == Vitals(False, 0.0)
        assert not first.done()
        nodes.gate("a").set()
        assert await first == Vitals(False, 0.0)
        assert await asyncio.gather(*later) == [Vitals(False, 0.0), Vitals(True, 0.0), Vitals(False, 0.0), None]
        assert await kills == Vitals(True, 0.0)
        assert nodes.looks == [("a", {1: False}), ("b", {1: False}), ("a", {2: False, 3: True, 100: False})]
        await asking.end()

    asyncio.run(main())


def test_only_so_many_nodes_are_asked_and_every_question_has_its_time(
    leaves_nothing: Footprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        nodes = Nodes()
        asking = Asking(nodes.look)
        names = [str(number) for number in range(asking_module.MOST_NODES + 2)]
        asks = [asyncio.ensure_future(asking.ask(name, 1)) for name in names]
        await settled(lambda: len(nodes.looks) == asking_module.MOST_NODES)
        # The loop's own threads are free, however many are silent.
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), PATIENCE_S) == 1
        monkeypatch.setattr(asking_module, "ANSWER_WITHIN_S", 0.01)
        assert await asking.ask("one more", 1) is None
        monkeypatch.undo()
        for name in (*names, "one more"):
            nodes.gate(name).set()
        assert await asyncio.gather(*asks) == [Vitals(False, 0.0)] * len(names)
        await settled(lambda: len(nodes.looks) == len(names) + 1)
        await asking.end()

    asyncio.run(main())


def test_a_node_that_cannot_be_asked(leaves_nothing: Footprint) -> None:
    async def main() -> None:
        nodes = Nodes()
        asking = Asking(nodes.look)
        nodes.gate("broken").set()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no such node"):
                await asking.ask("broken", 1)
        await asking.end()

    asyncio.run(main())
