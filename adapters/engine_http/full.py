"""The full lane: hypercorn's protocols on one connection.

Hypercorn's objects are fed by one task per connection, so they see one event at a time. What is written in one go
leaves in one write. An application never waits for a client that sends a body nobody reads, and always hears that its
client left: hypercorn's own queue would make it wait for both.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h11
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, Data, EndBody, EndData, Response, StreamClosed, Trailers
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, H2Protocol
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol
from hypercorn.typing import ConnectionState

from engine.seam.ingress_server import ASGIApp, StreamBroken
from engine.seam.log import Log

from .lane import IN_HOST, READ_AHEAD

if TYPE_CHECKING:
    from hypercorn.config import Config

    from .connection import Connection

__all__ = ["FullLane"]

log = Log("engine.http")

_ABSOLUTE = re.compile(rb"https?://([^/?#]+)(.*)", re.IGNORECASE)
_TARGET = re.compile(rb"/|https?://[^/?#]", re.IGNORECASE)
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Z-]+")
_PATH = re.compile(rb"/[\x21-\x7e]*")
_RESETS = 500
_RESETS_PER_S = 50.0
_WRITE_AT_ONCE = 64 * 1024
"""More than this is not held back to join it with what follows."""


class FullLane:
    """Serves everything hypercorn can.

    Args:
        connection: The connection.
        http2: It chose HTTP/2 already.
    """

    def __init__(self, connection: Connection, *, http2: bool) -> None:
        self._connection = connection
        self._inbox: collections.deque[bytes] = collections.deque()
        self._inbox_bytes = 0
        self._task: asyncio.Task[Any] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._outbox: list[bytes] = []
        self._outbox_bytes = 0
        self._flush_handle: asyncio.Handle | None = None
        context = connection.context
        # hypercorn wants its own wrapper of an application, which only its own task group looks at
        self._args: list[Any] = [
            context.app,
            context.config,
            context.hypercorn,
            _Tasks(connection, context.app),
            ConnectionState({}),
            connection.tls is not None,
            connection.client,
            connection.server,
            self._send,
        ]
        self._protocol: _H1 | _H2 = _H2(*self._args) if http2 else _H1(*self._args)

    def data(self, data: bytes) -> None:
        """See `engine_http.lane.Lane.data`."""
        self._inbox.append(data)
        self._inbox_bytes += len(data)
        if self._inbox_bytes > READ_AHEAD:
            self._connection.pause_reading()
        self._wake()

    def ended(self) -> None:
        """See `engine_http.lane.Lane.ended`."""
        self._outbox.clear()
        # whatever hypercorn waits for in the middle of an event, it waits in vain
        if self._task is not None:
            self._task.cancel()

    def farewell(self) -> None:
        """See `engine_http.lane.Lane.farewell`: over HTTP/2, the client then knows what was not begun."""
        protocol = getattr(self, "_protocol", None)  # it has ended, with all that there was to say
        if isinstance(protocol, _H2):
            self._outbox.append(protocol.last_words())
        self.flush()

    def flush(self) -> None:
        """Write what was held back."""
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        if self._outbox:
            data = self._outbox[0] if len(self._outbox) == 1 else b"".join(self._outbox)
            self._outbox.clear()
            self._outbox_bytes = 0
            self._connection.write(data)

    async def serve(self) -> None:
        """Feed hypercorn until the client is gone."""
        connection = self._connection
        self._task = asyncio.current_task()
        try:
            if connection.context.stopping:
                await connection.context.hypercorn.terminated.set()
            await self._protocol.initiate()
            while not connection.closing:
                if self._inbox:
                    data = self._inbox.popleft()
                    self._inbox_bytes -= len(data)
                    await self._handle(data)
                else:
                    connection.resume_reading()
                    self._waiter = connection.loop.create_future()
                    await self._waiter
        except asyncio.CancelledError:
            if not connection.closing:
                raise
        finally:
            try:
                await self._protocol.handle(Closed())
            finally:
                del self._protocol  # which knows this lane, too: they would keep each other in memory
                self._args.clear()

    async def _handle(self, data: bytes) -> None:
        try:
            await self._protocol.handle(RawData(data))
        except H2ProtocolAssumedError as change:
            self._protocol = _H2(*self._args)
            await self._protocol.initiate()
            if change.data:
                await self._protocol.handle(RawData(change.data))
        except H2CProtocolRequiredError as change:
            self._protocol = _H2(*self._args)
            await self._protocol.initiate(change.headers, change.settings)
            if change.data:
                await self._protocol.handle(RawData(change.data))

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _send(self, event: Event) -> None:
        connection = self._connection
        if isinstance(event, RawData):
            if event.data and not connection.closing:
                self._outbox.append(event.data)
                self._outbox_bytes += len(event.data)
                if self._outbox_bytes >= _WRITE_AT_ONCE:
                    self.flush()
                elif self._flush_handle is None:
                    self._flush_handle = connection.loop.call_soon(self.flush)
                if connection.congested:
                    await connection.drain()
        elif isinstance(event, Updated):
            connection.set_idle(event.idle)
            if event.idle:
                self.flush()
                if connection.context.stopping and not self._inbox:
                    connection.close()
        elif isinstance(event, Closed):
            connection.close()


# -- calls of the application --------------------------------------------------------------------------------------


class _Inbox:
    """What an application receives for one request: bounded, but neither its end nor the client's leaving waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: collections.deque[Any] = collections.deque()
        self._bytes = 0
        self._gone = False
        self._over = False
        self._getter: asyncio.Future[None] | None = None
        self._putter: asyncio.Future[None] | None = None

    async def put(self, message: Any) -> None:
        """Hand a message to the application; waits while it has more than enough to read."""
        if self._over:
            return
        if message["type"] == "http.disconnect":
            self._gone = True
            self._wake_putter()
        else:
            self._messages.append(message)
            self._bytes += len(message.get("body", b""))
        if self._getter is not None and not self._getter.done():
            self._getter.set_result(None)
        while self._bytes > READ_AHEAD and not self._over and not self._gone:
            self._putter = self._loop.create_future()
            await self._putter

    async def get(self) -> Any:
        """The application's ``receive``."""
        while not self._messages:
            if self._gone:
                return {"type": "http.disconnect"}
            self._getter = self._loop.create_future()
            await self._getter
        message = self._messages.popleft()
        self._bytes -= len(message.get("body", b""))
        self._wake_putter()
        return message

    def close(self) -> None:
        """The application has ended: what comes now is dropped."""
        self._over = True
        self._messages.clear()
        self._wake_putter()

    def _wake_putter(self) -> None:
        if self._putter is not None and not self._putter.done():
            self._putter.set_result(None)


class _Tasks:
    """What hypercorn's protocols know as their task group."""

    def __init__(self, connection: Connection, app: ASGIApp) -> None:
        self._connection = connection
        self._app = app
        self.loop = connection.loop
        self.stall_timeout_s = connection.context.stall_timeout_s

    @property
    def congested(self) -> bool:
        """See `Connection.congested`."""
        return self._connection.congested

    @property
    def requests(self) -> int:
        """See `Connection.requests`."""
        return self._connection.requests

    async def spawn_app(
        self, app: Any, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        """Run the application for one request; returns what its messages are put into."""
        inbox = _Inbox(self._connection.loop)
        self._connection.requests += 1
        self._connection.spawn(self._run(scope, inbox, send))
        return inbox.put

    def spawn(self, function: Callable[..., Any], *args: Any) -> None:
        """Run a part of the protocol."""
        self._connection.spawn(function(*args))

    async def _run(self, scope: Any, inbox: _Inbox, send: Callable[[Any], Awaitable[None]]) -> None:
        try:
            await self._app(scope, inbox.get, send)
        except StreamBroken:
            pass  # who raised it has said why
        except Exception:
            log.exception("the application failed")
        finally:
            inbox.close()
            await send(None)


# -- protocols -----------------------------------------------------------------------------------------------------


def refusal(request: h11.Request, max_head_bytes: int) -> int | None:
    """The status to refuse a request with whose head h11 takes and we do not, or None."""
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    if size > max_head_bytes:  # which h11 only asks of heads that are not complete
        return 431
    if not request.http_version.startswith(b"1."):
        return 505
    # a method is not the one that it would be in capitals: whoever filters requests by method has let another one pass
    if request.method in (b"CONNECT", b"PRI") or request.method != request.method.upper():
        return 501
    if _TARGET.match(request.target) is None and (request.method, request.target) != (b"OPTIONS", b"*"):
        return 400
    absolute = _ABSOLUTE.match(request.target)
    hosts = [value for name, value in request.headers if name == b"host"]
    if absolute is not None:
        hosts.append(absolute[1])
    return 400 if b"".join(hosts).translate(None, IN_HOST) else None


def refusal_of_stream(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The status to refuse a request of HTTP/2 with that h2 takes, by the rules of `refusal`; or None."""
    pseudo = {name: value for name, value in headers if name.startswith(b":")}
    method, path = pseudo[b":method"], pseudo.get(b":path", b"")
    if _METHOD.fullmatch(method) is None or (method == b"CONNECT" and b":protocol" not in pseudo):
        return 501
    if _PATH.fullmatch(path) is None and (method, path) != (b"OPTIONS", b"*"):
        return 400
    hosts = b"".join(value for name, value in headers if name in (b":authority", b"host"))
    return 400 if hosts.translate(None, IN_HOST) else None


def asks_for_http2(request: h11.Request, *, after: int, tls: bool) -> bool:
    """Whether a request is how a client changes to HTTP/2 on a connection on which it began requests ``after``.

    Hypercorn would change whenever it finds ``upgrade: h2c``, also where a proxy that knows nothing of it has passed
    that on: the proxy would take what follows for HTTP/1.1 (RFC 7540, 3.2; RFC 9110, 7.8).
    """
    if request.method == b"PRI":
        return not after and not request.headers
    found: dict[bytes, list[bytes]] = {}
    for name, value in request.headers:
        found.setdefault(name, []).append(value)
    tokens = {token.strip() for token in b",".join(found.get(b"connection", ())).lower().split(b",")}
    settings = found.get(b"http2-settings", ())
    return (
        not tls
        and request.http_version == b"1.1"
        and {b"upgrade", b"http2-settings"} <= tokens
        and len(settings) == 1
        and _are_settings(settings[0])
    )


def _are_settings(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value + b"=" * (-len(value) % 4), b"-_", validate=True)) % 6 == 0
    except ValueError:
        return False


class _Reader(h11.Connection):
    """An h11 that takes what follows the last request of a connection for nothing (RFC 9112, 9.6).

    Its own calls that an error, for which hypercorn refuses the last request while the application is at it.
    """

    def receive_data(self, data: bytes) -> None:
        if self.their_state is not h11.MUST_CLOSE:
            super().receive_data(data)

    def next_event(self) -> Any:
        return h11.NEED_DATA if self.their_state is h11.MUST_CLOSE else super().next_event()


class _H1(H11Protocol):
    """Hypercorn's HTTP/1.1, which tells clients when it is going to close, and serves targets as proxies get them.

    A request with both framings may have been smuggled past a proxy that took the other one: chunks count, its length
    is dropped, and nothing that follows on the connection is taken for a request (RFC 9112, 6.1).
    """

    _framed_twice = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connection = _Reader(h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size)

    async def _check_protocol(self, event: h11.Request) -> None:
        if asks_for_http2(event, after=self.task_group.requests, tls=self.ssl):  # type: ignore[attr-defined]
            await super()._check_protocol(event)

    async def _create_stream(self, request: h11.Request) -> None:
        status = refusal(request, self.config.h11_max_incomplete_size)
        if status is not None:
            await self._send_error_response(status)
            await self.send(Closed())
            return
        names = {name for name, _ in request.headers}
        if b"transfer-encoding" in names and b"content-length" in names:
            self._framed_twice = True
            request = h11.Request(
                method=request.method,
                headers=[
                    (name, value) for name, value in request.headers.raw_items() if name.lower() != b"content-length"
                ],
                target=request.target,
                http_version=request.http_version,
            )
        absolute = _ABSOLUTE.match(request.target)
        if absolute is not None:
            authority, target = absolute.groups()
            headers = [(name, value) for name, value in request.headers.raw_items() if name.lower() != b"host"]
            request = h11.Request(
                method=request.method,
                headers=[(b"host", authority), *headers],  # it counts more than the header, says RFC 9112
                target=target if target.startswith(b"/") else b"/" + target,
                http_version=request.http_version,
            )
        await super()._create_stream(request)
        if self.stream is not None and self.stream.closed:  # refused because of its host
            await self._maybe_recycle()

    async def stream_send(self, event: StreamEvent) -> None:
        closing = self._framed_twice or self.context.terminated.is_set()
        if isinstance(event, Response) and event.status_code >= 200 and closing:
            headers = [*event.headers, (b"connection", b"close")]
            event = Response(stream_id=event.stream_id, headers=headers, status_code=event.status_code)
        await super().stream_send(event)


class Allowance:
    """So much at once, and then so much in a second: a token bucket.

    Args:
        most: At once.
        per_s: After that.
        now: The time, which does not go back.
    """

    def __init__(self, most: int, per_s: float, now: float) -> None:
        self._most = most
        self._per_s = per_s
        self._left = float(most)
        self._at = now

    def take(self, now: float) -> bool:
        """Take one; False if none is left."""
        self._left = min(self._most, self._left + (now - self._at) * self._per_s) - 1
        self._at = now
        return self._left >= 0


class _H2(H2Protocol):
    """Hypercorn's HTTP/2, which resets a stream that broke off and survives a body that nobody reads.

    A client that opens streams and has them reset, by itself or by doing on them what is not allowed, makes work that
    the number of open streams does not bound: it may do so `_RESETS` times at once, and `_RESETS_PER_S` in a second.
    Its wishes for priorities are not heard (RFC 9113, 5.3.2), since they would let it fill the tree of streams.

    An application that sends waits until the stream's buffer has room again: hypercorn's own goes on as soon as the
    client's flow-control window is used up. It is let go when the client leaves, which hypercorn's own forgets: when
    the connection ends, and when a stream is reset whose window is used up.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        loop: Any = self.task_group.loop  # type: ignore[attr-defined]
        self._clock: Callable[[], float] = loop.time
        self._resets = Allowance(_RESETS, _RESETS_PER_S, self._clock())

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, StreamClosed):
            buffer = self.stream_buffers.get(event.stream_id)
            if buffer is not None and not buffer._complete:
                await self._discard(event.stream_id)
                try:
                    self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
                except h2.exceptions.ProtocolError:
                    pass  # the client was faster
                await self._flush()
        if not isinstance(event, (Body, Data, EndBody, EndData, Trailers)):
            await super().stream_send(event)
            return
        buffer = self.stream_buffers.get(event.stream_id)
        watch = _WindowWatch(self, event.stream_id, buffer.buffer if buffer is not None else b"")
        try:
            await super().stream_send(event)
            if isinstance(event, (Body, Data)):  # the others wait until there is nothing left
                await self._has_room(event.stream_id)
        finally:
            watch.stop()

    async def _has_room(self, stream_id: int) -> None:
        # The sending task takes from a buffer until there is nothing to take, because it or the window is empty, and
        # sets `_paused` then; closing the buffer sets it, too. Who waits looks at the buffer after having cleared it.
        buffer = self.stream_buffers.get(stream_id)
        while buffer is not None and len(buffer.buffer) >= BUFFER_HIGH_WATER and not buffer._complete:
            await buffer._paused.wait()
            await buffer._paused.clear()

    def last_words(self) -> bytes:
        """What says up to which stream the client was heard; nothing where one side has said that it ends."""
        if self.connection.state_machine.state is not h2.connection.ConnectionState.CLOSED:
            self.connection.close_connection()
        return self.connection.data_to_send()

    async def let_go(self, stream_id: int) -> None:
        """Reset a stream of which the client takes nothing."""
        try:
            self.connection.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
        except h2.exceptions.ProtocolError:
            pass  # the client was faster
        await self._handle_events([h2.events.StreamReset(stream_id=stream_id)])

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                # answered before its body was complete
                self.connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
                await self._flush()
            elif not isinstance(event, h2.events.PriorityUpdated):
                if isinstance(event, h2.events.StreamReset):
                    await self._discard(event.stream_id)
                    if not self._resets.take(self._clock()):
                        self.connection.close_connection(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
                        await self._flush()
                        await self.send(Closed())
                        return
                await super()._handle_events([event])
                if isinstance(event, (h2.events.RequestReceived, h2.events.StreamReset)):
                    await self._note_end(event.stream_id)

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        status = refusal_of_stream(request.headers)
        if status is None:
            await super()._create_stream(request)
            return
        stream_id = request.stream_id
        headers = [(b":status", b"%d" % status), (b"content-length", b"0"), *self.config.response_headers("h2")]
        with contextlib.suppress(h2.exceptions.ProtocolError):  # what came with the request has ended its stream
            self.connection.send_headers(stream_id, headers, end_stream=True)
            if request.stream_ended is None:  # it need not send its body
                self.connection.reset_stream(stream_id, h2.errors.ErrorCodes.NO_ERROR)
        await self._flush()

    async def _note_end(self, stream_id: int | None) -> None:
        # Hypercorn's own keeps what it refused because of its host, and takes a connection for idle after answers only:
        # it would be waited for when the server stops, and never make room for another one.
        stream = self.streams.get(stream_id or 0)
        if stream is not None and stream.closed:
            await self._close_stream(stream.stream_id)
        if self.idle:
            await self.send(Updated(idle=True))

    async def _discard(self, stream_id: int) -> None:
        """Drop what was still to be sent on a stream; the sending task then finds it complete, and forgets it."""
        buffer = self.stream_buffers.get(stream_id)
        if buffer is not None:
            await buffer.close()
            self.priority.unblock(stream_id)
            await self.has_data.set()


class _WindowWatch:
    """Looks after one wait for a client that opens no window: its connection may be busy with other streams.

    Args:
        protocol: Of the connection.
        stream_id: Of the stream on which an application sends.
        buffer: What is still to be sent there; nothing is added meanwhile.
    """

    def __init__(self, protocol: _H2, stream_id: int, buffer: Sized) -> None:
        self._protocol = protocol
        self._stream_id = stream_id
        self._buffer = buffer
        self._timer: asyncio.TimerHandle | None = None
        tasks: Any = protocol.task_group
        if tasks.stall_timeout_s is not None:
            self._timer = tasks.loop.call_later(tasks.stall_timeout_s, self._look, None)

    def stop(self) -> None:
        """The wait is over (idempotent)."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _look(self, size: int | None) -> None:
        tasks: Any = self._protocol.task_group
        # while the connection waits for its client, no stream gets on: it is looked after by itself
        left = None if tasks.congested else len(self._buffer)
        if left is not None and left == size:
            tasks.spawn(self._protocol.let_go, self._stream_id)
        else:
            self._timer = tasks.loop.call_later(tasks.stall_timeout_s, self._look, left)
