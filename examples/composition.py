"""Backends that call backends: handles work inside replicas as they do outside.

    tag_words  ->  clean (sync)                  a sync backend holds a sync handle
    report     ->  clean, count (at once)        an async backend holds async handles

A replica calls the other backend's replicas directly; neither this script nor any central process stands between.
"""

import asyncio
import json
import urllib.parse
import urllib.request

from engine import Engine, get_replica_context


def clean(request):
    return request.data.strip().lower()


def count(request):
    return len(request.data.split())


class TagWords:
    """Gets a handle as a constructor argument, like any other value."""

    def __init__(self, cleaner):
        self.cleaner = cleaner

    def __call__(self, request):
        text = self.cleaner.call(request.data)  # blocks this replica until the answer is there
        return [f"#{word}" for word in text.split()]


class Report:
    """Finds its handles by name. An async backend gets async handles: a sync one would block its event loop."""

    def __init__(self):
        context = get_replica_context()
        self.clean = context.get_handle("clean")
        self.count = context.get_handle("count")
        self.replica = context.replica_tag

    async def __call__(self, request):
        text = request.query_params["text"]
        # Both calls are under way together, and while they are this replica takes other requests.
        cleaned, words = await asyncio.gather(self.clean.call(text), self.count.call(text))
        return {"text": cleaned, "words": words, "by": self.replica}


with Engine(backend="local", http_options={"port": 0}) as engine:
    for function in (clean, count):
        engine.create_backend(function.__name__, function)
        engine.create_endpoint(function.__name__, backend=function.__name__)

    engine.create_backend("tag_words", TagWords, engine.get_handle("clean"))
    engine.create_endpoint("tag_words", backend="tag_words")
    print("sync in sync:   ", engine.get_handle("tag_words").call("  Bold NEW World "))

    engine.create_backend("report", Report)
    engine.create_endpoint("report", backend="report", route="/report")
    text = urllib.parse.quote("  All is WELL ")
    with urllib.request.urlopen(f"{engine.http_url}/report?text={text}") as response:
        print("async in async: ", json.load(response))

    # Without a backend in between: a ref given to remote() is resolved before the callee sees it.
    cleaned = engine.get_handle("clean").remote("  one Two three  ")
    print("a ref as input: ", engine.get(engine.get_handle("count").remote(cleaned)), "words")
