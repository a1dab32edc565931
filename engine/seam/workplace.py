"""What this process is to engines: a worker of one, a child of `multiprocessing` that starts, or neither.

A replica imports the module that its backend comes from, and that module may create an engine where it is imported:
the very engine that runs the replica. Another one there would start replicas that create the next, without end. So an
engine made while a worker imports a module is inert: it stands for the engine that the worker belongs to. The same
holds while `multiprocessing` imports the main module of a program once more, in a child that it spawns.
"""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from typing import NamedTuple

from ..errors import EngineError

__all__ = [
    "Surrounding",
    "check_idle",
    "enter_engine",
    "enter_engine_here",
    "enter_worker",
    "is_worker",
    "settles_later",
    "surrounding_engine",
    "why_inert",
    "works_for",
]

_MARK = "ENGINE_WORKER"
"""In the environment of a worker its process id, for the processes that its user code spawns by `multiprocessing`."""
_IMPORTS = "<frozen importlib._bootstrap>"
"""The file of the code that imports modules, in every Python."""


class Surrounding(NamedTuple):
    """The engine that this process works for, as handles name it."""

    engine_id: str
    adapter_name: str
    control_address: str


_is_worker = False
_surrounding: Surrounding | None = None
_here: ContextVar[str] = ContextVar("engine_works_for", default="")
"""The id of the engine that this thread works for in the application's own process: that of a worker of its own has all
of its threads work for it."""


def enter_worker() -> None:
    """Declare that this process works for an engine, before it imports anything of the user's."""
    global _is_worker
    _is_worker = True


def enter_engine(surrounding: Surrounding) -> None:
    """Declare that this process works for this engine, before it imports anything of the user's."""
    global _surrounding
    enter_worker()
    _surrounding = surrounding
    os.environ[_MARK] = str(os.getpid())


def enter_engine_here(engine_id: str) -> None:
    """Declare that this thread, with all tasks that it begins, works for this engine in the application's process."""
    _here.set(engine_id)


def works_for(engine_id: str) -> bool:
    """Whether this code runs in a worker of this engine, rather than in a program that uses it."""
    return _here.get() == engine_id or (_surrounding is not None and _surrounding.engine_id == engine_id)


def is_worker() -> bool:
    """Whether this process works for an engine, rather than for the application."""
    return _is_worker


def surrounding_engine() -> Surrounding:
    """The engine that this process works for.

    Raises:
        errors.EngineError: It works for none, or imports a module whose engine is only now being told what to run.
    """
    if _surrounding is None:
        raise EngineError(
            "this handle comes from an engine that was created while its module was imported, in a process that works "
            "for no engine or for a part of one that makes no calls: create the engine under "
            "`if __name__ == '__main__':`, and pass handles to other processes"
        )
    if _importing():
        raise EngineError(
            "a call was made while a replica imports the module that its backend comes from, before the backend is "
            "there: make calls in a function, or under `if __name__ == '__main__':`"
        )
    return _surrounding


def settles_later() -> bool:
    """Whether handles that are made here and now will know the engine that they belong to when the import is done."""
    return _is_worker and _importing()


def why_inert() -> str:
    """Why an engine that is made here and now is inert; empty if it is not."""
    if _is_worker or _is_child_of_worker():
        if _importing():
            return "was created while a worker of it imported its module, and stands for the engine that runs elsewhere"
    elif _is_importing_main_again():
        return "was created while multiprocessing imported the main module once more, in a child process"
    return ""


def check_idle(why: str) -> None:
    """Refuse what an inert engine cannot do, unless it is what its module asks for while it is imported.

    Raises:
        errors.EngineError: It is asked for later.
    """
    if not why_inert():
        raise EngineError(
            f"this engine {why}: it gives handles, and what changes the engine is for the application's own process"
        )


def _importing() -> bool:
    """Whether this thread is in the body of a module that is being imported."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTS:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_child_of_worker() -> bool:
    process = sys.modules.get("multiprocessing.process")
    parent = process.parent_process() if process is not None else None
    if process is None or parent is None or _MARK not in os.environ:
        return False
    # Programs of their own that a worker starts have its environment, too, and may spawn processes of theirs. Of what
    # those spawn in turn only the direct parent is known: it is rather taken for a worker's, than to go on without end.
    return os.environ[_MARK] == str(parent.pid) or len(process.current_process()._identity) > 1


def _is_importing_main_again() -> bool:
    process = sys.modules.get("multiprocessing.process")
    return process is not None and bool(getattr(process.current_process(), "_inheriting", False))
