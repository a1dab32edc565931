"""An engine on a Ray cluster of several hosts: calls, routes, nodes that join and die, cut links, strangers.

The application runs on one of the hosts (`_on_a_host`) and does what the test says. All tests share a cluster of two
hosts; those that kill one or cut its link add it for that. ``--log-cli-level=INFO`` shows how long what took.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from _on_a_host import Failed, Process, Record
from ray_hosts import Host, Hosts, why_not

from engine.testing.instruments import PATIENCE_S, eventually
from engine_wire.handshake import ClientHandshake
from engine_wire.lobby import PATIENCE_S as HANDSHAKE_S
from engine_wire.protocol import GREETING

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(120),
]

_log = logging.getLogger(__name__)

PORT = 8100
BUSY_S = 6.0
"""Granted on top of what is stated, for a machine that has other things to do."""
RAY_NOTICES_S = 6.0
"""In these clusters (`ray_hosts`), that a node does not answer; by default it is more than a minute."""
SILENCE_S = 11.0
"""After which the kernel gives an idle connection up: `engine_wire.addresses`."""
SHORT_CUT_S = 2.0


class Cluster:
    """A Ray cluster of two hosts, and of those that tests add.

    Each node has a resource of its host's name. Those of "seat" are for replicas that may be on the second host and on
    those that are added.
    """

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self.one, self.two = hosts.add(), hosts.add()
        self.one.start_head(resources={self.one.name: 1000})
        self.address = self.one.ray_address
        self.two.join(self.one, resources={self.two.name: 1000, "seat": 4})

    def add(self) -> Host:
        """One more node, which the test may kill."""
        host = self._hosts.add()
        host.join(self.one, resources={host.name: 1000, "seat": 2})
        return host


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Hosts() as hosts:
        yield Cluster(hosts)


@pytest.fixture
def victim(cluster: Cluster) -> Iterator[Host]:
    """One more node, which the test may do anything to."""
    host = cluster.add()
    yield host
    host.kill()


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[Host], Process]]:
    """Starts a process on a host."""
    processes: list[Process] = []

    def start(host: Host) -> Process:
        processes.append(Process(host, tmp_path / f"{host.name}-{len(processes)}.log"))
        return processes[-1]

    yield start
    for process in processes:
        process.end()
        sys.stderr.write(process.log())
    everywhere = [cluster.one, cluster.two]
    eventually(lambda: not [workers for host in everywhere for workers in engine_processes(host)])


def engine_processes(host: Host) -> list[str]:
    """The pids of an engine's workers on a host."""
    lines = host.run("ps", "-eo", "pid,args").splitlines()
    return [line.split()[0] for line in lines if "ray::RayWorker" in line or "ray::Courier" in line]


def status(host: Host, url: str) -> int:
    """Of the answer to a request from a host; 0 if nobody listens there."""
    try:
        return host.get(url)[0]
    except ConnectionRefusedError:
        return 0


def serving(application: Process) -> list[str]:
    """The addresses of the nodes with an ingress, once for each."""
    return sorted(one["node"] for one in application("statistics")["ingresses"].values())


# -- calls -------------------------------------------------------------------------------------------------------------


def test_calls_across_nodes(cluster: Cluster, start: Callable[[Host], Process]) -> None:
    application = start(cluster.one)
    application("begin", cluster.address, location=None)
    assert application("serve", "near", resources={"host1": 1}) == ["host1"]
    assert application("serve", "far", resources={"host2": 1}) == ["host2"]

    assert application("call", "near") == "host1"
    assert application("call", "far") == "host2"
    assert application("channels") == {"near#1": "AF_UNIX", "far#1": "AF_INET"}
    assert application("call_by_ref", "near", 5) == {"host1": 5}
    assert application("call_by_ref", "far", 5) == {"host2": 5}

    assert application("call", "far", "near", 3, method="ask") == {"host1": 3}
    assert application("call", "far", "far", 3, method="ask") == {"host2": 3}
    assert application("call", "far", method="channels") == {"near#1": "AF_INET", "far#1": "AF_UNIX"}
    assert application("call", "far", "near", method="ask_by_ref") == "host1"
    application("shutdown")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_with_tls_nobody_between_the_nodes_reads_along(
    tls: bool, cluster: Cluster, start: Callable[[Host], Process]
) -> None:
    how = "AF_INET by SecureSocket" if tls else "AF_INET"
    application, other = start(cluster.one), start(cluster.two)
    application("begin", cluster.address, location=None, tls=tls)
    application("serve", "near", resources={"host1": 1})
    application("serve", "far", resources={"host2": 1})
    assert application("call", "near") == "host1"
    application("listen_in")
    word = "".join(("for nobody's", " eyes"))
    assert application("call", "far", word, method="echo") == word
    assert application("overheard", word, "no such word") == [not tls, False]
    assert application("channels") == {"near#1": "AF_UNIX", "far#1": how}
    assert application("call", "far", "near", 3, method="ask") == {"host1": 3}
    assert application("call", "far", method="channels") == {"near#1": how}
    assert application("call", "near", "far", method="ask_by_ref") == "host2"
    large = "x" * 5_000_000
    assert application("call", "far", large, method="echo") == large
    application("shutdown")

    application("begin", cluster.address, name="lasting", detached=True, location=None, tls=tls)
    application("serve", "near", resources={"host1": 1})
    other("connect", cluster.address, "lasting")
    assert other("call", "near") == "host1"
    assert other("channels") == {"near#1": how}
    other("serve", "far", resources={"host2": 1})
    assert application("call", "far") == "host2"
    application("shutdown")


def test_a_detached_engine_without_tls_is_not_taken_for_one_that_has_it(
    cluster: Cluster, start: Callable[[Host], Process]
) -> None:
    application = start(cluster.one)
    application("begin", cluster.address, name="lasting", detached=True, location=None)
    with pytest.raises(Failed, match=r"^InvalidArgument: tls: the detached engine 'lasting' was created without"):
        start(cluster.two)("connect", cluster.address, "lasting", tls=True)
    application("shutdown")


STOPPED_S = 5.0
"""After which a stopped replica is found: `engine.control.pulse`."""


def test_a_replica_that_is_stopped_on_another_node_is_replaced(
    cluster: Cluster, start: Callable[[Host], Process]
) -> None:
    """No connection of it breaks, and the controller cannot see its process: a task on that node can."""
    application = start(cluster.one)
    application("begin", cluster.address, location=None)
    application("serve", "far", resources={"host2": 1})
    pid = application("call", "far", method="pid")
    stopped = time.monotonic()
    cluster.two.run("kill", "-STOP", str(pid))
    with suppress(Failed):  # it had heard of the call
        assert application("call", "far", method="pid") != pid
    took_s = time.monotonic() - stopped
    _log.info("a call that a stopped replica held came back after %.1f s", took_s)
    assert took_s < STOPPED_S + BUSY_S
    assert application("call", "far", method="pid") != pid
    eventually(lambda: str(pid) not in engine_processes(cluster.two))
    application("shutdown")


# -- HTTP on every node ------------------------------------------------------------------------------------------------


def test_every_node_serves_every_replica(cluster: Cluster, start: Callable[[Host], Process]) -> None:
    one, two = cluster.one, cluster.two
    application = start(one)
    application("begin", cluster.address, location="EveryNode", host="0.0.0.0", port=PORT, workers=2)
    application("serve", "near", resources={"host1": 1}, route="/near")
    application("serve", "far", resources={"host2": 1}, route="/far")

    def serves(host: Host) -> None:
        """On its own address, to every host, from every replica, by two processes."""
        base = f"http://{host.address}:{PORT}"
        for client in (one, two):
            assert client.get(f"{base}/near") == (200, b"host1")
            assert client.get(f"{base}/far") == (200, b"host2")
            assert client.get(f"{base}/-/healthz") == (200, b"ok")
        listening = {pid for local, pid in listeners(host) if local == f"0.0.0.0:{PORT}"}
        assert len(listening) == 2
        urls = [each["url"] for each in application("statistics")["ingresses"].values()]
        assert urls.count(base) == 2

    for host in (one, two):
        serves(host)
    assert serving(application) == 2 * [one.address] + 2 * [two.address]

    third = cluster.add()
    joined = time.monotonic()
    eventually(lambda: len(serving(application)) == 6)
    _log.info("a node that joined serves after %.1f s", time.monotonic() - joined)
    assert time.monotonic() - joined < 5 + BUSY_S
    serves(third)

    third.kill()
    killed = time.monotonic()
    eventually(lambda: serving(application) == 2 * [one.address] + 2 * [two.address])
    _log.info("a node that left is dropped after %.1f s", time.monotonic() - killed)
    for host in (one, two):
        serves(host)

    application("shutdown")
    assert [status(two, f"http://{host.address}:{PORT}/-/healthz") for host in (one, two)] == [0, 0]


def test_the_creating_node_alone_serves(cluster: Cluster, start: Callable[[Host], Process]) -> None:
    application = start(cluster.two)
    application("begin", cluster.address, location="HeadOnly", host="0.0.0.0", port=PORT)
    application("serve", "near", resources={"host1": 1}, route="/near")
    assert cluster.one.get(f"http://{cluster.two.address}:{PORT}/near") == (200, b"host1")
    assert status(cluster.two, f"http://{cluster.one.address}:{PORT}/near") == 0
    assert serving(application) == [cluster.two.address]
    application("shutdown")


def test_a_port_that_is_taken_on_one_node(cluster: Cluster, start: Callable[[Host], Process]) -> None:
    application = start(cluster.one)
    application("begin", cluster.address, location="EveryNode", host="0.0.0.0", port=PORT)
    takes = f"import socket, sys; s = socket.create_server(('', {PORT})); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with cluster.two.popen(sys.executable, "-c", takes, **pipes) as taker:
        assert taker.stdin is not None and taker.stdout is not None
        taker.stdout.readline()
        with pytest.raises(Failed) as failed:
            application("serve", "near", resources={"host1": 1}, route="/near")
        taker.stdin.close()
    assert str(failed.value).startswith("InvalidArgument: ")
    assert f"port {PORT} (Address already in use)" in str(failed.value)
    assert cluster.two.address in str(failed.value)

    application("name_endpoint", "near", "/near")  # now that it is free
    for host in (cluster.one, cluster.two):
        assert cluster.one.get(f"http://{host.address}:{PORT}/near") == (200, b"host1")
    application("shutdown")


# -- nodes that die, links that are cut --------------------------------------------------------------------------------


class Load:
    """Calls without end: by handle from the application on the first host, over HTTP on the first and on the second.

    Args:
        cluster: That everything runs on.
        start: Starts processes.
        victim: The host that something will happen to. There and on the second one are the replicas of "all"; that of
            "there" is on it as long as it lives, and holds calls.
    """

    def __init__(self, cluster: Cluster, start: Callable[[Host], Process], victim: Host) -> None:
        self.application = application = start(cluster.one)
        application("begin", cluster.address, location="EveryNode", host="0.0.0.0", port=PORT)
        application("serve", "filler", replicas=2, resources={"seat": 1, "host2": 1})
        served = application("serve", "all", replicas=4, route="/all", resources={"seat": 1})
        assert served == ["host2", "host2", victim.name, victim.name]
        application("delete", "filler")
        assert application("serve", "there", route="/there", node=victim.address) == [victim.name]
        self._clients = [start(host) for host in (cluster.one, cluster.two)]

    def hold(self) -> None:
        """Have calls in flight at the replica of "there"."""
        self.application("hold", "there", 5)
        for client in self._clients:
            client("hold_http", f"http://{client.host.address}:{PORT}/there", 5)
        eventually(lambda: self.application("call", "there", method="held") == 15)

    def released(self, within_s: float, since: float) -> float:
        """Wait until all of those have failed; returns when, in seconds after a moment."""
        assert [outcome for _, _, outcome in self.application("released")] == 5 * ["ReplicaDied"]
        ended = [end for _, end, _ in self.application("released")]
        for client in self._clients:
            records: list[Record] = client("released")
            assert [outcome for _, _, outcome in records] == 5 * ["502"]
            ended += [end for _, end, _ in records]
        assert max(ended) - since < within_s
        return max(ended) - since

    def begin(self) -> None:
        """Call, and go on with that."""
        self.application("begin_load", "all", 4)
        for client in self._clients:
            client("begin_http_load", f"http://{client.host.address}:{PORT}/all", 3)
        self.wait_for_more()

    def wait_for_more(self) -> None:
        """Wait until some more calls were made in each way."""
        for process in (self.application, *self._clients):
            enough = process("loaded") + 100
            eventually(lambda process=process, enough=enough: process("loaded") >= enough)  # type: ignore[misc]

    def end(self) -> list[Record]:
        """Stop; returns what became of the calls."""
        return [record for process in (self.application, *self._clients) for record in process("end_load")]

    def recovered(self, since: float) -> float:
        """Wait until every replica is back, all on the hosts that live; returns when, in seconds after a moment."""
        application = self.application
        eventually(lambda: application("hosts", "all") == 4 * ["host2"])
        eventually(lambda: application("hosts", "there") in (["host1"], ["host2"]))
        return time.monotonic() - since

    def check_failures(self, records: list[Record], within_s: float, since: float) -> int:
        """See that calls failed only with the replica that held them, and none was late; returns how many did."""
        failed = [record for record in records if not record[2].startswith("host")]
        assert {outcome for _, _, outcome in failed} <= {"ReplicaDied", "502"}
        assert max((end - since for _, end, _ in failed), default=0) < within_s
        assert max(end - begun for begun, end, _ in records) < within_s
        assert len(failed) <= 10 * 2, "a caller met one of the two dead replicas more than once"
        return len(failed)

    def check_faultless(self) -> None:
        """Call again, without a failure."""
        self.begin()
        assert {outcome for _, _, outcome in self.end()} == {"host2"}


@pytest.mark.parametrize(
    ("power", "within_s"), [(False, 1 + BUSY_S), (True, RAY_NOTICES_S + 1 + BUSY_S)], ids=["killed", "power-failure"]
)
def test_a_node_dies_under_load(
    cluster: Cluster, victim: Host, start: Callable[[Host], Process], power: bool, within_s: float
) -> None:
    load = Load(cluster, start, victim)
    load.hold()
    load.begin()

    killed = time.monotonic()
    if power:
        victim.cut()
    victim.kill()
    detected_s = load.released(within_s, killed)
    recovered_s = load.recovered(killed)
    load.wait_for_more()
    failed = load.check_failures(load.end(), within_s, killed)
    _log.info(
        "calls failed after %.2f s (%d and those held), all is well after %.1f s", detected_s, failed, recovered_s
    )
    load.check_faultless()
    assert serving(load.application) == [cluster.one.address, cluster.two.address]
    load.application("shutdown", 1)


def test_a_cut_link(cluster: Cluster, victim: Host, start: Callable[[Host], Process]) -> None:
    """A short cut is a delay. A long one is a death, also for what lives on behind it."""
    load = Load(cluster, start, victim)
    load.begin()
    victim.cut()
    time.sleep(SHORT_CUT_S)
    victim.mend()
    load.wait_for_more()
    records = load.end()
    assert {outcome for _, _, outcome in records} == {"host2", victim.name}
    _log.info("calls were delayed by up to %.1f s", max(end - begun for begun, end, _ in records))
    assert max(end - begun for begun, end, _ in records) > SHORT_CUT_S

    load.hold()
    load.begin()
    cut = time.monotonic()
    victim.cut()
    within_s = RAY_NOTICES_S + 1 + BUSY_S
    detected_s = load.released(within_s, cut)
    recovered_s = load.recovered(cut)
    eventually(lambda: not engine_processes(victim))
    ended_s = time.monotonic() - cut
    assert ended_s < SILENCE_S + 2 + BUSY_S
    victim.mend()
    load.wait_for_more()
    failed = load.check_failures(load.end(), within_s, cut)
    _log.info(
        "calls failed after %.2f s (%d and those held), all is well after %.1f s, what was cut off ended after %.1f s",
        *(detected_s, failed, recovered_s, ended_s),
    )
    load.check_faultless()
    load.application("shutdown", 1)


# -- strangers ---------------------------------------------------------------------------------------------------------


class _Bomb:
    """Unpickled, it makes a directory."""

    PATH = "/dev/shm/unpickled"

    def __reduce__(self) -> Any:
        return os.mkdir, (self.PATH,)


def _without_a_secret() -> bytes:
    frame = pickle.dumps(_Bomb())
    return GREETING + len(frame).to_bytes(4, "little") + frame


_WORDS = {
    "nothing": b"",
    "garbage": os.urandom(4096),
    "HTTP": b"GET / HTTP/1.1\r\nHost: replica\r\n\r\n",
    "a pickle": _without_a_secret(),
}


def _is_dropped(connection: socket.socket) -> bool:
    """Whether the other side has hung up; waits for it."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_strangers_harm_nobody(cluster: Cluster, start: Callable[[Host], Process]) -> None:
    one, two = cluster.one, cluster.two
    application = start(one)
    application("begin", cluster.address, location=None)
    application("serve", "far", resources={"host2": 1})
    [replica] = application("addresses", "far")
    controller = application("controller_address")
    targets = [(two, *controller.split(":")[1:]), (one, *replica.split(":")[1:])]
    application("begin_load", "far", 2)

    def connect() -> list[socket.socket]:
        return [host.connect(address, int(port)) for host, address, port in targets]

    for _ in range(3):  # a port scan
        for connection in connect():
            connection.close()
    for words in _WORDS.values():
        for connection in connect():
            with connection:
                with suppress(OSError):  # it hangs up before it has heard all
                    connection.sendall(words)
                    connection.shutdown(socket.SHUT_WR)
                assert _is_dropped(connection)
    for connection in connect():
        with connection:
            handshake = ClientHandshake(b"the secret of some other engine.")
            connection.sendall(handshake.hello)
            connection.recv(handshake.wanted)
            connection.sendall(os.urandom(32))
            assert _is_dropped(connection)

    slow = connect()
    begun = time.monotonic()
    unsaid = [iter(ClientHandshake(b"the secret of some other engine.").hello) for _ in slow]
    for connection in slow:
        connection.settimeout(PATIENCE_S)
    waiting = dict(zip(slow, unsaid, strict=True))
    while waiting:
        readable, _, _ = select.select(list(waiting), [], [], 0.25)
        for connection in readable:
            assert _is_dropped(connection)
            del waiting[connection]
            connection.close()
        for connection, hello in waiting.items():
            connection.send(bytes([next(hello)]))
    assert HANDSHAKE_S - 1 < time.monotonic() - begun < HANDSHAKE_S + BUSY_S

    assert {outcome for _, _, outcome in application("end_load")} == {"host2"}
    for host in (one, two):
        assert host.run("sh", "-c", f"test -e {_Bomb.PATH} && echo harmed || echo unharmed") == "unharmed\n"
    assert "its secret is another one" in application.log(), "nobody can learn of it"
    application("shutdown")


def listeners(host: Host) -> list[tuple[str, str]]:
    """Local address and pid of all that listens on a host."""
    found = []
    for line in host.run("ss", "-Hltnp").splitlines():
        words = line.split()
        if "pid=" in words[-1]:
            found.append((words[3], words[-1].partition("pid=")[2].partition(",")[0]))
    return found


def test_nothing_listens_everywhere_unasked(cluster: Cluster, start: Callable[[Host], Process]) -> None:
    application = start(cluster.one)
    application("begin", cluster.address, location="EveryNode", port=PORT)
    application("serve", "near", resources={"host1": 1}, route="/near")
    application("serve", "far", resources={"host2": 1})
    application("call_by_ref", "far", 1)
    application("start_bystanders", ["host1", "host2"])
    for host in (cluster.one, cluster.two):
        listening = listeners(host)
        engines = [*engine_processes(host), *([str(application("pid"))] if host is cluster.one else [])]
        assert len(engines) >= 2
        bystander = host.run("pgrep", "-f", "ray::Bystander").split()

        def everywhere(pids: list[str], listening: list[tuple[str, str]] = listening) -> int:
            return sum(pid in pids and address.startswith(("0.0.0.0:", "*:", "[::]:")) for address, pid in listening)

        rays_own = everywhere(bystander)
        assert [everywhere([pid]) for pid in engines] == [rays_own] * len(engines)
        elsewhere = {address.rpartition(":")[0] for address, pid in listening if pid in engines}
        assert elsewhere - {"*", "[::]", "0.0.0.0"} == {host.address, "127.0.0.1"}
    assert status(cluster.one, f"http://{cluster.two.address}:{PORT}/near") == 0
    application("shutdown")


# -- the controller's host dies ----------------------------------------------------------------------------------------


def test_a_detached_engine_survives_the_host_of_its_controller(
    cluster: Cluster, victim: Host, start: Callable[[Host], Process]
) -> None:
    creator = start(victim)
    http = {"location": "EveryNode", "host": "0.0.0.0", "port": PORT}
    creator("begin", cluster.address, name="lasting", detached=True, **http)
    assert creator("serve", "far", replicas=2, resources={"host2": 1}, route="/far") == ["host2", "host2"]

    application, client = start(cluster.one), start(cluster.two)
    application("connect", cluster.address, "lasting")
    assert application("call", "far") == "host2"
    assert application("controller_address").split(":")[1] == victim.address
    before = application("addresses", "far")
    application("begin_load", "far", 3)
    client("begin_http_load", f"http://{cluster.one.address}:{PORT}/far", 3)
    eventually(lambda: application("loaded") > 100 and client("loaded") > 100)

    killed = time.monotonic()
    victim.cut()
    victim.kill()
    eventually(lambda: application("controller_address").split(":")[1] != victim.address)
    moved_s = time.monotonic() - killed
    eventually(lambda: answers(application, "statistics"))
    eventually(lambda: serving(application) == [cluster.one.address, cluster.two.address])
    _log.info("the controller is elsewhere after %.1f s, and has all after %.1f s", moved_s, time.monotonic() - killed)
    assert application("addresses", "far") == before, "replicas that did not die were replaced"
    assert application("serve", "near", resources={"host1": 1}, route="/near") == ["host1"]
    assert cluster.one.get(f"http://{cluster.two.address}:{PORT}/near") == (200, b"host1")
    for process in (application, client):
        assert {outcome for _, _, outcome in process("end_load")} == {"host2"}
    assert max(end - begun for begun, end, _ in application("end_load")) < 1 + BUSY_S
    application("shutdown", 1)


def answers(application: Process, function: str) -> bool:
    """Whether a control call gets through."""
    try:
        application(function)
    except Failed as error:
        assert str(error).startswith("RetryLater: ")
        return False
    return True


@pytest.mark.parametrize(
    ("power", "within_s"), [(False, 3 + BUSY_S), (True, SILENCE_S + 3 + BUSY_S)], ids=["killed", "power-failure"]
)
def test_workers_end_with_the_host_of_their_engine(
    cluster: Cluster, victim: Host, start: Callable[[Host], Process], power: bool, within_s: float
) -> None:
    application = start(victim)
    application("begin", cluster.address, location="EveryNode", host="0.0.0.0", port=PORT)
    application("serve", "near", resources={"host1": 1}, route="/near")
    application("serve", "far", resources={"host2": 1})
    application("call_by_ref", "far", 1)
    everywhere = (cluster.one, cluster.two)
    assert all(engine_processes(host) for host in everywhere)

    killed = time.monotonic()
    if power:
        victim.cut()
    victim.kill()
    eventually(lambda: not any(engine_processes(host) for host in everywhere), timeout_s=within_s)
    _log.info("the workers ended after %.1f s", time.monotonic() - killed)
