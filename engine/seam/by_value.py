"""The pickler that takes functions and classes apart which another process could not import: cloudpickle's, and more.

Imported when something goes by value for the first time, because cloudpickle takes milliseconds to import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import cloudpickle

__all__ = ["make_pickler"]


def make_pickler(refusals: dict[type, Callable[[Any], Any]]) -> Any:
    """A class of picklers.

    Args:
        refusals: By type what raises for values of it.
    """

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table = cloudpickle.Pickler.dispatch_table.new_child({CodeType: _reduce_code, **refusals})

        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, (type, FunctionType)) and _is_of_unfinished_module(value):
                return find_global, (value.__module__, value.__qualname__)
            return super().reducer_override(value)

    return Pickler


_reduce_code_dynamically = cloudpickle.Pickler.dispatch_table[CodeType]


def _reduce_code(code: CodeType) -> tuple[Any, ...]:
    """Keep the file of code: cloudpickle 3.1.3 drops it, and tracebacks their source lines."""
    kind, arguments = _reduce_code_dynamically(code)
    return kind, tuple(code.co_filename if _is_made_up(argument) else argument for argument in arguments)


def _is_made_up(argument: Any) -> bool:
    # its type first: bytes, of which code is made, may not be compared with text under `python -bb`
    return type(argument) is str and argument == "<dynamic-code>"


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


def _is_of_unfinished_module(value: Any) -> bool:
    module = sys.modules.get(value.__module__)
    if not is_unfinished(module):
        return False
    try:
        return find_global(value.__module__, value.__qualname__) is value
    except AttributeError:
        return False
