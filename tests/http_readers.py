"""Who reads the bytes of an HTTP/1.1 client, and what each makes of them: this project's front, h11 and llhttp.

The front is fed without a socket, so that thousands of conversations take seconds, and piece by piece: the next piece
comes when nothing of the last is left to be done.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from typing import Any

import h11
import httptools

from engine.config import HTTPOptions
from engine_http.connection import Connection
from engine_http.connections import Connections
from engine_http.server_context import ServerContext
from engine_http.settings import build_config

__all__ = ["Conversation", "Front", "Message", "h11_reads", "llhttp_reads"]

Headers = list[tuple[bytes, bytes]]


@dataclass
class Message:
    """A request as somebody understood it."""

    method: bytes
    target: bytes
    headers: Headers
    version: bytes
    body: bytes = b""
    complete: bool = False


@dataclass
class Conversation:
    """What came of the bytes of one client.

    Attributes:
        messages: The requests; the last one may be incomplete.
        refused: Why the rest was no HTTP, if it was not.
        closes: Whether nothing that follows is taken for a request.
        switched: Whether the rest is another protocol's.
        streams: What was understood of it as requests of HTTP/2.
        written: The answers.
    """

    messages: list[Message] = field(default_factory=list)
    refused: str | None = None
    closes: bool = False
    switched: bool = False
    streams: list[Message] = field(default_factory=list)
    written: bytes = b""


# -- this project's front ------------------------------------------------------------------------------------------


class FakeTransport(asyncio.Transport):
    """A transport whose client takes everything at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol, sock: socket.socket) -> None:
        super().__init__({"socket": sock, "peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self._loop = loop
        self._protocol = protocol
        self.written = bytearray()
        self.closed = False
        self.paused = False

    def write(self, data: Any) -> None:
        assert not self.closed, "something was written after the end"
        self.written += data

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Front:
    """The server's connections, on a loop that only runs while a conversation goes on."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._sock = socket.socket()
        self.failures: list[str] = []
        self._loop.set_exception_handler(lambda _, context: self.failures.append(repr(context)))

    def close(self) -> None:
        """Free what it holds."""
        self._loop.close()
        self._sock.close()

    def reads(self, pieces: tuple[bytes, ...], answers: str = "after the body") -> Conversation:
        """Feed one connection piece by piece, and hang up."""
        return self._loop.run_until_complete(self._converse(pieces, answers))

    async def _converse(self, pieces: tuple[bytes, ...], answers: str) -> Conversation:
        app = _App(answers)
        connections = Connections(ServerContext(app, build_config(HTTPOptions()), self._loop))
        connection = connections.accept()
        transport = FakeTransport(self._loop, connection, self._sock)
        connection.connection_made(transport)
        for piece in pieces:
            if not transport.closed:
                connection.data_received(piece)
                await self._settle()
        app.may_answer.set()
        await self._settle()
        closes = transport.closed
        connection.eof_received()
        await self._settle()
        await connections.break_off(1.0)
        await self._settle()
        self._check_nothing_left(connection)
        return Conversation(
            app.messages, closes=closes, switched=app.switched, streams=app.streams, written=bytes(transport.written)
        )

    async def _settle(self) -> None:
        loop: Any = self._loop
        while loop._ready:  # noqa: ASYNC110 (nothing says that nothing is left to be done)
            await asyncio.sleep(0)

    def _check_nothing_left(self, connection: Connection) -> None:
        assert not connection._tasks, "a task outlived its connection"
        assert not self.failures, self.failures


class _App:
    def __init__(self, answers: str) -> None:
        self._answers = answers
        self.messages: list[Message] = []
        self.streams: list[Message] = []
        self.switched = False
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket" or scope["http_version"] == "2":
            self.switched = True
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
            return
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        message = Message(scope["method"].encode(), target, list(scope["headers"]), scope["http_version"].encode())
        (self.streams if self.switched else self.messages).append(message)
        if self._answers == "before the body":
            await self._answer(send)
        if self._answers == "at the end":
            await self.may_answer.wait()
        more = True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            message.body += event["body"]
            more = event["more_body"]
        message.complete = True
        if self._answers != "before the body":
            await self._answer(send)

    async def _answer(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


# -- the others ----------------------------------------------------------------------------------------------------


def h11_reads(pieces: tuple[bytes, ...], limit: int = 16 * 1024) -> Conversation:
    """What h11 makes of it as a server that answers each request once it is complete."""
    found = Conversation()
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=limit)
    try:
        for piece in pieces:
            connection.receive_data(piece)
            while not found.closes and not found.switched:
                event = connection.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    break
                _take(event, connection, found)
    except h11.RemoteProtocolError as error:
        found.refused = str(error)
        found.closes = True
    return found


def _take(event: Any, connection: h11.Connection, found: Conversation) -> None:
    if isinstance(event, h11.Request):
        found.messages.append(Message(event.method, event.target, list(event.headers), event.http_version))
    elif isinstance(event, h11.Data):
        found.messages[-1].body += bytes(event.data)
    elif isinstance(event, h11.EndOfMessage):
        found.messages[-1].complete = True
        connection.send(h11.Response(status_code=404, headers=[(b"content-length", b"0")]))  # also to CONNECT
        connection.send(h11.EndOfMessage())
        if connection.our_state is h11.MUST_CLOSE or connection.their_state is h11.MUST_CLOSE:
            found.closes = True
        else:
            connection.start_next_cycle()


class _Llhttp:
    """The callbacks of httptools, which wraps llhttp."""

    def __init__(self) -> None:
        self.found = Conversation()
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: Headers = []

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        version = self._parser.get_http_version().encode()
        self.found.messages.append(Message(self._parser.get_method(), self._url, self._headers, version))
        self._headers = []  # what follows the body is no header

    def on_body(self, body: bytes) -> None:
        self.found.messages[-1].body += body

    def on_message_complete(self) -> None:
        self.found.messages[-1].complete = True

    def reads(self, pieces: tuple[bytes, ...]) -> Conversation:
        try:
            for piece in pieces:
                self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self.found.switched = True
        except httptools.HttpParserError as error:
            self.found.refused = str(error)
            self.found.closes = True
        return self.found


def llhttp_reads(pieces: tuple[bytes, ...]) -> Conversation:
    """What llhttp makes of it at its strictest, which is its default."""
    return _Llhttp().reads(pieces)
