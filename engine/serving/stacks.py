"""Where user code is: the stacks of a thread and of a task, as text for the log."""

from __future__ import annotations

import asyncio
import sys
import traceback
from types import FrameType
from typing import Any

__all__ = ["stack_of_task", "stack_of_thread"]

_MOST_FRAMES = 50
"""The innermost ones are kept."""


def stack_of_thread(ident: int | None) -> str:
    """The stack of a thread, the innermost call last; from any thread."""
    frame = sys._current_frames().get(ident) if ident is not None else None
    if frame is None:
        return "  (the thread has ended)\n"
    return "".join(traceback.format_stack(frame, _MOST_FRAMES))


def stack_of_task(task: asyncio.Task[Any]) -> str:
    """Where a task waits: its coroutine, what that awaits, and so on. To be asked while it does not run."""
    frames: list[FrameType] = []
    step: Any = task.get_coro()
    while step is not None and len(frames) < 1000:  # what user code awaits may have any shape
        frame = _first(step, "cr_frame", "gi_frame", "ag_frame")
        if isinstance(frame, FrameType):
            frames.append(frame)
        step = _first(step, "cr_await", "gi_yieldfrom", "ag_await")
    lines = [line for frame in frames[-_MOST_FRAMES:] for line in traceback.format_stack(frame, 1)]
    return "".join(lines) or "  (it has no Python code to show)\n"


def _first(of: Any, *names: str) -> Any:
    for name in names:
        found = getattr(of, name, None)
        if found is not None:
            return found
    return None
