"""FastAPI on uvicorn, with its model on a Ray cluster: the web server stays small, the replicas go where there is room.

    python examples/fastapi_ray.py                       serves, asks itself and exits
    python examples/fastapi_ray.py --serve --port 8000   serves until Ctrl-C

Uses the Ray that runs on this machine, or that RAY_ADDRESS names; if there is none, it starts one and stops it again.
For a cluster of several machines: ray start --head here, ray start --address=... on the others, and the same command.
"""

import argparse
import asyncio
import os
import threading
from contextlib import asynccontextmanager

import ray
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel

from engine import Engine


class Sentiment:
    """The model. Every replica is an actor, on any node, and has half of a processor counted as its own."""

    def __init__(self, good_words):
        self.good_words = frozenset(good_words)

    def __call__(self, request):
        words = request.data.lower().split()
        return {"score": sum(word in self.good_words for word in words) / max(len(words), 1), "pid": os.getpid()}


@ray.remote
def best_of(*results):
    """A task of Ray's: refs that it is given arrive as their results."""
    return max(result["score"] for result in results)


@asynccontextmanager
async def lifespan(app):
    async with Engine(backend="ray", http_options={"location": None}) as engine:
        engine.create_backend(
            "sentiment",
            Sentiment,
            ["good", "great", "fine"],
            config={"num_replicas": 2},
            ray_actor_options={"num_cpus": 0.5},
        )
        engine.create_endpoint("sentiment", backend="sentiment")
        app.state.sentiment = engine.get_handle("sentiment", sync=False)
        yield


app = FastAPI(lifespan=lifespan)


class Review(BaseModel):
    text: str


class Reviews(BaseModel):
    texts: list[str]


@app.post("/reviews")
async def judge(review: Review, request: Request):
    # The shortest way to a result: straight to a replica, on whichever node it is, and not by way of Ray.
    return await request.app.state.sentiment.options(timeout_s=5).call(review.text)


@app.post("/best")
async def best(reviews: Reviews, request: Request):
    # What remote() gives is a ray.ObjectRef, so other code on Ray can take it from here.
    refs = [await request.app.state.sentiment.remote(text) for text in reviews.texts]
    return {"best": await best_of.remote(*refs)}


async def ask(url):
    """Be the client."""
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        answer = await client.post("/reviews", json={"text": "a good film and a great cast"})
        print(f"POST /reviews: {answer.status_code} {answer.json()}")
        assert answer.json()["pid"] != os.getpid()

        texts = ["fine", "dull", "good story", "good and great and fine"] * 10
        answers = await asyncio.gather(*(client.post("/reviews", json={"text": text}) for text in texts))
        print(f"{sum(answer.status_code == 200 for answer in answers)} of {len(texts)} concurrent requests answered")

        answer = await client.post("/best", json={"texts": ["dull", "good story", "so so"]})
        print(f"POST /best: {answer.status_code} {answer.json()}")


def check():
    """Serve in a thread, as uvicorn would from the command line, and ask from here."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.05)
            if not thread.is_alive():
                raise SystemExit("the server did not start")
        host, port = server.servers[0].sockets[0].getsockname()
        print(f"this process: pid {os.getpid()}")
        asyncio.run(ask(f"http://{host}:{port}"))
    finally:
        server.should_exit = True
        thread.join()
    print("shut down: nothing of the engine is left on the cluster")


if __name__ == "__main__":  # so that a server can import this file without running it; the engine does not need it
    options = argparse.ArgumentParser()
    options.add_argument("--serve", action="store_true", help="keep serving until Ctrl-C")
    options.add_argument("--port", type=int, default=0, help="0 picks a free one, and uvicorn says which")
    chosen = options.parse_args()
    if chosen.serve:
        uvicorn.run(app, port=chosen.port)
    else:
        check()
