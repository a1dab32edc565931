"""The conformance suite as other projects run it, and what it says when it is asked for something wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import engine.testing.conformance
from engine.testing.conformance.factory import AdapterFactory, describe
from engine.testing.conformance.plugin import load_factory
from engine.testing.fakes import FakeAdapter
from engine_inline import InlineAdapter
from engine_local import LocalAdapter

SUITE = Path(engine.testing.conformance.__file__).parent
HERE = Path(__file__).parent
number = 5


def broken() -> None:
    raise LookupError("no cluster here")


def with_refs() -> FakeAdapter:
    return FakeAdapter(refs=object())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "must be PACKAGE:FACTORY"),
        ("engine_local", "must be PACKAGE:FACTORY"),
        ("engine_local:", "must be PACKAGE:FACTORY"),
        ("no_such_package:Adapter", r"'no_such_package' cannot be imported \(ModuleNotFoundError: .*\); install it"),
        ("engine_inline:InlineAdaptor", "engine_inline has no 'InlineAdaptor'; did you mean 'InlineAdapter'"),
        ("engine_inline:Something", "engine_inline has no 'Something'; name a module, and in it a callable"),
        (f"{__name__}:number", "that is 5, which cannot be called; name .* a callable without arguments"),
        (f"{__name__}:broken", "calling it raised LookupError: no cluster here; name .* a callable without arguments"),
        ("engine_local.gpus:GpuTable", "calling it raised TypeError: .*devices.*without arguments"),
        ("builtins:dict", r"it returned \{\}, which is no adapter: it lacks bound, close, .*, tell$"),
    ],
)
def test_what_is_no_factory(given: str, message: str) -> None:
    with pytest.raises(pytest.UsageError, match=f"^--adapter {given}: .*{message}"):
        load_factory(given)


@pytest.mark.parametrize(
    ("make", "processes", "own_refs", "sees"),
    [
        (InlineAdapter, False, True, False),
        (LocalAdapter, True, True, True),
        (FakeAdapter, True, True, False),
        (with_refs, True, False, False),
    ],
)
def test_what_the_suite_must_know_is_seen_from_the_adapter(
    make: Any, processes: bool, own_refs: bool, sees: bool
) -> None:
    known = AdapterFactory("x", make, processes=processes, own_refs=own_refs, sees_processes=sees)
    assert describe("x", make) == known


def test_each_engine_gets_an_adapter_of_its_own() -> None:
    factory = load_factory("engine_inline:InlineAdapter")
    assert factory.name == "engine_inline:InlineAdapter"
    with factory.engine() as one, factory.engine(location=None) as other:
        assert one._adapter is not other._adapter


def run(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Run the suite as another project would; its exit code, and what it said."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [sys.executable, *arguments, "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=50,
    )
    return done.returncode, done.stdout + done.stderr


def test_without_an_adapter_it_says_what_to_give(tmp_path: Path) -> None:
    code, said = run("-m", "engine.testing.conformance", cwd=tmp_path)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert said.strip().startswith("ERROR: the conformance suite needs an adapter to run against: give")
    assert len(said.strip().splitlines()) == 1


PROJECT = """
from engine_inline import InlineAdapter

def make():
    return InlineAdapter()
"""


@pytest.mark.parametrize(
    "command",
    [
        ["engine.testing.conformance"],
        ["pytest", "-p", "engine.testing.conformance.plugin", "--pyargs", "engine.testing.conformance"],
    ],
    ids=["its own command", "pytest"],
)
def test_an_adapter_in_the_current_directory(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "somebodys.py").write_text(PROJECT)
    code, said = run("-m", *command, "--adapter", "somebodys:make", "-k", "test_generators_stream", cwd=tmp_path)
    assert code == 0, said
    assert "2 passed" in said


def test_it_passes_where_interrupts_are_ignored(tmp_path: Path) -> None:
    """As a shell has it for what it starts in the background."""
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "runpy.run_module('engine.testing.conformance', run_name='__main__', alter_sys=True)"
    )
    code, said = run(
        "-c", program, "--adapter", "engine_inline:InlineAdapter", "-k", "test_an_interrupted_call", cwd=tmp_path
    )
    assert code == 0, said
    assert "1 passed" in said


def test_it_has_names_of_its_own_whatever_those_of_the_project_are(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = *_spec.py\npython_functions = it_*\n")
    code, said = run(
        "-m", "engine.testing.conformance", "--adapter", "engine_inline:InlineAdapter", "--collect-only", cwd=tmp_path
    )
    assert code == 0, said
    assert "test_streams.py::test_generators_stream[engine_inline:InlineAdapter-sync_generator]" in said


def test_every_module_of_the_suite_runs_against_the_adapters_of_this_repository() -> None:
    ours = {path.name for path in (HERE / "conformance").glob("test_*.py")}
    assert ours == {path.name for path in SUITE.glob("test_*.py")}
    for name in ours:
        text = (HERE / "conformance" / name).read_text(encoding="utf-8")
        assert f"\nfrom engine.testing.conformance.{name.removesuffix('.py')} import *\n" in text
