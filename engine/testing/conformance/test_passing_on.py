"""A Starlette request that is passed on through a handle arrives as one."""

from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def describe(request):
    return {
        "starlette": isinstance(request, Request),
        "method": request.method,
        "token": request.headers.get("x-token"),
        "query": dict(request.query_params),
        "body": (await request.body()).decode(),
    }


EXPECTED = {"starlette": True, "method": "POST", "token": "abc", "query": {"a": "b"}, "body": "the body"}
SENT = {"headers": {"X-Token": "abc"}, "params": {"a": "b"}, "content": "the body"}


class SyncFront:
    def __init__(self, back):
        self.back = back

    def __call__(self, request):
        return self.back.call(request)


class AsyncFront:
    def __init__(self, back):
        self.back = back

    async def __call__(self, request):
        return await self.back.call(request)


class ReadingFront(AsyncFront):
    async def __call__(self, request):
        body = await request.body()
        assert body == b"the body"
        return await (await self.back.remote(request))


@pytest.mark.parametrize("front", [SyncFront, AsyncFront, ReadingFront])
def test_a_backend_passes_its_request_on(serve, serve_once, front):
    back = serve_once(describe, route=None)
    served = serve(front, back.handle if front is SyncFront else back.ahandle)
    assert served.http_json("POST", **SENT) == EXPECTED


@pytest.mark.parametrize("front", [SyncFront, AsyncFront])
def test_a_request_of_a_handle_is_passed_on_as_well(serve, serve_once, front):
    async def describe(request):
        assert not isinstance(request, Request)
        return request.method, request.headers["x-token"], request.query_params["x"], request.data

    back = serve_once(describe, route=None)
    served = serve(front, back.handle if front is SyncFront else back.ahandle, route=None)
    handle = served.handle.options(http_method="PUT", http_headers={"X-Token": "abc"})
    assert handle.call({1, 2}, x=3) == ("PUT", "abc", 3, {1, 2})


@pytest.mark.anyio
async def test_an_application_passes_its_request_on(serve_once):
    """The caller's own web framework hands the request of its client to a backend."""
    back = serve_once(describe, route=None)

    async def endpoint(request):
        return JSONResponse(await back.ahandle.call(request))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.post("/", **SENT)
    assert response.json() == EXPECTED


@pytest.mark.anyio
async def test_a_sync_handle_needs_the_body_read_first(serve_once):
    back = serve_once(describe, route=None)

    async def endpoint(request):
        with pytest.raises(ValueError, match="body"):
            back.handle.remote(request)
        await request.body()
        return JSONResponse(await back.handle.remote(request))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.post("/", **SENT)
    assert response.json() == EXPECTED
