"""README.md and docs/ tell the truth: programs run and print what they show, tables are complete, links lead somewhere.

Programs on Ray run on the session's cluster.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import ENVIRONMENT

from engine import BackendConfig, HTTPOptions, errors
from engine.handle import CallOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, "docs/cluster.md": (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")}
LIMIT_S = 50


def blocks(language: str, page: str = README) -> list[tuple[str, str]]:
    """Every fenced block of a language with the heading it stands under."""
    found = []
    heading = ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        elif match[2] == language:
            found.append((heading, match[3]))
    return found


# The lines that each section's programs print, in order.
PRINTED: dict[str, list[list[str]]] = {
    "In twenty lines": [["{'value': 105}", """b'{"value":106}'"""]],
    "Handles": [["2", "[0, 2, 4, 6]", "12", "0 2", "2", "4", "[0, 2, 4]"]],
    "Requests": [
        ["5", "{'sum': 6, 'asked by': 'Ada'}", """b'{"sum":9,"asked by":"Grace"}'"""],
        ["""b'{"total":14}'"""],
    ],
    "Configuration": [["False", "True", "2"]],
    "Traffic": [[]],
    "Batching": [["[0.0, 5.0, 10.0, 15.0, 20.0]"]],
    "Composition": [["True"]],
    "Errors": [["refill: buy some"]],
    "Embedding": [["{'text': 'HELLO ADA'}", "HELLO GRACE"], ["144"], []],
    "Logging": [[]],
    "Adapters": [["2.0"]],
    "On Ray": [["2", "4 4", "5", "8 8", "[0, 2, 4]"], ["hello Ada"]],
    # docs/cluster.md
    "Several machines": [[]],
    "What must be installed where": [["blue"]],
    "GPUs and other resources": [[]],
    "HTTP on every node": [["b'hello'", "200"]],
    "Detached engines": [["2"]],
}


def programs() -> list[Any]:
    """Every Python block with what it is to print, as test cases."""
    cases = []
    numbers: dict[str, int] = {}
    for page in PAGES.values():
        for heading, source in blocks("python", page):
            number = numbers[heading] = numbers.get(heading, 0) + 1
            cases.append(pytest.param(heading, source, PRINTED[heading][number - 1], id=f"{heading} {number}"))
    return cases


def run(source: str, directory: Path, environment: Mapping[str, str]) -> tuple[str, str]:
    """Run a program as a user would who pasted it into a file; what it printed, and what went to standard error."""
    needed = {
        name for name in ("fastapi", "flask", "httpx", "numpy") if re.search(rf"^(from|import) {name}\b", source, re.M)
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


@pytest.mark.parametrize(("heading", "source", "lines"), programs())
def test_program(heading: str, source: str, lines: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    environment = {}
    if 'backend="ray"' in source:
        environment = {**ENVIRONMENT, "RAY_ADDRESS": request.getfixturevalue("ray_cluster").address}
    printed, complaints = run(source, tmp_path, environment)
    # The program about logging shows what arrives there, and prints nothing itself.
    logged = next(shown for section, shown in blocks("text") if section == "Logging") if heading == "Logging" else ""
    # Standard output and log records take different ways, so either may come first.
    assert sorted(complaints.splitlines()) == sorted(logged.splitlines())
    rest = iter(printed.splitlines())
    for line in lines:
        assert line in rest, f"{line!r} is not in, or not in this order in\n{printed}"


def test_the_first_output_is_that_of_the_quickstart(tmp_path: Path) -> None:
    (_, shown), *_ = blocks("text")
    script = ROOT / "examples" / "quickstart.py"
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    shape = re.compile(r"\d+")
    # Which of the replicas gets how many calls, and so how many of them show, is chance.
    assert dict.fromkeys(shape.sub("N", done.stdout).splitlines()) == dict.fromkeys(shape.sub("N", shown).splitlines())


def documented(first_header: str) -> str:
    """The table whose header row starts with this cell."""
    table = re.search(rf"^\| {re.escape(first_header)} \|.*?(?=\n\n)", README, re.MULTILINE | re.DOTALL)
    assert table is not None, first_header
    return table[0]


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


def test_every_error_is_in_its_row() -> None:
    rows = documented("Catch").splitlines()
    for name in errors.__all__:
        kind = getattr(errors, name)
        parents = [parent.__name__ for parent in kind.__mro__ if parent.__name__ in errors.__all__]
        if name in ("EngineError", "RemoteTraceback"):
            continue
        family = parents[-2]  # the child of EngineError it descends from
        row = next(row for row in rows if row.startswith(f"| `errors.{family}`"))
        assert name in row


def headings(page: str) -> set[str]:
    """What links to the page can end with."""
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", page, re.M)}


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


def test_every_example_is_listed() -> None:
    for example in (ROOT / "examples").glob("*.py"):
        assert f"examples/{example.name}" in README
