"""Every example runs to its end as a user would run it, prints what it promises, and complains about nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray_cluster import ENVIRONMENT

EXAMPLES = Path(__file__).parent.parent / "examples"
# An example is done within seconds; a machine with much else to do may take longer, above all to import scikit-learn.
LIMIT_S = 100

pytestmark = pytest.mark.timeout(LIMIT_S + 20)

# What each example needs beyond `.[test]`, and lines that its output must have, in this order, as regular expressions.
EXPECTED: dict[str, tuple[list[str], list[str]]] = {
    "quickstart.py": (
        [],
        [
            r"this process +pid \d+",
            r"through a handle +Hello, Ada! +from pid \d+",
            r"over HTTP +Hello, Grace! +from pid \d+",
            r"replica +pid \d+ has answered \d+ calls",
            r"shut down +nothing is left running",
        ],
    ),
    "digits.py": (
        ["sklearn"],
        [
            r"trained on \d+ images, 300 kept for the test",
            r"by handle: 300 images, accuracy 0\.9\d+",
            r"over HTTP: 100 images, accuracy (0\.9\d+|1\.000)",
        ],
    ),
    "responses_and_middleware.py": (
        [],
        [
            r"/tea: 201",
            r"    location: /tea/17",
            r"    content-type: application/json",
            r"    x-elapsed-ms: [\d.]+",
            r"/tea\?drink=coffee: 418",
            r"    this is a teapot",
            r"/squares: 200",
            r"    content-encoding: gzip",
            r"    access-control-allow-origin: https://shop.example",
            r"    1000 squares in \d+ compressed bytes, the last one is 998001",
            r"/countdown\?from=3: 200",
            r"    after [\d.]+ s: 3",
            r"    after [\d.]+ s: lift-off",
        ],
    ),
    "methods.py": (
        [],
        [
            r"from Python:  \{'owner': 'Ada', 'balance': 100\}",
            r"withdraw 30:  70 left",
            r"deposit 5:    \{'balance': 75\}",
            r"withdraw 500: InsufficientFunds: Ada has 75, not 500",
            r"_audit:       MethodNotFound: .*_audit.*",
            r"over HTTP:    \{'balance': 100\}",
            r"_audit:       HTTP status 400",
        ],
    ),
    "ab_and_shadow.py": (
        [],
        [
            r"v1 alone:          \{'v1': 200\}",
            r"80 % v1, 20 % v2:  v1=1\d\d v2=\d+",
            r"    ada: +\{'(v\d)': 10\} and over HTTP \1",
            r"    barbara: +\{'(v\d)': 10\} and over HTTP \1",
            r"v2 as a shadow:    \{'v1': 100\}",
            r"    v2 saw 100 copies",
            r"v2 alone:          \{'v2': 100\}",
        ],
    ),
    "batching.py": (
        ["numpy"],
        [
            r"400 calls were computed in \d+ batches of up to \d+",
            r"every caller got its own score, the first five are \[.*\]",
            r"a single call is a batch of 1",
        ],
    ),
    "composition.py": (
        [],
        [
            r"sync in sync:    \['#bold', '#new', '#world'\]",
            r"async in async:  \{'text': 'all is well', 'words': 3, 'by': 'report#\d+'\}",
            r"a ref as input:  3 words",
        ],
    ),
    "fastapi_app.py": (
        ["fastapi", "httpx"],
        [
            r"this process: pid \d+",
            r"POST /reviews: 200 \{'score': 0\.\d+, 'pid': \d+\}",
            r"40 of 40 concurrent requests answered",
            r"POST /reviews without a text: 422, .*",
            r"POST /engine/raw: 200 \{'score': 0\.5, 'pid': \d+\}",
            r"GET /engine/-/routes: 200 \{'/raw': .*\}",
        ],
    ),
    "fastapi_ray.py": (
        ["fastapi", "httpx", "ray", "uvicorn"],
        [
            r"this process: pid \d+",
            r"POST /reviews: 200 \{'score': 0\.\d+, 'pid': \d+\}",
            r"40 of 40 concurrent requests answered",
            r"POST /best: 200 \{'best': 0\.5\}",
            r"shut down: nothing of the engine is left on the cluster",
        ],
    ),
    "flask_app.py": (
        ["flask"],
        [
            r"GET /factors/1001: 200 \{'factors': \[7, 11, 13\], 'pid': \d+\} \(this is pid \d+\)",
            r"GET /many\?numbers=12,97,360: \{'12': \[2, 2, 3\], '360': \[2, 2, 2, 3, 3, 5\], '97': \[97\]\}",
            r"40 requests from 8 threads: 40 answered with 200",
        ],
    ),
    "subprocess_adapter.py": (
        [],
        [
            r"process \d+ makes an engine",
            r"Hello, Ada! This is process \d+\.",
            r"Hello, Grace! This is process \d+\.",
            r"Hello, Alan! This is process \d+\.",
        ],
    ),
    "test_my_backend.py": ([], [r"12 passed in .*"]),
}


def need(*modules: str) -> None:
    """Skip the test if a package of the extra `examples` is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install '.[examples]'")


def on_cluster(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of an example that finds the session's Ray cluster."""
    return {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": request.getfixturevalue("ray_cluster").address}


def command(name: str) -> list[str]:
    """How a user runs an example."""
    # Warnings that only a destructor can give would otherwise go unnoticed.
    python = [sys.executable, "-W", "always::ResourceWarning"]
    if name.startswith("test_"):
        return [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", str(EXAMPLES / name)]
    return [*python, str(EXAMPLES / name)]


def test_every_example_is_listed_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    modules, lines = EXPECTED[name]
    need(*modules)
    environment = on_cluster(request) if "ray" in modules else None
    done = subprocess.run(command(name), cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    output = f"{done.stdout}\n--- standard error:\n{done.stderr}"
    assert done.returncode == 0, output
    assert done.stderr == "", output
    printed = iter(done.stdout.splitlines())
    for pattern in lines:
        assert any(re.fullmatch(pattern, line) for line in printed), (
            f"no {pattern!r}, or not in this order, in\n{output}"
        )
    assert not list(tmp_path.iterdir()), "an example that only shows something leaves no file behind"


def test_replicas_of_the_quickstart_are_other_processes(tmp_path: Path) -> None:
    done = subprocess.run(command("quickstart.py"), cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    own, *others = re.findall(r"pid (\d+)", done.stdout)
    assert len(others) >= 3
    assert own not in others


def test_quickstart_runs_inline_too(tmp_path: Path) -> None:
    inline = [*command("quickstart.py"), "--backend", "inline"]
    done = subprocess.run(inline, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(set(re.findall(r"pid (\d+)", done.stdout))) == 1


def test_quickstart_runs_on_ray_too(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    on_ray = [*command("quickstart.py"), "--backend", "ray"]
    environment = on_cluster(request)
    done = subprocess.run(on_ray, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    own, *others = re.findall(r"pid (\d+)", done.stdout)
    assert len(set(others)) == 2
    assert own not in others
    assert done.stdout.endswith("nothing is left running\n")


@contextmanager
def serving(name: str, ready: str, cwd: Path, *how: str, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Run an example with --serve, or as said, yield what matched in its line, and end it as Ctrl-C does."""
    process = subprocess.Popen(
        how or [*command(name), "--serve"],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        output = b""
        deadline = time.monotonic() + LIMIT_S
        while not (found := re.search(ready, output.decode())):
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(process.stdout.fileno(), 65536) if readable else b""
            assert chunk, f"ended or got stuck after\n{output.decode()}"
            output += chunk
        yield found[1]
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=LIMIT_S)
        everything = (output + rest).decode()
        assert process.returncode == 0, everything
        assert "Traceback" not in everything and "ResourceWarning" not in everything, everything
    finally:
        process.kill()
        process.communicate()


def fetch(url: str, body: bytes | None = None) -> bytes:
    with urllib.request.urlopen(url, body, timeout=LIMIT_S) as response:
        return bytes(response.read())


def test_quickstart_keeps_serving_until_interrupted(tmp_path: Path) -> None:
    with serving("quickstart.py", r"curl '(\S+)'", tmp_path) as url:
        assert b"Hello, Alan!" in fetch(url)


def test_digits_keeps_serving_until_interrupted(tmp_path: Path) -> None:
    need("sklearn")
    with serving("digits.py", r"curl --data-binary @digit.pgm (\S+)\s", tmp_path) as url:
        image = (tmp_path / "digit.pgm").read_bytes()
        with urllib.request.urlopen(url, data=image, timeout=LIMIT_S) as response:
            assert int(response.read()) in range(10)


def test_fastapi_app_serves_with_uvicorn(tmp_path: Path) -> None:
    need("fastapi", "uvicorn")
    with serving("fastapi_app.py", r"running on (http://[\d.:]+)", tmp_path) as url:
        assert b"/raw" in fetch(f"{url}/engine/-/routes")
        assert b'"score":0.5' in fetch(f"{url}/engine/raw", b"fine weather")


def test_fastapi_ray_serves_with_uvicorn(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    need("fastapi", "uvicorn")
    environment = on_cluster(request)
    with serving("fastapi_ray.py", r"running on (http://[\d.:]+)", tmp_path, environment=environment) as url:
        question = urllib.request.Request(
            f"{url}/reviews", b'{"text": "fine weather"}', {"content-type": "application/json"}
        )
        with urllib.request.urlopen(question, timeout=LIMIT_S) as response:
            assert b'"score":0.5' in response.read()


def test_flask_app_serves_with_the_development_server(tmp_path: Path) -> None:
    need("flask")
    with serving("flask_app.py", r"Running on (http://[\d.:]+)", tmp_path) as url:
        assert b"[2,2,3,5]" in fetch(f"{url}/factors/60").replace(b"\n", b"").replace(b" ", b"")


def test_flask_app_is_imported_and_made_by_a_server(tmp_path: Path) -> None:
    need("flask")
    factory = f"{EXAMPLES / 'flask_app.py'}:create_app()"
    flask_run = (sys.executable, "-m", "flask", "--app", factory, "run", "--port", "0")
    with serving("flask_app.py", r"Running on (http://[\d.:]+)", tmp_path, *flask_run) as url:
        assert b"[2,2,3,5]" in fetch(f"{url}/factors/60").replace(b"\n", b"").replace(b" ", b"")
