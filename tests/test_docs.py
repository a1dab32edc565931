"""README.md and docs/ tell the truth: programs run and print what they show, tables are complete, links lead somewhere.

Pages are named as in the checkout, "docs/handles.md" say, and sections of a page by their heading, whatever its level.

Programs on Ray run on the session's cluster.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import ENVIRONMENT

from engine import BackendConfig, HTTPOptions, errors
from engine.calling.handle import CallOptions
from engine_local import LocalAdapter
from engine_ray import RayAdapter

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
README_LINES = 150
"""About a screen and a half. What is longer belongs on a page of docs/."""
LIMIT_S = 50


def blocks(language: str, page: str) -> list[tuple[str, str]]:
    """Every fenced block of a language with the heading it stands under."""
    found = []
    heading = ""
    for match in re.finditer(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        elif match[2] == language:
            found.append((heading, match[3]))
    return found


# The lines that the programs of each section print, in order, by page and heading.
PRINTED: dict[tuple[str, str], list[list[str]]] = {
    ("README.md", "In twenty lines"): [["{'value': 105}", """b'{"value":106}'"""]],
    ("docs/adapters.md", "The local adapter"): [["2.0"]],
    ("docs/batching.md", "Batching"): [["[0.0, 5.0, 10.0, 15.0, 20.0]"]],
    ("docs/cluster.md", "Several machines"): [[]],
    ("docs/cluster.md", "What must be installed where"): [["blue"]],
    ("docs/cluster.md", "GPUs and other resources"): [[]],
    ("docs/cluster.md", "HTTP on every node"): [["b'hello'", "200"]],
    ("docs/cluster.md", "Detached engines"): [["2"]],
    ("docs/cluster.md", "Security"): [["hello Ada"]],
    ("docs/composition.md", "Composition"): [["True"]],
    ("docs/configuration.md", "BackendConfig"): [["False", "True", "2"]],
    ("docs/configuration.md", "Calls that hang"): [
        [
            "a call of backend 'work' ran for longer than max_call_s=0.5 and was ended; what it did until then is done",
            "done",
        ]
    ],
    ("docs/embedding.md", "An engine in a module"): [["42"]],
    ("docs/embedding.md", "FastAPI and Starlette"): [["{'text': 'HELLO ADA'}", "HELLO GRACE"]],
    ("docs/embedding.md", "Flask and other threaded servers"): [["144"]],
    ("docs/embedding.md", "Django"): [["{'square': 144}"]],
    ("docs/embedding.md", "Logging"): [[]],
    ("docs/engine.md", "The life of a backend's object"): [["['time']"]],
    ("docs/engine.md", "Health checks"): [["replaced"]],
    ("docs/engine.md", "What runs"): [["[('greet#1', 'ready'), ('greet#2', 'ready')]", "ready"]],
    ("docs/engine.md", "Replacing a backend"): [["hello", "good morning"]],
    ("docs/errors.md", "Errors"): [["refill: buy some"]],
    ("docs/handles.md", "Handles"): [["2", "[0, 2, 4, 6]", "12", "0 2", "2", "4", "[0, 2, 4]"]],
    ("docs/handles.md", "Cancelling"): [["given up", "served"]],
    ("docs/handles.md", "Types"): [["5", "6"]],
    ("docs/handles.md", "Deadlines"): [["True None", "None"]],
    ("docs/overload.md", "Background work"): [["at once", "4950"]],
    ("docs/ray.md", "In a program"): [["2", "4 4", "5", "8 8", "[0, 2, 4]"]],
    ("docs/ray.md", "Detached engines"): [["hello Ada"]],
    ("docs/requests.md", "Methods by name"): [
        ["5", "{'sum': 6, 'asked by': 'Ada'}", """b'{"sum":9,"asked by":"Grace"}'"""]
    ],
    ("docs/requests.md", "Work on request bodies"): [["""b'{"total":14}'"""]],
    ("docs/requests.md", "Refusing a request: 422"): [
        [
            """b'{"ordered":3}'""",
            """422 b'{"detail":[{"type":"missing","loc":["amount"],"msg":"Field required"}]}'""",
        ]
    ],
    ("docs/requests.md", "Access log"): [[]],
    ("docs/security.md", "What HTTP clients can reach"): [["done"]],
    ("docs/testing.md", "The class alone"): [["2 passed"]],
    ("docs/testing.md", "The inline and the local adapter"): [["4 passed"]],
    ("docs/testing.md", "Holding calls back"): [["1 passed"]],
    ("docs/traffic.md", "Traffic"): [[]],
    ("docs/retries.md", "Calls that may be repeated"): [["tea: 3.50, after 3 tries", "coffee: 3.50, after 4 tries"]],
    ("docs/versions.md", "New code under the same tag"): [["first.pt", "second.pt", "no such model", "second.pt", "2"]],
}


# Sections whose Python blocks are, one after the other, a file.
SHOWN = {("docs/adapters.md", "One in 120 lines"): "examples/subprocess_adapter.py"}
# Pages whose programs serve until they are ended, and the tests that run them.
SERVING = {"docs/deploying.md": "test_deploying.py"}


def programs() -> list[Any]:
    """Every Python block with what it is to print, as test cases."""
    cases = []
    for page in PAGES:
        numbers: dict[str, int] = {}
        for heading, source in blocks("python", page):
            if (page, heading) in SHOWN or page in SERVING:
                continue
            number = numbers[heading] = numbers.get(heading, 0) + 1
            printed = PRINTED.get((page, heading), [])
            assert number <= len(printed), f"{page}: what does program {number} of {heading!r} print?"
            cases.append(pytest.param(page, heading, source, printed[number - 1], id=f"{page}: {heading} {number}"))
    return cases


def run(source: str, directory: Path, environment: Mapping[str, str]) -> tuple[str, str]:
    """Run a program as a user would who pasted it into a file; what it printed, and what went to standard error."""
    needed = {
        name
        for name in ("django", "fastapi", "flask", "httpx", "numpy")
        if re.search(rf"^(from|import) {name}\b", source, re.M)
    }
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install '.[examples]'")
    tests = "\ndef test_" in source
    script = directory / ("test_pasted.py" if tests else "pasted.py")
    script.write_text(source, encoding="utf-8")
    how = (
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        if tests
        else ["-W", "always::ResourceWarning"]
    )
    done = subprocess.run(
        [sys.executable, *how, str(script)],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


@pytest.mark.parametrize(("page", "heading", "source", "lines"), programs())
def test_program(
    page: str, heading: str, source: str, lines: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    environment = {}
    if 'backend="ray"' in source or "RayAdapter(" in source:
        environment = {**ENVIRONMENT, "RAY_ADDRESS": request.getfixturevalue("ray_cluster").address}
    printed, complaints = run(source, tmp_path, environment)
    # The program about logging shows what arrives there, and prints nothing itself.
    logged = (
        next(shown for section, shown in blocks("text", page) if section == heading) if heading == "Logging" else ""
    )
    # Standard output and log records take different ways, so either may come first.
    assert sorted(complaints.splitlines()) == sorted(logged.splitlines())
    rest = iter(re.sub(r"^(\d+ passed) in .*s$", r"\1", printed, flags=re.MULTILINE).splitlines())
    for line in lines:
        assert line in rest, f"{line!r} is not in, or not in this order in\n{printed}"


def test_no_program_is_missing() -> None:
    found = Counter((page, heading) for page in PAGES if page not in SERVING for heading, _ in blocks("python", page))
    assert set(SHOWN) <= set(found)
    assert {section: found[section] for section in set(found) - set(SHOWN)} == {
        section: len(printed) for section, printed in PRINTED.items()
    }


@pytest.mark.parametrize(("section", "file"), SHOWN.items())
def test_a_file_is_shown_as_it_is(section: tuple[str, str], file: str) -> None:
    page, heading = section
    text = (ROOT / file).read_text(encoding="utf-8")
    shown = "".join(source for under, source in blocks("python", page) if under == heading)
    assert [line for line in shown.splitlines() if line] == [line for line in text.splitlines() if line]
    limit = re.search(r"\d+(?= lines)", heading)
    assert limit is None or len(text.splitlines()) < int(limit[0])


def test_the_first_output_is_that_of_the_quickstart(tmp_path: Path) -> None:
    (_, shown), *_ = blocks("text", "README.md")
    script = ROOT / "examples" / "quickstart.py"
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    shape = re.compile(r"\d+")
    # Which of the replicas gets how many calls, and so how many of them show, is chance.
    assert dict.fromkeys(shape.sub("N", done.stdout).splitlines()) == dict.fromkeys(shape.sub("N", shown).splitlines())


def documented(first_header: str) -> str:
    """The one table on all pages whose header row starts with this cell."""
    pattern = rf"^\| {re.escape(first_header)} \|.*?(?=\n\n|\n?\Z)"
    tables = [table for text in PAGES.values() for table in re.findall(pattern, text, re.MULTILINE | re.DOTALL)]
    assert len(tables) == 1, f"{len(tables)} tables begin with {first_header!r}"
    return str(tables[0])


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("Field of `BackendConfig`", BackendConfig),
        ("Key of `http_options`", HTTPOptions),
        ("Option", CallOptions),
    ],
)
def test_every_option_is_in_its_table_with_its_default(header: str, options: Any) -> None:
    table = documented(header)
    for field in dataclasses.fields(options):
        row = next((row for row in table.splitlines() if re.match(rf"\|[^|]*`{field.name}`", row)), None)
        if field.name == "server_options":  # stands in the row of the server's own settings
            assert "`server_options`" in table
            continue
        assert row is not None, f"{field.name} is not in the table of {header}"
        default = field.default
        if default in (None, "", ()) or default is dataclasses.MISSING or field.name == "max_concurrent_queries":
            continue
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        assert shown in row, f"the default of {field.name} is {shown}: {row}"


@pytest.mark.parametrize("adapter", [LocalAdapter, RayAdapter])
def test_every_option_of_an_adapter_is_in_its_table_with_its_default(adapter: type[Any]) -> None:
    table = documented(f"Argument of `{adapter.__name__}`")
    for name, parameter in inspect.signature(adapter).parameters.items():
        default = "" if parameter.default is parameter.empty else f"`{parameter.default}`"
        assert f"| `{name}` | {default} |".replace("|  |", "| |") in table


def test_every_error_is_in_its_row() -> None:
    rows = documented("Catch").splitlines()
    for name in errors.__all__:
        kind = getattr(errors, name)
        parents = [parent.__name__ for parent in kind.__mro__ if parent.__name__ in errors.__all__]
        if name in ("EngineError", "RemoteTraceback", "CallCancelled"):
            continue
        family = parents[-2]  # the child of EngineError it descends from
        row = next(row for row in rows if row.startswith(f"| `errors.{family}`"))
        assert name in row


def rows(table: str) -> list[list[str]]:
    """The cells of a table, below its header."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def test_the_figures_are_those_of_the_notes() -> None:
    notes = (ROOT / "bench" / "NOTES.md").read_text(encoding="utf-8")
    known = [cells[1:5] for table in re.findall(r"^\| what \|.*?(?=\n\n)", notes, re.M | re.S) for cells in rows(table)]
    shown = rows(documented("What"))
    assert shown
    for what, beside, *figures in shown:
        assert figures in known, f"{what} beside {beside}: {figures} are not in bench/NOTES.md"


def headings(page: str) -> set[str]:
    """What links to the page can end with."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if "://" in target:
            continue
        file, _, section = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if section:
            assert section in headings(path.read_text(encoding="utf-8")), target


def test_every_page_is_listed() -> None:
    assert "(docs/README.md)" in PAGES["README.md"]
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"]({page.removeprefix('docs/')})" in PAGES["docs/README.md"], page


def test_every_example_is_listed() -> None:
    for example in (ROOT / "examples").glob("*.py"):
        assert any(f"examples/{example.name})" in text for text in PAGES.values()), example.name


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= README_LINES


def test_the_tests_that_hold_what_is_promised_exist() -> None:
    named = re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", PAGES["docs/guarantees.md"])
    assert len(named) > 30
    for path, name in named:
        suite = ROOT / "engine" / "testing" if path.startswith("conformance/") else ROOT / "tests"
        assert re.search(rf"^(async )?def {name}\(", (suite / path).read_text(encoding="utf-8"), re.M), (
            f"{path}::{name}"
        )
