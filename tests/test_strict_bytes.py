"""Everything works where Python refuses to compare bytes with text (``python -bb``)."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import urllib.request

from engine import Engine


class Backend:
    def __init__(self):
        self.suffix = b"!"

    def __call__(self, request):
        return [request.method, len(self.suffix)]

    def fail(self):
        raise ValueError("of the backend")


async def asynchronous(request):
    return (await request.body()).decode()


with Engine(backend="local", http_options={"port": 0}) as engine:
    engine.create_backend("b", Backend)
    engine.create_endpoint("e", backend="b", route="/e")
    engine.create_backend("a", asynchronous)
    engine.create_endpoint("a", backend="a", route="/a", methods=["POST"])
    handle = engine.get_handle("e")
    print(handle.call(1), handle.remote(2).result())
    try:
        handle.options(method_name="fail").call()
    except ValueError as error:
        print(error)
    print(urllib.request.urlopen(engine.http_url + "/e").read().decode())
    print(urllib.request.urlopen(engine.http_url + "/a", b"body").read().decode())
"""


def test_a_script_under_bb() -> None:
    done = subprocess.run([sys.executable, "-bb", "-c", SCRIPT], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['GET', 1] ['GET', 1]", "of the backend", '["GET",1]', "body"]
