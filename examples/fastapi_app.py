"""The engine inside a FastAPI application: it starts and stops with the application's lifespan.

    python examples/fastapi_app.py                       tests itself and exits
    python examples/fastapi_app.py --serve --port 8000   serves with uvicorn

Any ASGI server can run it just as well: uvicorn --app-dir examples fastapi_app:app
"""

import argparse
import asyncio
import os
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from pydantic import BaseModel

from engine import Engine, get_replica_context


class Sentiment:
    """Heavy work that must not run on the web server's event loop. Its replicas are processes of their own."""

    def __init__(self, good_words):
        self.good_words = frozenset(good_words)

    def __call__(self, request):
        words = request.data.lower().split()
        return {"score": sum(word in self.good_words for word in words) / max(len(words), 1), "pid": os.getpid()}


class RawSentiment:
    """What HTTP clients reach without FastAPI: only an `async def` can read a body, the work is left to `Sentiment`."""

    def __init__(self):
        self.sentiment = get_replica_context().get_handle("sentiment")

    async def __call__(self, request):
        return await self.sentiment.call((await request.body()).decode())


@asynccontextmanager
async def lifespan(app):
    # FastAPI is the HTTP server here, so the engine runs none of its own.
    async with Engine(backend="local", http_options={"location": None, "status_details": True}) as engine:
        # These block until the replicas are ready, which is what one wants of a start-up; later on, while requests are
        # served, call them in a thread: await asyncio.to_thread(engine.create_backend, ...)
        engine.create_backend("sentiment", Sentiment, ["good", "great", "fine"], config={"num_replicas": 2})
        engine.create_endpoint("sentiment", backend="sentiment")
        engine.create_backend("raw", RawSentiment)
        engine.create_endpoint("raw", backend="raw", route="/raw", methods=["POST"])
        app.state.sentiment = engine.get_handle("sentiment", sync=False)  # the async handle never blocks the loop
        app.mount("/engine", engine.asgi)  # optional: the routes of endpoints, here /engine/raw
        yield
    # Left: every replica is gone, also when the application is cancelled or fails.


app = FastAPI(lifespan=lifespan)


class Review(BaseModel):
    text: str


@app.post("/reviews")
async def judge(review: Review, request: Request):
    # FastAPI has validated the input; the engine runs the model. A deadline keeps a slow model from piling up requests.
    return await request.app.state.sentiment.options(timeout_s=5).call(review.text)


async def check():
    """Run the application in this process, as a test would: no server, no port."""
    import httpx

    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://app") as client,
    ):
        print(f"this process: pid {os.getpid()}")
        answer = await client.post("/reviews", json={"text": "a good film and a great cast"})
        print(f"POST /reviews: {answer.status_code} {answer.json()}")
        assert answer.json()["pid"] != os.getpid()

        texts = ["fine", "dull", "good story", "good and great and fine"] * 10
        answers = await asyncio.gather(*(client.post("/reviews", json={"text": text}) for text in texts))
        print(f"{sum(answer.status_code == 200 for answer in answers)} of {len(texts)} concurrent requests answered")

        answer = await client.post("/reviews", json={"words": 3})
        print(f"POST /reviews without a text: {answer.status_code}, FastAPI refuses it")
        answer = await client.post("/engine/raw", content="fine weather")
        print(f"POST /engine/raw: {answer.status_code} {answer.json()}")
        assert answer.json()["score"] == 0.5
        answer = await client.get("/engine/-/routes")
        print(f"GET /engine/-/routes: {answer.status_code} {answer.json()}")


if __name__ == "__main__":  # so that a server can import this file without running it; the engine does not need it
    options = argparse.ArgumentParser()
    options.add_argument("--serve", action="store_true", help="keep serving until Ctrl-C")
    options.add_argument("--port", type=int, default=0, help="0 picks a free one, and uvicorn says which")
    chosen = options.parse_args()
    if chosen.serve:
        import uvicorn

        uvicorn.run(app, port=chosen.port)
    else:
        asyncio.run(check())
