"""The parts of the Ray adapter, without a cluster: each behaves as the others and Ray expect of it."""

from __future__ import annotations

import asyncio
import copyreg
import io
import pickle
import socket
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any, NamedTuple

import pytest
from fakes import backend_entry, snapshot
from ray_cluster import why_not

from engine.errors import EngineClosed, InvalidArgument, RemoteTraceback, RetryLater
from engine.seam.channel import ChannelClosed
from engine.seam.control_messages import Drain, Publish, Ready, Subscribe
from engine.seam.messages import Control, Credit
from engine.seam.resources import Resources
from engine.seam.serialization import dumps, pack_exception
from engine.seam.worker import WorkerSpec
from engine.testing.fakes import FakeChannel
from engine.testing.instruments import PATIENCE_S

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
if why_not() is None:
    from engine_ray import RayAdapter
    from engine_ray.calling import connector, courier, turns
    from engine_ray.calling.addresses import Address, cluster_of, engine_of, is_symbolic, symbolic
    from engine_ray.calling.carried import CarriedError, CarriedResult, Errand, Filled, Placeholder, carried
    from engine_ray.calling.connector import RayConnector
    from engine_ray.calling.turns import Turns
    from engine_ray.controlling import places, watched
    from engine_ray.controlling.cluster import ClusterAdapter
    from engine_ray.controlling.places import options_of, shortage, trifle
    from engine_ray.controlling.watched import WatchedWorker, described_death
    from engine_ray.link import connection, registry
    from engine_ray.link.actors import NAMESPACE, actor_names, kill_actor, kill_named
    from engine_ray.link.registry import Entry, Registry
    from engine_ray.working.bodies import Bound, Leaving
    from engine_ray.working.output import LineWriter


# -- the connection to Ray -------------------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody listens, for the time of a test."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def somebody() -> Iterator[str]:
    """An address where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"127.0.0.1:{sock.getsockname()[1]}"


def test_a_cluster_that_died_without_being_stopped_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, nobody: str, somebody: str
) -> None:
    """Ray itself would knock at the address it has noted for minutes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda directory: nobody)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    assert connection._running(None) is None
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: {nobody, somebody})
    assert connection._running(None) == somebody


def test_the_cluster_that_was_started_last_is_left_to_ray_to_find(
    monkeypatch: pytest.MonkeyPatch, somebody: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for noted in (somebody, None):
        monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda directory, noted=noted: noted)
        assert connection._running(None) == "auto"


def test_where_nobody_answers_at_the_address_of_the_environment(monkeypatch: pytest.MonkeyPatch, nobody: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with pytest.raises(InvalidArgument, match=f"RAY_ADDRESS='{nobody}': cannot connect.*refused"):
        connection._running(None)


def test_the_environment_may_ask_for_a_cluster_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert connection._running(None) is None


@pytest.mark.parametrize("other", ["localhost:6379", "127.0.0.1:6379"])
def test_a_cluster_has_several_names(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setattr(connection, "cluster", lambda: "127.0.0.1:6379")
    connection._check_same(other)
    with pytest.raises(InvalidArgument, match="one cluster a process"):
        connection._check_same("127.0.0.1:6380")


@pytest.mark.parametrize(
    ("connected", "last", "said"),
    [
        ("10.0.0.5:6379", "10.0.0.6:6379", "the Ray cluster at 10.0.0.5:6379"),
        (None, "10.0.0.6:6379", "the Ray cluster at 10.0.0.6:6379"),
        (None, "", "the Ray cluster"),
    ],
)
def test_how_messages_name_the_cluster(
    monkeypatch: pytest.MonkeyPatch, connected: str | None, last: str, said: str
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: connected is not None)
    monkeypatch.setattr(connection, "cluster", lambda: connected)
    monkeypatch.setattr(connection, "_last", last)
    assert connection.where() == said


def test_a_search_that_fails_names_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda directory: "10.0.0.5:6379")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.6:6379")
    assert connection._sought(None) == "the Ray cluster at 10.0.0.6:6379, which RAY_ADDRESS names"
    monkeypatch.delenv("RAY_ADDRESS")
    assert connection._sought(None) == "the Ray cluster at 10.0.0.5:6379 that seems to run on this machine"


@pytest.mark.parametrize(
    ("mode", "variables", "said"),
    [
        ("DISABLED", {"RAY_AUTH_TOKEN": "secret"}, "without a token"),
        ("TOKEN", {"RAY_AUTH_TOKEN": "secret", "RAY_AUTH_TOKEN_PATH": "/a/path"}, "with the token in RAY_AUTH_TOKEN"),
        ("TOKEN", {"RAY_AUTH_TOKEN_PATH": "/a/path"}, "with the token in /a/path, as RAY_AUTH_TOKEN_PATH says"),
        ("TOKEN", {}, "with the token in ~/.ray/auth_token"),
    ],
)
def test_the_log_says_where_the_token_is_and_not_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    variables: dict[str, str],
    said: str,
) -> None:
    from ray._raylet import AuthenticationMode

    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ray._raylet.get_authentication_mode", lambda: getattr(AuthenticationMode, mode))
    monkeypatch.setattr(connection, "where", lambda: "the Ray cluster at 10.0.0.5:6379")
    monkeypatch.setattr(connection, "_keeper", None)
    with caplog.at_level("INFO", logger="engine.ray"):
        connection.announce("e")
    (line,) = caplog.messages
    assert line == f"engine e is on the Ray cluster at 10.0.0.5:6379 (this program's own connection, {said})"


# -- addresses -------------------------------------------------------------------------------------------------------

UNIX, TCP, GCS = "unix:@engine-e-1", "tcp:10.0.0.5:4000", "gcs:10.0.0.1:6379"
PARTY = f"ray:e:node:{TCP}"
CONTROLLER = f"ray:e:node:{UNIX}|{TCP}|{GCS}"
SYMBOLIC = f"ray-engine:e:{GCS}"


def test_an_address_survives_being_written() -> None:
    address = Address("e", "node", (UNIX, "tcp:[fe80::1]:4000", "gcs:[fe80::2]:6379"))
    assert str(address) == "ray:e:node:unix:@engine-e-1|tcp:[fe80::1]:4000|gcs:[fe80::2]:6379"
    assert Address.parse(str(address)) == address
    assert engine_of(str(address)) == "e"
    assert cluster_of(str(address)) == "[fe80::2]:6379"


@pytest.mark.parametrize("text", ["", "ray:", "ray:e:node", "ray:e:node:", "tcp:e:node:unix:@x", SYMBOLIC])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ChannelClosed, match="is not the address of a party on Ray"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("ways", "here", "elsewhere"),
    [((UNIX, TCP), UNIX, TCP), ((GCS, TCP, UNIX), UNIX, TCP), ((TCP,), TCP, TCP), ((UNIX,), UNIX, None)],
)
def test_which_socket_is_connected_to(ways: tuple[str, ...], here: str, elsewhere: str | None) -> None:
    address = Address("e", "node", ways)
    assert address.seen_from("node") == here
    if elsewhere is not None:
        assert address.seen_from("other") == elsewhere
    else:
        with pytest.raises(ChannelClosed, match="names no socket to connect to from here"):
            address.seen_from("other")


def test_symbolic_addresses() -> None:
    assert symbolic("e", "10.0.0.1:6379") == SYMBOLIC
    assert is_symbolic(SYMBOLIC)
    assert not is_symbolic(PARTY)
    assert (engine_of(SYMBOLIC), cluster_of(SYMBOLIC)) == ("e", "10.0.0.1:6379")
    assert (engine_of(PARTY), cluster_of(PARTY)) == ("e", None)


# -- turns -----------------------------------------------------------------------------------------------------------


class Queue:
    """Calls that take their turns, and the order in which they got them."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.went: list[tuple[str, int]] = []

    def arrive(self, source: str, number: int) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._take(source, number))

    async def _take(self, source: str, number: int) -> None:
        await self.turns.take(source, number)
        self.went.append((source, number))


async def ended(*tasks: asyncio.Task[None]) -> None:
    await asyncio.wait_for(asyncio.gather(*tasks), 10)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_PATIENCE_S", 1000.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_PATIENCE_S", 0.01)


@pytest.mark.parametrize("arrivals", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_calls_go_in_the_order_of_their_numbers(patient: None, arrivals: tuple[int, ...]) -> None:
    async def main() -> None:
        queue = Queue()
        await ended(*[queue.arrive("s", number) for number in arrivals])
        assert queue.went == [("s", 0), ("s", 1), ("s", 2), ("s", 3)]
        assert not queue.turns._waiting

    asyncio.run(main())


def test_a_call_whose_turn_it_is_does_not_suspend(patient: None) -> None:
    async def main() -> None:
        turns = Turns()
        for number in range(3):
            with pytest.raises(StopIteration):  # it ran to its end at the first step
                turns.take("s", number).send(None)

    asyncio.run(main())


def test_sources_do_not_wait_for_each_other(patient: None) -> None:
    async def main() -> None:
        queue = Queue()
        stuck = queue.arrive("slow", 1)
        await ended(queue.arrive("s", 0), queue.arrive("other", 0))
        assert queue.went == [("s", 0), ("other", 0)]
        await ended(queue.arrive("slow", 0), stuck)

    asyncio.run(main())


@pytest.mark.parametrize("arrivals", [(2, 3, 4), (4, 3, 2), (3, 4, 2)])
def test_a_number_that_never_comes_is_not_waited_for_long(impatient: None, arrivals: tuple[int, ...]) -> None:
    """As after the courier was started again: it does not know of the calls that its predecessor took."""

    async def main() -> None:
        queue = Queue()
        await ended(queue.arrive("s", 0), *[queue.arrive("s", number) for number in arrivals])
        assert queue.went == [("s", 0), ("s", 2), ("s", 3), ("s", 4)]
        await ended(queue.arrive("s", 1))  # late, but not lost: nobody waits for it, nor it for anybody
        assert queue.went[-1] == ("s", 1)
        assert not queue.turns._waiting

    asyncio.run(main())


def test_several_gaps(impatient: None) -> None:
    async def main() -> None:
        queue = Queue()
        await ended(*[queue.arrive("s", number) for number in (9, 7, 5, 3)])
        assert queue.went == [("s", number) for number in (3, 5, 7, 9)]

    asyncio.run(main())


def test_a_call_that_is_cancelled_while_it_waits(patient: None) -> None:
    async def main() -> None:
        queue = Queue()
        waiting = queue.arrive("s", 1)
        await asyncio.sleep(0)
        assert queue.turns._waiting
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not queue.turns._waiting
        await ended(queue.arrive("s", 0))

    asyncio.run(main())


# -- carried ---------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: int
    y: int


executed: list[str] = []


class Trap:
    """Does something when it is unpickled."""

    def __reduce__(self) -> Any:
        return executed.append, ("unpickled",)


def packed(value: Any) -> bytes:
    return dumps(value, "the result")


PLAIN = [
    None,
    True,
    3,
    2.5,
    "text",
    b"bytes",
    [1, [2]],
    (1, (2,)),
    {"a": {"b": [None]}},
    {1, 2},
    frozenset({1}),
    1 << 99,
]
NOT_PLAIN = [Point(1, 2), date(2020, 1, 2), 1j, OrderedDict(a=1), int, [1, {"deep": Point(3, 4)}], "x" * 5000]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_results_are_opened(value: Any) -> None:
    result = carried(packed(value))
    assert type(result) is type(value)
    assert result == value


@pytest.mark.parametrize("value", NOT_PLAIN, ids=lambda value: type(value).__name__)
def test_other_results_are_carried_as_they_are(value: Any) -> None:
    result = carried(packed(value))
    assert type(result) is CarriedResult
    assert pickle.loads(pickle.dumps(result)) == value
    assert pickle.loads(pickle.dumps(result, 5)) == value


EXTENSION = 0x7ABC

_IMPORTS = {
    "by a global": b"cno_such_module\nthing\n.",
    "by a stack global": pickle.dumps(Trap(), 5),
    "by an old instance": b"(ino_such_module\nthing\n.",
    "by a call": b"cbuiltins\nexec\n(S'raise SystemExit'\ntR.",
    "by an extension": b"\x80\x02\x83" + EXTENSION.to_bytes(2, "little") + b".",
    "by a persistent id": b"Pthing\n.",
    "after something plain": pickle.dumps([1, 2, Trap()], 2),
}


@pytest.mark.parametrize("payload", _IMPORTS.values(), ids=_IMPORTS)
def test_nothing_is_imported_or_run_to_see_whether_a_result_is_plain(
    payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyreg.add_extension(__name__, "Trap", EXTENSION)
    try:
        before = set(sys.modules)
        monkeypatch.setattr("builtins.__import__", None)
        result = carried(payload)
        monkeypatch.undo()
        assert type(result) is CarriedResult
        assert set(sys.modules) == before
        assert not executed
    finally:
        copyreg.remove_extension(__name__, "Trap", EXTENSION)


class Broken(Exception):
    """Carries an attribute of its own."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as same:
        return same


def test_an_error_arrives_as_itself_with_its_remote_traceback_as_cause() -> None:
    carried_error = CarriedError(pack_exception(raised(Broken(7))))
    assert "Broken: 7" in str(carried_error)
    assert "raised in a replica" in str(carried_error)
    arrived = pickle.loads(pickle.dumps(carried_error))
    assert type(arrived) is Broken
    assert arrived.code == 7
    assert isinstance(arrived.__cause__, RemoteTraceback)
    assert "in raised" in arrived.__cause__.text


@pytest.mark.parametrize(
    ("args", "kwargs", "values", "filled"),
    [
        ((Placeholder(0),), {}, ["a"], (("a",), {})),
        ((1, Placeholder(1), Placeholder(0)), {}, ["a", "b"], ((1, "b", "a"), {})),
        ((), {"x": Placeholder(0), "y": 2}, ["a"], ((), {"x": "a", "y": 2})),
        ((Placeholder(0),), {"x": Placeholder(1)}, [Point(1, 2), None], ((Point(1, 2),), {"x": None})),
        (([Placeholder(0)],), {}, ["a"], (([Placeholder(0)],), {})),  # as in a Ray task: only whole arguments
        (((0,),), {}, ["a"], (((0,),), {})),  # equal to a placeholder, and none
    ],
)
def test_refs_among_arguments_are_filled_in(
    args: tuple[Any, ...], kwargs: dict[str, Any], values: list[Any], filled: Any
) -> None:
    arrived = pickle.loads(packed(Filled(packed((args, kwargs)), values)))
    assert arrived == filled


def test_the_courier_need_not_know_what_is_in_the_arguments() -> None:
    payload = b"cno_such_module\nthing\n."
    assert pickle.loads(packed(Filled(packed(((payload,), {})), []))) == ((payload,), {})
    with pytest.raises(ModuleNotFoundError):  # only whoever unpickles the arguments
        pickle.loads(packed(Filled(payload, [])))


def test_an_errand_survives_being_packed() -> None:
    errand = Errand("source", 3, "e", "method", b"head", b"payload", None, 1.5, 1.25, 17.0, "node")
    assert Errand(*pickle.loads(errand.packed())) == errand


# -- places ----------------------------------------------------------------------------------------------------------


def spec_of(*, node_id: str | None = None, **resources: Any) -> WorkerSpec:
    return WorkerSpec("w#1", "replica.w.1", "nowhere:main", b"", resources=Resources(**resources), node_id=node_id)


@pytest.mark.parametrize(
    ("resources", "options"),
    [
        ({}, {"num_cpus": 0, "resources": trifle()}),
        ({"num_cpus": 2.0}, {"num_cpus": 2.0}),
        ({"num_gpus": 0.25}, {"num_cpus": 0, "num_gpus": 0.25}),
        ({"other": {"resources": {"tpu": 1}}}, {"num_cpus": 0, "resources": {"tpu": 1}}),
        ({"other": {"memory": 1 << 20}}, {"num_cpus": 0, "memory": 1 << 20}),
        (
            {"env_vars": {"A": "1"}},
            {"num_cpus": 0, "resources": trifle(), "runtime_env": {"env_vars": {"A": "1"}}},
        ),
    ],
)
def test_what_an_actor_is_asked_for(resources: dict[str, Any], options: dict[str, Any]) -> None:
    assert options_of(spec_of(**resources), {}) == ({**options, "scheduling_strategy": "SPREAD"}, [])


def test_runtime_envs_are_merged_key_by_key() -> None:
    engine_wide = {"pip": ["a"], "working_dir": "/w", "env_vars": {"A": "engine", "B": "engine"}}
    spec = spec_of(
        other={"runtime_env": {"pip": ["b"], "py_modules": ["m"]}}, env_vars={"B": "replica", "C": "replica"}
    )
    options, _ = options_of(spec, engine_wide)
    assert options["runtime_env"] == {
        "pip": ["b"],
        "working_dir": "/w",
        "py_modules": ["m"],
        "env_vars": {"A": "engine", "B": "replica", "C": "replica"},
    }
    assert engine_wide["env_vars"] == {"A": "engine", "B": "engine"}  # the next worker's, too
    assert spec.resources.other == {"runtime_env": {"pip": ["b"], "py_modules": ["m"]}}


@pytest.mark.parametrize(
    "given",
    [{"scheduling_strategy": "DEFAULT"}, {"placement_group": object()}, {"label_selector": {"zone": "a"}}],
    ids=lambda given: next(iter(given)),
)
def test_where_to_schedule_is_the_users_choice(given: dict[str, Any]) -> None:
    options, ignored = options_of(spec_of(other=given), {})
    assert options == {"num_cpus": 0, **given}
    assert ignored == []


def test_a_preference_for_a_node_is_heeded() -> None:
    """Ray heeds it only of an actor that needs something."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy("ab" * 28, soft=True)
    options, _ = options_of(spec_of(other={"scheduling_strategy": strategy}), {})
    assert options == {"num_cpus": 0, "resources": trifle(), "scheduling_strategy": strategy}
    assert list(trifle().values()) == [0.0001], "this Ray has no such resource any more"


def test_a_worker_of_a_node_is_placed_there_and_nowhere_else() -> None:
    options, _ = options_of(spec_of(node_id="ab" * 28, other={"scheduling_strategy": "DEFAULT"}), {})
    strategy = options["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft) == ("ab" * 28, False)


def test_options_that_the_engine_decides_on_are_ignored_by_name() -> None:
    other = {"name": "mine", "max_restarts": 3, "lifetime": "detached", "max_concurrency": 5, "memory": 1}
    options, ignored = options_of(spec_of(other=other), {})
    assert options == {"num_cpus": 0, "memory": 1, "scheduling_strategy": "SPREAD"}
    assert ignored == ["lifetime", "max_concurrency", "max_restarts", "name"]


NODES = [
    {"NodeID": "1", "Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 8.0, "memory": 2.0**31}},
    {"NodeID": "2", "Alive": True, "NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 4.0, "GPU": 1.0, "tpu": 2.0}},
    {"NodeID": "3", "Alive": False, "NodeManagerAddress": "10.0.0.3", "Resources": {"CPU": 64.0}},
]
CLUSTER = "the Ray cluster at 10.0.0.5:6379"
FREE = {"1": {"CPU": 2.5, "memory": 1.5 * 2**30}, "2": {"CPU": 4.0, "GPU": 0.5}}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Resources(num_gpus=1.0), "GPU 1; ... on 10.0.0.1 CPU 2.5 of 8, no GPU; on 10.0.0.2 CPU 4 of 4, GPU 0.5 of 1"),
        (
            Resources(num_cpus=4.0, other={"resources": {"tpu": 3}}),
            "CPU 4, tpu 3; ... on 10.0.0.1 CPU 2.5 of 8, no GPU, no tpu; "
            "on 10.0.0.2 CPU 4 of 4, GPU 0.5 of 1, tpu 0 of 2",
        ),
        (
            Resources(num_cpus=6.0),  # both nodes together have them, neither alone does
            "CPU 6; ... on 10.0.0.1 CPU 2.5 of 8, no GPU; on 10.0.0.2 CPU 4 of 4, GPU 0.5 of 1",
        ),
        (
            Resources(other={"label_selector": {"zone": "a"}}),
            "label_selector {'zone': 'a'}; ... on 10.0.0.1 CPU 2.5 of 8, no GPU; on 10.0.0.2 CPU 4 of 4, GPU 0.5 of 1",
        ),
        (
            Resources(other={"memory": 3 << 40}),
            "memory 3.07e+03 GiB; ... on 10.0.0.1 CPU 2.5 of 8, no GPU, memory 1.5 GiB of 2 GiB; "
            "on 10.0.0.2 CPU 4 of 4, GPU 0.5 of 1, no memory",
        ),
        (Resources(), None),
        (Resources(num_cpus=4.0, num_gpus=0.5), None),
        (Resources(num_cpus=4.0, other={"scheduling_strategy": "SPREAD"}), None),
    ],
)
def test_what_is_said_of_a_shortage(monkeypatch: pytest.MonkeyPatch, asked: Resources, said: str | None) -> None:
    monkeypatch.setattr(places, "where", lambda: CLUSTER)
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: FREE)
    if said is not None:
        said = "it asked for " + said.replace("...", f"{CLUSTER} has free:")
    assert shortage(asked) == said


@pytest.mark.parametrize(("num_cpus", "lacks"), [(2.0, False), (4.0, True)])
def test_a_shortage_on_a_certain_node(monkeypatch: pytest.MonkeyPatch, num_cpus: float, lacks: bool) -> None:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node_id = "ab" * 28
    monkeypatch.setattr(places, "where", lambda: CLUSTER)
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: {node_id: FREE["1"], "2": FREE["2"]})
    affinity = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    said = shortage(Resources(num_cpus=num_cpus, other=affinity))
    assert (said is not None) == lacks
    assert said is None or f"scheduling_strategy NodeAffinity(node_id='{node_id}', soft=False); {CLUSTER} has" in said


def test_what_is_said_of_a_cluster_without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "where", lambda: CLUSTER)
    monkeypatch.setattr("ray.nodes", lambda: [])
    monkeypatch.setattr("ray._private.state.available_resources_per_node", dict)
    assert shortage(Resources(num_gpus=1.0)) == f"it asked for GPU 1; {CLUSTER} has free: nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"address": 6379}, "address must be a str or None, not 6379"),
        ({"address": ""}, "address must be a str or None, not ''"),
        ({"namespace": b"n"}, "namespace must be a str or None, not b'n'"),
        ({"runtime_env": ["pip"]}, "runtime_env must be a dict or None, not \\['pip'\\]"),
        ({"address": "ray://10.0.0.5:10001"}, "run the application on a node of the cluster"),
    ],
)
def test_wrong_options_of_the_adapter(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        RayAdapter(**options)


def test_without_ray_the_adapter_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_ray.adapter.find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match=r'pip install "engineroom\[ray\]"'):
        RayAdapter()


# -- actors ----------------------------------------------------------------------------------------------------------


class FakeActors:
    """Ray's named actors, by namespace and name; killing one that is gone raises, as Ray does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *known: tuple[str, str]) -> None:
        self.known = set(known)
        self.connected = True
        self.asked = 0
        monkeypatch.setattr("ray.is_initialized", lambda: self.connected)
        monkeypatch.setattr("ray.util.list_named_actors", self._list)
        monkeypatch.setattr("ray.get_actor", self._get)
        monkeypatch.setattr("ray.kill", self._kill)

    def _list(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces
        return [{"namespace": namespace, "name": name} for namespace, name in sorted(self.known)]

    def _get(self, name: str, *, namespace: str) -> tuple[str, str]:
        self.asked += 1
        if (namespace, name) not in self.known:
            raise ValueError(f"Failed to look up actor with name {name!r}")
        return namespace, name

    def _kill(self, actor: tuple[str, str]) -> None:
        self.asked += 1
        self.known.remove(actor)


def test_actors_are_found_by_the_beginning_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeActors(monkeypatch, (NAMESPACE, "a-1"), (NAMESPACE, "a-2"), (NAMESPACE, "b-1"), ("users", "a-3"))
    assert actor_names("a-") == ["a-1", "a-2"]
    assert actor_names("a-", "users") == ["a-3"]


def test_actors_are_killed_and_those_that_are_gone_missed_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = FakeActors(monkeypatch, (NAMESPACE, "a"), (NAMESPACE, "b"), (NAMESPACE, "c"))
    kill_actor((NAMESPACE, "a"))
    kill_actor((NAMESPACE, "a"))
    kill_named(["a", "b"])
    assert actors.known == {(NAMESPACE, "c")}


def test_who_has_left_ray_asks_it_for_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would connect anew to whatever cluster it finds."""
    actors = FakeActors(monkeypatch, (NAMESPACE, "a"))
    actors.connected = False
    kill_actor((NAMESPACE, "a"))
    kill_named(["a"])
    assert actors.asked == 0


# -- output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "lines", "last"),
    [
        (["one\n"], ["one"], []),
        (["o", "n", "e", "\n"], ["one"], []),
        (["one\ntwo\nthree"], ["one", "two"], ["three"]),
        (["one\r\n", "two\r", "\n"], ["one", "two"], []),
        (["\n", "\n"], ["", ""], []),
        ([""], [], []),
        (["x" * 70_000], ["x" * 70_000], []),  # does not wait for a newline that may never come
        (["x" * 40_000, "x" * 40_000, "\n"], ["x" * 80_000, ""], []),
    ],
)
def test_what_is_written_arrives_line_by_line(written: list[str], lines: list[str], last: list[str]) -> None:
    heard: list[str] = []
    stream = io.StringIO(newline="")
    writer = LineWriter(stream, heard.append)
    for text in written:
        assert writer.write(text) == len(text)
    assert heard == lines
    writer.finish()
    writer.finish()
    assert heard == lines + last
    assert stream.getvalue() == "".join(written)


def test_the_writer_stands_in_for_the_stream(tmp_path: Any) -> None:
    heard: list[str] = []
    with (tmp_path / "out").open("w", encoding="latin-1") as stream:
        writer = LineWriter(stream, heard.append)
        print("printed", 1, file=writer, flush=True)
        assert (tmp_path / "out").read_text() == "printed 1\n"
        assert (writer.encoding, writer.fileno()) == ("latin-1", stream.fileno())
        assert (writer.writable(), writer.isatty()) == (True, False)
    assert heard == ["printed 1"]


def test_threads_that_write_at_a_time_lose_no_line() -> None:
    heard: list[str] = []
    writer = LineWriter(io.StringIO(), heard.append)
    begin = threading.Barrier(4)

    def write(name: str) -> None:
        begin.wait()
        for _ in range(3000):
            print(name, file=writer)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    writer.finish()
    assert Counter("".join(heard)) == dict.fromkeys("abcd", 3000)  # how they are spread over lines is left to chance


# -- watched workers -------------------------------------------------------------------------------------------------

_SIGNS = {
    "The actor is dead because it was killed by `ray.kill`.": "was killed by ray.kill",
    "The actor exited because exit_actor() is called.": "exited",
    "The actor died because its node has died.": "died with its node",
    "node was terminated: autoscaler": "died with its node",
    "The worker process died unexpectedly: connection error code 2": "died (killed by a signal, out of memory",
    "something\n  new": "died (something new)",
}


@pytest.mark.parametrize(("text", "phrase"), _SIGNS.items())
def test_what_ray_says_of_a_death_in_other_words(text: str, phrase: str) -> None:
    assert described_death(Exception(text)).startswith(phrase)


def test_deaths_with_a_type_of_their_own() -> None:
    from ray.exceptions import RayTaskError, RuntimeEnvSetupError

    assert described_death(None) == "exited"
    assert "runtime_env could not be set up" in described_death(RuntimeEnvSetupError("no pip here"))
    assert "no pip here" in described_death(RuntimeEnvSetupError("no pip here"))
    failed = RayTaskError("run", "traceback", Broken(3))
    assert described_death(failed) == "failed: Broken(3)"


class Watch:
    """A watched worker, and what was heard of it."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.ends: list[str] = []
        self.ports: list[int] = []
        self.worker = WatchedWorker(
            spec_of(),
            None,
            lambda worker_id, body: self.said.append(body),
            lambda worker, port: self.ports.append(port),
            lambda worker, why: self.ends.append(why),
        )
        self.channel = FakeChannel("worker", self.worker)


def test_what_a_worker_is_told_before_it_has_connected_is_kept() -> None:
    watch = Watch()
    watch.worker.tell("first")
    watch.worker.tell("second")
    assert not watch.worker.placed
    watch.worker.connected(watch.channel)
    assert watch.worker.placed
    watch.worker.tell(Drain(1.0))
    assert watch.channel.sent == [Control("first"), Control("second"), Control(Drain(1.0))]
    watch.channel.close()
    watch.worker.tell("too late")


def test_a_deadline_ends_when_the_worker_connects() -> None:
    async def main() -> None:
        watch = Watch()
        watch.worker.expect_within(0.0, "never came")
        watch.worker.connected(watch.channel)
        await asyncio.sleep(0.01)
        assert not watch.ends
        watch.worker.expect_within(0.0, "never came back")
        await asyncio.sleep(0.01)
        assert watch.ends == ["never came back"]

    asyncio.run(main())


def test_a_worker_has_ended_when_its_process_has() -> None:
    """Ray says so earlier, when it has decided it."""

    async def main() -> None:
        watch = Watch()
        watch.worker.connected(watch.channel)
        watch.worker.ray_ended("was killed by ray.kill")
        assert not watch.ends
        watch.channel.break_off()
        assert watch.ends == ["was killed by ray.kill"]

    asyncio.run(main())


def test_a_worker_whose_channel_nobody_closes_has_ended_when_ray_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "_GONE_PATIENCE_S", 0.0)

    async def main() -> None:
        for why in ("died with its node", "died", "was killed by ray.kill"):
            watch = Watch()
            if why != "died":  # before it ever connected
                watch.worker.connected(watch.channel)
            watch.worker.ray_ended(why)
            assert watch.ends == ([] if why == "was killed by ray.kill" else [why])
            await asyncio.sleep(0.01)
            assert watch.ends == [why]

    asyncio.run(main())


@pytest.mark.parametrize("ray_knows", [True, False])
def test_a_worker_that_is_lost_has_ended_for_the_reason_that_ray_gives(
    monkeypatch: pytest.MonkeyPatch, ray_knows: bool
) -> None:
    monkeypatch.setattr(watched, "_REASON_PATIENCE_S", 1000.0 if ray_knows else 0.0)

    async def main() -> None:
        watch = Watch()
        watch.worker.connected(watch.channel)
        watch.channel.break_off()
        assert not watch.ends
        if ray_knows:
            watch.worker.ray_ended("ran out of memory")
        else:
            await asyncio.sleep(0.01)
        assert watch.ends == ["ran out of memory" if ray_knows else "lost its connection to the engine"]
        watch.worker.finish()

    asyncio.run(main())


def test_what_a_worker_says() -> None:
    async def main() -> None:
        watch = Watch()
        watch.worker.connected(watch.channel)
        for message in (
            Control(Ready("a")),
            Control(Bound(4000)),
            Control(Leaving(3)),
            Credit(1, 1),
        ):
            watch.channel.answer(message)
        assert watch.said == [Ready("a")]
        assert watch.ports == [4000]
        assert watch.worker.exit_code == 3
        watch.channel.break_off()
        assert watch.ends == ["exited"]

    asyncio.run(main())


def test_a_worker_that_ends_before_it_listened_wakes_those_that_wait_for_its_port() -> None:
    async def main() -> None:
        watch = Watch()
        port = watch.worker.port = asyncio.get_running_loop().create_future()
        watch.worker.connected(watch.channel)
        watch.worker.finish()
        assert port.cancelled()
        assert watch.channel.closed
        assert not watch.ends

    asyncio.run(main())


def test_the_belated_end_of_a_former_channel_is_no_end_of_a_worker_that_has_come_back() -> None:
    watch = Watch()
    watch.worker.connected(watch.channel)
    back = FakeChannel("worker", watch.worker)
    watch.worker.connected(back)
    assert watch.channel.closed
    watch.channel.break_off("the connection fell silent")
    assert not watch.ends
    back.answer(Control(Leaving(0)))
    back.break_off()
    assert watch.ends == ["exited"]


# -- the registry ----------------------------------------------------------------------------------------------------


class FakeControlPlane:
    """Ray's client of its control plane, as far as the key-value store goes.

    Attributes:
        away: What it raises, if it does not answer in time.
    """

    def __init__(self) -> None:
        self.rows: dict[tuple[bytes, bytes], bytes] = {}
        self.away: BaseException | None = None

    def _answer(self, timeout: float) -> None:
        assert 0 < timeout <= 10, "nobody waits for ever"
        if self.away is not None:
            raise self.away

    def internal_kv_put(self, key: bytes, value: bytes, *, overwrite: bool, namespace: bytes, timeout: float) -> None:
        self._answer(timeout)
        assert overwrite
        self.rows[namespace, key] = value

    def internal_kv_get(self, key: bytes, *, namespace: bytes, timeout: float) -> bytes | None:
        self._answer(timeout)
        return self.rows.get((namespace, key))

    def internal_kv_del(self, key: bytes, *, del_by_prefix: bool, namespace: bytes, timeout: float) -> None:
        self._answer(timeout)
        assert not del_by_prefix
        self.rows.pop((namespace, key), None)

    def internal_kv_keys(self, prefix: bytes, *, namespace: bytes, timeout: float) -> list[bytes]:
        self._answer(timeout)
        return [key for space, key in self.rows if space == namespace and key.startswith(prefix)]


@pytest.fixture
def kv(monkeypatch: pytest.MonkeyPatch) -> FakeControlPlane:
    kv = FakeControlPlane()
    monkeypatch.setattr(registry, "_control_plane", lambda: kv)
    return kv


@pytest.fixture
def silent(kv: FakeControlPlane) -> FakeControlPlane:
    """One that keeps an engine, and does not answer."""
    from ray.exceptions import RpcError

    Registry("e").put(Entry(b"secret", "", CONTROLLER))
    kv.away = RpcError("Timed out while waiting for GCS to become available.", rpc_code=4)
    return kv


def test_the_registry_keeps_an_engine(kv: FakeControlPlane) -> None:
    entry = Entry(b"secret", "01000000", "ray:e:node:tcp:h:1")
    assert Registry("e").get() is None
    Registry("e").put(entry)
    assert Registry("e").get() == entry
    moved = entry._replace(control_address="elsewhere")
    Registry("e").put(moved)
    assert Registry("e").get() == moved
    assert Registry("other").get() is None


def test_the_registry_keeps_the_state_of_a_controller(kv: FakeControlPlane) -> None:
    store, other = Registry("e"), Registry("e2")
    assert store.load() == {}
    store.save("picture", b"1")
    store.save("backend:a/b", b"2")
    store.save("picture", b"3")
    other.save("picture", b"other")
    store.put(Entry(b"", "", ""))
    assert store.load() == {"picture": b"3", "backend:a/b": b"2"}
    store.remove("picture")
    store.remove("picture")
    assert store.load() == {"backend:a/b": b"2"}
    store.clear()
    store.clear()
    assert store.load() == {}
    assert store.get() is None
    assert other.load() == {"picture": b"other"}


def test_what_ended_jobs_left_is_swept(kv: FakeControlPlane) -> None:
    for engine_id, job in (("a", "1"), ("b", "2"), ("detached", "")):
        Registry(engine_id).put(Entry(b"secret", job, "address"))
        Registry(engine_id).save("picture", b"state")
    Registry.sweep(lambda entry: entry.job_id in {"1", "3"})
    assert {key for _, key in kv.rows} == {
        b"engine/b",
        b"state/b/picture",
        b"engine/detached",
        b"state/detached/picture",
    }


_QUESTIONS: dict[str, Callable[[Registry], object]] = {
    "put": lambda registry: registry.put(Entry(b"", "", "")),
    "get": lambda registry: registry.get(),
    "save": lambda registry: registry.save("picture", b""),
    "load": lambda registry: registry.load(),
    "remove": lambda registry: registry.remove("picture"),
    "clear": lambda registry: registry.clear(),
    "sweep": lambda registry: registry.sweep(lambda entry: True),
}


@pytest.mark.parametrize("ask", _QUESTIONS.values(), ids=_QUESTIONS)
def test_whoever_asks_a_silent_control_plane_is_told_so(
    silent: FakeControlPlane, ask: Callable[[Registry], object]
) -> None:
    with pytest.raises(RetryLater, match=r"does not answer .*Timed out.* is its head alive") as caught:
        ask(Registry("e"))
    assert caught.value.__cause__ is silent.away


@pytest.mark.parametrize("ask", _QUESTIONS.values(), ids=_QUESTIONS)
def test_who_has_left_ray_can_ask_nobody(monkeypatch: pytest.MonkeyPatch, ask: Callable[[Registry], object]) -> None:
    monkeypatch.setattr(registry, "_control_plane", lambda: None)
    with pytest.raises(EngineClosed, match="not connected to the Ray cluster"):
        ask(Registry("e"))


def test_other_errors_are_not_taken_for_silence(kv: FakeControlPlane) -> None:
    kv.away = TypeError("a fault of ours")
    with pytest.raises(TypeError, match="a fault of ours"):
        Registry("e").get()


# -- the connector ---------------------------------------------------------------------------------------------------


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens to this process's connection to Ray, which there is none of."""
    log: list[Any] = []

    def join(address: str | None, options: Any, *, start: bool) -> bool:
        assert not start, "whoever looks for an engine does not want a new cluster"
        log.append(address)
        if address == "10.0.0.1:1":
            raise InvalidArgument("nobody is there")
        return True

    monkeypatch.setattr(connector.connection, "join", join)
    monkeypatch.setattr(connector.connection, "leave", lambda: log.append("leave"))
    return log


HEAD = "10.0.0.1:6379"


def test_who_was_handed_the_secret_asks_nobody(kv: FakeControlPlane, joins: list[Any]) -> None:
    own = RayConnector(CONTROLLER, b"secret")
    assert own.locate(PARTY) == Address.parse(PARTY)
    own.close()
    assert joins == []


@pytest.mark.parametrize(("address", "head"), [(PARTY, None), (CONTROLLER, HEAD), (SYMBOLIC, HEAD)])
def test_who_was_not_looks_it_up_once(kv: FakeControlPlane, joins: list[Any], address: str, head: str | None) -> None:
    Registry("e").put(Entry(b"secret", "", CONTROLLER if address == SYMBOLIC else PARTY))
    own = RayConnector()
    for _ in range(2):
        assert own.locate(address) == Address.parse(CONTROLLER if address == SYMBOLIC else address)
    assert (own.secret(), own.control_address) == (b"secret", address)
    own.close()
    own.close()
    assert joins == [head, "leave"]


@pytest.mark.parametrize("address", [PARTY, SYMBOLIC])
def test_an_engine_that_the_cluster_does_not_know(kv: FakeControlPlane, joins: list[Any], address: str) -> None:
    own = RayConnector()
    with pytest.raises(ChannelClosed, match="knows of no such engine"):
        own.locate(address)
    own.close()
    assert joins[-1] == "leave"


def test_a_cluster_that_is_gone(kv: FakeControlPlane, joins: list[Any]) -> None:
    own = RayConnector()
    with pytest.raises(ChannelClosed, match="nobody is there"):
        own.locate("ray-engine:e:gcs:10.0.0.1:1")
    own.close()
    assert joins == ["10.0.0.1:1"]


def test_what_was_closed_connects_to_no_cluster_any_more(kv: FakeControlPlane, joins: list[Any]) -> None:
    Registry("e").put(Entry(b"secret", "", CONTROLLER))
    own = RayConnector()
    own.close()
    with pytest.raises(ChannelClosed, match="has let go of the engine"):
        own.locate(SYMBOLIC)
    assert joins == []


def test_a_controller_that_moved_is_found_where_it_is_now(kv: FakeControlPlane, joins: list[Any]) -> None:
    own = RayConnector(SYMBOLIC, b"secret")
    for place in ("tcp:h:1", "tcp:h:2"):
        Registry("e").put(Entry(b"secret", "", f"ray:e:node:{place}"))
        assert own.locate(SYMBOLIC).ways == (place,)
    own.close()


def test_which_controllers_come_back(kv: FakeControlPlane) -> None:
    Registry("e").put(Entry(b"secret", "", CONTROLLER))
    assert RayConnector().returns(SYMBOLIC)
    assert not RayConnector().returns(CONTROLLER)
    assert not RayConnector().returns(symbolic("shut-down", HEAD))


@pytest.mark.parametrize("connected", [True, False])
def test_a_controller_may_come_back_as_long_as_nobody_says_that_it_will_not(
    silent: FakeControlPlane, monkeypatch: pytest.MonkeyPatch, connected: bool
) -> None:
    """The control plane may be away for a while only; but who has left the cluster will never hear of it."""
    monkeypatch.setattr("ray.is_initialized", lambda: connected)
    assert RayConnector().returns(SYMBOLIC) is connected


@pytest.mark.parametrize("address", [PARTY, SYMBOLIC])
def test_a_cluster_that_does_not_answer(silent: FakeControlPlane, joins: list[Any], address: str) -> None:
    """Whoever looks for an engine hears of it in the one way that it expects."""
    own = RayConnector()
    with pytest.raises(ChannelClosed, match=r"cannot ask the cluster for the engine: .* does not answer"):
        own.locate(address)
    silent.away = None
    assert own.locate(address)
    own.close()


def test_the_names_are_there_when_they_are_used() -> None:
    import engine_ray

    assert engine_ray.RayAdapter is RayAdapter
    with pytest.raises(AttributeError, match="'engine_ray' has no attribute 'Nothing'"):
        _ = engine_ray.Nothing
    assert isinstance(watched.WatchedWorker, type)


# -- the courier -----------------------------------------------------------------------------------------------------


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> FakeChannel:
    """The courier's channel to a controller; the one backend there is has no replica yet."""
    channel = FakeChannel("controller")

    def publish(message: Any) -> None:
        if isinstance(message.body, Subscribe):
            channel.answer(Control(Publish(snapshot(1, backend_entry("b", [])))))

    def open_channel(connector: Any, address: str, listener: Any, *, on_loop: bool) -> FakeChannel:
        channel.listener = listener
        return channel

    channel.on_send = publish
    monkeypatch.setattr(RayConnector, "open_channel", open_channel)
    return channel


@pytest.mark.usefixtures("leaves_nothing")
def test_the_courier_leaves_when_the_engine_is_gone_and_every_call_was_answered(
    controller: FakeChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "_LAST_ANSWERS_S", 0.0)
    left: list[int] = []
    monkeypatch.setattr(courier, "_leave_process", left.append)
    errand = Errand("source", 0, "e", "__call__", b"", packed(((), {})), None, None, None).packed()

    async def main() -> None:
        own = courier.Courier("e", CONTROLLER, b"secret", [])
        asked = asyncio.ensure_future(own.leave())
        call = asyncio.ensure_future(own.carry(errand))
        await asyncio.sleep(0)
        assert (own._held, asked.done(), left) == (1, False, [])
        controller.break_off("the engine's process died")
        with pytest.raises(CarriedError, match="the engine is gone: the engine's process died"):
            await call
        await asyncio.wait_for(asked, PATIENCE_S)
        await asyncio.wait_for(own._leaving, PATIENCE_S)
        assert own._held == 0

    asyncio.run(main())
    assert left == [0]


@pytest.mark.usefixtures("leaves_nothing")
def test_a_call_that_waited_for_the_courier_has_no_more_time_than_before(
    controller: FakeChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline counts as it is on the node with the same clock; elsewhere, what was left when the call was made."""
    monkeypatch.setattr(courier, "_LAST_ANSWERS_S", 0.0)
    monkeypatch.setattr(courier, "_leave_process", lambda code: None)
    monkeypatch.setattr(RayConnector, "node_id", lambda self: "here")

    def errand(number: int, node_id: str) -> bytes:
        late = time.monotonic() - 1
        return Errand("s", number, "e", "m", b"", packed(((), {})), None, 100.0, 100.0, late, node_id).packed()

    async def main() -> None:
        own = courier.Courier("e", CONTROLLER, b"secret", [])
        with pytest.raises(CarriedError, match="did not answer within timeout_s=100"):
            await own.carry(errand(0, "here"))
        elsewhere = asyncio.ensure_future(own.carry(errand(1, "elsewhere")))
        with pytest.raises(CarriedError, match="DeadlineExceeded"):
            await own.carry(errand(2, "here"), [asyncio.get_running_loop().create_future()])
        assert not elsewhere.done()
        controller.break_off("the engine's process died")
        with pytest.raises(CarriedError, match="the engine is gone"):
            await elsewhere
        await asyncio.wait_for(own._leaving, PATIENCE_S)

    asyncio.run(main())


@pytest.mark.usefixtures("leaves_nothing")
def test_a_courier_that_comes_too_late_does_not_start(controller: FakeChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does its process end, which would have Ray make it again: Ray gives an actor up whose constructor raises."""
    left: list[int] = []
    monkeypatch.setattr(courier, "_leave_process", left.append)
    controller.on_send = lambda message: controller.break_off("the engine was shut down")

    async def main() -> None:
        with pytest.raises(EngineClosed):
            courier.Courier("e", CONTROLLER, b"secret", [])

    asyncio.run(main())
    assert left == []


# -- the controller as an actor, seen from a program -----------------------------------------------------------------


class DyingActor:
    """Stands for the handle of a controller that dies of whatever it is asked."""

    run = property(lambda self: self)

    def remote(self, operation: bytes) -> None: ...


@pytest.mark.parametrize(
    ("entry", "answers", "error", "said"),
    [
        (True, True, RetryLater, "died while it was at 'set_traffic', and may have done it"),
        (True, False, RetryLater, "died while it was at 'set_traffic', and may have done it"),
        (False, True, EngineClosed, "the engine was shut down"),
    ],
    ids=["it comes back", "nobody says whether it does", "it does not"],
)
def test_what_a_program_hears_when_the_controller_dies(
    silent: FakeControlPlane,
    monkeypatch: pytest.MonkeyPatch,
    entry: bool,
    answers: bool,
    error: type[Exception],
    said: str,
) -> None:
    from ray.exceptions import ActorUnavailableError

    from engine_ray.controlling.detached import RayController

    def die(ref: None) -> None:
        raise ActorUnavailableError("the actor is restarting", b"a" * 16)

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get", die)
    monkeypatch.setattr("engine_ray.controlling.detached.connection.cluster", lambda: HEAD)
    if answers:
        silent.away = None
    if not entry:
        silent.rows.clear()
    controller = RayController(DyingActor(), "e", ClusterAdapter(None, {}, {}))
    with pytest.raises(error, match=said):
        controller.run("set_traffic", b"")


def test_an_end_goes_as_far_as_it_can(monkeypatch: pytest.MonkeyPatch, silent: FakeControlPlane) -> None:
    from engine_ray.controlling.detached import RayController

    ended: list[Any] = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("engine_ray.controlling.detached.connection.cluster", lambda: HEAD)
    monkeypatch.setattr("engine_ray.controlling.detached.kill_actor", ended.append)
    monkeypatch.setattr("engine_ray.controlling.detached.end_courier", ended.append)
    monkeypatch.setattr("engine_ray.controlling.detached._worker_names", lambda engine_id: [engine_id])
    monkeypatch.setattr("engine_ray.controlling.detached.kill_named", ended.append)
    RayController("the controller", "e", ClusterAdapter(None, {}, {})).leave(ended=True)
    assert ended == ["the controller", "e", ["e"]], "though the control plane did not answer"


# -- the controller's adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("detached", [False, True])
def test_a_start_that_fails_ends_only_an_engine_that_ends_with_it(
    kv: FakeControlPlane, monkeypatch: pytest.MonkeyPatch, detached: bool
) -> None:
    """A detached engine has workers that wait for its next controller, which finds the engine by its entry."""
    monkeypatch.setattr("engine_ray.controlling.cluster.connection.join", lambda address, options: False)
    monkeypatch.setattr("engine_ray.controlling.cluster.listen_everywhere", lambda name: ([], ()))
    monkeypatch.setattr("ray.is_initialized", lambda: False)

    def failing(own_id: Any) -> Any:
        raise ConnectionError("the control plane is away")

    monkeypatch.setattr("engine_ray.controlling.nodes._living", failing)
    adapter: ClusterAdapter
    if detached:
        from engine_ray.controlling.detached import DetachedAdapter
        from engine_ray.link.surroundings import Surroundings

        adapter = DetachedAdapter("e", {}, Surroundings.here())
    else:
        adapter = ClusterAdapter(None, {}, {})
    Registry("e").put(Entry(b"a secret of some length", "", CONTROLLER))

    async def start() -> None:
        with pytest.raises(ConnectionError):
            await adapter.start("e", FakeEvents())

    asyncio.run(start())
    assert (Registry("e").get() is not None) is detached


class FakeEvents:
    """Hears nothing."""

    def worker_said(self, worker_id: str, body: Any) -> None: ...

    def worker_exited(self, exit: Any) -> None: ...

    def peer_connected(self, channel: Any) -> Any: ...

    def nodes_changed(self) -> None: ...
