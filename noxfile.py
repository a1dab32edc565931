"""Every check of the project, each in an environment of its own: `nox -s lint`, `nox -s tests-3.12 -- -k wire`, ..."""

from __future__ import annotations

from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
EXAMPLE_TIMEOUT_S = 120
# a benchmark may take longer than a test before the stacks of its threads are of interest
BENCH_OPTIONS = ["-o", "faulthandler_timeout=590"]

nox.options.reuse_existing_virtualenvs = True
# a Python that was not tested must not look like one that passed
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "typecheck", "tests", "examples"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the test suite; arguments after `--` go to pytest."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format; `nox -s lint -- --fix` repairs what can be repaired."""
    session.install("ruff")
    if "--fix" in session.posargs:
        session.run("ruff", "check", "--fix", ".")
        session.run("ruff", "format", ".")
    else:
        session.run("ruff", "check", ".")
        session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types of the engine and its adapters."""
    session.install("-e", ".[dev]")
    session.run("mypy", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example to its end, from an installation that is not editable."""
    session.install(".[examples]")
    wanted = [Path(name) for name in session.posargs] or sorted(Path("examples").glob("*.py"))
    for script in wanted:
        if script.name.startswith("test_"):
            # not `python -m pytest`: that would put the checkout before the installed package
            session.run("pytest", str(script))
        else:
            session.run("timeout", f"{EXAMPLE_TIMEOUT_S}s", "python", str(script), external=True)


@nox.session
def conformance(session: nox.Session) -> None:
    """Run the conformance suite against the adapter of the examples, as another project would."""
    session.install(".[conformance]")
    suite = ["-m", "engine.testing.conformance", "--adapter", "subprocess_adapter:SubprocessAdapter"]
    with session.chdir("examples"):
        session.run("python", *suite, *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Ask whether anything that the engine, its adapters or its tests need has a known vulnerability."""
    session.install("-e", ".[test,examples]", "pip-audit")
    session.run("python", ".ci/audit", "--strict", "python")


@nox.session
def coverage(session: nox.Session) -> None:
    """Measure branch coverage, worker processes included; fails below the limit in pyproject.toml."""
    session.install("-e", ".[test]")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the engine beside its references; the table is also kept in bench/.results/last.json."""
    session.install("-e", ".[bench]")
    session.run("python", "-m", "pytest", "bench", *BENCH_OPTIONS, *session.posargs)
