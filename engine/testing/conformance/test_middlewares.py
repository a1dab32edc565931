"""ASGI middlewares, Starlette's and home-made ones, applied in order."""

from __future__ import annotations

import threading

import pytest
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse

from engine.seam.scribe import scribe
from engine.testing.instruments import PATIENCE_S, eventually


class Tag:
    """Adds its name to the request's ``x-seen`` headers on the way in and the answer's ``x-left`` on the way out."""

    def __init__(self, app, name):
        self.app = app
        self.name = name.encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            scope = {**scope, "headers": [*scope["headers"], (b"x-seen", self.name)]}

        async def send_tagged(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-left", self.name)]}
            await send(message)

        await self.app(scope, receive, send_tagged)


class Door:
    """Answers some requests itself, raises for others, and lets the rest pass."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["query_string"] == b"door=answers":
            await PlainTextResponse("from the door", status_code=401)(scope, receive, send)
        elif scope["type"] == "http" and scope["query_string"] == b"door=raises":
            raise RuntimeError("the secret of the door")
        else:
            await self.app(scope, receive, send)


class Visitor:
    """A class of the program itself."""

    def __init__(self, name):
        self.name = name


class Welcome:
    """Leaves what is known of the client to those inside, as middlewares for sessions and authentication do."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            scope["user"] = Visitor("Ada")
            scope["session"] = {"visits": 3}
            scope.setdefault("state", {}).update(tenant="acme", lock=threading.Lock())
        await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def engine(adapter):
    """An engine with a chain of middlewares, all of which every test of this module passes."""
    middlewares = [
        Middleware(CORSMiddleware, allow_origins=["https://example.org"], allow_methods=["GET"]),
        Middleware(GZipMiddleware, minimum_size=500),
        Middleware(Tag, name="outer"),
        Door,
        lambda app: Tag(app, "inner"),
        Welcome,
    ]
    with adapter.engine(middlewares=middlewares) as engine:
        yield engine


def seen(request):
    return request.headers.getlist("x-seen")


def test_order(serve):
    response = serve(seen).http()
    assert response.json() == ["outer", "inner"]
    assert response.headers.get_list("x-left") == ["inner", "outer"]


def test_what_they_leave_reaches_backends(serve):
    def known(request):
        return [request.user.name, request.session, request.state.tenant, hasattr(request.state, "lock")]

    assert serve(known).http_json() == ["Ada", {"visits": 3}, "acme", False]


def test_they_do_not_touch_handles(serve):
    assert serve(seen).call() == []


def test_one_that_answers_itself(serve):
    response = serve(seen).http(params={"door": "answers"})
    assert (response.status_code, response.text) == (401, "from the door")
    assert response.headers.get_list("x-left") == ["outer"]


def test_one_that_raises(serve, caplog):
    served = serve(seen)
    for given in ({}, {"X-Request-Id": "mine-7"}):
        response = served.http(params={"door": "raises"}, headers=given)
        assert (response.status_code, response.text) == (500, "Internal Server Error")
        request_id = response.headers["x-request-id"]
        eventually(lambda request_id=request_id: f"failed in a middleware (request {request_id})" in caplog.text)
    assert request_id == "mine-7"
    scribe().flush(PATIENCE_S)
    assert "the secret of the door" in caplog.text
    assert served.http().status_code == 200


def test_cors(serve):
    served = serve(seen, methods=["GET"])
    response = served.http(headers={"Origin": "https://example.org"})
    assert response.headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-origin" not in served.http(headers={"Origin": "https://example.com"}).headers
    preflight = served.http(
        "OPTIONS", headers={"Origin": "https://example.org", "Access-Control-Request-Method": "GET"}
    )
    assert preflight.status_code == 200
    assert "GET" in preflight.headers["access-control-allow-methods"]


def test_gzip(serve):
    served = serve(lambda request: "a long text " * 1000)
    response = served.http(headers={"Accept-Encoding": "gzip"})
    assert response.headers["content-encoding"] == "gzip"
    assert int(response.headers["content-length"]) < 1000
    assert response.text == "a long text " * 1000
    assert "content-encoding" not in served.http(headers={"Accept-Encoding": "identity"}).headers
    assert "content-encoding" not in serve(seen).http(headers={"Accept-Encoding": "gzip"}).headers


def test_streams_pass_through(serve, client, gate):
    def backend(request):
        yield "first"
        gate.pass_through()
        yield "second"

    with client.stream("GET", serve(backend).url, headers={"Accept-Encoding": "identity"}) as response:
        parts = response.iter_text()
        assert next(parts) == "first"
        gate.open()
        assert "".join(parts) == "second"


def test_error_answers_pass_through_them(serve):
    served = serve(seen)
    response = served.http(suffix="/nowhere")
    assert response.status_code == 404
    assert response.headers.get_list("x-left") == ["inner", "outer"]


def test_one_that_raises_with_debug(own_engine, client):
    engine = own_engine(middlewares=[Door], debug=True)
    engine.create_backend("seen", seen)
    engine.create_endpoint("seen", backend="seen", route="/seen")
    response = client.get(f"{engine.http_url}/seen", params={"door": "raises"})
    assert response.status_code == 500
    assert "the secret of the door" in response.text
