"""What a backend may return over HTTP, and middlewares around all of it.

Results become responses by their type; a Starlette response is sent as it is. Middlewares are ASGI ones, ready-made or
your own, the first in the list outermost.
"""

import gzip
import json
import time
import urllib.error
import urllib.request

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response

from engine import Engine


def order_tea(request):
    if request.query_params.get("drink") == "coffee":
        raise HTTPException(418, "this is a teapot")  # a refusal with a status of your choice
    return Response('{"order": 17}\n', status_code=201, media_type="application/json", headers={"location": "/tea/17"})


def countdown(request):
    # A generator streams: the client reads every part as soon as it is yielded.
    for number in range(int(request.query_params.get("from", "3")), 0, -1):
        yield f"{number}\n"
        time.sleep(0.1)
    yield "lift-off\n"


def squares(request):
    return [number * number for number in range(1000)]  # neither text, bytes nor a response: sent as JSON


class Timing:
    """A home-made ASGI middleware: takes the application it wraps, and is one."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        started = time.perf_counter()

        async def send_with_header(message):
            if message["type"] == "http.response.start":
                elapsed_ms = (time.perf_counter() - started) * 1000
                message["headers"] = [*message["headers"], (b"x-elapsed-ms", f"{elapsed_ms:.1f}".encode())]
            await send(message)

        await self.app(scope, receive, send_with_header)


middlewares = [
    Timing,
    Middleware(CORSMiddleware, allow_origins=["https://shop.example"]),
    Middleware(GZipMiddleware, minimum_size=1000),
]

with Engine(backend="local", http_options={"port": 0, "middlewares": middlewares}) as engine:
    for backend, route in [(order_tea, "/tea"), (countdown, "/countdown"), (squares, "/squares")]:
        engine.create_backend(backend.__name__, backend)
        engine.create_endpoint(backend.__name__, backend=backend.__name__, route=route)

    def show(path, headers=None):
        """Print the status and the headers that matter here; return the body."""
        request = urllib.request.Request(engine.http_url + path, headers=headers or {})
        try:
            response = urllib.request.urlopen(request)
        except urllib.error.HTTPError as refusal:
            response = refusal  # a status of 400 and above; it reads like any other response
        with response:
            print(f"{path}: {response.status}")
            for name in ("location", "content-type", "content-encoding", "access-control-allow-origin", "x-elapsed-ms"):
                if name in response.headers:
                    print(f"    {name}: {response.headers[name]}")
            return response.read()

    print(f"    {show('/tea').decode().strip()}")
    print(f"    {show('/tea?drink=coffee').decode().strip()}")

    body = show("/squares", {"accept-encoding": "gzip", "origin": "https://shop.example"})
    numbers = json.loads(gzip.decompress(body))
    print(f"    {len(numbers)} squares in {len(body)} compressed bytes, the last one is {numbers[-1]}")

    started = time.perf_counter()
    with urllib.request.urlopen(f"{engine.http_url}/countdown?from=3") as response:
        print(f"/countdown?from=3: {response.status}")
        for line in response:
            print(f"    after {time.perf_counter() - started:.1f} s: {line.decode().strip()}")
