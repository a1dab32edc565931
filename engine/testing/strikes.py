"""Exceptions that strike where a signal handler of the application could raise them, one place after the other.

Python runs signal handlers on the main thread, and there only when a function begins, when a call returns and when a
loop turns (3.10 also where a condition jumps). `struck` runs a function and raises at one of these places, in its code
or in any that it calls; or does there what a handler would.
"""

from __future__ import annotations

import dis
import gc
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

__all__ = ["struck"]

_CALLS = ("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "POP_JUMP_BACKWARD")
_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_NOT_CALLS = ("CALL_INTRINSIC", "JUMP_BACKWARD_NO_INTERRUPT")
_CHECKS: frozenset[int] = frozenset(
    number
    for name, number in dis.opmap.items()
    if (name.startswith(_CALLS) and not name.startswith(_NOT_CALLS))
    or (sys.version_info < (3, 11) and name.startswith("POP_JUMP"))
)


_WEAK = ("/weakref.py", "/_weakrefset.py")


class _Strike:
    def __init__(self, place: int, error: BaseException | Callable[[], object], spare: tuple[str, ...]) -> None:
        self._left = place
        self._error = error
        self._spare = spare
        self._collecting = {getattr(function, "__code__", None) for function in gc.callbacks}
        self.where = ""

    def begin(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Trace a function that begins, or a generator that goes on."""
        if frame.f_code.co_filename.endswith(self._spare) or self._is_unheard(frame):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if not frame.f_code.co_flags & _RESUMABLE:  # else it may be going on to be closed, which nothing interrupts
            self._pass(frame)
        code = _opcodes(frame.f_code)
        before = -1

        def within(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            if event == "opcode":
                if before in _CHECKS:
                    self._pass(frame)
                before = code[frame.f_lasti]
            else:  # an exception: no handler runs on its way
                before = -1
            return within

        return within

    def _is_unheard(self, frame: FrameType) -> bool:
        """Whether the interpreter runs it when it likes, as the end of an object: then nobody hears what it raises."""
        caller: FrameType | None = frame
        while caller is not None and caller.f_code is not struck.__code__:
            if caller.f_code.co_name == "__del__" or caller.f_code in self._collecting:
                return True
            caller = caller.f_back
        return False

    def _pass(self, frame: FrameType) -> None:
        if self._left == 0:
            self._left = -1
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
            sys.settrace(None)
            if not isinstance(self._error, BaseException):
                self._error()
                return
            raise self._error
        self._left -= 1


_cache: dict[CodeType, bytes] = {}


def _opcodes(code: CodeType) -> bytes:
    found = _cache.get(code)
    if found is None:
        found = _cache[code] = code.co_code
    return found


def struck(
    function: Callable[[], object],
    place: int,
    error: BaseException | Callable[[], object],
    *,
    spare: tuple[str, ...] = (),
) -> str:
    """Run a function and raise an exception at one of the places where a signal handler could.

    Args:
        function: Run on this thread.
        place: The number of the place: 0 is the beginning of the function.
        error: What is raised there. Whatever becomes of it in the function, it does not come out of here. Or what is
            called there, to raise or not.
        spare: Ends of the names of files in whose functions it does not strike, besides those of weak references:
            these run when some object dies, and nobody hears what they raise.

    Returns:
        Where it struck, for people; empty if the function passed fewer places.
    """
    strike = _Strike(place, error, spare + _WEAK)
    before = sys.gettrace()
    sys.settrace(strike.begin)
    try:
        function()
    except BaseException as raised:
        if raised is not error:
            raise
    finally:
        sys.settrace(before)
    return strike.where
