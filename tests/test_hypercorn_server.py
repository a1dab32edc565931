"""The hypercorn server on real sockets: HTTP/1.1, HTTP/2, TLS, and how it starts, stops and breaks off."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h2.connection
import h2.events
import h2.settings
import httpx
import pytest
import trustme
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER

from engine.config import HTTPOptions
from engine.errors import InvalidArgument
from engine.seam.ingress_server import StreamBroken
from engine_http import HypercornServer
from engine_http import connection as connection_module
from engine_http import connections as connections_module
from engine_http import server as server_module
from engine_http.connection import Connection
from engine_http.connections import Connections
from engine_http.full import _WindowWatch
from engine_http.plain import PlainLane

pytestmark = pytest.mark.anyio

PATIENCE_S = 10
_LARGE = {"/large": 10_000_000, "/kernels": 1_000_000}
"""Bodies by path: more than a kernel keeps, and less than one keeps between two sockets of its own."""


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@dataclass
class App:
    """An application that the test steers: which way to answer is the path."""

    started: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    scopes: list[Any] = field(default_factory=list)
    sent: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
            return
        path = scope["path"]
        self.started.put_nowait(path)
        if path == "/early":  # answers without reading the body
            await self._answer(send, b"early", status=413)
            return
        if path == "/raise":
            raise ValueError("the application's error")
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.put_nowait(path)
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if path == "/wait":
            await self.may_answer.wait()
        elif path == "/listen":
            assert (await receive())["type"] == "http.disconnect"
            self.left.put_nowait(path)
            return
        elif path == "/broken":
            await self._start(send)
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
            raise StreamBroken
        elif path == "/stream":
            await self._start(send)
            for number in range(3):
                await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
                await self.may_answer.wait()
            await send({"type": "http.response.body", "body": b""})
            return
        elif path == "/endless":
            await self._endless(receive, send)
            return
        elif path in _LARGE:
            body = b"x" * _LARGE[path]
        await self._answer(send, body or b"hello")

    async def _endless(self, receive: Any, send: Any) -> None:
        """Stream until the client is gone, and notice it as the ingress does: beside sending."""
        await self._start(send)
        leaving = asyncio.ensure_future(receive())
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True})
            self.sent += 50_000
            await asyncio.sleep(0)
        assert leaving.result()["type"] == "http.disconnect"
        self.left.put_nowait("/endless")

    async def _start(self, send: Any, status: int = 200, headers: Any = ()) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [*headers]})

    async def _answer(self, send: Any, body: bytes, status: int = 200) -> None:
        await self._start(send, status, [(b"content-length", b"%d" % len(body))])
        await send({"type": "http.response.body", "body": body})


@dataclass
class Running:
    app: App
    port: int
    stop: asyncio.Event
    task: asyncio.Task[None]
    sock: socket.socket

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ended(self) -> None:
        done, _ = await asyncio.wait([self.task], timeout=PATIENCE_S)
        assert done, "the server did not end"
        if not self.task.cancelled():
            self.task.result()


@contextlib.asynccontextmanager
async def serving(
    app: App | None = None,
    stall_timeout_s: float | None = None,
    max_connections: int | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    app = app or App()
    sock = socket.create_server(("127.0.0.1", 0))
    stop, started = asyncio.Event(), asyncio.Event()
    task = asyncio.ensure_future(
        HypercornServer().serve(
            app,
            [sock],
            HTTPOptions(stall_timeout_s=stall_timeout_s, max_connections=max_connections, server_options=settings),
            started=started.set,
            stopping=stop.wait,
        )
    )
    waiting = asyncio.ensure_future(started.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        sock.close()
        task.result()
    running = Running(app, sock.getsockname()[1], stop, task, sock)
    try:
        yield running
    finally:
        app.may_answer.set()
        stop.set()
        try:
            await running.ended()
        finally:
            sock.close()


Client = Callable[[], httpx.AsyncClient]


@pytest.fixture(params=["http/1.1", "http/2"])
def browser(request: pytest.FixtureRequest) -> Client:
    two = request.param == "http/2"
    return lambda: httpx.AsyncClient(http1=not two, http2=two, timeout=PATIENCE_S)


# -- requests and answers ------------------------------------------------------------------------------------------


async def test_requests_and_answers(browser: Client) -> None:
    async with serving() as server, browser() as client:
        for _ in range(3):
            response = await client.get(server.url + "/a")
            assert (response.status_code, response.text) == (200, "hello")
            assert "date" in response.headers and "server" not in response.headers
        assert (await client.post(server.url + "/a", content=b"x" * 1_000_000)).content == b"x" * 1_000_000
        assert len((await client.get(server.url + "/large")).content) == 10_000_000
        response = await client.head(server.url + "/a")
        assert (response.text, response.headers["content-length"]) == ("", "5")


async def test_side_by_side(browser: Client) -> None:
    async with serving() as server, browser() as client:
        answers = await asyncio.gather(*(client.post(server.url, content=b"%d" % number) for number in range(50)))
        assert [answer.content for answer in answers] == [b"%d" % number for number in range(50)]


async def test_http_2_by_prior_knowledge() -> None:
    async with serving() as server, httpx.AsyncClient(http1=False, http2=True) as client:
        assert (await client.get(server.url)).http_version == "HTTP/2"
    assert server.app.scopes[0]["http_version"] == "2"


async def test_an_application_that_fails(browser: Client, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server, browser() as client:
        assert (await client.get(server.url + "/raise")).status_code == 500
        assert (await client.get(server.url + "/a")).status_code == 200
    assert "the application's error" in caplog.text


async def test_a_broken_stream_is_noticed(browser: Client, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server, browser() as client:
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(server.url + "/broken")
        assert (await client.get(server.url + "/a")).status_code == 200
    assert caplog.text == ""


async def test_an_answer_before_the_body_was_read(browser: Client) -> None:
    async with serving() as server, browser() as client:
        for _ in range(2):
            response = await client.post(server.url + "/early", content=b"x" * 3_000_000)
            assert (response.status_code, response.text) == (413, "early")
        assert (await client.get(server.url + "/a")).status_code == 200


async def test_parts_arrive_as_they_are_sent(browser: Client) -> None:
    async with serving() as server, browser() as client:
        async with client.stream("GET", server.url + "/stream") as response:
            parts = response.aiter_raw()
            assert await parts.__anext__() == b"0"
            server.app.may_answer.set()
            assert b"".join([part async for part in parts]) == b"12"


async def test_the_application_hears_that_the_client_left(browser: Client) -> None:
    async with serving() as server:
        async with browser() as client:
            request = asyncio.ensure_future(client.get(server.url + "/listen"))
            await server.app.started.get()
            request.cancel()
            await asyncio.wait([request])
        assert await asyncio.wait_for(server.app.left.get(), PATIENCE_S) == "/listen"


@pytest.mark.parametrize("leave", ["close", "half-close", "abort"])
@pytest.mark.parametrize("framing", ["content-length: 10\r\n\r\n", "transfer-encoding: chunked\r\n\r\n5\r\n"])
async def test_a_client_that_leaves_in_its_body(framing: str, leave: str) -> None:
    async with serving() as server:
        _, writer = await server.connect()
        writer.write(b"POST /a HTTP/1.1\r\nhost: x\r\n" + framing.encode() + b"abc")
        await server.app.started.get()
        if leave == "half-close":
            writer.write_eof()
        elif leave == "abort":
            writer.transport.abort()
        else:
            writer.close()
        assert await asyncio.wait_for(server.app.left.get(), PATIENCE_S) == "/a"
        writer.close()


async def exchange(server: Running, data: bytes) -> bytes:
    reader, writer = await server.connect()
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    writer.close()
    return answer


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving() as server:
        request = b"POST /%s HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n%s\r\n%s"
        data = b"".join(
            request % (name, b"connection: close\r\n" if name == b"c" else b"", name) for name in (b"a", b"b", b"c")
        )
        answer = await exchange(server, data)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert [part[:1] for part in answer.split(b"\r\n\r\n")[1:]] == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
async def test_bad_requests(data: bytes) -> None:
    async with serving() as server:
        assert (await exchange(server, data)).startswith(b"HTTP/1.1 400")
        assert not server.app.scopes
        assert b"hello" in await exchange(server, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"get / HTTP/1.1", 501),
        (b"Delete / HTTP/1.1", 501),
        (b"CONNECT x:80 HTTP/1.1", 501),
        (b"PRI / HTTP/1.1", 501),
        (b"PRI * HTTP/2.0", 505),
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/0.9", 505),
        (b"GET * HTTP/1.1", 400),
        (b"GET a HTTP/1.1", 400),
        (b"GET ftp://x/ HTTP/1.1", 400),
        (b"GET http:///a HTTP/1.1", 400),
        (b"GET http://y@x/ HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\na: b\r\nhost: x/admin?\r\nb: c", 400),
        (b"GET / HTTP/1.0\r\nhost: x#y\r\nb: c", 400),
    ],
)
async def test_requests_that_are_not_served_here(line: bytes, status: int) -> None:
    async with serving() as server:
        data = line + (b"" if b"host:" in line else b"\r\nhost: x") + b"\r\n\r\n" + ORDINARY[0]
        assert (await exchange(server, data)).startswith(b"HTTP/1.1 %d" % status)
        assert not server.app.scopes


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\nhost: x\nconnection: close\n\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\n",
    ],
)
async def test_a_head_whose_lines_end_with_lf_alone_waits_for_nothing(data: bytes) -> None:
    async with serving() as server:
        assert b"hello" in await exchange(server, data)


@pytest.mark.parametrize("more", [b"\r\n", b"GET /b HTTP/1.0\r\n\r\n", b"nonsense\r\n\r\n"])
async def test_what_follows_the_last_request_is_ignored(more: bytes) -> None:
    async with serving() as server:
        for last in (b"GET /a HTTP/1.0\r\n\r\n", b"GET /a HTTP/1.1\r\nhost: x\r\nconnection: x, close\r\n\r\n"):
            answer = await exchange(server, last + more)
            assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"hello")
            assert answer.count(b"HTTP/1.1") == 1


async def test_headers_without_end_are_refused() -> None:
    async with serving() as server:
        data = b"GET / HTTP/1.1\r\nhost: x\r\nlong: " + b"x" * 100_000
        assert (await exchange(server, data)).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("framing", ["", "transfer-encoding: chunked\r\n"], ids=["plain", "full"])
async def test_complete_heads_are_limited_as_well(framing: str) -> None:
    async with serving() as server:
        head = f"POST /a HTTP/1.1\r\nhost: x\r\n{framing}long: {'x' * 20_000}\r\n\r\n"
        assert (await exchange(server, head.encode())).startswith(b"HTTP/1.1 431")
        assert server.app.scopes == []


@pytest.mark.parametrize("http_version", ["1.1", "1.0"], ids=["plain", "full"])
async def test_a_client_that_takes_nothing_is_let_go(http_version: str) -> None:
    async with serving(stall_timeout_s=0.1) as server:
        reader, writer = await server.connect()
        writer.write(f"GET /endless HTTP/{http_version}\r\nhost: x\r\n\r\n".encode())
        assert await asyncio.wait_for(server.app.left.get(), PATIENCE_S) == "/endless"
        with pytest.raises(ConnectionResetError):  # the kernel, too, keeps nothing for it
            await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="no other kernel tells what a client has taken")
async def test_a_client_that_takes_little_is_not_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel asks for more only when a good part of what it keeps has been taken."""
    paused: asyncio.Queue[Connection] = asyncio.Queue()
    pause = Connection.pause_writing

    def note(self: Connection) -> None:
        pause(self)
        paused.put_nowait(self)

    monkeypatch.setattr(Connection, "pause_writing", note)
    async with serving() as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.setblocking(False)
            client.sendall(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
            connection = await asyncio.wait_for(paused.get(), PATIENCE_S)
            loop = asyncio.get_running_loop()
            until = loop.time() + PATIENCE_S
            before = connection._left().taken
            # what its side of the kernel holds is taken, so more than that must be read
            while connection._left().taken == before and loop.time() < until:
                with contextlib.suppress(BlockingIOError):
                    client.recv(10_000)
                await asyncio.sleep(0.001)
            assert connection._left().taken > before


def test_a_stream_is_not_let_go_while_its_connection_waits() -> None:
    resets: list[int] = []
    tasks: Any = SimpleNamespace(
        congested=True,
        stall_timeout_s=1.0,
        loop=SimpleNamespace(call_later=lambda *_: None),
        spawn=lambda _, stream_id: resets.append(stream_id),
    )
    protocol: Any = SimpleNamespace(task_group=tasks, let_go=None)
    watch = _WindowWatch(protocol, 1, b"to be sent")
    watch._look(None)
    watch._look(len(b"to be sent"))
    assert not resets
    tasks.congested = False
    watch._look(len(b"to be sent"))
    assert resets == [1]


async def test_expect_continue() -> None:
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(
            b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n"
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(b"abc")
        assert (await reader.read()).endswith(b"abc")
        writer.close()


async def test_chunked_bodies_both_ways() -> None:
    async with serving() as server:
        server.app.may_answer.set()
        chunks = b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        answer = await exchange(
            server, b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n" + chunks
        )
        assert answer.endswith(b"\r\n\r\nabc")
        answer = await exchange(server, b"GET /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b"transfer-encoding: chunked" in answer.lower()
        assert answer.endswith(b"1\r\n0\r\n1\r\n1\r\n1\r\n2\r\n0\r\n\r\n")


async def test_what_follows_a_request_with_two_framings_is_no_request() -> None:
    async with serving() as server:
        server.app.may_answer.set()
        framings = b"Content-Length: 5\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
        answer = await exchange(
            server, b"POST /a HTTP/1.1\r\nhost: x\r\n" + framings + b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
        )
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"connection: close" in answer.lower()
    assert answer.endswith(b"\r\n\r\na")
    (scope,) = server.app.scopes
    assert [name for name, _ in scope["headers"]] == [b"host", b"transfer-encoding"]


async def test_an_absolute_target() -> None:
    async with serving() as server:
        for target in ("http://example.org:80/a%20b?c=d", "HTTP://example.org:80?e"):
            answer = await exchange(
                server, f"GET {target} HTTP/1.1\r\nhost: other\r\nconnection: close\r\n\r\n".encode()
            )
            assert answer.startswith(b"HTTP/1.1 200"), answer
    first, second = server.app.scopes
    assert (first["path"], first["raw_path"], first["query_string"]) == ("/a b", b"/a%20b", b"c=d")
    assert (second["path"], second["query_string"]) == ("/", b"e")
    assert [value for name, value in first["headers"] if name == b"host"] == [b"example.org:80"]


async def test_http_1_0() -> None:
    async with serving() as server:
        server.app.may_answer.set()
        answer = await exchange(server, b"GET /stream HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"chunked" not in answer.lower()
        assert answer.endswith(b"\r\n\r\n012")


async def test_upgrade_to_http_2() -> None:
    async with serving() as server:
        reader, writer = await server.connect()
        connection = h2.connection.H2Connection()
        settings = connection.initiate_upgrade_connection()
        assert settings is not None
        writer.write(
            b"GET /a HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
            b"http2-settings: " + settings + b"\r\n\r\n"
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        writer.write(connection.data_to_send())
        body, over = b"", False
        while not over:
            for event in connection.receive_data(await reader.read(65536)):
                if isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
                over = over or isinstance(event, h2.events.StreamEnded)
        assert body == b"hello"
        writer.close()


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        ("1.0", "connection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk"),
        ("1.1", "http2-settings: AAMAAABk"),
        ("1.1", "connection: http2-settings\r\nhttp2-settings: AAMAAABk"),
        ("1.1", "connection: upgrade\r\nhttp2-settings: AAMAAABk"),
        ("1.1", "connection: upgrade, http2-settings"),
        ("1.1", "connection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk\r\nhttp2-settings: AAMAAABk"),
        ("1.1", "connection: upgrade, http2-settings\r\nhttp2-settings: AAMAAAB"),
        ("1.1", "connection: upgrade, http2-settings\r\nhttp2-settings: AAMA!ABk"),
    ],
)
async def test_an_upgrade_that_the_client_may_not_have_asked_for_is_ignored(version: str, fields: str) -> None:
    async with serving() as server:
        answer = await exchange(
            server, f"GET /a HTTP/{version}\r\nhost: x\r\nupgrade: h2c\r\n{fields}\r\n\r\n".encode() + CLOSING
        )
        assert answer.startswith(b"HTTP/1.1 200")
        assert {scope["http_version"] for scope in server.app.scopes} <= {version, "1.1"}


async def test_a_preface_of_http_2_counts_at_the_beginning_alone() -> None:
    async with serving() as server:
        answer = await exchange(server, ORDINARY[0] + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + ORDINARY[0])
        assert answer.count(b"HTTP/1.1 200") == 1 and b"HTTP/1.1 505" in answer
        assert len(server.app.scopes) == 1


async def test_a_websocket_is_refused() -> None:
    async with serving() as server:
        answer = await exchange(
            server,
            b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        assert answer.startswith(b"HTTP/1.1 403")


# -- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    with (directory / "cert.pem").open("wb") as file:
        file.writelines(blob.bytes() for blob in issued.cert_chain_pems)
    return {"certfile": str(directory / "cert.pem"), "keyfile": str(directory / "key.pem")}


@pytest.mark.parametrize(("http2", "version"), [(False, "HTTP/1.1"), (True, "HTTP/2")])
async def test_tls(authority: trustme.CA, certificate: dict[str, str], http2: bool, version: str) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with serving(**certificate) as server, httpx.AsyncClient(verify=context, http2=http2) as client:
        response = await client.post(f"https://127.0.0.1:{server.port}/a", content=b"x" * 200_000)
        assert (response.http_version, response.content) == (version, b"x" * 200_000)
    assert server.app.scopes[0]["scheme"] == "https"


async def test_a_connection_that_is_closed_breaks_off_no_answer(
    authority: trustme.CA, certificate: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has written all of it, but the client has yet to take it from the kernel."""
    monkeypatch.setattr(connection_module, "_LOOK_AFTER_S", 0.01)
    looked = asyncio.Event()
    look = Connection._check_gone

    def note(self: Connection, *args: Any) -> None:
        look(self, *args)
        looked.set()

    monkeypatch.setattr(Connection, "_check_gone", note)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with serving(**certificate) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname="localhost", limit=1)
        writer.write(b"GET /kernels HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await asyncio.wait_for(looked.wait(), PATIENCE_S)
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert len(answer.partition(b"\r\n\r\n")[2]) == _LARGE["/kernels"]
        writer.close()


# -- clients that leave --------------------------------------------------------------------------------------------


class Http2:
    """A client of HTTP/2 that has asked for something endless, and takes of it what the test says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection = h2.connection.H2Connection()
        self.reader, self.writer = reader, writer

    @classmethod
    async def ask(cls, server: Running, how: str, context: ssl.SSLContext | None = None) -> Http2:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", server.port, ssl=context, server_hostname="localhost" if context else None
        )
        client = cls(reader, writer)
        if how == "upgrade":
            settings = client.connection.initiate_upgrade_connection()
            assert settings is not None
            writer.write(
                b"GET /endless HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
                b"http2-settings: " + settings + b"\r\n\r\n"
            )
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        else:
            client.connection.initiate_connection()
            client.get(1, "/endless")
        client.flush()
        return client

    @classmethod
    async def open(cls, server: Running) -> Http2:
        """A client that has asked for nothing yet."""
        client = cls(*await server.connect())
        client.connection.initiate_connection()
        await client.echo()
        return client

    def get(self, stream_id: int, path: str) -> None:
        pseudo = [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "x")]
        self.connection.send_headers(stream_id, pseudo, end_stream=True)
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.connection.data_to_send())

    async def take(self, amount: int, *, window: bool, stream_id: int = 1) -> None:
        """Take so many bytes of a stream; with ``window``, make room for more each time."""
        while amount > 0:
            for event in self.connection.receive_data(await self.reader.read(65536)):
                if isinstance(event, h2.events.DataReceived) and event.stream_id == stream_id:
                    amount -= len(event.data or b"")
                    if window:
                        self.connection.acknowledge_received_data(event.flow_controlled_length or 0, stream_id)
            self.flush()

    async def echo(self) -> None:
        """Wait until the server has read everything up to here, and gone on meanwhile."""
        self.connection.ping(b"as it is")
        self.flush()
        heard = False
        while not heard:
            events = self.connection.receive_data(await self.reader.read(65536))
            heard = any(isinstance(event, h2.events.PingAckReceived) for event in events)

    async def until_reset(self, stream_id: int) -> None:
        """Wait until the server gives a stream up."""
        given_up = False
        while not given_up:
            events = self.connection.receive_data(await asyncio.wait_for(self.reader.read(65536), PATIENCE_S))
            given_up = any(
                isinstance(event, h2.events.StreamReset) and event.stream_id == stream_id for event in events
            )

    def open_window(self, amount: int) -> None:
        self.connection.increment_flow_control_window(amount)
        self.connection.increment_flow_control_window(amount, 1)
        self.flush()

    async def leave(self, how: str) -> None:
        if how == "reset":
            self.connection.reset_stream(1)
            self.flush()
        elif how == "goaway":
            self.connection.close_connection()
            self.flush()
        elif how == "half-close":
            self.writer.write_eof()
        else:
            self.writer.transport.abort()


@pytest.mark.parametrize("leaving", ["reset", "goaway", "half-close", "abort"])
@pytest.mark.parametrize("taken", [1, 65_535, 3_000_000])
@pytest.mark.parametrize("how", ["prior knowledge", "upgrade", "tls"])
async def test_who_waits_to_send_over_http_2_is_let_go_when_the_client_leaves(
    how: str, taken: int, leaving: str, authority: trustme.CA, certificate: dict[str, str]
) -> None:
    context = None
    if how == "tls":
        if leaving == "half-close":
            pytest.skip("TLS has none")
        context = ssl.create_default_context()
        context.set_alpn_protocols(["h2"])
        authority.configure_trust(context)
    async with serving(**(certificate if context else {})) as server:
        before = asyncio.all_tasks()
        client = await Http2.ask(server, how, context)
        # 65,535 is the window that a client gives first: the stream's stays used up, and there is nothing to send
        await client.take(taken, window=taken > 65_535)
        await client.leave(leaving)
        assert await asyncio.wait_for(server.app.left.get(), PATIENCE_S) == "/endless"
        if leaving == "reset":
            client.connection.increment_flow_control_window(100_000)  # of the connection
            client.get(3, "/a")
            await client.take(len(b"hello"), window=False, stream_id=3)
            client.writer.close()
        await only_left(before)
        client.writer.close()


@pytest.mark.parametrize("opened", [0, 1])
async def test_a_stream_over_http_2_waits_for_its_clients_window(opened: int) -> None:
    async with serving() as server:
        client = await Http2.ask(server, "prior knowledge")
        await client.take(65_535, window=False)
        for _ in range(100):
            if opened:
                client.open_window(opened)
            await client.echo()
        # what the client took, and what was buffered when the last send went through
        assert server.app.sent < 65_535 + 100 * opened + BUFFER_HIGH_WATER
        client.open_window(100_000)
        await client.take(1_000_000, window=True)
        await client.leave("abort")
        assert await asyncio.wait_for(server.app.left.get(), PATIENCE_S) == "/endless"


async def test_a_stream_of_which_the_client_takes_nothing_is_reset() -> None:
    """Its connection is busy meanwhile, and goes on."""
    async with serving(stall_timeout_s=0.2) as server:
        client = await Http2.ask(server, "prior knowledge")
        await client.take(65_535, window=False)
        client.connection.increment_flow_control_window(1_000_000)  # of the connection
        stream_id = 1
        while server.app.left.empty():
            stream_id += 2
            client.get(stream_id, "/a")
            await client.take(len(b"hello"), window=False, stream_id=stream_id)
        client.get(stream_id + 2, "/a")
        await client.take(len(b"hello"), window=False, stream_id=stream_id + 2)
        client.writer.close()


@pytest.mark.parametrize("path", ["/a", "/large"])
async def test_an_answer_of_which_the_client_never_takes_the_end_is_let_go(path: str) -> None:
    """It is complete as far as the application goes, and its connection is busy meanwhile."""
    async with serving(stall_timeout_s=0.2) as server:
        before = asyncio.all_tasks()
        client = await Http2.ask(server, "prior knowledge")
        await client.leave("reset")
        client.connection.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        client.get(3, path)
        await client.until_reset(3)
        client.get(5, "/a")
        client.connection.increment_flow_control_window(100_000, 5)
        await client.take(len(b"hello"), window=False, stream_id=5)
        client.writer.close()
        await only_left(before)


@pytest.mark.parametrize("window", [True, False])
async def test_a_client_of_http_2_that_takes_nothing_is_broken_off(window: bool) -> None:
    async with serving() as server:
        client = await Http2.ask(server, "prior knowledge")
        if window:  # a window, but nobody who reads
            client.open_window(2**30)
        await client.take(1, window=False)
        server.stop.set()
        await asyncio.sleep(0)
        assert not server.task.done()
        server.task.cancel()
        await server.ended()
        assert server.task.cancelled()
        client.writer.close()


@pytest.mark.parametrize("path", ["/endless", "/large"])
async def test_who_stops_sending_has_left_even_if_it_takes_nothing(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(connection_module, "_LOOK_AFTER_S", 0.001)
    async with serving() as server:
        before = asyncio.all_tasks()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode())
            await server.app.started.get()
            client.shutdown(socket.SHUT_WR)
            if path == "/endless":
                assert await asyncio.wait_for(server.app.left.get(), PATIENCE_S) == path
            await only_left(before)
            server.stop.set()
            await server.ended()  # without having it broken off


async def only_left(tasks: set[asyncio.Task[Any]]) -> None:
    """Wait until all other tasks have ended."""
    while more := asyncio.all_tasks() - tasks:
        await asyncio.wait_for(asyncio.wait(more), PATIENCE_S)


# -- how many there may be -----------------------------------------------------------------------------------------


async def test_who_is_one_too_many_waits_until_another_one_leaves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits = asyncio.Event()
    wait_for_room = Connections.wait_for_room

    def waiting(connections: Connections, tell: Callable[[], None]) -> None:
        wait_for_room(connections, tell)
        waits.set()

    monkeypatch.setattr(Connections, "wait_for_room", waiting)
    async with serving(max_connections=2) as server:
        clients = [await server.connect() for _ in range(2)]
        for _, writer in clients:
            writer.write(b"GET /listen HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await server.app.started.get() == "/listen"
        more = [await server.connect() for _ in range(2)]
        for _, writer in more:
            writer.write(b"GET /listen HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.wait_for(waits.wait(), PATIENCE_S)
        assert "2 clients are connected (max_connections)" in caplog.text
        for _ in range(2):
            assert server.app.started.empty()
            _, writer = clients.pop()
            writer.close()
            assert await server.app.left.get() == "/listen"
            assert await server.app.started.get() == "/listen"
        assert caplog.text.count("max_connections") == 1
        for _, writer in more:
            writer.close()


async def test_connections_that_nobody_uses_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "_IDLE_S", 0.01)
    async with serving(max_connections=2) as server:
        silent = [await server.connect() for _ in range(20)]
        for reader, writer in silent[:18]:
            assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
            writer.close()
        heard, asks = await server.connect()
        asks.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await asyncio.wait_for(heard.readuntil(b"hello"), PATIENCE_S)).startswith(b"HTTP/1.1 200")
        for writer in (asks, silent[18][1], silent[19][1]):
            writer.close()


# -- stopping ------------------------------------------------------------------------------------------------------


async def test_idle_connections_are_closed_at_once_when_it_stops(browser: Client) -> None:
    async with serving() as server, browser() as client:
        await client.get(server.url)
        server.stop.set()
        await server.ended()


async def test_who_has_connected_when_it_stops_is_served(browser: Client) -> None:
    """Also those one too many, and those whose request comes a moment later."""
    async with serving(max_connections=1) as server, browser() as client:
        held = asyncio.ensure_future(client.get(server.url + "/wait"))
        assert await server.app.started.get() == "/wait"
        early, late = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        early.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        server.stop.set()
        answers = [await answer_to(early)]
        late.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        answers.append(await answer_to(late))
        server.app.may_answer.set()
        assert (await held).text == "hello"
        for answer in answers:
            assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer
        await server.ended()


async def test_who_connects_when_it_stops_and_asks_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "_IDLE_S", 0.01)
    async with serving() as server:
        silent = socket.create_connection(("127.0.0.1", server.port))
        server.stop.set()
        assert await answer_to(silent) == b""
        await server.ended()


async def answer_to(sock: socket.socket) -> bytes:
    """All that comes until the server closes."""
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE_S)
    finally:
        writer.close()


@pytest.mark.parametrize("how", ["refused", "refused at once", "reset", "reset early", "no such server"])
async def test_a_connection_of_http_2_is_idle_after_streams_that_have_come_to_nothing(how: str) -> None:
    async with serving(**({"server_names": ["y"]} if how == "no such server" else {})) as server:
        client = await Http2.open(server)
        if how.startswith("refused"):
            client.get(1, "*")
        elif how == "no such server":
            client.get(1, "/a")
        else:
            client.get(1, "/listen")
            if how == "reset":
                assert await server.app.started.get() == "/listen"
            client.connection.reset_stream(1)
        if how != "refused at once":
            await client.echo()
        server.stop.set()
        await server.ended()
        client.writer.close()


async def test_a_client_of_http_2_is_told_which_streams_were_heard_when_its_connection_is_closed() -> None:
    async with serving() as server:
        client = await Http2.open(server)
        client.get(1, "/a")
        await client.take(len(b"hello"), window=False)
        server.stop.set()
        events = client.connection.receive_data(await asyncio.wait_for(client.reader.read(), PATIENCE_S))
        heard = [event.last_stream_id for event in events if isinstance(event, h2.events.ConnectionTerminated)]
        assert heard == [1]
        client.writer.close()


async def test_who_asks_for_another_server_over_http_1_is_answered_and_hung_up_on() -> None:
    async with serving(server_names=["y"]) as server:
        assert (await exchange(server, b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")).startswith(b"HTTP/1.1 404")
        assert not server.app.scopes


async def test_requests_in_flight_are_finished_when_it_stops(browser: Client) -> None:
    async with serving() as server, browser() as client:
        request = asyncio.ensure_future(client.get(server.url + "/wait"))
        await server.app.started.get()
        server.stop.set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(server.task), 0.05)
        assert not server.task.done()
        server.app.may_answer.set()
        response = await request
        assert response.text == "hello"
        if response.http_version == "HTTP/1.1":
            assert response.headers["connection"] == "close"
        await server.ended()


async def test_cancelling_breaks_off_what_is_left(browser: Client) -> None:
    async with serving() as server, browser() as client:
        request = asyncio.ensure_future(client.get(server.url + "/wait"))
        await server.app.started.get()
        server.stop.set()
        await asyncio.sleep(0)
        server.task.cancel()
        with pytest.raises(httpx.TransportError):
            await request
        await server.ended()
        assert server.task.cancelled()
    assert not [task for task in asyncio.all_tasks() if "Connection" in repr(task)]


async def test_a_client_that_takes_nothing_is_broken_off() -> None:
    async with serving() as server:
        _, writer = await server.connect()
        writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        await server.app.started.get()
        server.stop.set()
        await asyncio.sleep(0)
        assert not server.task.done()
        server.task.cancel()
        await server.ended()
        assert server.task.cancelled()
        writer.close()


async def test_the_callers_sockets_stay_open() -> None:
    async with serving() as server:
        server.stop.set()
        await server.ended()
        assert server.sock.getsockname()[1] == server.port


async def test_idle_connections_time_out() -> None:
    async with serving(keep_alive_timeout=0.05) as server:
        reader, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), PATIENCE_S)).endswith(b"hello")
        writer.close()


async def test_busy_connections_do_not_time_out() -> None:
    async with serving(keep_alive_timeout=0.02) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n")
        await server.app.started.get()
        with contextlib.suppress(asyncio.TimeoutError):
            assert await asyncio.wait_for(reader.read(1), 0.1) != b""
        server.app.may_answer.set()
        assert (await reader.read()).endswith(b"hello")
        writer.close()


# -- settings ------------------------------------------------------------------------------------------------------


def validate(**settings: Any) -> None:
    HypercornServer().validate(HTTPOptions(server_options=settings))


def test_good_settings(certificate: dict[str, str]) -> None:
    validate()
    validate(**certificate, keep_alive_timeout=3, backlog=5, h2_max_concurrent_streams=7, root_path="/x")
    validate(access_log_format="%(h)s", accesslog="-", alpn_protocols=["h2"], include_date_header=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keyfle": "x"}, "'keyfle'; did you mean keyfile"),
        ({"max_body_byte": 3}, "did you mean max_body_bytes"),
        ({"zzz": 3}, "hypercorn's are .*backlog"),
        ({"backlog": "many"}, "backlog must be an integer, not 'many'"),
        ({"backlog": True}, "backlog must be an integer"),
        ({"keep_alive_timeout": None}, "keep_alive_timeout must be a number"),
        ({"include_date_header": 1}, "must be True or False"),
        ({"alpn_protocols": "h2"}, "must be a list"),
        ({"bind": "0.0.0.0:1"}, "use host and port"),
        ({"graceful_timeout": 3}, "drain"),
        ({"log": 3}, "'log'"),
        ({"_bind": 3}, "'_bind'"),
        ({"create_sockets": 3}, "'create_sockets'"),
        ({"certfile": "/nowhere/cert.pem"}, "keyfile is missing"),
        ({"keyfile": "/nowhere/key.pem"}, "certfile is missing"),
        (
            {"certfile": "/nowhere/cert.pem", "keyfile": "/nowhere/key.pem"},
            "certfile='/nowhere/cert.pem'.*No such file",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        validate(**settings)


def test_files_that_are_no_certificates(tmp_path: Path, certificate: dict[str, str]) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    with pytest.raises(InvalidArgument, match="TLS cannot be set up"):
        validate(certfile=str(tmp_path / "cert.pem"), keyfile=certificate["keyfile"])
    with pytest.raises(InvalidArgument, match=r"TLS cannot be set up.*ciphers='none'"):
        validate(**certificate, ciphers="none")


async def test_settings_are_checked_again_where_it_serves() -> None:
    with pytest.raises(InvalidArgument, match="keyfile"):
        async with serving(certfile="x"):
            pass


# -- the two lanes -------------------------------------------------------------------------------------------------


@pytest.fixture
def full_lanes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What moved connections to the full lane."""
    moved: list[bytes] = []
    take = Connection.take_full_lane

    def note(self: Connection, data: bytes, **options: Any) -> None:
        moved.append(data)
        take(self, data, **options)

    monkeypatch.setattr(Connection, "take_full_lane", note)
    return moved


ORDINARY = [
    b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /a%20b?c=d%20e HTTP/1.1\r\nHost:x\r\nX-Empty:\r\nX-Spaces: \t a b \t \r\nX-High: \xe4\r\n\r\n",
    b"HEAD /a HTTP/1.1\r\nhost: x\r\nconnection: keep-alive\r\n\r\n",
    b"OPTIONS /a HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc",
    b"PUT /a HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
    b"GET /raise HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /a HTTP/1.1\r\nhost: x\r\ncookie: a=b\r\ncookie: c=d\r\n\r\n",
]
NOT_ORDINARY = [
    b"GET / HTTP/1.0\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nhost: x\r\n\r\n",
    b"GET / HTTP/2.0\r\nhost: x\r\n\r\n",
    b"get / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET  / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /\xe4 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET http://x/a HTTP/1.1\r\nhost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost : x\r\n\r\n",
    b"GET / HTTP/1.1\r\n host: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\na: b\x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\na: b\rc: d\r\n\r\n",
    b"GET / HTTP/1.1\nhost: x\n\n",
    b"GET / HTTP/1.1\r\nhost: x\r\na\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3, 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: +3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length:\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\nTransfer-Encoding : chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nt: v\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nconnection: foo, close\r\n\r\n",
]


CLOSING = b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


async def converse(data: bytes, *pieces: bytes) -> tuple[list[Any], list[str]]:
    """Send raw bytes, then a last request; returns what the application saw and the answers without their dates."""
    async with serving() as server:
        reader, writer = await server.connect()
        for piece in pieces or (data,):
            writer.write(piece)
            await writer.drain()
            if pieces:
                await asyncio.sleep(0)
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        try:
            answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        except ConnectionError:
            answer = b""
        writer.close()
        seen = [
            {key: scope[key] for key in ("method", "path", "raw_path", "query_string", "headers", "http_version")}
            for scope in server.app.scopes
        ]
        # the lanes write headers in another order, and hypercorn no reason after the status
        lines = answer.decode("latin-1").replace(" OK\r\n", " \r\n").lower().split("\r\n")
        return seen, sorted(line for line in lines if not line.startswith(("date:", "connection:")))


@pytest.mark.parametrize("data", ORDINARY)
async def test_ordinary_requests_stay_in_the_plain_lane(data: bytes, full_lanes: list[bytes]) -> None:
    plain = await converse(data)
    assert full_lanes == []
    assert [scope["path"] for scope in plain[0]][1:] == ["/last"] or b"/raise" in data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainLane, "data", lambda self, data: self.connection.take_full_lane(data))
        full = await converse(data)
    assert full_lanes
    assert plain[0][0] == full[0][0]
    if b"/raise" not in data:
        assert plain == full


@pytest.mark.parametrize("data", NOT_ORDINARY)
async def test_all_others_are_served_by_hypercorn_from_their_first_byte_on(
    data: bytes, full_lanes: list[bytes]
) -> None:
    plain = await converse(data)
    assert len(full_lanes) == 1 and full_lanes[0].startswith(data[:10])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainLane, "data", lambda self, data: self.connection.take_full_lane(data))
        assert await converse(data) == plain


async def test_tunnels_are_hypercorns_business(full_lanes: list[bytes]) -> None:
    await converse(b"CONNECT /a HTTP/1.1\r\nhost: x\r\n\r\n")
    assert len(full_lanes) == 1


async def test_a_client_that_leaves_with_a_request_ahead_is_noticed() -> None:
    async with serving() as server:
        _, writer = await server.connect()
        chunked = b"POST /listen HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        writer.write(chunked + ORDINARY[0])
        await server.app.started.get()
        writer.close()
        assert await asyncio.wait_for(server.app.left.get(), PATIENCE_S) == "/listen"


@pytest.mark.parametrize("data", [ORDINARY[1], ORDINARY[4], NOT_ORDINARY[25]])
async def test_requests_may_arrive_byte_by_byte(data: bytes) -> None:
    whole = await converse(data)
    assert await converse(data, *(data[position : position + 1] for position in range(len(data)))) == whole


async def test_a_connection_changes_lanes_between_requests(full_lanes: list[bytes]) -> None:
    chunked = b"POST /b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nb\r\n0\r\n\r\n"
    seen, _ = await converse(ORDINARY[4] + chunked + ORDINARY[0])
    assert [scope["path"] for scope in seen] == ["/a", "/b", "/", "/last"]
    assert len(full_lanes) == 1


async def test_many_pipelined_requests() -> None:
    async with serving() as server:
        count = 3000  # more bytes than are read ahead
        data = ORDINARY[4] * count + b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        answer = await exchange(server, data)
    assert answer.count(b"HTTP/1.1 200") == count + 1
    assert len(server.app.scopes) == count + 1


async def test_a_stream_that_began_before_the_stop_ends_its_connection(browser: Client) -> None:
    async with serving() as server, browser() as client:
        async with client.stream("GET", server.url + "/stream") as response:
            parts = response.aiter_raw()
            assert await parts.__anext__() == b"0"
            server.stop.set()
            await asyncio.sleep(0)
            server.app.may_answer.set()
            assert b"".join([part async for part in parts]) == b"12"
        await server.ended()


async def test_a_connection_serves_a_bounded_number_of_requests() -> None:
    async with serving(keep_alive_max_requests=2) as server:
        answer = await exchange(server, ORDINARY[0] * 5)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.lower().count(b"connection: close") == 1


async def test_an_early_answer_lets_a_client_finish_its_body() -> None:
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc")
        answer = await reader.readuntil(b"early")
        assert b"413" in answer and b"connection: close" in answer
        writer.write(b"0123456")
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()


async def raw_answer(*messages: dict[str, Any]) -> bytes:
    """What a client gets when an application sends these messages."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/":
            for message in messages:
                await send({**message, "type": f"http.response.{message['type']}"})

    app.may_answer = asyncio.Event()  # type: ignore[attr-defined]
    async with serving(app) as server:  # type: ignore[arg-type]
        return await exchange(server, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")


START: dict[str, Any] = {"type": "start", "status": 200, "headers": []}
BODY: dict[str, Any] = {"type": "body", "body": b"abc"}


@pytest.mark.parametrize(
    ("messages", "begins", "ends"),
    [
        ([START, BODY], b"HTTP/1.1 200 OK\r\n", b"content-length: 3\r\nconnection: close\r\n\r\nabc"),
        ([START, {"type": "body"}], b"HTTP/1.1 200 OK\r\n", b"content-length: 0\r\nconnection: close\r\n\r\n"),
        ([{**START, "status": 299}, BODY], b"HTTP/1.1 299 \r\n", b"\r\n\r\nabc"),
        ([{**START, "status": 304}, BODY], b"HTTP/1.1 304 Not Modified\r\n", b"connection: close\r\n\r\n"),
        (
            [{**START, "status": 204, "headers": [(b"content-length", b"0")]}, {"type": "body"}],
            b"HTTP/1.1 204 No Content\r\ndate",
            b"connection: close\r\n\r\n",
        ),
        (
            [{**START, "headers": [(b"Transfer-Encoding", b"x"), (b"Connection", b"x"), (b"A", b"b")]}, BODY],
            b"HTTP/1.1 200 OK\r\nA: b\r\ndate",
            b"content-length: 3\r\nconnection: close\r\n\r\nabc",
        ),
        ([START, {**BODY, "body": memoryview(b"x" * 70_000)}], b"HTTP/1.1 200 OK\r\n", b"x" * 70_000),
        (
            [START, {**BODY, "more_body": True}, {"type": "body"}],
            b"HTTP/1.1 200 OK\r\n",
            b"chunked\r\nconnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ),
        ([START, BODY, BODY], b"HTTP/1.1 200 OK\r\n", b"\r\n\r\nabc"),
        ([{**START, "status": 103}], b"HTTP/1.1 500", b"content-length: 0\r\nconnection: close\r\n\r\n"),
        ([{**START, "headers": [(b"a", b"b\r\nc: d")]}, BODY], b"HTTP/1.1 500", b"\r\n\r\n"),
        ([{**START, "headers": [(b"a b", b"c")]}, BODY], b"HTTP/1.1 500", b"\r\n\r\n"),
        ([{**START, "headers": [(b"a", b"b\x00")]}, BODY], b"HTTP/1.1 500", b"\r\n\r\n"),
        ([{**START, "headers": [(b"content-length", b"2")]}, BODY], b"HTTP/1.1 500", b"\r\n\r\n"),
        ([{**START, "headers": [(b"content-length", b"4")]}, BODY], b"HTTP/1.1 500", b"\r\n\r\n"),
        (
            [{**START, "headers": [(b"content-length", b"4")]}, {**BODY, "more_body": True}, BODY],
            b"HTTP/1.1 200",
            b"\r\n\r\nabc",
        ),
        ([BODY], b"HTTP/1.1 500", b"\r\n\r\n"),
        ([START, START, BODY], b"HTTP/1.1 500", b"\r\n\r\n"),
        ([{"type": "push"}], b"HTTP/1.1 500", b"\r\n\r\n"),
        ([START], b"HTTP/1.1 500", b"\r\n\r\n"),
        ([], b"HTTP/1.1 500", b"\r\n\r\n"),
    ],
)
async def test_what_applications_send(messages: list[dict[str, Any]], begins: bytes, ends: bytes) -> None:
    answer = await raw_answer(*messages)
    assert answer.startswith(begins)
    assert answer.endswith(ends)


async def test_access_log(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with serving(accesslog=str(path), access_log_format="%(m)s %(U)s %(s)s %(b)s") as server:
        async with httpx.AsyncClient() as client:
            await client.get(server.url + "/a")
        async with httpx.AsyncClient(http1=False, http2=True) as client:
            await client.get(server.url + "/b")
    import logging

    logger = logging.getLogger("hypercorn.access")
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    assert [line.partition("[INFO] ")[2] for line in path.read_text().splitlines()] == ["GET /a 200 5", "GET /b 200 5"]


async def test_the_full_lane_is_imported_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = asyncio.Event()
    monkeypatch.setattr(server_module, "_IMPORT_AFTER_S", 0.0)
    monkeypatch.setattr(server_module, "_import_full_lane_aside", imported.set)
    async with serving():
        await asyncio.wait_for(imported.wait(), PATIENCE_S)


def test_plain_serving_imports_no_protocols() -> None:
    program = (
        "import sys, engine_http, engine_http.connections, engine_http.plain, engine_http.settings, hypercorn.config\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'h11', 'h2', 'wsproto', 'starlette', 'priority'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
