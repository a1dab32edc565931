"""`Engine.asgi`: the ingress as an application inside the user's own."""

from __future__ import annotations

from contextlib import asynccontextmanager

import anyio.to_thread
import fastapi
import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

pytestmark = pytest.mark.anyio


@pytest.fixture(
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
)
def anyio_backend(request):
    return request.param


async def describe(request):
    return {"path": request.url.path, "body": (await request.body()).decode(), "params": request.path_params}


def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
async def test_mounted_beside_own_routes(serve, engine, request, kind):
    served = serve(describe, route=f"/{request.node.name}/{{name}}")
    path = served.route.replace("{name}", "x")
    if kind == "starlette":

        async def own(request):
            return PlainTextResponse("own")

        app = Starlette(routes=[Route("/own", own), Mount("/models", app=engine.asgi)])
    else:
        app = fastapi.FastAPI()
        app.get("/own")(lambda: "own")
        app.mount("/models", engine.asgi)
    async with client_of(app) as client:
        answer = await client.post(f"/models{path}", content="the body")
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"path": f"/models{path}", "body": "the body", "params": {"name": "x"}}
        assert "own" in (await client.get("/own")).text
        assert (await client.get("/models/nowhere")).status_code == 404
        assert (await client.delete(f"/models{path}")).status_code == 405
        assert (await client.get("/models/-/healthz")).status_code == 200


async def test_as_the_whole_application(serve, engine):
    assert engine.asgi is engine.asgi
    served = serve(describe)
    async with client_of(engine.asgi) as client:
        assert (await client.get(served.route)).json()["path"] == served.route


async def test_errors_and_methods(serve, engine):
    class Backend:
        def __call__(self, request):
            raise ValueError("the secret")

        def other(self, request):
            return "other"

    served = serve(Backend)
    async with client_of(engine.asgi) as client:
        response = await client.get(served.route)
        assert (response.status_code, response.text) == (500, "Internal Server Error")
        assert (await client.get(served.route, headers={"X-SERVE-CALL-METHOD": "other"})).text == "other"


@pytest.mark.parametrize("options", [{"location": "NoServer"}, {"location": None}, {"host": None}])
async def test_without_a_server_of_its_own(own_engine, options):
    def build():
        engine = own_engine(**options)
        engine.create_backend("describe", describe)
        engine.create_endpoint("describe", backend="describe", route="/describe")
        return engine

    engine = await anyio.to_thread.run_sync(build)
    assert engine.http_url is None
    async with client_of(engine.asgi) as client:
        assert (await client.get("/describe")).json()["path"] == "/describe"
        await anyio.to_thread.run_sync(engine.delete_endpoint, "describe")
        assert (await client.get("/describe")).status_code == 404
    await anyio.to_thread.run_sync(engine.shutdown)


async def test_inside_the_lifespan_of_an_application(adapter, leaves_nothing):
    """The engine starts and ends with the application that embeds it."""

    @asynccontextmanager
    async def lifespan(app):
        async with adapter.engine(location=None) as engine:
            await anyio.to_thread.run_sync(engine.create_backend, "describe", describe)
            await anyio.to_thread.run_sync(
                lambda: engine.create_endpoint("describe", backend="describe", route="/describe")
            )
            app.mount("/models", engine.asgi)
            app.state.handle = engine.get_handle("describe", sync=False)
            yield

    app = fastapi.FastAPI(lifespan=lifespan)

    @app.get("/by-handle")
    async def by_handle(request: fastapi.Request):
        return await app.state.handle.call(request)

    async with app.router.lifespan_context(app), client_of(app) as client:
        assert (await client.get("/by-handle")).json()["path"] == "/by-handle"
        assert (await client.get("/models/describe")).json()["path"] == "/models/describe"


async def test_mounted_streams_arrive_whole(serve, engine):
    def numbers(request):
        for number in range(500):
            yield f"{number}\n"

    served = serve(numbers)
    async with client_of(engine.asgi) as client:
        assert (await client.get(served.route)).text.split() == [str(number) for number in range(500)]
