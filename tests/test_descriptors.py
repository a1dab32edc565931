"""What happens when no file descriptors are left, in processes whose limit is really that low."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import Engine
from engine.testing.instruments import PATIENCE_S, Footprint
from engine_wire import Acceptor, BlockingServiceLoop, listen_unix

_TOOLS = """
import json, logging, os, resource, sys

class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []
    def emit(self, record):
        self.texts.append(record.getMessage())

records = Records()
logging.getLogger().addHandler(records)

def limit(spare):
    "Let no more than so many descriptors be opened from now on."
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    holes = [os.open("/dev/null", os.O_RDONLY)]
    while holes[-1] < highest:
        holes.append(os.open("/dev/null", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (holes[-1] + 1 + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return holes

def say(value):
    print(json.dumps(value), flush=True)
"""


class Script:
    """A Python process that says JSON by lines and hears lines."""

    def __init__(self, text: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TOOLS + textwrap.dedent(text), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def said(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the script failed"
        return json.loads(line)

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    scripts: list[Script] = []

    def start(text: str, *arguments: str) -> Script:
        scripts.append(Script(text, *arguments))
        return scripts[-1]

    yield start
    try:
        for one in scripts:
            one.process.communicate(timeout=PATIENCE_S)
            assert one.process.returncode == 0
    finally:
        for one in scripts:
            one.process.kill()
            one.process.communicate()


_ACCEPTING = """
    import asyncio, socket, threading
    from engine_wire import Acceptor, BlockingServiceLoop
    from engine_http import HypercornServer, plain  # noqa: F401: as the fork server does
    from engine.config import HTTPOptions

    kind, loop_kind = sys.argv[1:]
    tries = 0

    class Counting(socket.socket):
        def accept(self):
            global tries
            tries += 1
            return super().accept()

    listening = Counting(socket.AF_INET)
    listening.bind(("127.0.0.1", 0))
    listening.listen(100)
    port = listening.getsockname()[1]

    class Greeter:  # every channel greets whoever comes
        on_loop = False
        over = False
        def attach(self, loop): self.loop = loop
        def received(self, channel, message): pass
        def lost(self, channel, reason): pass
        def run_next(self): return None
        def finished(self): return self.over

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    def until_told(end):
        say(port)
        sys.stdin.readline()
        end()

    service = Greeter()
    if kind == "blocking":
        loop = BlockingServiceLoop([listening], service)
        limit(3)
        def end():
            service.over = True
            loop.wake()
        threading.Thread(target=until_told, args=(end,)).start()
        loop.run()
    else:
        if loop_kind == "uvloop":
            import uvloop
            loop = uvloop.new_event_loop()
        else:
            loop = asyncio.new_event_loop()
        async def serve():
            stop = asyncio.Event()
            if kind == "acceptor":
                acceptor = Acceptor([listening], lambda channel: service, loop)
            else:
                started = asyncio.Event()
                serving = loop.create_task(
                    HypercornServer().serve(app, [listening], HTTPOptions(), started=started.set, stopping=stop.wait)
                )
                await started.wait()
            limit(3)
            end = lambda: loop.call_soon_threadsafe(stop.set)
            threading.Thread(target=until_told, args=(end,)).start()
            await stop.wait()
            if kind == "acceptor":
                acceptor.close()
            else:
                await serving
        loop.run_until_complete(serve())
    say([tries, records.texts])
"""


@pytest.mark.parametrize(
    ("kind", "loop"),
    [("blocking", "none"), *((kind, loop) for kind in ("acceptor", "http") for loop in ("asyncio", "uvloop"))],
)
def test_who_accepts_rests_and_goes_on_when_there_are_descriptors(
    script: Callable[..., Script], kind: str, loop: str
) -> None:
    server = script(_ACCEPTING, kind, loop)
    port = server.said()
    clients = [socket.create_connection(("127.0.0.1", port), PATIENCE_S) for _ in range(6)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" if kind == "http" else b"")
    served: list[socket.socket] = []
    while more := select.select([client for client in clients if client not in served], [], [], 0.35)[0]:
        served += more
    # there was room for some: the others wait, and nobody hangs up on them
    assert 0 < len(served) <= 3
    for client in served:
        assert client.recv(1)
        client.close()
    for client in clients:
        if client not in served:
            assert client.recv(1)
            client.close()
    server.tell()
    tries, texts = server.said()
    assert tries < 50
    assert [text for text in texts if "descriptors" in text] == texts
    assert len(texts) == 1
    assert "no file descriptors left (RLIMIT_NOFILE=" in texts[0]


_INGRESS = """
    import http.client
    from engine import Engine

    def double(request):
        return "done"

    with Engine(http_options={"port": 0}) as engine:
        engine.create_backend("b", double)
        engine.create_endpoint("b", backend="b", route="/b")
        say(engine.http_url)
        sys.stdin.readline()
"""


def test_an_ingress_that_cannot_reach_its_replicas_says_so_at_once(script: Callable[..., Script]) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
    server = script(limited + textwrap.dedent(_INGRESS))
    port = int(server.said().rpartition(":")[2])
    clients = [socket.create_connection(("127.0.0.1", port), PATIENCE_S) for _ in range(60)]
    # all descriptors of the ingress are taken before it has opened a channel
    for client in clients[:10]:
        client.sendall(b"GET /b HTTP/1.1\r\nhost: x\r\n\r\n")
    answers = [client.recv(4096) for client in clients[:10]]
    assert all(answer.startswith(b"HTTP/1.1 503") for answer in answers), answers
    assert b"retry-after" in answers[0]
    for client in clients[1:]:
        client.close()
    answer = b""
    while not answer.startswith(b"HTTP/1.1 200"):  # until it has seen that they left
        clients[0].sendall(b"GET /b HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = clients[0].recv(4096)
        assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 503"))
    clients[0].close()
    server.tell()


_APPLICATION = """
    import asyncio
    from engine import Engine
    from engine.errors import EngineError, ResourcesUnavailable

    def double(request):
        return 2 * request.data

    def refused(action):
        spare = 0
        while True:  # until there is room enough, each try has to say what is missing
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            holes = limit(spare)
            try:
                action()
                assert spare
                return spare
            except ResourcesUnavailable as error:
                assert "no file descriptors left (RLIMIT_NOFILE=" in str(error), error
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for hole in holes:
                    os.close(hole)
            spare += 1

    def start():
        with Engine(sys.argv[1], http_options={"location": None}) as engine:
            engine.create_backend("b", double)

    async def acall():
        assert await engine.get_handle("b", sync=False).call(2) == 4

    with Engine(sys.argv[1], http_options={"location": None}) as engine:
        engine.create_backend("b", double)
        engine.create_endpoint("b", backend="b")
        handle = engine.get_handle("b")
        if sys.argv[1] == "local":
            # one attempt for each way a descriptor can be missing
            refused(lambda: handle.call(1))
            loop = asyncio.new_event_loop()
            refused(lambda: loop.run_until_complete(acall()))
            loop.close()
            refused(lambda: engine.create_backend("c", double))
            refused(lambda: engine.update_backend_config("b", {"num_replicas": 2}))
        start()  # what it needs is imported now
        refused(start)
        assert handle.call(3) == 6
    say("over")
"""


@pytest.mark.parametrize("adapter", ["local", "inline"])
def test_an_application_is_told(script: Callable[..., Script], adapter: str) -> None:
    assert script(_APPLICATION, adapter).said() == "over"


@pytest.mark.parametrize("make", [Acceptor, BlockingServiceLoop])
def test_a_secret_that_is_too_short_leaks_no_socket(make: Any, tmp_path: Path, leaves_nothing: Footprint) -> None:
    listening = listen_unix(str(tmp_path / "s"))
    rest: list[Any] = [None, None] if make is Acceptor else [None]
    with pytest.raises(ValueError, match="secret"):
        make([listening], *rest, secret=b"short")
    assert listening.fileno() < 0


def count_descriptors(request: Any) -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="nobody says which descriptors there are")
def test_a_channel_takes_one_descriptor_at_each_end(leaves_nothing: Footprint) -> None:
    with Engine(backend="local", http_options={"location": None}) as engine:
        for tag in ("one", "two"):
            engine.create_backend(tag, count_descriptors)
            engine.create_endpoint(tag, backend=tag)
        engine.get_handle("one").call()  # opens what all channels have in common
        before = count_descriptors(None)
        there = engine.get_handle("two").call()
        assert count_descriptors(None) == before + 1

        async def call_from_a_loop() -> int:
            return await engine.get_handle("two", sync=False).call()

        assert asyncio.run(call_from_a_loop()) == there + 1
