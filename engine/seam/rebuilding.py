"""What is pickled by value (`engine.seam.by_value`), as another process puts it together again.

The functions and classes of a program's main module travel by value, because another process has another ``__main__``.
In a replica, those of its backend live in that module again: code that looks for them there, as `pickle` and
`multiprocessing` do, finds them. A class that this process knows already stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = [
    "ORIGIN",
    "MainModule",
    "find_global",
    "globals_of_main",
    "in_main_module",
    "in_origin",
    "is_unfinished",
    "make_cache",
    "make_class",
    "make_dispatcher",
    "make_dispatching_method",
    "make_function",
    "set_class",
    "set_class_of_main",
    "set_dispatcher",
    "set_function",
    "set_function_of_main",
]

ORIGIN = os.urandom(8)
"""Tells functions that were pickled in this process from those of others."""


class _Mode(threading.local):
    """How this thread unpickles.

    Attributes:
        main: What the main module of a program is to be put together in, if anything.
        keeps_functions: Functions of this process's own main module are found rather than made once more.
    """

    main: ModuleType | None = None
    keeps_functions = False


_mode = _Mode()
_unfinished: weakref.WeakSet[type] = weakref.WeakSet()  # classes that were made and not filled yet


class MainModule(ModuleType):
    """The ``__main__`` of a replica.

    Args:
        former: What was it before, which runs on: that of the platform's own program.
    """

    def __init__(self, former: ModuleType) -> None:
        super().__init__("__main__")
        self._former = former

    def __repr__(self) -> str:
        return "<module '__main__' of a replica, which has of the program what its backend mentions>"

    @property
    def __file__(self) -> str:  # type: ignore[override]
        """None, though the namespace may have one, for functions to read: nobody is to run the program once more."""
        raise AttributeError("a replica runs no main program")


@contextlib.contextmanager
def in_main_module() -> Iterator[None]:
    """Put what this thread unpickles of a program's main module into this process's own, which is a replica's."""
    if not isinstance(sys.modules["__main__"], MainModule):
        sys.modules["__main__"] = MainModule(sys.modules["__main__"])
    _mode.main = sys.modules["__main__"]
    try:
        yield
    finally:
        _mode.main = None


@contextlib.contextmanager
def in_origin() -> Iterator[None]:
    """Find the functions of this process's own main module, rather than make them once more."""
    _mode.keeps_functions = True
    try:
        yield
    finally:
        _mode.keeps_functions = False


# -- functions -----------------------------------------------------------------------------------------------------


def globals_of_main(base: dict[str, Any]) -> dict[str, Any]:
    """The namespace for functions of the main module that were pickled together.

    Args:
        base: What is in it to begin with.
    """
    if _mode.main is None:
        return base
    namespace = vars(_mode.main)
    namespace.update(base)
    return namespace


def make_function(origin: bytes, name: str, code: CodeType, *arguments: Any) -> FunctionType:
    """A function to be filled.

    Args:
        origin: The `ORIGIN` of the process that pickled it.
        name: Under which the main module has it there; may be empty.
        code: Its code.
        arguments: Further ones of cloudpickle's.
    """
    if _mode.keeps_functions and name and origin == ORIGIN:
        known = vars(sys.modules["__main__"]).get(name)
        if isinstance(known, FunctionType) and known.__code__ == code:
            return known
    from cloudpickle.cloudpickle import _make_function

    made: FunctionType = _make_function(code, *arguments)
    return made


def set_function(function: FunctionType, state: Any) -> None:
    """Fill a function."""
    if _mode.keeps_functions and function.__globals__ is vars(sys.modules["__main__"]):
        return  # it was found
    from cloudpickle.cloudpickle import _function_setstate

    _function_setstate(function, state)


def set_function_of_main(function: FunctionType, state: Any) -> None:
    """Fill a function that stands in the main module under its name."""
    set_function(function, state)
    _place(function)


def _place(value: Any) -> None:
    if _mode.main is not None:
        vars(_mode.main).setdefault(value.__qualname__, value)


# -- classes -------------------------------------------------------------------------------------------------------


def make_class(make: Callable[..., type], identity: str, arguments: tuple[Any, ...]) -> type:
    """A class to be filled, or the one that this process has of that identity.

    Args:
        make: Of cloudpickle, which keeps the identities.
        identity: One and the same wherever the class travels.
        arguments: For ``make``.
    """
    from cloudpickle.cloudpickle import _DYNAMIC_CLASS_TRACKER_BY_ID

    known: type | None = _DYNAMIC_CLASS_TRACKER_BY_ID.get(identity)
    if known is not None:
        return known
    made = make(*arguments)
    _unfinished.add(made)
    return made


def set_class(kind: type, state: Any) -> None:
    """Fill a class, unless this process had it: then what it has become here stays."""
    if kind in _unfinished:
        from cloudpickle.cloudpickle import _class_setstate

        _class_setstate(kind, state)
        _unfinished.discard(kind)


def set_class_of_main(kind: type, state: Any) -> None:
    """Fill a class that stands in the main module under its name."""
    set_class(kind, state)
    _place(kind)


# -- what functools makes of functions -----------------------------------------------------------------------------


def make_cache(function: Any, maxsize: int | None, typed: bool) -> Any:
    """A function with a cache, which is empty."""
    return functools.lru_cache(maxsize, typed)(function)


def make_dispatcher(function: Any) -> Any:
    """A generic function, to be filled."""
    return functools.singledispatch(function)


def make_dispatching_method(function: Any, dispatcher: Any) -> Any:
    """A generic method."""
    method: Any = functools.singledispatchmethod(function)
    method.dispatcher = dispatcher
    return method


def set_dispatcher(dispatcher: Any, registry: dict[type, Any]) -> None:
    """Fill a generic function."""
    for kind, function in registry.items():
        if dispatcher.registry.get(kind) is not function:
            dispatcher.register(kind, function)


# -- modules that are being imported -------------------------------------------------------------------------------


def find_global(module: str, name: str) -> Any:
    """What a module has under a name; a module that is being imported is taken as it is."""
    found: Any = sys.modules.get(module)
    if not is_unfinished(found):
        __import__(module)
        found = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found


def is_unfinished(module: Any) -> bool:
    """Whether a module is being imported. The pickle module would wait for that, and so perhaps for itself."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
