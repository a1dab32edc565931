"""A process on a host, told line by line what to do: an application with an engine on Ray, or a client over HTTP.

As a script it reads lines of JSON, ``["name of a function below", [arguments], {arguments}]``, and answers each in turn
by a line ``{"result": ...}`` or ``{"error": "Type: message"}``. `Process` is the test's side.
"""

from __future__ import annotations

import asyncio
import collections
import faulthandler
import gc
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from harness import take_stdout

__all__ = ["Failed", "Process", "Record"]

_ANSWER_S = 90.0
"""Longer than anything takes that a test asks for; who takes longer hangs, and says where."""
_PAUSE_S = 0.002
"""Between two calls of one caller under load: on few processors the others need some, too."""


# -- what is served ----------------------------------------------------------------------------------------------------


class Where:
    """Says where it runs, and holds calls as long as it lives."""

    def __init__(self) -> None:
        self._held = 0

    async def __call__(self, request: Any) -> str:
        return socket.gethostname()

    async def hold(self, request: Any) -> None:
        self._held += 1
        await asyncio.Event().wait()

    async def held(self) -> int:
        return self._held

    async def pid(self) -> int:
        return os.getpid()

    async def ask(self, endpoint: str, count: int) -> dict[str, int]:
        from engine import get_replica_context

        handle = get_replica_context().get_handle(endpoint)
        return collections.Counter([await handle.call() for _ in range(count)])

    async def ask_by_ref(self, endpoint: str) -> str:
        from engine import get_replica_context

        return str(await (await get_replica_context().get_handle(endpoint).remote()))

    async def echo(self, word: str) -> str:
        return word

    async def channels(self) -> dict[str, str]:
        return _channels()


def _channels() -> dict[str, str]:
    """By which kind of socket this process reaches which replica."""
    from engine.calling.caller import Caller

    return {
        target.replica_tag: channel.sock.family.name
        + ("" if type(channel.sock) is socket.socket else f" by {type(channel.sock).__name__}")
        for caller in gc.get_objects()
        if isinstance(caller, Caller)
        for channel, target in caller._channels.items()
    }


# -- the application ---------------------------------------------------------------------------------------------------

_engine: Any = None


def begin(
    ray_address: str, name: str | None = None, detached: bool = False, tls: bool = False, **http_options: Any
) -> None:
    """Have an engine."""
    global _engine
    from engine import Engine
    from engine_ray import RayAdapter

    adapter = RayAdapter(address=ray_address, tls=tls)
    _engine = Engine(backend=adapter, http_options=http_options, name=name, detached=detached)


def connect(ray_address: str, name: str, tls: bool = False) -> None:
    """Take over a detached engine."""
    global _engine
    from engine import Engine
    from engine_ray import RayAdapter

    _engine = Engine.connect(name, backend=RayAdapter(address=ray_address, tls=tls))


def serve(
    tag: str, replicas: int = 1, route: str | None = None, node: str | None = None, **ray_actor_options: Any
) -> list[str]:
    """Serve `Where` as backend and endpoint of this name; returns the hosts of its replicas.

    Args:
        tag: Of both.
        replicas: How many.
        route: For HTTP.
        node: The address of a node to prefer.
        ray_actor_options: As they are.
    """
    if node is not None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        [node_id] = [one["NodeID"] for one in ray.nodes() if one["Alive"] and one["NodeManagerAddress"] == node]
        ray_actor_options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=True)
    _engine.create_backend(tag, Where, config={"num_replicas": replicas}, ray_actor_options=ray_actor_options)
    _engine.create_endpoint(tag, backend=tag, route=route)
    return hosts(tag)


def hosts(tag: str) -> list[str]:
    """The hosts of the replicas of a backend."""
    return sorted("host" + address.split(":")[1].rpartition(".")[2] for address in addresses(tag))


def addresses(tag: str) -> list[str]:
    """Where the replicas of a backend are reached from other hosts: tcp:HOST:PORT."""
    from engine_ray.calling.addresses import Address

    entry = _engine._client.snapshot.backends[tag]
    return [Address.parse(replica.address).seen_from("another node") for replica in entry.replicas]


def controller_address() -> str:
    """Where the controller is reached from other hosts: tcp:HOST:PORT."""
    return str(_engine._adapter.locate(_engine._adapter.control_address).seen_from("another node"))


def call(endpoint: str, *args: Any, method: str = "__call__", timeout_s: float | None = None) -> Any:
    """The result of a call."""
    return _engine.get_handle(endpoint).options(method_name=method, timeout_s=timeout_s).call(*args)


def call_by_ref(endpoint: str, count: int) -> dict[str, int]:
    """How many of so many calls by `handle.remote` and `ray.get` were answered where."""
    import ray

    handle = _engine.get_handle(endpoint)
    return collections.Counter(ray.get([handle.remote() for _ in range(count)]))


def channels() -> dict[str, str]:
    """By which kind of socket this process reaches which replica."""
    return _channels()


def listen_in() -> None:
    """Write down what passes this host's cable from now on."""
    _overheard.begin()


def overheard(*words: str) -> list[bool]:
    """Which of these words passed it."""
    return _overheard.end(words)


class _Overheard:
    def begin(self) -> None:
        self._cable = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # type: ignore[attr-defined]
        self._cable.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._cable.bind(("eth0", 0))

    def end(self, words: tuple[str, ...]) -> list[bool]:
        packets = []
        with self._cable as cable, suppress(BlockingIOError):
            while True:
                packets.append(cable.recv(1 << 17, socket.MSG_DONTWAIT))
        assert packets
        return [any(word.encode() in packet for packet in packets) for word in words]


_overheard = _Overheard()


def statistics() -> Any:
    """Of the engine."""
    return _engine.statistics()


def delete(name: str) -> None:
    """An endpoint and its backend of the same name."""
    _engine.delete_endpoint(name)
    _engine.delete_backend(name, force=True)


def name_endpoint(name: str, route: str) -> None:
    """Have a route to the backend of the same name."""
    _engine.create_endpoint(name, backend=name, route=route)


def shutdown(timeout_s: float = 5.0) -> None:
    """End the engine."""
    _engine.shutdown(timeout_s)


def pid() -> int:
    """Of this process, on its host."""
    return os.getpid()


def start_bystanders(resources: list[str]) -> None:
    """Start plain Ray actors, for comparison, where there are these resources."""
    import ray

    _bystanders.extend(ray.remote(num_cpus=0, resources={name: 1})(Bystander).remote() for name in resources)
    ray.get([actor.ready.remote() for actor in _bystanders])


class Bystander:
    def ready(self) -> None: ...


_bystanders: list[Any] = []


# -- load --------------------------------------------------------------------------------------------------------------

_load: Load | None = None


class Load:
    """Some threads that call without end, and a record of each call."""

    def __init__(self, make_call: Callable[[], Callable[[], str]], threads: int) -> None:
        self._stopping = threading.Event()
        self._records: list[tuple[float, float, str]] = []
        self._threads = [threading.Thread(target=self._run, args=(make_call(),), daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, one_call: Callable[[], str]) -> None:
        while not self._stopping.wait(_PAUSE_S):
            start = time.monotonic()
            outcome = one_call()
            self._records.append((start, time.monotonic(), outcome))

    def count(self) -> int:
        return len(self._records)

    def stop(self) -> list[tuple[float, float, str]]:
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a call hangs"
        return self._records


def begin_load(endpoint: str, threads: int) -> None:
    """Call an endpoint by handle."""
    _begin_load(lambda: lambda: _outcome(lambda: str(call(endpoint))), threads)


def begin_http_load(url: str, threads: int) -> None:
    """Make requests, each thread on a connection that it keeps."""
    _begin_load(lambda: _Client(url), threads)


def _begin_load(make_call: Callable[[], Callable[[], str]], threads: int) -> None:
    global _load
    _load = Load(make_call, threads)


def loaded() -> int:
    """How many calls are done."""
    assert _load is not None
    return _load.count()


def end_load() -> list[tuple[float, float, str]]:
    """Stop calling; returns start and end (seconds on the machine's monotonic clock) and outcome of each call."""
    assert _load is not None
    return _load.stop()


def hold(endpoint: str, count: int) -> None:
    """Make calls by handle that end when their replica does."""
    for _ in range(count):
        thread = threading.Thread(target=_hold, args=(lambda: str(call(endpoint, method="hold")),), daemon=True)
        _holders.append(thread)
        thread.start()


def hold_http(url: str, count: int) -> None:
    """The same over HTTP."""
    for _ in range(count):
        client = _Client(url, {"X-SERVE-CALL-METHOD": "hold"})
        thread = threading.Thread(target=_hold, args=(client,), daemon=True)
        _holders.append(thread)
        thread.start()


def _hold(one_call: Callable[[], str]) -> None:
    start = time.monotonic()
    outcome = _outcome(one_call)
    _released.append((start, time.monotonic(), outcome))


_holders: list[threading.Thread] = []
_released: list[tuple[float, float, str]] = []


def released() -> list[tuple[float, float, str]]:
    """The records of the held calls, once all of them have ended."""
    for thread in _holders:
        thread.join(60)
        assert not thread.is_alive(), "a call hangs"
    _holders.clear()
    return _released


def _outcome(one_call: Callable[[], str]) -> str:
    try:
        return one_call()
    except Exception as error:
        return type(error).__name__


class _Client:
    """Makes the same request again and again; says the body of the answer, or its status if that is not 200."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        self._path = parts.path
        self._headers = headers or {}

    def __call__(self) -> str:
        try:
            self._connection.request("GET", self._path, headers=self._headers)
            response = self._connection.getresponse()
            body = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return type(error).__name__
        return body if response.status == 200 else str(response.status)


# -- the two ends ------------------------------------------------------------------------------------------------------

Record = tuple[float, float, str]
"""Start and end of a call, in seconds on the machine's monotonic clock, and its outcome."""


class Failed(Exception):
    """What was asked for raised; the message starts with the type of the error."""


class Process:
    """The test's side of such a process.

    Args:
        host: To run on.
        log: Gets its standard error.
    """

    def __init__(self, host: Any, log: Path) -> None:
        self.host = host
        self._log = log
        with log.open("a") as stderr:
            self._process = host.popen(
                sys.executable, __file__, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )

    def __call__(self, function: str, /, *args: Any, **arguments: Any) -> Any:
        """Have a function of this module called.

        Raises:
            Failed: It raised.
        """
        self.tell(function, *args, **arguments)
        return self.answer()

    def tell(self, function: str, /, *args: Any, **arguments: Any) -> None:
        """The same, without waiting: `answer` returns what it gave."""
        self._process.stdin.write(json.dumps([function, args, arguments]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for what a function gave."""
        impatience = threading.Timer(_ANSWER_S, self._process.send_signal, [signal.SIGABRT])
        impatience.start()
        try:
            line = self._process.stdout.readline()
        finally:
            impatience.cancel()
        if line:
            answer = json.loads(line)
            if "error" in answer:
                raise Failed(answer["error"])
            return answer["result"]
        code = self._process.wait()
        raise AssertionError(f"the process on {self.host} ended with exit code {code}:\n{self.log()}")

    def log(self) -> str:
        """What it wrote to its standard error."""
        return self._log.read_text()

    def end(self) -> None:
        """Let it leave in good order."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def main() -> None:
    answers = take_stdout()
    faulthandler.enable()  # SIGABRT is the test's way to ask where this process hangs
    for line in sys.stdin:
        name, args, arguments = json.loads(line)
        try:
            answer = {"result": globals()[name](*args, **arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(f"{json.dumps(answer)}\n")


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    main()
