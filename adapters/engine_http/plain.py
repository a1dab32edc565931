r"""The plain lane: ordinary HTTP/1.1 requests, at a fraction of what the full generality costs.

Ordinary is ``METHOD /path HTTP/1.1`` with one host, well-formed header lines, and a body of announced length or none.
One regular expression, which matches in linear time, says whether a head is that. Whatever it does not match goes to
the full lane from its first byte on, which serves it or says what is wrong with it; so nothing is interpreted here that
could be understood in two ways. An answer leaves in one write.

A request is served by a `Cycle`, one at a time; what the client sends ahead waits.
"""

from __future__ import annotations

import asyncio
import http
import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from engine.seam.ingress_server import StreamBroken
from engine.seam.log import Log

from .lane import IN_HOST, READ_AHEAD

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["PlainLane"]

log = Log("engine.http")

_FIELD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n"
_HEAD = re.compile(rb"([A-Z]{1,20}) (/[\x21-\x7e]*) HTTP/1\.1\r\n((?:" + _FIELD + rb")+)\r\n")
_FIELDS = re.compile(rb"(?:" + _FIELD + rb")*")
_PAIR = re.compile(rb"([^:]+):([^\r]*)\r\n")
_LENGTH = re.compile(rb"[0-9]{1,15}")

_NOT_PLAIN_METHODS = frozenset((b"CONNECT", b"PRI"))
_NOT_PLAIN = frozenset((b"transfer-encoding", b"upgrade", b"expect", b"http2-settings"))
_LINGER_S = 2.0
"""How long a client that was answered early may take to send the rest of its body and to read its answer."""
_JOIN_UP_TO = 64 * 1024
_ASGI = {"spec_version": "2.1", "version": "3.0"}

_status_lines: dict[int, bytes] = {}


class PlainLane:
    """Serves a connection as long as its requests are ordinary.

    Args:
        connection: The connection.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting = b""  # sent by the client, belonging to no request that has begun
        self._cycle: Cycle | None = None
        self._to_discard = 0

    def data(self, data: bytes) -> None:
        """See `engine_http.lane.Lane.data`."""
        cycle = self._cycle
        if cycle is None:
            if self._to_discard:
                self._discard(len(data))
                return
            self._waiting = self._waiting + data if self._waiting else data
            self._begin()
        elif cycle.missing:
            missing = cycle.missing
            if len(data) > missing:
                self._waiting = data[missing:]
                data = data[:missing]
            cycle.feed(data)
        else:
            self._waiting += data
            if len(self._waiting) > READ_AHEAD:
                self._connection.pause_reading()

    def ended(self) -> None:
        """See `engine_http.lane.Lane.ended`."""
        if self._cycle is not None:
            self._cycle.leave()

    def farewell(self) -> None:
        """See `engine_http.lane.Lane.farewell`: nothing is ever held back, and the last answer has said it."""

    def _begin(self) -> None:
        """Begin the next request, if its head is complete."""
        data = self._waiting
        end = data.find(b"\r\n\r\n") + 4
        if end == 3:
            too_long = len(data) > self._connection.context.config.h11_max_incomplete_size
            # a head whose lines end with LF alone may be complete: it must not wait for an end that never comes
            if too_long or not 65 <= data[0] <= 90 or data.count(b"\n") > data.count(b"\r\n"):
                self._connection.take_full_lane(data)
            return
        limit = self._connection.context.config.h11_max_incomplete_size
        matched = _HEAD.fullmatch(data, 0, end) if end <= limit else None
        cycle = Cycle.of(matched, self) if matched is not None else None
        if cycle is None:
            self._connection.take_full_lane(data)
            return
        self._cycle = cycle
        missing = cycle.missing
        if missing:
            self._waiting = data[end + missing :]
            if end < len(data):
                cycle.feed(data[end : end + missing])
        else:
            self._waiting = data[end:]
        connection = self._connection
        connection.requests += 1
        connection.set_idle(False)
        connection.spawn(cycle.run())

    def answered(self, cycle: Cycle) -> None:
        """A cycle wrote its whole answer."""
        connection = self._connection
        self._cycle = None
        if cycle.missing:
            self._to_discard = cycle.missing
            self._waiting = b""
            connection.resume_reading()
            connection.loop.call_later(_LINGER_S, connection.close)
        elif cycle.closes or connection.context.stopping:
            connection.close()
        else:
            connection.set_idle(True)
            connection.resume_reading()
            if self._waiting:
                self._begin()

    def broken(self) -> None:
        """A cycle ended in the middle of its answer: only the connection's end can tell the client."""
        self._cycle = None
        self._connection.close()

    def _discard(self, amount: int) -> None:
        self._to_discard -= amount
        if self._to_discard <= 0:
            self._connection.close()

    @property
    def connection(self) -> Connection:
        """The connection."""
        return self._connection


class Cycle:
    """One request and its answer, as ASGI.

    Attributes:
        missing: Bytes of the body that did not come yet.
        closes: Whether the connection ends with this answer.
    """

    __slots__ = (
        "_answer_left",
        "_began",
        "_body_parts",
        "_body_size",
        "_chunked",
        "_connection",
        "_given",
        "_gone",
        "_head",
        "_headers",
        "_lane",
        "_over",
        "_scope",
        "_status",
        "_waiter",
        "_without_body",
        "_written",
        "closes",
        "missing",
    )

    def __init__(self, lane: PlainLane, scope: dict[str, Any], length: int, closes: bool) -> None:
        self._lane = lane
        self._connection = lane.connection
        self._scope = scope
        self.missing = length
        self.closes = closes
        # the request
        self._body_parts: list[bytes] = []
        self._body_size = 0
        self._given = False  # the application has got the whole body
        self._gone = False  # the client left, or the answer is complete
        self._waiter: asyncio.Future[None] | None = None
        # the answer
        self._status = 0
        self._head: list[bytes] = []
        self._answer_left: int | None = None  # bytes still to be written, where the application said how many
        self._chunked = False
        self._without_body = False
        self._written = False  # something is on the wire
        self._over = False
        self._began = 0.0
        self._headers: list[tuple[bytes, bytes]] = []

    @classmethod
    def of(cls, matched: re.Match[bytes], lane: PlainLane) -> Cycle | None:
        """Make the cycle of a well-formed head, or None if there is something about it that is not ordinary."""
        method, target, fields = matched.groups()
        headers: list[tuple[bytes, bytes]] = []
        hosts = 0
        length: int | None = None
        closes = False
        if method in _NOT_PLAIN_METHODS:
            return None
        for name, value in _PAIR.findall(fields):
            name = name.lower()
            value = value.strip(b" \t")
            headers.append((name, value))
            if name == b"host":
                if value.translate(None, IN_HOST):
                    return None
                hosts += 1
            elif name == b"content-length":
                if length is not None or _LENGTH.fullmatch(value) is None:
                    return None
                length = int(value)
            elif name == b"connection":
                token = value.lower()
                if token == b"close":
                    closes = True
                elif token != b"keep-alive":
                    return None
            elif name in _NOT_PLAIN:
                return None
        if hosts != 1:
            return None
        connection = lane.connection
        config = connection.context.config
        if config.server_names:
            return None
        raw_path, _, query = target.partition(b"?")
        scope = {
            "type": "http",
            "http_version": "1.1",
            "asgi": _ASGI,
            "method": method.decode("ascii"),
            "scheme": "http" if connection.tls is None else "https",
            "path": unquote(raw_path.decode("ascii")),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": config.root_path,
            "headers": headers,
            "client": connection.client,
            "server": connection.server,
            "state": {},
            "extensions": {},
        }
        if connection.requests >= config.keep_alive_max_requests:
            closes = True
        return cls(lane, scope, length or 0, closes)

    async def run(self) -> None:
        """Run the application."""
        if self._connection.context.logs_access:
            self._began = time.time()
        try:
            await self._connection.context.app(self._scope, self.receive, self.send)
        except StreamBroken:
            pass  # who raised it has said why
        except Exception:
            log.exception("the application failed")
        finally:
            if not self._over:
                self._give_up()

    # -- the request -----------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Take a part of the body."""
        self.missing -= len(data)
        if self._over:
            return
        self._body_parts.append(data)
        self._body_size += len(data)
        if self._body_size > READ_AHEAD and self.missing:
            self._connection.pause_reading()
        self._wake()

    def leave(self) -> None:
        """The client is gone."""
        self._gone = True
        self._wake()

    async def receive(self) -> dict[str, Any]:
        """The application's ``receive``."""
        if not self._given:
            while self.missing and not self._body_parts and not self._gone:
                await self._wait()
            if not self._gone or not self.missing:
                parts, self._body_parts = self._body_parts, []
                self._body_size = 0
                self._given = not self.missing
                if not self._given:
                    self._connection.resume_reading()
                body = parts[0] if len(parts) == 1 else b"".join(parts)
                return {"type": "http.request", "body": body, "more_body": not self._given}
        while not self._gone:
            await self._wait()
        return {"type": "http.disconnect"}

    async def _wait(self) -> None:
        if self._waiter is None or self._waiter.done():
            self._waiter = self._connection.loop.create_future()
        await asyncio.shield(self._waiter)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- the answer ------------------------------------------------------------------------------------------------

    async def send(self, message: Any) -> None:
        """The application's ``send``."""
        kind = message["type"]
        if kind == "http.response.body":
            if not self._status or self._over:
                raise RuntimeError("http.response.body was sent before http.response.start or after the last body")
            if self._gone:
                return
            body = message.get("body", b"")
            self._write(body, message.get("more_body", False))
            if self._connection.congested:
                await self._connection.drain()
            if self._over and self._began:
                await self._log_access()
        elif kind == "http.response.start":
            if self._status:
                raise RuntimeError("http.response.start was sent twice")
            self._start(int(message["status"]), message.get("headers", ()))
        else:
            raise RuntimeError(f"an ASGI application cannot send {kind!r} here")

    def _start(self, status: int, headers: Any) -> None:
        lines: list[bytes] = []
        length: int | None = None
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-length":
                length = int(value)
                if status == 204:
                    continue
            elif lower == b"connection":
                if value.strip().lower() == b"close":
                    self.closes = True
                continue
            elif lower == b"transfer-encoding":
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        # a header that smuggles in a line of its own would make one more line than there are headers
        block = b"".join(lines)
        if _FIELDS.fullmatch(block) is None or block.count(b"\r\n") != len(lines):
            raise ValueError("a header of the answer has characters that HTTP does not allow")
        self._status = status
        if self._began:
            self._headers = list(headers)
        self._without_body = self._scope["method"] == "HEAD" or status in (204, 304)
        self._answer_left = length
        self._head = [_status_line(status), block, self._connection.context.common_headers()]

    def _write(self, body: bytes, more: bool) -> None:
        connection = self._connection
        data = b""
        if not self._written:
            data = self._frame(len(body), more)
        if self._without_body:
            body = b""
        elif self._answer_left is not None:
            self._answer_left -= len(body)
            if self._answer_left < 0 or (self._answer_left and not more):
                self._answer_left = None
                raise RuntimeError("the answer's body is not as long as its content-length says")
        elif self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        self._written = True
        if len(body) <= _JOIN_UP_TO:
            data += body
            if data:
                connection.write(data)
        else:
            if data:
                connection.write(data)
            connection.write(bytes(body))
        if not more:
            self._over = self._gone = True
            self._wake()
            self._lane.answered(self)

    def _frame(self, size: int, more: bool) -> bytes:
        """The head, with what says where the body ends."""
        head = self._head
        if self._answer_left is None and not self._without_body:
            if more:
                self._chunked = True
                head.append(b"transfer-encoding: chunked\r\n")
            else:
                self._answer_left = size
                head.append(b"content-length: %d\r\n" % size)
        if self.closes or self.missing or self._connection.context.stopping:
            self.closes = True
            head.append(b"connection: close\r\n")
        head.append(b"\r\n")
        return b"".join(head)

    def _give_up(self) -> None:
        """The application ended before its answer was complete."""
        if self._written or self._gone:
            self._over = self._gone = True
            self._lane.broken()
            return
        self.closes = True
        self._start(500, ())
        self._write(b"", False)

    async def _log_access(self) -> None:
        response: Any = {"status": self._status, "headers": self._headers}
        scope: Any = self._scope
        await self._connection.context.config.log.access(scope, response, time.time() - self._began)


def _status_line(status: int) -> bytes:
    line = _status_lines.get(status)
    if line is None:
        if not 200 <= status <= 999:
            raise ValueError(f"{status} is not the status of an answer")
        try:
            phrase = http.HTTPStatus(status).phrase
        except ValueError:
            phrase = ""
        line = _status_lines[status] = f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")
    return line
