"""Try a new version on some of the callers, then on copies of everybody's calls that nobody waits for."""

import time
import urllib.request
from collections import Counter

from engine import Engine


class Model:
    def __init__(self, version):
        self.version = version
        self.seen = 0

    def __call__(self, request):
        self.seen += 1
        return self.version

    def calls_seen(self):
        return self.seen


with Engine(backend="local", http_options={"port": 0}) as engine:
    engine.create_backend("model:v1", Model, "v1")
    # Copies never queue: one that finds every replica full is dropped. So v2 may hold as many as come at once here.
    engine.create_backend("model:v2", Model, "v2", config={"max_concurrent_queries": 200})
    engine.create_endpoint("model", backend="model:v1", route="/model")  # everything goes to v1
    handle = engine.get_handle("model")

    def answers(how_many):
        return Counter(engine.get([handle.remote() for _ in range(how_many)]))

    print(f"v1 alone:          {dict(answers(200))}")

    # A split. Weights must sum to 1. It holds for every caller, in every process, from its next call on.
    engine.set_traffic("model", {"model:v1": 0.8, "model:v2": 0.2})
    split = answers(200)
    print(f"80 % v1, 20 % v2:  v1={split['v1']} v2={split['v2']}")

    # Sticky: calls with the same shard key meet the same version as long as the weights stay.
    for user in ("ada", "grace", "alan", "edsger", "barbara"):
        sticky = handle.options(shard_key=user)
        print(f"    {user + ':':<10} {dict(Counter(sticky.call() for _ in range(10)))}", end=" ")
        # The same key, spelled for HTTP, leads to the same version.
        request = urllib.request.Request(f"{engine.http_url}/model", headers={"X-SERVE-SHARD-KEY": user})
        with urllib.request.urlopen(request) as response:
            print(f"and over HTTP {response.read().decode()}")

    # A shadow: v1 answers, and v2 gets a copy of every call. Its answers are dropped, and so are its errors.
    engine.create_endpoint("v2 only", backend="model:v2")  # no route: for handles
    ask_v2 = engine.get_handle("v2 only").options(method_name="calls_seen")
    engine.set_traffic("model", {"model:v1": 1.0})
    engine.shadow_traffic("model", "model:v2", 1.0)
    before = ask_v2.call()
    print(f"v2 as a shadow:    {dict(answers(100))}")
    # Copies travel off the caller's path, so they may come a moment later.
    deadline = time.monotonic() + 5
    while (copies := ask_v2.call() - before) < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    print(f"    v2 saw {copies} copies")

    # Good enough: everybody moves to v2, and v1 can go.
    engine.shadow_traffic("model", "model:v2", 0.0)
    engine.set_traffic("model", {"model:v2": 1.0})
    engine.delete_backend("model:v1")
    print(f"v2 alone:          {dict(answers(100))}")
