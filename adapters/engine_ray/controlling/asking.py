"""Processes of other nodes, asked after by tasks there.

A task is what Ray has to run something on another node. It takes milliseconds, or a second if a process has to be
started for it, and no end if the node has fallen silent. So each question has its time, a node runs one task at a time
(all that is wanted of it meanwhile goes into the next), and only so many nodes do. Belongs to the controller's loop;
Ray is talked to in threads of its own: those of the loop have other things to do, such as to look which nodes live.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeAlias

from engine.seam.adapter import Vitals

from ..link.connection import check_connected

__all__ = ["ANSWER_WITHIN_S", "MOST_NODES", "Asking"]

ANSWER_WITHIN_S = 8.0
"""For a question, from its being asked on."""
MOST_NODES = 8
"""Asked at a time, each by a thread."""
_LOOK_S = 0.2

Seen: TypeAlias = "Mapping[int, Vitals | None]"
Look: TypeAlias = "Callable[[str, Mapping[int, bool], threading.Event], Seen]"
"""Looks at processes of a node: their numbers, and whether to end each if it is stopped; until the event is set."""


class _Question:
    """What several may wait for: how one process is."""

    def __init__(self) -> None:
        self.kill = False
        self.answer: asyncio.Future[Vitals | None] = asyncio.get_running_loop().create_future()


class Asking:
    """Asks other nodes about processes, until it ends: Ray ends a program that uses it after it was disconnected.

    Args:
        look: Blocks; a test's own, or a task on the node.
    """

    def __init__(self, look: Look | None = None) -> None:
        self._look = look or _look_by_task
        self._over = threading.Event()
        self._wanted: dict[str, dict[int, _Question]] = {}  # by node and process: what is to be asked next
        self._asked: dict[str, asyncio.Task[None]] = {}  # by node

    async def ask(self, node_id: str, pid: int, *, kill: bool = False) -> Vitals | None:
        """Look at a process there, and end it if that is asked for and it is stopped.

        Returns:
            None if nothing can be learnt, within `ANSWER_WITHIN_S`.
        """
        if self._over.is_set():
            return None
        wanted = self._wanted.setdefault(node_id, {})
        question = wanted.get(pid)
        if question is None:
            question = wanted[pid] = _Question()
        question.kill |= kill
        self._go_on()
        await asyncio.wait((question.answer,), timeout=ANSWER_WITHIN_S)
        return question.answer.result() if question.answer.done() else None

    async def end(self) -> None:
        """Ask no more; returns once nobody does, or none of them comes back in time (idempotent)."""
        self._over.set()
        for questions in self._wanted.values():
            _answer(questions, {})
        self._wanted.clear()
        if self._asked:
            await asyncio.wait(self._asked.values(), timeout=ANSWER_WITHIN_S)

    def _go_on(self) -> None:
        """Ask the nodes of which something is wanted, in that order, as many as may be asked."""
        for node_id in [one for one in self._wanted if one not in self._asked][: MOST_NODES - len(self._asked)]:
            asking = self._ask(node_id, self._wanted.pop(node_id))
            self._asked[node_id] = asyncio.get_running_loop().create_task(asking)

    async def _ask(self, node_id: str, questions: dict[int, _Question]) -> None:
        pids = {pid: question.kill for pid, question in questions.items()}
        try:
            _answer(questions, await _in_a_thread(self._look, node_id, pids, self._over))
        except Exception as error:
            for question in questions.values():
                question.answer.set_exception(error)
                question.answer.exception()  # whoever asked may have stopped to wait
        finally:
            del self._asked[node_id]
            self._go_on()


def _answer(questions: Mapping[int, _Question], seen: Seen) -> None:
    for pid, question in questions.items():
        question.answer.set_result(seen.get(pid))


def _in_a_thread(look: Look, node_id: str, pids: Mapping[int, bool], over: threading.Event) -> asyncio.Future[Seen]:
    seen: Future[Seen] = Future()

    def run() -> None:
        try:
            seen.set_result(look(node_id, pids, over))
        except BaseException as error:
            seen.set_exception(error)

    threading.Thread(target=run, name="engine-ray-look", daemon=True).start()
    return asyncio.wrap_future(seen)


def _look_by_task(node_id: str, pids: Mapping[int, bool], over: threading.Event) -> Seen:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(
        pids: dict[int, bool],
    ) -> dict[int, tuple[bool, float]]:  # pickled by value: that node need not have this module
        import os

        seen = {}
        for pid, kill in pids.items():
            try:
                with open(f"/proc/{pid}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
                if kill and fields[0] in "Tt":
                    os.kill(pid, 9)
            except OSError:
                continue
            seen[pid] = fields[0] in "Tt", (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return seen

    check_connected()
    task = ray.remote(look).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )
    ref = task.remote(dict(pids))
    until = time.monotonic() + ANSWER_WITHIN_S
    while not ray.wait([ref], timeout=_LOOK_S)[0]:
        if over.is_set() or time.monotonic() > until:
            ray.cancel(ref)
            return {}
    return {pid: Vitals(*one) for pid, one in ray.get(ref).items()}
