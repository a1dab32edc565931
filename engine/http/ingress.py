"""The ingress: an ASGI application that turns HTTP requests into the calls that handles make.

Owns no connection and no routing: the server in front of it owns the first, the `Client` it is given the
second. It answers every request exactly once, or breaks the connection when an answer broke off in the middle. When the
client leaves, the call is cancelled. Runs on one asyncio loop at a time; no request waits for another one. Starlette is
not needed to serve a request, so it is not imported.

    server ──► ErrorGuard ──► middlewares ──► Ingress ──► caller.submit ═══► replica
                                                 ▲── StreamSlot ◄── Reply | Failure | Item* End | error
"""

from __future__ import annotations

import asyncio
import math
import pickle
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs

from ..calling.answers import StreamSlot
from ..calling.budget import PRIORITIES
from ..calling.slot import NO_CALL, Submitter
from ..config import LONGEST_S
from ..errors import DeadlineExceeded, EngineError, InvalidArgument, Overloaded
from ..seam.http_request import trim_scope
from ..seam.ingress_server import StreamBroken
from ..seam.log import Log
from ..seam.messages import (
    AS_CONFIGURED,
    AS_CONFIGURED_FOR_POSTS,
    HTTP,
    INITIAL_CREDIT,
    NORMAL,
    Call,
    End,
    Failure,
    Item,
    Reply,
    credit_of,
)
from .bodies import BodyTooLarge, Budget, Claim, ClientLeft, read_body
from .exchange import TEXT_TYPE, Exchange, printable, request_id_of
from .failures import failure_head
from .heads import decode_head
from .patience import ClientStalled, Patience
from .readiness import readiness
from .routes import RESERVED, Match, NotFound, RouteTable, WrongMethod
from .watch import Lookout, Watch

if TYPE_CHECKING:
    from ..seam.snapshot import RoutingSnapshot

__all__ = ["Ingress", "IngressClient"]


_new = tuple.__new__  # a named tuple's own constructor takes longer
_HEEDED = frozenset(
    (
        b"content-length",
        b"transfer-encoding",
        b"x-request-id",
        b"x-request-timeout-ms",
        b"x-serve-call-method",
        b"x-serve-shard-key",
    )
)
_TOLD_BY_HEADERS = frozenset(("1.0", "1.1"))
"""Versions of HTTP in which a request has no body unless a header says so."""
_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})  # RFC 9110, 9.2.2
_CREDIT_BATCH = INITIAL_CREDIT // 2
_REFUSALS_EVERY_S = 1.0

_logger = Log("engine.http")


class IngressClient(Protocol):
    """What the ingress needs of `engine.calling.client.Client`."""

    @property
    def snapshot(self) -> RoutingSnapshot:
        """The routing snapshot that rules now; its version is negative until there is one."""

    def loop_caller(self) -> Submitter:
        """The caller bound to the running asyncio loop."""


class Ingress:
    """The ASGI application. Honours ``root_path``, so that it can be mounted in another application.

    Args:
        client: Gives the routing snapshot and the caller.
        max_body_bytes: Larger request bodies are answered with 413.
        max_bodies_bytes: Bytes that all bodies held at a time may have together; beyond it, 503 is answered.
        request_timeout_s: Seconds from the request's arrival to the first part of its answer (then 504), or None. A
            client may shorten it.
        stall_timeout_s: Seconds for which a client may owe the next part of its request (then 408), or None.
        debug: Tell clients the traceback of a failed backend.
        tells_details: Tell clients the names of endpoints and backends, and how they are.
        priority_header: The header by which a client may say how urgent its request is; None if there is none.
    """

    def __init__(
        self,
        client: IngressClient,
        *,
        max_body_bytes: int = 100 * 1024 * 1024,
        max_bodies_bytes: int = 512 * 1024 * 1024,
        request_timeout_s: float | None = None,
        stall_timeout_s: float | None = None,
        debug: bool = False,
        tells_details: bool = False,
        priority_header: str | None = None,
    ) -> None:
        self._client = client
        self._max_body_bytes = max_body_bytes
        self._bodies = Budget(max(max_bodies_bytes, max_body_bytes))
        self._request_timeout_s = request_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._debug = debug
        self._tells_details = tells_details
        self._priority_header = None if priority_header is None else priority_header.lower().encode("ascii")
        # Only the loop's thread touches these.
        self._snapshot: RoutingSnapshot | None = None
        self._routes: RouteTable | None = None
        self._lookout: Lookout | None = None
        self._in_flight = 0
        self._draining = False
        self._refusals: dict[str, tuple[float, int]] = {}  # by endpoint: the last logged at, and how many since
        self._refused_websockets: set[str] = set()  # endpoints

    def __repr__(self) -> str:
        state = "draining" if self._draining else "open"
        return f"<Ingress {state}, {self._in_flight} in flight>"

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        return self._in_flight

    def begin_drain(self) -> None:
        """Tell health checks to look elsewhere. Requests are answered as before (idempotent)."""
        self._draining = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one ASGI scope."""
        kind = scope["type"]
        if kind == "http":
            self._in_flight += 1
            try:
                await self._http(scope, receive, send)
            finally:
                self._in_flight -= 1
        elif kind == "lifespan":
            await _lifespan(receive, send)
        elif kind == "websocket":
            await self._refuse_websocket(scope, receive, send)
        else:
            raise RuntimeError(f"the ingress serves no ASGI scope of type {kind!r}")

    async def _http(self, scope: Any, receive: Any, send: Any) -> None:
        call_method = "__call__"
        shard_key: str | None = None
        given_id: bytes | None = None
        given_timeout: bytes | None = None
        content_length = 0
        chunked = False
        for name, value in scope["headers"]:
            if name not in _HEEDED:
                continue
            if name == b"content-length":
                content_length = int(value) if value.isdigit() else -1
            elif name == b"x-request-id":
                given_id = value
            elif name == b"x-serve-call-method":
                call_method = _text(value).strip()
            elif name == b"x-serve-shard-key":
                shard_key = _text(value)
            elif name == b"x-request-timeout-ms":
                given_timeout = value
            elif name == b"transfer-encoding":
                chunked = True
        request_id = request_id_of(given_id)
        exchange = Exchange(scope, send, request_id)

        path = scope["path"]
        root_path = scope.get("root_path")
        if root_path:
            path = _below(path, root_path)
        if path.startswith(RESERVED):
            await self._own_route(path, exchange)
            return
        found = self._match(path, scope["method"])
        if type(found) is not Match:
            if isinstance(found, NotFound):
                await exchange.say(404, "Not Found")
            else:
                await exchange.say(405, "Method Not Allowed", ((b"allow", ", ".join(found.allowed).encode("ascii")),))
            return
        if call_method != "__call__" and (call_method.startswith("_") or not call_method.isidentifier()):
            await exchange.say(400, "X-SERVE-CALL-METHOD must be the name of a public method.")
            return
        if call_method != "__call__" and not self._is_open(found.endpoint_name, call_method):
            await exchange.say(400, "X-SERVE-CALL-METHOD names a method that this route does not open to clients.")
            return
        if content_length < 0:
            await exchange.say(400, "The content-length is not a number.")
            return
        if content_length > self._max_body_bytes:
            await self._too_large(exchange)
            return
        priority = NORMAL
        if self._priority_header is not None:
            given_priority = _priority(scope["headers"], self._priority_header)
            if given_priority is None:
                await exchange.say(400, f"{self._priority_header.decode().upper()} must be normal or low.")
                return
            priority = given_priority
        timeout_s = self._request_timeout_s
        if given_timeout is not None:
            given_s = _seconds(given_timeout)
            if given_s is None:
                await exchange.say(400, "X-REQUEST-TIMEOUT-MS must be a whole number of milliseconds, at least 1.")
                return
            timeout_s = given_s if timeout_s is None else min(given_s, timeout_s)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        loop = asyncio.get_running_loop()
        owes_body = bool(content_length) or chunked or scope.get("http_version") not in _TOLD_BY_HEADERS
        if not owes_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            if not (message.get("body") or message.get("more_body")):
                call = _call_of(scope, found, call_method, deadline, request_id, b"", priority)
                await self._call(StreamSlot(loop, found.endpoint_name, call, shard_key), exchange, receive)
                return
            receive = _beginning_with(message, receive)  # a middleware has put a body there
        claim = Claim(self._bodies)
        try:
            patience = Patience(self._stall_timeout_s, deadline) if owes_body else None
            body = await self._body(receive, content_length, claim, patience, found.endpoint_name, exchange)
            if body is not None:
                call = _call_of(scope, found, call_method, deadline, request_id, body, priority)
                slot = StreamSlot(loop, found.endpoint_name, call, shard_key)
                del call, body  # it alone keeps them
                await self._call(slot, exchange, receive, claim)
        finally:
            claim.release()

    async def _body(
        self,
        receive: Any,
        content_length: int,
        claim: Claim,
        patience: Patience | None,
        endpoint_name: str,
        exchange: Exchange,
    ) -> bytes | None:
        """The body of a request; None if there will be no call, of which the client has been told."""
        try:
            claim.announce(content_length)
            return await read_body(receive, self._max_body_bytes, claim, patience)
        except ClientLeft:
            pass
        except BodyTooLarge:
            await self._too_large(exchange)
        except ClientStalled:
            await exchange.say(408, "The rest of the request did not come.")
        except (DeadlineExceeded, Overloaded) as refusal:
            await self._refused(refusal, endpoint_name, exchange)
        finally:
            if patience is not None:
                patience.stop()
        return None

    def _match(self, path: str, method: str) -> Any:
        snapshot = self._client.snapshot
        if snapshot is not self._snapshot or self._routes is None:
            self._routes = RouteTable(snapshot)
            self._snapshot = snapshot
            for gone in self._refusals.keys() - snapshot.endpoints.keys():
                del self._refusals[gone]
            self._refused_websockets &= snapshot.endpoints.keys()
        return self._routes.match(path, method)

    def _is_open(self, endpoint_name: str, call_method: str) -> bool:
        assert self._snapshot is not None  # the route was found there
        opened = self._snapshot.endpoints[endpoint_name].call_methods
        return opened is None or call_method in opened

    async def _too_large(self, exchange: Exchange) -> None:
        await exchange.say(413, f"The body of a request may have at most {self._max_body_bytes} bytes.")

    # -- calls -----------------------------------------------------------------------------------------------------

    async def _call(self, slot: StreamSlot, exchange: Exchange, receive: Any, claim: Claim | None = None) -> None:
        endpoint_name = slot.endpoint
        try:
            caller = self._client.loop_caller()
        except EngineError as error:
            await self._refused(error, endpoint_name, exchange)
            return
        loop = slot.loop
        watch = Watch(slot, caller, receive, slot.call.deadline)
        lookout = self._lookout
        if lookout is None or lookout.loop is not loop:
            lookout = self._lookout = Lookout(loop)
        lookout.enter(watch)
        over = False
        try:
            caller.submit(slot)
            answer = await slot.next()
            kind = type(answer)
            if claim is not None and (kind is Reply or kind is Item):
                # The client may be slow to take the answer, and has what it sent all that time.
                slot.call = NO_CALL
                claim.release()
            if kind is Reply:
                over = True
                status, headers = decode_head(answer.head)
                await exchange.answer(status, headers, answer.payload)
                if status >= 500:
                    exchange.log_failure(status, endpoint_name, "said the backend")
            elif kind is Item:
                watch.deadline_met()
                watch.start()
                over = await self._stream(answer, caller, slot, endpoint_name, exchange)
            elif kind is Failure:
                over = True
                await self._failed(answer, endpoint_name, exchange)
            elif kind is End:
                over = True
                exchange.log_failure(500, endpoint_name, "the answer ended before it began")
                await exchange.say(500, "Internal Server Error")
            elif answer is not None:
                # the caller failed the call, or the deadline passed here
                over = not isinstance(answer, DeadlineExceeded)
                await self._refused(answer, endpoint_name, exchange)
        finally:
            lookout.leave(watch)
            watch.stop()
            if not over:
                caller.cancel(slot)

    async def _failed(self, failure: Failure, endpoint_name: str, exchange: Exchange) -> None:
        if failure.head:
            status, headers = decode_head(failure.head)
            if status >= 500:
                why = f"the backend failed: {failure.cause}" if failure.cause else "the backend failed"
                exchange.log_failure(status, endpoint_name, why)
            await exchange.answer(status, headers, failure.payload)
        else:
            exchange.log_failure(500, endpoint_name, "the backend failed without saying how")
            await exchange.say(500, "Internal Server Error")

    async def _refused(self, error: EngineError, endpoint_name: str, exchange: Exchange) -> None:
        if isinstance(error, InvalidArgument):
            # the one argument a caller can find wrong is the size of the message
            await exchange.say(413, "This request is too large to be passed on.")
            return
        head, body = failure_head(error, debug=self._debug)
        status, headers = decode_head(head)
        if status >= 500 and (why := self._worth_a_line(error, endpoint_name)):
            exchange.log_failure(status, endpoint_name, why)
        await exchange.answer(status, headers, body)

    def _worth_a_line(self, error: EngineError, endpoint_name: str) -> str:
        """What the log is to say; nothing of most that are refused in a flood, which logging would make worse."""
        why = f"{type(error).__name__}: {error}"
        if not isinstance(error, Overloaded):
            return why
        now = time.monotonic()
        said_at, unsaid = self._refusals.get(endpoint_name, (-math.inf, 0))
        if now - said_at < _REFUSALS_EVERY_S:
            self._refusals[endpoint_name] = said_at, unsaid + 1
            return ""
        self._refusals[endpoint_name] = now, 0
        return f"{why}; {unsaid} more were refused since the last such line" if unsaid else why

    async def _stream(
        self, first: Item, caller: Submitter, slot: StreamSlot, endpoint_name: str, exchange: Exchange
    ) -> bool:
        """Pass a stream on; returns whether the call is over and need not be cancelled.

        Raises:
            StreamBroken: The stream broke off.
        """
        status, headers = decode_head(first.head)
        if exchange.headless:
            await exchange.answer(status, headers, b"")
            return False
        await exchange.start(status, headers)
        message: Any = first
        owed = 0
        while True:
            kind = type(message)
            if kind is Item:
                if message.payload:
                    await exchange.send({"type": "http.response.body", "body": message.payload, "more_body": True})
                owed += credit_of(message.payload)
                if owed >= _CREDIT_BATCH:
                    caller.credit(slot, owed)
                    owed = 0
            elif kind is End and not message.failed:
                await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})
                return True
            elif message is None:
                return False
            else:
                why = "the backend's stream failed" if kind is End else f"{kind.__name__}: {message}"
                exchange.log_failure(status, endpoint_name, f"broke off, {why}")
                raise StreamBroken(exchange.request_id)
            message = await slot.next()

    # -- the ingress's own routes ----------------------------------------------------------------------------------

    async def _own_route(self, path: str, exchange: Exchange) -> None:
        snapshot = self._client.snapshot
        if path not in ("/-/healthz", "/-/readyz") and (path != "/-/routes" or not self._tells_details):
            await exchange.say(404, "Not Found")
        elif exchange.scope["method"] not in ("GET", "HEAD"):
            await exchange.say(405, "Method Not Allowed", ((b"allow", b"GET, HEAD"),))
        elif path == "/-/routes":
            table = {
                endpoint.route: {"endpoint": endpoint.name, "methods": list(endpoint.methods)}
                for endpoint in snapshot.endpoints.values()
                if endpoint.route is not None
            }
            await exchange.say_json(200, table)
        elif path == "/-/readyz":
            status, told = 503, {"ready": False, "reason": "draining", "backends": {}}
            if not self._draining:
                query = parse_qs(exchange.scope.get("query_string", b"").decode("latin-1"))
                status, told = readiness(snapshot, query.get("backend", ()))
            if not self._tells_details:  # nor shall the status tell which backends there are
                status, told = 200 if status == 200 else 503, {"ready": status == 200}
            await exchange.say_json(status, told)
        elif self._draining:
            await exchange.say(503, "draining")
        elif snapshot.version < 0:
            await exchange.say(503, "starting")
        else:
            await exchange.say(200, "ok")

    # -- WebSockets ------------------------------------------------------------------------------------------------

    async def _refuse_websocket(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        root_path = scope.get("root_path")
        inside = _below(path, root_path) if root_path else path
        found = self._match(inside, "GET")
        if isinstance(found, WrongMethod):
            found = self._match(inside, found.allowed[0])
        if isinstance(found, NotFound):
            status, sentence = 404, "Not Found"
        else:
            status, sentence = 501, "This route does not serve WebSockets."
            name = found.endpoint_name
            if name not in self._refused_websockets:  # which clients may try again and again
                self._refused_websockets.add(name)
                _logger.warning(
                    "refused a WebSocket on %s: endpoint %r is served by backends, which do not serve WebSockets",
                    printable(path),
                    name,
                )
        await receive()
        if "websocket.http.response" in (scope.get("extensions") or ()):
            body = sentence.encode("ascii")
            headers = [(b"content-length", b"%d" % len(body)), TEXT_TYPE]
            await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
            await send({"type": "websocket.http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": sentence})


def _text(value: bytes) -> str:
    """The text of a header that handles have as text, too: clients send UTF-8, and some of them Latin-1."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _seconds(milliseconds: bytes) -> float | None:
    """The seconds that a header gives as whole milliseconds, at most a year; None if it does not say that."""
    digits = milliseconds.strip()
    if not digits.isdigit():
        return None
    digits = digits.lstrip(b"0")
    if not digits:
        return None
    return min(int(digits) / 1000, LONGEST_S) if len(digits) < 16 else LONGEST_S


def _call_of(
    scope: Any, found: Match, call_method: str, deadline: float | None, request_id: str, body: bytes, priority: int
) -> Call:
    trimmed = trim_scope(scope)
    if found.path_params:
        trimmed["path_params"] = {**trimmed.get("path_params", {}), **found.path_params}
    retries = AS_CONFIGURED if scope["method"] in _IDEMPOTENT else AS_CONFIGURED_FOR_POSTS
    return _new(
        Call, (0, HTTP, call_method, deadline, request_id, pickle.dumps(trimmed, 5), body, retries, priority, False)
    )


def _beginning_with(message: Any, receive: Any) -> Any:
    """A ``receive`` that gives a message first which was taken from it."""
    messages = [message]

    async def receive_again() -> Any:
        return messages.pop() if messages else await receive()

    return receive_again


def _priority(headers: Iterable[tuple[bytes, bytes]], header: bytes) -> int | None:
    """What a client says of its request by this header, the last of them; None if it is no priority."""
    priority: int | None = NORMAL
    for name, value in headers:
        if name == header:
            priority = PRIORITIES.get(_text(value).strip().lower())
    return priority


def _below(path: str, root_path: str) -> str:
    """The path inside a mount. Servers disagree on whether ``path`` begins with ``root_path``; both are understood."""
    if path.startswith(root_path):
        rest = path[len(root_path) :]
        if not rest:
            return "/"
        if rest.startswith("/"):
            return rest
    return path


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
