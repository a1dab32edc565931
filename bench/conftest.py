from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import report as _report

BENCH_TIMEOUT_S = 600
_rows: list[_report.Row] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(BENCH_TIMEOUT_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _rows:
        terminalreporter.section("engine beside its references")
        terminalreporter.write_line(_report.table(_rows))


def pytest_sessionfinish() -> None:
    if _rows:
        _report.store(_rows)


@pytest.fixture
def record() -> Iterator[Callable[[_report.Row], None]]:
    """Put a row into the table at the end of the run and into the stored results."""
    yield _rows.append
