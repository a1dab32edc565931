"""The ingress, driven in-process by raw ASGI, with a scripted caller in the place of replicas."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount

from engine import errors
from engine.calling.slot import Slot
from engine.http import watch as watch_module
from engine.http.failures import failure_head
from engine.http.guard import wrap_middlewares
from engine.http.heads import encode_head
from engine.http.ingress import Ingress
from engine.http.results import encode_result
from engine.http.watch import Lookout
from engine.seam.ingress_server import StreamBroken
from engine.seam.messages import HTTP, INITIAL_CREDIT, LOW, NORMAL, End, Failure, FailureKind, Item, Reply
from engine.seam.snapshot import BackendEntry, EndpointEntry, ReplicaEntry, RoutingSnapshot

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def snapshot(version: int = 1, **routes: tuple[str | None, tuple[str, ...]]) -> RoutingSnapshot:
    endpoints = {name: EndpointEntry(name, route, methods, (("b", 1.0),)) for name, (route, methods) in routes.items()}
    return RoutingSnapshot(version, endpoints, {})


class Asked:
    """One call as the caller sees it, to be answered by the test."""

    def __init__(self, slot: Slot) -> None:
        self.endpoint = slot.endpoint
        self.call = slot.call
        self.shard_key = slot.shard_key
        self.slot = slot
        self.cancelled = False
        self.credit = 0
        self.changed = asyncio.Event()

    @property
    def scope(self) -> dict[str, Any]:
        scope: dict[str, Any] = pickle.loads(self.call.head)
        return scope

    def reply(self, result: Any) -> None:
        encoded = encode_result(result)
        self.slot.deliver(Reply(1, 0, encoded.head, encoded.body))  # type: ignore[union-attr]

    def item(self, payload: bytes, head: bytes = b"") -> None:
        self.slot.deliver(Item(1, head, payload))

    def end(self, *, failed: bool = False) -> None:
        self.slot.deliver(End(1, 0, failed))

    async def until_cancelled(self) -> None:
        while not self.cancelled:
            self.changed.clear()
            await self.changed.wait()


class FakeClient:
    """A client and its caller in one. ``script`` is called with each call; without one, calls wait in ``calls``."""

    def __init__(self, routes: RoutingSnapshot, script: Callable[[Asked], None] | None = None) -> None:
        self.snapshot = routes
        self.script = script
        self.calls: asyncio.Queue[Asked] = asyncio.Queue()
        self.by_slot: dict[int, Asked] = {}

    def loop_caller(self) -> FakeClient:
        return self

    def submit(self, slot: Slot) -> None:
        asked = Asked(slot)
        self.by_slot[id(slot)] = asked
        if self.script is not None:
            self.script(asked)
        else:
            self.calls.put_nowait(asked)

    def cancel(self, slot: Slot) -> None:
        call = self.by_slot[id(slot)]
        call.cancelled = True
        call.changed.set()

    def credit(self, slot: Slot, amount: int) -> None:
        self.by_slot[id(slot)].credit += amount


ROUTES = snapshot(
    echo=("/echo", ("GET", "POST")), user=("/user/{name}/{n:int}", ("GET",)), put=("/put", ("PUT",)), hidden=(None, ())
)


def make(script: Callable[[Asked], None] | None = None, **options: Any) -> tuple[FakeClient, Ingress]:
    client = FakeClient(ROUTES, script)
    return client, Ingress(client, **{"tells_details": True, **options})


def echo(call: Asked) -> None:
    call.reply({"endpoint": call.endpoint, "body": call.call.payload.decode(), **_seen(call)})


def _seen(call: Asked) -> dict[str, Any]:
    return {"method": call.call.method, "key": call.shard_key, "params": call.scope.get("path_params")}


def http(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


class Exchange:
    """One raw ASGI request, its client's side under the test's control."""

    def __init__(self, app: Any, method: str = "GET", path: str = "/echo", **changes: Any) -> None:
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.sent: list[Any] = []
        self.progress = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": None,
            "server": None,
            **changes,
        }
        self.task = asyncio.ensure_future(app(scope, self.inbox.get, self._send))

    async def _send(self, message: Any) -> None:
        await self.writable.wait()
        self.sent.append(message)
        self.progress.set()

    def says(self, body: bytes = b"", more: bool = False) -> Exchange:
        self.inbox.put_nowait({"type": "http.request", "body": body, "more_body": more})
        return self

    def leaves(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})

    async def until_sent(self, count: int) -> None:
        while len(self.sent) < count:
            self.progress.clear()
            await self.progress.wait()

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status


# -- calls ---------------------------------------------------------------------------------------------------------


async def test_a_request_becomes_a_call() -> None:
    client, app = make(lambda call: call.reply("fine"))
    async with http(app) as browser:
        response = await browser.post("/echo?a=b", content=b"body", headers={"X-Own": "1"})
    assert (response.status_code, response.text) == (200, "fine")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    (call,) = client.by_slot.values()
    sent = call.call
    assert (call.endpoint, sent.kind, sent.method, sent.payload) == ("echo", HTTP, "__call__", b"body")
    assert sent.deadline is None and call.shard_key is None
    assert call.scope["query_string"] == b"a=b"
    assert (b"x-own", b"1") in call.scope["headers"]
    assert not call.cancelled
    assert app.in_flight == 0


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
async def test_names_in_headers_are_those_of_handles(encoding: str) -> None:
    _, app = make(echo)
    async with http(app) as browser:
        headers = {"X-SERVE-CALL-METHOD": "größe".encode(encoding), "X-SERVE-SHARD-KEY": "Jürgen".encode(encoding)}
        response = await browser.get("/echo", headers=headers)
    assert (response.json()["method"], response.json()["key"]) == ("größe", "Jürgen")


async def test_headers_choose_method_and_shard_key() -> None:
    _, app = make(echo)
    async with http(app) as browser:
        response = await browser.get("/echo", headers={"X-SERVE-CALL-METHOD": "other", "X-SERVE-SHARD-KEY": "k"})
    assert response.json()["method"] == "other"
    assert response.json()["key"] == "k"


@pytest.mark.parametrize("name", ["_private", "__init__", "a.b", "1a", "", "a b"])
async def test_method_headers_that_name_nothing_callable(name: str) -> None:
    client, app = make(echo)
    async with http(app) as browser:
        response = await browser.get("/echo", headers={"X-SERVE-CALL-METHOD": name})
    assert response.status_code == 400
    assert not client.by_slot


async def test_path_parameters() -> None:
    _, app = make(echo)
    async with http(app) as browser:
        assert (await browser.get("/user/ann/7")).json()["params"] == {"name": "ann", "n": 7}


async def test_no_route_and_wrong_verb() -> None:
    _, app = make(echo)
    async with http(app) as browser:
        response = await browser.get("/nowhere")
        assert (response.status_code, response.text) == (404, "Not Found")
        response = await browser.delete("/echo")
        assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD, POST")
        assert "x-request-id" in response.headers


async def test_a_new_snapshot_rules_at_once() -> None:
    client, app = make(echo)
    async with http(app) as browser:
        assert (await browser.get("/new")).status_code == 404
        client.snapshot = snapshot(2, new=("/new", ("GET",)))
        assert (await browser.get("/new")).json()["endpoint"] == "new"
        assert (await browser.get("/echo")).status_code == 404


async def test_head_is_get_without_the_body() -> None:
    _, app = make(lambda call: call.reply("text"))
    exchange = Exchange(app, "HEAD").says()
    await exchange.task
    assert exchange.status == 200
    assert (b"content-length", b"4") in exchange.sent[0]["headers"]
    assert exchange.sent[1:] == [{"type": "http.response.body", "body": b"", "more_body": False}]


async def test_head_of_a_stream_cancels_it() -> None:
    client, app = make(lambda call: call.item(b"x", encode_head(200, [])))
    exchange = Exchange(app, "HEAD").says()
    await exchange.task
    assert [message.get("body") for message in exchange.sent] == [None, b""]
    assert next(iter(client.by_slot.values())).cancelled


# -- request ids ---------------------------------------------------------------------------------------------------


async def test_request_ids() -> None:
    _, app = make(lambda call: call.reply(call.call.request_id))
    async with http(app) as browser:
        response = await browser.get("/echo", headers={"X-Request-Id": "abc-1"})
        assert response.text == response.headers["x-request-id"] == "abc-1"
        response = await browser.get("/echo", headers={"X-Request-Id": 'a"b c\x7f' + "d" * 500})
        assert response.text == response.headers["x-request-id"] == ("abc" + "d" * 500)[:128]
        made = {(await browser.get("/echo")).headers["x-request-id"] for _ in range(10)}
        made.add((await browser.get("/echo", headers={"X-Request-Id": "<>"})).headers["x-request-id"])
        assert len(made) == 11
        assert all(len(one) == 16 for one in made)


# -- bodies --------------------------------------------------------------------------------------------------------


async def test_a_body_comes_in_parts() -> None:
    _, app = make(lambda call: call.reply(call.call.payload))
    exchange = Exchange(app, "POST").says(b"a", True).says(b"b", True).says(b"", True).says(b"c")
    await exchange.task
    assert exchange.sent[1]["body"] == b"abc"


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    _, app = make(echo, max_body_bytes=10)
    exchange = Exchange(app, "POST", headers=[(b"content-length", b"11")])
    await exchange.task
    assert exchange.status == 413


async def test_a_body_that_grows_too_large_is_not_read_to_its_end() -> None:
    client, app = make(echo, max_body_bytes=10)
    exchange = Exchange(app, "POST").says(b"x" * 10, True).says(b"x", True)
    await exchange.task
    assert exchange.status == 413
    assert not client.by_slot
    exchange = Exchange(app, "POST").says(b"x" * 11)
    await exchange.task
    assert exchange.status == 413


async def test_a_body_of_the_largest_size() -> None:
    _, app = make(echo, max_body_bytes=10)
    exchange = Exchange(app, "POST", headers=[(b"content-length", b"10")]).says(b"x" * 10, True).says(b"")
    await exchange.task
    assert exchange.status == 200


async def test_a_length_that_is_no_number() -> None:
    _, app = make(echo)
    exchange = Exchange(app, "POST", headers=[(b"content-length", b"-1")])
    await exchange.task
    assert exchange.status == 400


async def test_a_client_that_leaves_in_its_body_makes_no_call() -> None:
    client, app = make(echo)
    for start in (False, True):
        exchange = Exchange(app, "POST")
        if start:
            exchange.says(b"a", True)
        exchange.leaves()
        await exchange.task
        assert exchange.sent == []
    assert not client.by_slot


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.Overloaded("secret"), 503),
        (errors.NoReplica("secret"), 503),
        (errors.ReplicaDied("secret"), 502),
        (errors.DeadlineExceeded("secret"), 504),
        (errors.EngineClosed("secret"), 503),
        (errors.EndpointNotFound("secret"), 404),
        (errors.InvalidArgument("secret"), 413),
        (errors.BackendError("secret"), 500),
    ],
)
async def test_errors_of_the_router(error: errors.EngineError, status: int, caplog: pytest.LogCaptureFixture) -> None:
    _, app = make(lambda call: call.slot.fail(error))
    async with http(app) as browser:
        response = await browser.get("/echo", headers={"x-request-id": "abc"})
    assert response.status_code == status
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "abc"
    assert ("retry-after" in response.headers) == isinstance(error, (errors.Overloaded, errors.NoReplica))
    records = [record for record in caplog.records if record.name == "engine.http"]
    assert len(records) == (1 if status >= 500 else 0)
    assert all("abc" in record.getMessage() and "'echo'" in record.getMessage() for record in records)


async def test_failures_of_the_backend(caplog: pytest.LogCaptureFixture) -> None:
    head, body = failure_head(ValueError())
    _, app = make(lambda call: call.slot.deliver(Failure(1, 0, FailureKind.USER, head, body)))
    async with http(app) as browser:
        response = await browser.get("/echo")
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    (record,) = [record for record in caplog.records if record.name == "engine.http"]
    assert record.exc_info is None


@pytest.mark.parametrize("answer", [Failure(1, 0, FailureKind.USER, b"", b"\x80secret"), End(1, 0, True)])
async def test_answers_that_say_nothing(answer: Any) -> None:
    _, app = make(lambda call: call.slot.deliver(answer))
    async with http(app) as browser:
        response = await browser.get("/echo")
    assert (response.status_code, response.text) == (500, "Internal Server Error")


async def test_a_closed_engine() -> None:
    class Closed(FakeClient):
        def loop_caller(self) -> FakeClient:
            raise errors.EngineClosed("the engine was shut down")

    async with http(Ingress(Closed(ROUTES))) as browser:
        assert (await browser.get("/echo")).status_code == 503


# -- deadlines and clients that leave ------------------------------------------------------------------------------


async def test_the_deadline_travels_and_rules() -> None:
    client, app = make(request_timeout_s=0.001)
    exchange = Exchange(app).says()
    call = await client.calls.get()
    assert call.call.deadline is not None
    await exchange.task
    assert exchange.status == 504
    assert call.cancelled


@pytest.mark.parametrize(
    ("configured_s", "given", "expected_s"),
    [
        (None, b"2000", 2.0),
        (None, b" 0002000 ", 2.0),
        (1.0, b"2000", 1.0),
        (3.0, b"2000", 2.0),
        (None, b"99999999999999999999", 366 * 86400.0),
        (1.0, b"9" * 5000, 1.0),
        (5.0, None, 5.0),
        (None, None, None),
    ],
)
async def test_the_shorter_of_two_limits_counts(
    configured_s: float | None, given: bytes | None, expected_s: float | None
) -> None:
    client, app = make(request_timeout_s=configured_s)
    before = time.monotonic()
    headers = [] if given is None else [(b"x-request-timeout-ms", given)]
    exchange = Exchange(app, headers=headers).says()
    call = await client.calls.get()
    deadline = call.call.deadline
    if expected_s is None:
        assert deadline is None
    else:
        assert deadline is not None
        assert before + expected_s <= deadline <= time.monotonic() + expected_s
    call.reply("fine")
    await exchange.task
    assert exchange.status == 200


@pytest.mark.parametrize(
    "wrong", [b"", b"0", b"000", b"-1", b"+1", b"1.5", b"1e3", b"ten", b"1 000", "\u0663".encode()]
)
async def test_a_limit_that_is_none_is_the_clients_mistake(wrong: bytes) -> None:
    client, app = make(request_timeout_s=30)
    exchange = Exchange(app, headers=[(b"x-request-timeout-ms", wrong)]).says()
    await exchange.task
    assert exchange.status == 400
    assert b"X-REQUEST-TIMEOUT-MS" in exchange.sent[1]["body"]
    assert client.calls.empty()


@pytest.mark.parametrize(
    ("header", "given", "expected"),
    [
        (None, [b"low"], NORMAL),  # there is no such header
        ("X-Priority", [], NORMAL),
        ("X-Priority", [b"low"], LOW),
        ("x-priority", [b" LOW "], LOW),
        ("x-priority", [b"normal"], NORMAL),
        ("x-priority", [b"low", b"normal"], NORMAL),
        ("x-priority", [b"high"], None),
        ("x-priority", [b""], None),
        ("x-priority", [b"\xff"], None),
    ],
)
async def test_a_header_says_how_urgent_a_request_is_if_it_may(
    header: str | None, given: list[bytes], expected: int | None
) -> None:
    client, app = make(priority_header=header)
    exchange = Exchange(app, headers=[(b"x-priority", value) for value in given]).says()
    if expected is None:
        await exchange.task
        assert exchange.status == 400
        assert exchange.sent[1]["body"] == b"X-PRIORITY must be normal or low."
        return
    call = await client.calls.get()
    assert call.call.priority == expected
    call.reply("fine")
    await exchange.task


@pytest.mark.parametrize(
    "sends",
    [
        {"headers": [(b"content-length", b"10")]},
        {"headers": [(b"transfer-encoding", b"chunked")]},
        {"http_version": "2"},
    ],
)
@pytest.mark.parametrize("begun", [False, True])
async def test_a_body_that_comes_too_late_makes_no_call(sends: dict[str, Any], begun: bool) -> None:
    client, app = make(request_timeout_s=0.01)
    exchange = Exchange(app, "POST", **sends)
    if begun:
        exchange.says(b"a", more=True)
    await exchange.task
    assert exchange.status == 504
    assert client.calls.empty()


async def test_the_time_that_a_body_takes_is_part_of_the_requests() -> None:
    client, app = make(request_timeout_s=30)
    before = time.monotonic()
    exchange = Exchange(app, "POST", headers=[(b"content-length", b"2")]).says(b"a", more=True)
    for _ in range(100):
        await asyncio.sleep(0)
    assert exchange.inbox.empty()
    after = time.monotonic()
    exchange.says(b"b")
    call = await client.calls.get()
    assert before + 30 <= call.call.deadline <= after + 30
    assert call.call.payload == b"ab"
    call.reply("fine")
    await exchange.task
    assert exchange.status == 200


async def test_a_stream_that_began_in_time_may_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_WATCH_AFTER_S", 0.0)
    client, app = make(request_timeout_s=0.05)
    exchange = Exchange(app).says()
    call = await client.calls.get()
    call.item(b"a", encode_head(200, []))
    await exchange.until_sent(2)
    assert asyncio.get_running_loop().time()  # the deadline's timer would fire in the wait below
    await asyncio.wait([exchange.task], timeout=0.1)
    call.end()
    await exchange.task
    assert exchange.status == 200
    assert not call.cancelled


async def test_a_client_that_leaves_cancels_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_WATCH_AFTER_S", 0.0)
    client, app = make()
    exchange = Exchange(app).says()
    call = await client.calls.get()
    exchange.leaves()
    await call.until_cancelled()
    await exchange.task
    assert exchange.sent == []


async def test_messages_after_the_body_are_no_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_WATCH_AFTER_S", 0.0)
    client, app = make()
    exchange = Exchange(app).says().says()
    call = await client.calls.get()
    for _ in range(100):
        await asyncio.sleep(0)
    assert exchange.inbox.empty()
    call.reply("fine")
    await exchange.task
    assert exchange.status == 200
    assert not call.cancelled


async def test_a_cancelled_request_cancels_its_call() -> None:
    client, app = make()
    exchange = Exchange(app).says()
    call = await client.calls.get()
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.task
    assert call.cancelled
    assert app.in_flight == 0


# -- streams -------------------------------------------------------------------------------------------------------


class Timers:
    """A loop as far as a lookout needs one."""

    def __init__(self) -> None:
        self.set: list[Callable[[], None]] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.set.append(callback)

    def fire(self) -> None:
        due, self.set = self.set, []
        for callback in due:
            callback()


class Watched:
    """A watch as far as a lookout needs one."""

    soon_s = None

    def __init__(self, strikes: bool = False) -> None:
        self.strikes = strikes
        self.started = False

    def start(self) -> None:
        self.started = True
        if self.strikes:
            raise KeyboardInterrupt


def test_whoever_looks_out_for_clients_goes_on_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def strike(*_: object) -> None:
        raise KeyboardInterrupt

    timers = Timers()
    lookout = Lookout(timers)  # type: ignore[arg-type]
    watches: list[Any] = [Watched(), Watched(), Watched(strikes=True), Watched()]
    with monkeypatch.context() as struck, pytest.raises(KeyboardInterrupt):
        struck.setattr(timers, "call_later", strike)
        lookout.enter(watches[0])
    for watch in watches[1:3]:
        lookout.enter(watch)
    timers.fire()
    with pytest.raises(KeyboardInterrupt):
        timers.fire()
    lookout.enter(watches[3])
    timers.fire()
    with monkeypatch.context() as struck, pytest.raises(KeyboardInterrupt):
        lookout.enter(late := Watched())  # type: ignore[arg-type]
        struck.setattr(timers, "call_later", strike)
        timers.fire()
    lookout.enter(last := Watched())  # type: ignore[arg-type]
    for _ in range(2):
        timers.fire()
    assert all(watch.started for watch in [*watches, late, last])
    timers.fire()
    assert not timers.set, "none without requests"


async def test_items_pass_as_they_come() -> None:
    client, app = make()
    exchange = Exchange(app).says()
    call = await client.calls.get()
    call.item(b"a", encode_head(201, [(b"x", b"y")]))
    await exchange.until_sent(2)
    assert exchange.status == 201
    assert (b"x", b"y") in exchange.sent[0]["headers"]
    assert exchange.sent[1] == {"type": "http.response.body", "body": b"a", "more_body": True}
    call.item(b"b")
    await exchange.until_sent(3)
    assert exchange.sent[2]["body"] == b"b"
    call.end()
    await exchange.task
    assert exchange.sent[3:] == [{"type": "http.response.body", "body": b"", "more_body": False}]
    assert not call.cancelled


async def test_large_items_are_given_more_credit_for() -> None:
    client, app = make()
    exchange = Exchange(app).says()
    call = await client.calls.get()
    call.item(b"0", encode_head(200, []))
    call.item(b"x" * (100 << 16))
    await exchange.until_sent(3)
    await asyncio.sleep(0)
    assert call.credit == 101
    call.end()
    await exchange.task


async def test_credit_is_given_for_what_the_client_took() -> None:
    client, app = make()
    exchange = Exchange(app).says()
    exchange.writable.clear()
    call = await client.calls.get()
    call.item(b"0", encode_head(200, []))
    for number in range(1, INITIAL_CREDIT):
        call.item(b"%d" % number)
    for _ in range(5):
        await asyncio.sleep(0)
    assert call.credit == 0
    exchange.writable.set()
    await exchange.until_sent(1 + INITIAL_CREDIT)
    await asyncio.sleep(0)
    assert call.credit == INITIAL_CREDIT
    call.end()
    await exchange.task


@pytest.mark.parametrize("breaks", ["failed", "died"])
async def test_a_broken_stream_is_no_clean_end(breaks: str, caplog: pytest.LogCaptureFixture) -> None:
    client, app = make()
    exchange = Exchange(app).says()
    call = await client.calls.get()
    call.item(b"a", encode_head(200, []))
    if breaks == "failed":
        call.end(failed=True)
    else:
        call.slot.fail(errors.ReplicaDied("it died"))
    with pytest.raises(StreamBroken):
        await exchange.task
    assert all(message.get("more_body", True) for message in exchange.sent)
    assert len([record for record in caplog.records if record.name == "engine.http"]) == 1


async def test_a_client_that_leaves_a_stream_cancels_it() -> None:
    client, app = make()
    exchange = Exchange(app).says()
    call = await client.calls.get()
    call.item(b"a", encode_head(200, []))
    exchange.leaves()
    await call.until_cancelled()
    await exchange.task


async def test_a_call_is_given_up_while_its_answer_waits_to_be_sent() -> None:
    client, app = make()
    exchange = Exchange(app).says()
    call = await client.calls.get()
    call.item(b"a", encode_head(200, []))
    await exchange.until_sent(2)
    exchange.writable.clear()
    call.item(b"b")
    exchange.leaves()
    await call.until_cancelled()
    assert not exchange.task.done()  # this server lets it wait
    exchange.writable.set()
    await exchange.task


# -- its own routes, draining, other scopes ------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
async def test_bodies_are_held_until_they_are_answered(announced: bool) -> None:
    client, app = make(max_bodies_bytes=10, max_body_bytes=10)
    body: Any = b"123456"

    async def parts() -> Any:
        yield body

    def content() -> Any:
        return body if announced else parts()

    async with http(app) as browser:
        first = asyncio.ensure_future(browser.post("/echo", content=content()))
        call = await client.calls.get()
        refused = await browser.post("/echo", content=content())
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        call.reply("done")
        assert (await first).text == "done"
        again = asyncio.ensure_future(browser.post("/echo", content=content()))
        (await client.calls.get()).reply("again")
        assert (await again).text == "again"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_body_is_not_held_for_a_client_that_is_slow_to_take_its_answer(streamed: bool) -> None:
    client, app = make(max_bodies_bytes=10, max_body_bytes=10)
    announced: Any = {"headers": [(b"content-length", b"10")]}
    slow = Exchange(app, "POST", **announced).says(b"0123456789")
    call = await client.calls.get()
    slow.writable.clear()
    if streamed:
        call.item(b"a", encode_head(200, []))
    else:
        call.reply("done")
    other = Exchange(app, "POST", **announced).says(b"0123456789")
    (await client.calls.get()).reply("done")
    await other.task
    assert other.status == 200
    assert call.slot.call.payload == b"", "nor is it kept in memory"
    slow.writable.set()
    if streamed:
        call.end()
    await slow.task
    assert slow.status == 200


async def test_clients_that_announce_bodies_and_send_nothing_keep_nobody_out() -> None:
    client, app = make(max_bodies_bytes=10, max_body_bytes=10)
    announced: Any = {"headers": [(b"content-length", b"10")]}
    silent = [Exchange(app, "POST", **announced) for _ in range(40)]
    await asyncio.sleep(0)
    honest = Exchange(app, "POST", **announced).says(b"01234", more=True).says(b"56789")
    call = await client.calls.get()
    for exchange in silent:
        exchange.says(b"0", more=True)
        await exchange.task
        assert exchange.status == 503, "now that there is something to hold"
    call.reply("done")
    await honest.task
    assert honest.status == 200


async def test_a_flood_of_refusals_is_logged_once_a_second(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, app = make(lambda call: call.slot.fail(errors.Overloaded("full")))
    async with http(app) as browser:
        for _ in range(5):
            assert (await browser.get("/echo")).status_code == 503
        assert [line.split(" (request")[0] for line in caplog.messages] == [
            "GET /echo -> 503: endpoint 'echo': Overloaded: full"
        ]
        monkeypatch.setattr("engine.http.ingress._REFUSALS_EVERY_S", 0.0)
        assert (await browser.get("/echo")).status_code == 503
        assert "Overloaded: full; 4 more were refused since the last such line (request" in caplog.messages[-1]
        assert (await browser.get("/echo")).status_code == 503
        assert "full (request" in caplog.messages[-1]


async def test_nothing_is_kept_of_endpoints_that_are_gone() -> None:
    client, app = make(lambda asked: asked.slot.fail(errors.Overloaded("full")))
    async with http(app) as browser:
        assert (await browser.get("/echo")).status_code == 503
        app._refused_websockets.update({"echo", "user"})
        assert set(app._refusals) == {"echo"}
        client.snapshot = snapshot(2, user=("/user", ("GET",)))
        assert (await browser.get("/echo")).status_code == 404
    assert (app._refusals, app._refused_websockets) == ({}, {"user"})


async def test_own_routes() -> None:
    client, app = make(echo)
    async with http(app) as browser:
        assert (await browser.get("/-/healthz")).text == "ok"
        assert (await browser.get("/-/routes")).json() == {
            "/echo": {"endpoint": "echo", "methods": ["GET", "POST"]},
            "/user/{name}/{n:int}": {"endpoint": "user", "methods": ["GET"]},
            "/put": {"endpoint": "put", "methods": ["PUT"]},
        }
        assert (await browser.post("/-/healthz")).headers["allow"] == "GET, HEAD"
        assert (await browser.get("/-/other")).status_code == 404
        client.snapshot = snapshot(-1)
        assert (await browser.get("/-/healthz")).status_code == 503
        client.snapshot = ROUTES
        app.begin_drain()
        response = await browser.get("/-/healthz")
        assert (response.status_code, response.text) == (503, "draining")
        assert (await browser.get("/echo")).status_code == 200


async def test_requests_in_flight_are_counted() -> None:
    client, app = make()
    first, second = Exchange(app).says(), Exchange(app).says()
    calls = [await client.calls.get(), await client.calls.get()]
    assert app.in_flight == 2
    assert "2 in flight" in repr(app)
    for call, exchange in zip(calls, (first, second), strict=True):
        call.reply(1)
        await exchange.task
    assert app.in_flight == 0


def backends(version: int = 1) -> RoutingSnapshot:
    """An endpoint on a backend that is ready, one on a backend that fails, and a backend without an endpoint."""

    def entry(tag: str, replicas: int, failures: int = 0) -> BackendEntry:
        tags = [ReplicaEntry(f"{tag}#{number}", "") for number in range(replicas)]
        return BackendEntry(
            tag, tuple(tags), 8, None, expecting=failures < 3, failures=failures, last_error="OSError: /etc/key"
        )

    entries = (
        entry("up", 2),
        entry("failing", 0, failures=3),
        entry("once", 0, failures=1),
        entry("new", 0),
        entry("unused", 0),
    )
    traffic = {"a": (("failing", 0.0), ("up", 1.0)), "b": (("failing", 0.5), ("up", 0.5)), "c": (("new", 1.0),)}
    endpoints = {name: EndpointEntry(name, None, (), split) for name, split in traffic.items()}
    return RoutingSnapshot(version, endpoints, {entry.tag: entry for entry in entries})


async def test_readiness() -> None:
    up = {"ready": True, "replicas": 2}
    failing = {
        "ready": False,
        "replicas": 0,
        "reason": "unhealthy: the last 3 tries to start one failed",
    }
    once = {**failing, "reason": "no replica yet: the last try to start one failed"}
    new = {"ready": False, "replicas": 0, "reason": "no replica yet"}
    missing = {"ready": False, "reason": "there is no backend 'nö', or it is still being created", "backends": {}}
    client, app = make(echo)
    client.snapshot = backends()
    async with http(app) as browser:
        for query, status, body in (
            ("", 503, {"ready": False, "backends": {"failing": failing, "new": new, "up": up}}),
            ("?backend=up", 200, {"ready": True, "backends": {"up": up}}),
            ("?backend=up&backend=new", 503, {"ready": False, "backends": {"up": up, "new": new}}),
            ("?backend=unused", 503, {"ready": False, "backends": {"unused": new}}),
            ("?backend=once", 503, {"ready": False, "backends": {"once": once}}),
            ("?backend=n%C3%B6", 404, missing),
        ):
            response = await browser.get(f"/-/readyz{query}")
            assert (response.status_code, response.json()) == (status, body)
        assert (await browser.get("/-/healthz")).status_code == 200
        assert (await browser.post("/-/readyz")).status_code == 405
        used = client.snapshot.endpoints["a"]
        client.snapshot = RoutingSnapshot(2, {"a": used}, client.snapshot.backends)
        assert (await browser.get("/-/readyz")).json() == {"ready": True, "backends": {"up": up}}
        client.snapshot = backends(-1)
        assert (await browser.get("/-/readyz")).json()["reason"] == "starting"
        client.snapshot = backends()
        app.begin_drain()
        response = await browser.get("/-/readyz?backend=up")
        assert (response.status_code, response.json()["reason"]) == (503, "draining")


async def test_strangers_are_told_no_names() -> None:
    client, app = make(echo, tells_details=False)
    client.snapshot = backends()
    async with http(app) as browser:
        for path, status, body in (
            ("/-/readyz", 503, {"ready": False}),
            ("/-/readyz?backend=up", 200, {"ready": True}),
            ("/-/readyz?backend=new", 503, {"ready": False}),
            ("/-/readyz?backend=absent", 503, {"ready": False}),
        ):
            response = await browser.get(path)
            assert (response.status_code, response.json()) == (status, body)
        assert (await browser.get("/-/routes")).text == (await browser.get("/-/absent")).text == "Not Found"
        assert (await browser.get("/-/healthz")).status_code == 200
        app.begin_drain()
        assert (await browser.get("/-/readyz?backend=up")).json() == {"ready": False}


@pytest.mark.parametrize("denial", [True, False])
async def test_a_websocket_is_refused_with_a_reason(denial: bool, caplog: pytest.LogCaptureFixture) -> None:
    _, app = make()

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def refused(path: str) -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        extensions = {"websocket.http.response": {}} if denial else {}
        await app({"type": "websocket", "path": path, "extensions": extensions}, receive, send)
        return sent

    for _ in range(2):
        sent = await refused("/echo")
    if denial:
        assert (sent[0]["status"], sent[1]["body"]) == (501, b"This route does not serve WebSockets.")
    else:
        assert (sent[0]["type"], sent[0]["reason"]) == ("websocket.close", "This route does not serve WebSockets.")
    assert [record.getMessage() for record in caplog.records] == [
        "refused a WebSocket on /echo: endpoint 'echo' is served by backends, which do not serve WebSockets"
    ]
    await refused("/put")  # which has no GET
    assert "endpoint 'put'" in caplog.records[1].getMessage()
    sent = await refused("/nowhere")
    assert not denial or sent[0]["status"] == 404
    assert len(caplog.records) == 2


async def test_lifespan_and_websockets() -> None:
    _, app = make()
    inbox = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return inbox.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "lifespan"}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    inbox.append({"type": "websocket.connect"})
    await app({"type": "websocket", "path": "/echo"}, receive, send)
    assert sent[-1]["type"] == "websocket.close"
    with pytest.raises(RuntimeError, match="'tcp'"):
        await app({"type": "tcp"}, receive, send)


# -- mounting and middlewares --------------------------------------------------------------------------------------


async def test_mounted_in_starlette() -> None:
    client, app = make(echo)
    outer = Starlette(routes=[Mount("/{tenant}/api", app=app)])
    async with http(outer) as browser:
        response = await browser.get("/x/api/user/ann/7")
        assert response.json()["params"] == {"tenant": "x", "name": "ann", "n": 7}
        assert (await browser.get("/x/api/-/healthz")).text == "ok"
        assert (await browser.get("/x/api/nowhere")).status_code == 404
    (call,) = client.by_slot.values()
    assert (call.scope["path"], call.scope["root_path"]) == ("/x/api/user/ann/7", "/x/api")


@pytest.mark.parametrize(
    ("root_path", "path", "status"),
    [
        ("/api", "/api/echo", 200),
        ("/api", "/echo", 200),
        ("/api", "/apiecho", 404),
        ("/api/echo", "/api/echo", 404),
        ("", "/echo", 200),
    ],
)
async def test_root_paths(root_path: str, path: str, status: int) -> None:
    _, app = make(echo)
    exchange = Exchange(app, path=path, root_path=root_path).says()
    await exchange.task
    assert exchange.status == status


async def test_middlewares_apply_in_order() -> None:
    def tag(name: str) -> Callable[[Any], Any]:
        def build(app: Any) -> Any:
            async def middleware(scope: Any, receive: Any, send: Any) -> None:
                async def tagging(message: Any) -> None:
                    if message["type"] == "http.response.start":
                        message["headers"].append((b"x-tag", name.encode()))
                    await send(message)

                await app(scope, receive, tagging)

            return middleware

        return build

    _, app = make(lambda call: call.reply("x" * 1000))
    chain = [
        Middleware(CORSMiddleware, allow_origins=["https://there"]),
        tag("outer"),
        Middleware(GZipMiddleware, minimum_size=10),
        tag("inner"),
    ]
    async with http(wrap_middlewares(app, chain)) as browser:
        response = await browser.get("/echo", headers={"Origin": "https://there"})
        assert response.text == "x" * 1000
        assert response.headers["content-encoding"] == "gzip"
        assert response.headers["access-control-allow-origin"] == "https://there"
        assert response.headers.get_list("x-tag") == ["inner", "outer"]
        preflight = {"Origin": "https://there", "Access-Control-Request-Method": "GET"}
        assert (await browser.options("/nowhere", headers=preflight)).status_code == 200


def raises(app: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            raise ValueError("secret")
        await app(scope, receive, send)

    return middleware


@pytest.mark.parametrize("debug", [False, True])
async def test_a_middleware_that_raises(debug: bool, caplog: pytest.LogCaptureFixture) -> None:
    _, app = make(echo)
    async with http(wrap_middlewares(app, [raises], debug=debug)) as browser:
        response = await browser.get("/echo")
    assert response.status_code == 500
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert ("secret" in response.text) == debug
    assert debug or response.text == "Internal Server Error"
    (record,) = caplog.records
    assert record.name == "engine.http" and record.exc_info is not None
    assert f"(request {response.headers['x-request-id']})" in record.getMessage()


async def test_a_middleware_that_raises_late_breaks_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    def late(app: Any) -> Any:
        async def middleware(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            raise ValueError("secret")

        return middleware

    _, app = make(echo)
    exchange = Exchange(wrap_middlewares(app, [late])).says()
    with pytest.raises(StreamBroken):
        await exchange.task
    assert caplog.records[0].exc_info is not None
    request_id = dict(exchange.sent[0]["headers"])[b"x-request-id"].decode()
    assert f"(request {request_id})" in caplog.text


@pytest.mark.parametrize("headers", [None, [None], [(b"x-request-id", None)], [("x-request-id", "text")]])
async def test_a_middleware_that_fails_for_its_own_headers_is_logged(
    headers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        raise ValueError("secret")

    exchange = Exchange(wrap_middlewares(broken, [])).says()
    with pytest.raises(StreamBroken):
        await exchange.task
    assert "failed in a middleware (request " in caplog.text and "secret" in caplog.text


async def test_a_broken_stream_passes_the_guard_without_a_second_record(caplog: pytest.LogCaptureFixture) -> None:
    client, app = make()
    exchange = Exchange(wrap_middlewares(app, [])).says()
    call = await client.calls.get()
    call.item(b"a", encode_head(200, []))
    call.end(failed=True)
    with pytest.raises(StreamBroken):
        await exchange.task
    assert len(caplog.records) == 1


async def test_other_scopes_pass_the_guard() -> None:
    _, app = make()
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.shutdown"}

    async def send(message: Any) -> None:
        sent.append(message)

    await wrap_middlewares(app, [raises])({"type": "lifespan"}, receive, send)
    assert sent == [{"type": "lifespan.shutdown.complete"}]


async def test_paths_are_logged_harmlessly(caplog: pytest.LogCaptureFixture) -> None:
    client, app = make(lambda call: call.slot.fail(errors.NoReplica("none")))
    client.snapshot = snapshot(2, any=("/{rest:path}", ("GET",)))
    exchange = Exchange(app, path="/a\x1b[31m").says()
    await exchange.task
    assert "\x1b" not in caplog.records[0].getMessage()
    assert exchange.status == 503
