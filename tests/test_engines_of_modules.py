"""Engines that a module creates where it is imported: its replicas import it, too, and must not create the next."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import run_python

PRELUDE = """
import os, pathlib, pickle, sys

_imports = pathlib.Path(__file__).with_suffix(".imports")
with _imports.open("a") as file:
    file.write(f"{os.getpid()}\\n")
if len(_imports.read_text().split()) > 12:
    os._exit(9)  # each makes the next

from engine import Engine, errors
"""

APP = f"""{PRELUDE}
def double(request):
    return 2 * request.data

class Front:
    def __init__(self):
        self.given = handle

    def __call__(self, request):
        by_name = engine.get_handle("double").call(request.data)
        by_ref = engine.get([engine.get_handle("double").remote(request.data)])
        by_pickle = pickle.loads(pickled).call(request.data)
        return handle.call(request.data), self.given.call(request.data), by_name, by_pickle, *by_ref

    def change(self):
        engine.delete_endpoint("double")

engine = Engine(os.environ["ADAPTER"], http_options={{"host": "127.0.0.1", "port": 0}})
engine.create_backend("double", double, config={{"num_replicas": 2}})
engine.create_endpoint("double", backend="double", route="/double")
engine.update_backend("double", double)
engine.update_backend_config("double", engine.get_backend_config("double"))
assert engine.list_backends().keys() | engine.list_endpoints().keys() | engine.statistics().keys()
assert engine.http_url.startswith("http://127.0.0.1:")
assert callable(engine.asgi)
handle = engine.get_handle("double")
pickled = pickle.dumps(handle)  # for processes that are forked from this one, say
engine.create_backend("front", Front)
engine.create_endpoint("front", backend="front")
"""

USE = """
import app
try:
    assert app.engine.get_handle("front").call(4) == (8, 8, 8, 8, 8)
    try:
        app.engine.get_handle("front").options(method_name="change").call()
    except app.errors.EngineError as error:
        assert "for the application's own process" in str(error), error
    else:
        assert os.environ["ADAPTER"] == "inline"
finally:
    app.engine.shutdown()
"""


def run(directory: Path, program: str, adapter: str = "local", **options: object) -> tuple[str, int]:
    """Run a program beside its modules; returns what it printed, and how often ``app`` was imported."""
    environment = {**os.environ, "ADAPTER": adapter, **dict[str, str](options.pop("env", {}))}  # type: ignore[call-overload]
    output = run_python("-c", "import os\n" + program, cwd=directory, env=environment, **options)  # type: ignore[arg-type]
    return output, len((directory / "app.imports").read_text().split())


@pytest.mark.parametrize("adapter", ["local", "inline"])
def test_an_engine_of_a_module(tmp_path: Path, adapter: str) -> None:
    (tmp_path / "app.py").write_text(APP)
    _, imports = run(tmp_path, USE, adapter)
    assert imports == (6 if adapter == "local" else 1), "the program, and each replica"


def test_an_engine_of_a_preloaded_module(tmp_path: Path) -> None:
    text = APP.replace('Engine(os.environ["ADAPTER"]', 'Engine(LocalAdapter(preload=["app"])')
    (tmp_path / "app.py").write_text("from engine_local import LocalAdapter\n" + text)
    _, imports = run(tmp_path, USE)
    assert imports == 2, "the program, and the fork server"


def test_an_engine_whose_ingress_imports_the_module(tmp_path: Path) -> None:
    """A middleware of the module takes the ingress there, and may make calls from it."""
    text = f"""{PRELUDE}
from starlette.responses import PlainTextResponse

class Answering:
    def __init__(self, app):
        pass

    async def __call__(self, scope, receive, send):
        number = await engine.get_handle("double", sync=False).call(21)
        await PlainTextResponse(str(number))(scope, receive, send)

def double(request):
    return 2 * request.data

engine = Engine(http_options={{"host": "127.0.0.1", "port": 0, "middlewares": [Answering]}})
engine.create_backend("double", double)
engine.create_endpoint("double", backend="double", route="/double")
"""
    (tmp_path / "app.py").write_text(text)
    program = """
import app, urllib.request
with urllib.request.urlopen(app.engine.http_url + "/double") as answer:
    print(answer.read().decode())
app.engine.shutdown()
"""
    output, imports = run(tmp_path, program)
    assert output.strip() == "42"
    assert imports == 3


def test_a_web_application_with_an_engine_mounted(tmp_path: Path) -> None:
    """As servers do it: imported while their loop runs."""
    (tmp_path / "app.py").write_text(
        f"""{PRELUDE}
from fastapi import FastAPI

def shout(request):
    return "HELLO"

engine = Engine(http_options={{"location": None}})
engine.create_backend("shout", shout)
engine.create_endpoint("shout", backend="shout", route="/shout")
handle = engine.get_handle("shout", sync=False)
web = FastAPI()
web.mount("/engine", engine.asgi)

@web.get("/greet")
async def greet():
    return await handle.call(1)
"""
    )
    program = """
import asyncio, httpx

async def serve():
    import app
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app.web), base_url="http://app")
    async with client:
        print((await client.get("/greet")).json(), (await client.get("/engine/shout")).text)
    await asyncio.to_thread(app.engine.shutdown)

asyncio.run(serve())
"""
    output, imports = run(tmp_path, program)
    assert output.split() == ["HELLO", "HELLO"]
    assert imports == 2


@pytest.mark.parametrize("adapter", ["local", "inline"])
def test_errors_of_the_module_do_not_wait_for_its_import(tmp_path: Path, adapter: str) -> None:
    (tmp_path / "app.py").write_text(
        f"""{PRELUDE}
class Odd(ValueError):
    def __init__(self, number):
        super().__init__(number)

class Refusing:
    def __init__(self):
        raise Odd(7)

def take(request):
    raise request.data

engine = Engine(os.environ["ADAPTER"], http_options={{"location": None}})
caught = None
try:
    engine.create_backend("refusing", Refusing)
except Odd as error:
    caught = error
if {adapter!r} == "inline" or caught:
    assert caught.args == (7,)
"""
    )
    _, imports = run(tmp_path, "import app; app.engine.shutdown(); assert type(app.caught) is app.Odd", adapter)
    assert imports == (2 if adapter == "local" else 1)


def test_arguments_of_the_module_do_not_wait_for_its_import(tmp_path: Path) -> None:
    text = f"""{PRELUDE}
class Number:
    value = 20

def double(request):
    return 2 * request.data.value

engine = Engine("inline", http_options={{"location": None}})
engine.create_backend("double", double)
engine.create_endpoint("double", backend="double")
assert engine.get_handle("double").call(Number()) == 40
engine.shutdown()
"""
    (tmp_path / "app.py").write_text(text)
    assert run(tmp_path, "import app") == ("", 1)


def test_a_call_that_needs_the_backend_to_be_there_is_refused(tmp_path: Path) -> None:
    text = f"""{PRELUDE}
def double(request):
    return 2 * request.data

with Engine(http_options={{"location": None}}) as engine:
    engine.create_backend("double", double)
    engine.create_endpoint("double", backend="double")
    engine.get_handle("double").call(1)
"""
    (tmp_path / "app.py").write_text(text)
    program = """
from engine import errors
try:
    import app
except errors.EngineError as error:
    print(error)
"""
    output, imports = run(tmp_path, program)
    assert "a call was made while a replica imports the module that its backend comes from" in output
    assert imports == 2


# -- multiprocessing -----------------------------------------------------------------------------------------------

SPAWNING = f"""{PRELUDE}
import multiprocessing

def kind(number):
    return repr(engine).endswith("inert>")

class Pooled:
    def __init__(self):
        self.pool = multiprocessing.get_context("spawn").Pool(1)

    def __call__(self, request):
        return self.pool.map(kind, [1])

    def __del__(self):
        self.pool.terminate()

engine = Engine(http_options={{"location": None}})
engine.create_backend("pooled", Pooled)
engine.create_endpoint("pooled", backend="pooled")
handle = engine.get_handle("pooled")
"""


def test_what_a_replica_spawns_imports_the_module(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(SPAWNING)
    output, imports = run(tmp_path, "import app; print(app.handle.call()); app.engine.shutdown()")
    assert output.strip() == "[True]"
    assert imports == 3


def test_a_program_that_a_replica_starts_has_engines_of_its_own(tmp_path: Path) -> None:
    """Also in what it spawns by `multiprocessing`: that is not the replica's."""
    (tmp_path / "other.py").write_text(
        """
from engine import Engine

with Engine("inline", http_options={"location": None}) as engine:
    engine.create_backend("own", lambda request: "its own")
    engine.create_endpoint("own", backend="own")
    print(engine.get_handle("own").call())
"""
    )
    (tmp_path / "tool.py").write_text(
        """
import importlib, multiprocessing

if __name__ == "__main__":
    import other
    spawned = multiprocessing.get_context("spawn").Process(target=importlib.import_module, args=("other",))
    spawned.start()
    spawned.join()
"""
    )
    (tmp_path / "app.py").write_text(
        f"""{PRELUDE}
import subprocess

def start(request):
    return subprocess.run([sys.executable, "tool.py"], stdout=subprocess.PIPE, text=True, check=True).stdout

engine = Engine(http_options={{"location": None}})
engine.create_backend("start", start)
engine.create_endpoint("start", backend="start")
handle = engine.get_handle("start")
"""
    )
    output, imports = run(tmp_path, "import app; print(app.handle.call()); app.engine.shutdown()")
    assert output.splitlines()[:2] == ["its own", "its own"]
    assert imports == 2


def test_what_a_program_spawns_imports_its_main_module_again(tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(
        f"""{PRELUDE}
import multiprocessing

def double(request):
    return 2 * request.data

def work(passed_on):
    try:
        handle.call(1)
    except errors.EngineError as error:
        return passed_on.call(4), repr(engine), str(error)

engine = Engine(http_options={{"location": None}})
engine.create_backend("double", double)
engine.create_endpoint("double", backend="double")
handle = engine.get_handle("double")

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answer, shown, error = pool.apply(work, (handle,))
    assert (answer, shown) == (8, "<Engine of this worker, inert>"), (answer, shown)
    assert "under `if __name__ == '__main__':`" in error
    engine.shutdown()
"""
    )
    run_python(str(script))
    assert len((tmp_path / "app.imports").read_text().split()) == 2
