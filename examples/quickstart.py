"""A class of yours answers from other processes: through a Python handle and over HTTP.

    python examples/quickstart.py                       shows both and exits
    python examples/quickstart.py --serve --port 8000   goes on serving until Ctrl-C
    python examples/quickstart.py --backend inline      the same without any other process
    python examples/quickstart.py --backend ray         the same on a Ray cluster, or on a Ray that it starts itself

Nothing but the package itself is needed (for Ray: pip install "engineroom[ray]"), and no `if __name__ == "__main__"`.
"""

import argparse
import json
import os
import threading
import urllib.request

from engine import Engine


class Greeter:
    """Every replica makes one instance, in its own process, and keeps it: the place for whatever is slow to load."""

    def __init__(self, greeting):
        self.greeting = greeting
        self.answered = 0

    def __call__(self, request):
        # A handle's call and an HTTP request read alike: here both may carry ?name=...
        name = request.query_params.get("name", "world")
        self.answered += 1
        return {"text": f"{self.greeting}, {name}!", "pid": os.getpid(), "answered": self.answered}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--serve", action="store_true", help="keep serving until Ctrl-C")
    options.add_argument(
        "--backend", choices=["local", "inline", "ray"], default="local", help="where the replicas run"
    )
    options.add_argument("--port", type=int, default=0, help="0 picks a free one")
    chosen = options.parse_args()

    with Engine(backend=chosen.backend, http_options={"port": chosen.port}) as engine:
        # A backend is what runs; an endpoint is the name, and here also the path, by which callers reach it.
        engine.create_backend("greeter", Greeter, "Hello", config={"num_replicas": 2})
        engine.create_endpoint("greet", backend="greeter", route="/greet")
        print(f"this process       pid {os.getpid()}")

        handle = engine.get_handle("greet")
        answer = engine.get(handle.remote(name="Ada"))  # remote() returns at once, get() waits
        print(f"through a handle   {answer['text']:<14} from pid {answer['pid']}")

        url = f"{engine.http_url}/greet"
        with urllib.request.urlopen(f"{url}?name=Grace") as response:
            answer = json.load(response)
        print(f"over HTTP          {answer['text']:<14} from pid {answer['pid']}")

        # Forty calls at once: the replicas share them, and each of them counts its own in an attribute.
        answers = engine.get([handle.remote(name=f"caller {number}") for number in range(40)])
        for pid in sorted({answer["pid"] for answer in answers}):
            answered = max(answer["answered"] for answer in answers if answer["pid"] == pid)
            print(f"replica            pid {pid} has answered {answered} calls")

        if chosen.serve:
            print(f"\nserving; try:      curl '{url}?name=Alan'      (Ctrl-C ends it)", flush=True)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                print()
    print("shut down          nothing is left running")


main()
