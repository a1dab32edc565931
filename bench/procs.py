"""What the kernel says about processes: children, open files, threads, memory. Linux only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROC = Path("/proc")


def descendants(root: int | None = None) -> list[int]:
    """All living processes below `root` (this one by default), zombies left out."""
    children: dict[int, list[int]] = {}
    for name in os.listdir(PROC):
        if not name.isdecimal():
            continue
        try:
            fields = (PROC / name / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    waiting = [os.getpid() if root is None else root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def parent(pid: int) -> int:
    """The process that a process is a child of.

    Raises:
        OSError: it ended meanwhile.
    """
    return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


def pss_mb(pids: list[int]) -> float:
    """Proportional set size of the processes together, in MB: a page shared by n of all processes counts 1/n each.

    Raises:
        OSError: one of them ended meanwhile.
    """
    total_kb = 0
    for pid in pids:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total_kb += int(line.split()[1])
                break
    return total_kb / 1024


def rss_mb(pid: int | None = None) -> float:
    """Resident memory of a process (this one by default), in MB; 0 if it ended."""
    try:
        pages = int((PROC / str(pid or os.getpid()) / "statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def title(pid: int) -> str:
    """What the process calls itself: its command line, or what it put in its place; empty if it ended."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def cpu_s(pids: list[int]) -> dict[int, float]:
    """Processor time of each process so far, in seconds; those that ended meanwhile are left out."""
    taken = {}
    for pid in pids:
        try:
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        taken[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return taken


def open_fds() -> int:
    """Open file descriptors of this process; the one that reads the list is left out."""
    return len(os.listdir("/proc/self/fd")) - 1


def threads() -> int:
    """Threads of this process, those that Python does not know included."""
    return len(os.listdir("/proc/self/task"))


def pin(pid: int, cpus: set[int]) -> None:
    """Let all threads of a process run on these CPUs only; threads and children made later inherit it."""
    for task in os.listdir(PROC / str(pid) / "task"):
        try:
            os.sched_setaffinity(int(task), cpus)
        except ProcessLookupError:
            continue  # ended meanwhile


@contextmanager
def placed(caller: int, others: int) -> Iterator[None]:
    """Keep this process on one CPU and all its descendants on another, or the same, until the block ends."""
    allowed = os.sched_getaffinity(0)
    below = descendants()
    try:
        pin(os.getpid(), {caller})
        for pid in below:
            pin(pid, {others})
        yield
    finally:
        for pid in [os.getpid(), *descendants()]:
            pin(pid, allowed)
