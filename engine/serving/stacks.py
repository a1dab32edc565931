"""Where user code is: the stacks of a thread and of a task, as text for the log."""

from __future__ import annotations

import asyncio
import itertools
import sys
import traceback
from types import FrameType
from typing import Any

__all__ = ["stack_of_task", "stack_of_thread"]

_MOST_FRAMES = 50
"""The innermost ones are kept."""
_CALLING = frozenset(
    f"engine.serving.{name}" for name in ("blocking_replica", "loop_replica", "replica", "user_callable")
)
"""Modules that call user code: what is above them is the same in every stack, and says nothing of it."""


def stack_of_thread(ident: int | None) -> str:
    """The stack of a thread from where user code begins, the innermost call last; from any thread."""
    frame = sys._current_frames().get(ident) if ident is not None else None
    if frame is None:
        return "  (the thread has ended)\n"
    frames: list[FrameType] = []
    step: FrameType | None = frame
    while step is not None and len(frames) < _MOST_FRAMES and not (frames and _calls_user_code(step, frames[-1])):
        frames.append(step)
        step = step.f_back
    return "".join(traceback.format_stack(frame, len(frames)))


def stack_of_task(task: asyncio.Task[Any]) -> str:
    """Where a task waits: user code's coroutine, what that awaits, and so on. To be asked while it does not run."""
    frames: list[FrameType] = []
    step: Any = task.get_coro()
    while step is not None and len(frames) < 1000:  # what user code awaits may have any shape
        frame = _first(step, "cr_frame", "gi_frame", "ag_frame")
        if isinstance(frame, FrameType):
            frames.append(frame)
        step = _first(step, "cr_await", "gi_yieldfrom", "ag_await")
    pairs = itertools.pairwise(frames)
    begins = max((at for at, pair in enumerate(pairs, 1) if _calls_user_code(*pair)), default=0)
    frames = frames[begins:]
    lines = [line for frame in frames[-_MOST_FRAMES:] for line in traceback.format_stack(frame, 1)]
    return "".join(lines) or "  (it has no Python code to show)\n"


def _calls_user_code(frame: FrameType, called: FrameType) -> bool:
    return _module_of(frame) in _CALLING and not _module_of(called).startswith("engine.serving.")


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _first(of: Any, *names: str) -> Any:
    for name in names:
        found = getattr(of, name, None)
        if found is not None:
            return found
    return None
