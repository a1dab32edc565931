"""The pickler that takes functions and classes apart which another process could not import: cloudpickle's, and more.

Imported when something goes by value for the first time, because cloudpickle takes milliseconds to import. What it
writes is read with the help of `engine.seam.rebuilding`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from types import CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import cloudpickle
from cloudpickle import cloudpickle as ways

from .importable import is_importable
from .rebuilding import (
    ORIGIN,
    MainModule,
    find_global,
    globals_of_main,
    is_unfinished,
    make_cache,
    make_class,
    make_dispatcher,
    make_dispatching_method,
    make_function,
    set_class,
    set_class_of_main,
    set_dispatcher,
    set_function,
    set_function_of_main,
)

__all__ = ["make_pickler"]

_Reduced = tuple[Any, ...]

_CACHE = type(functools.lru_cache(len))
_NAMELESS = (type(None), type(Ellipsis), type(NotImplemented))
_DISPATCHER = vars(functools)["singledispatch"](len).__code__
"""The code of every generic function."""


def make_pickler(refusals: dict[type, Callable[[Any], Any]]) -> Any:
    """A class of picklers.

    Args:
        refusals: By type what raises for values of it.
    """
    reducers: dict[type, Any] = {CodeType: _reduce_code, ModuleType: _reduce_module, MainModule: _reduce_module}
    reducers[functools.singledispatchmethod] = _reduce_dispatching_method
    if hasattr(functools.cached_property(len), "lock"):  # before Python 3.12
        reducers[functools.cached_property] = _reduce_cached_property

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table = cloudpickle.Pickler.dispatch_table.new_child({**reducers, **refusals})

        def __init__(self, file: Any, protocol: int) -> None:
            super().__init__(file, protocol)
            self._main: dict[int, _MainGlobals] = {}

        def reducer_override(self, value: Any) -> Any:
            kind = type(value)
            if kind is not FunctionType and kind is not _CACHE and not issubclass(kind, type):
                return NotImplemented
            module = _module_of(value)
            if module is None:
                return self._by_value(value)
            if is_unfinished(module):
                return find_global, (value.__module__, value.__qualname__)
            return NotImplemented

        def _by_value(self, value: Any) -> Any:
            if type(value) is FunctionType:
                return _reduce_dispatcher(value) if value.__code__ is _DISPATCHER else self._reduce_function(value)
            return _reduce_cache(value) if type(value) is _CACHE else _reduce_class(value)

        def _reduce_function(self, function: FunctionType) -> _Reduced:
            code, base, *arguments = self._function_getnewargs(function)
            state = ways._function_getstate(function)
            state[1]["_cloudpickle_submodules"] += _nested_submodules(function, state[1]["__globals__"].values())
            if base.get("__name__") == "__main__":
                base = self._main.setdefault(id(base), _MainGlobals(base))
            name = function.__qualname__ if _stands_in_main(function) else ""
            setter = set_function_of_main if name else set_function
            return make_function, (ORIGIN, name, code, base, *arguments), state, None, None, setter

    return Pickler


class _MainGlobals:
    """Stands for the namespace that functions of the main module have in common."""

    def __init__(self, base: dict[str, Any]) -> None:
        self.base = base

    def __reduce__(self) -> _Reduced:
        return globals_of_main, (self.base,)


def _module_of(value: Any) -> ModuleType | None:
    """The module that another process can find a function or class in; None if there is none."""
    found = ways._lookup_module_and_qualname(value)
    if found is None or ways._is_registered_pickle_by_value(found[0]):
        return None
    module: ModuleType = found[0]
    return module if is_importable(module) else None


def _stands_in_main(value: Any) -> bool:
    name = value.__qualname__
    return value.__module__ == "__main__" and vars(sys.modules["__main__"]).get(name) is value


# -- classes and modules -------------------------------------------------------------------------------------------


def _reduce_class(kind: type) -> _Reduced:
    if kind in _NAMELESS or kind in ways._BUILTIN_TYPE_NAMES:
        return ways._class_reduce(kind)  # type: ignore[no-any-return]
    make, arguments, state, *_ = ways._dynamic_class_reduce(kind)
    if vars(kind).get("__slots__") and not issubclass(kind, Enum):
        arguments, state = _with_slots(kind, arguments, state)
    identity = arguments[-2]
    setter = set_class_of_main if _stands_in_main(kind) else set_class
    return make_class, (make, identity, arguments), state, None, None, setter


def _with_slots(kind: type, arguments: Any, state: Any) -> tuple[Any, Any]:
    """Have the class made with its slots: an attribute of that name, set afterwards, makes none."""
    constructor, name, bases, namespace, identity, extra = arguments
    attributes, rest = state
    slots = attributes.pop("__slots__")
    if not isinstance(slots, (str, tuple, list, dict)):  # an iterator: used up
        slots = [key for key, item in vars(kind).items() if isinstance(item, MemberDescriptorType)]
    for key in [key for key, item in attributes.items() if isinstance(item, MemberDescriptorType)]:
        del attributes[key]
    return (constructor, name, bases, {**namespace, "__slots__": slots}, identity, extra), (attributes, rest)


def _reduce_module(module: ModuleType) -> Any:
    if module.__name__ in sys.modules and module.__name__ != "__main__" and not is_importable(module):
        return ways.dynamic_subimport, (module.__name__, _contents(module))
    return ways._module_reduce(module)


def _contents(module: ModuleType) -> dict[str, Any]:
    mechanics = ("__builtins__", "__cached__", "__loader__", "__spec__")
    return {name: value for name, value in vars(module).items() if name not in mechanics}


# -- functions and code --------------------------------------------------------------------------------------------


_reduce_code_dynamically = cloudpickle.Pickler.dispatch_table[CodeType]


def _reduce_code(code: CodeType) -> _Reduced:
    """Keep the file of code: cloudpickle 3.1.3 drops it, and tracebacks their source lines."""
    kind, arguments = _reduce_code_dynamically(code)
    return kind, tuple(code.co_filename if _is_made_up(argument) else argument for argument in arguments)


def _is_made_up(argument: Any) -> bool:
    # its type first: bytes, of which code is made, may not be compared with text under `python -bb`
    return type(argument) is str and argument == "<dynamic-code>"


def _nested_submodules(function: FunctionType, values: Iterable[Any]) -> list[ModuleType]:
    """Submodules that functions, lambdas and comprehensions within a function use: cloudpickle misses those."""
    names = set(function.__code__.co_names)
    inner = _names_within(function.__code__)
    if inner <= names:
        return []
    names |= inner
    packages = [value.__name__ for value in values if isinstance(value, ModuleType) and hasattr(value, "__path__")]
    return [
        module
        for name, module in list(sys.modules.items())
        for package in packages
        if name.startswith(f"{package}.") and names.issuperset(name[len(package) + 1 :].split("."))
    ]


def _names_within(code: CodeType) -> set[str]:
    names: set[str] = set()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(constant.co_names, _names_within(constant))
    return names


def _reduce_cache(cache: Any) -> _Reduced:
    parameters = cache.cache_parameters()
    return make_cache, (cache.__wrapped__, parameters["maxsize"], parameters["typed"])


def _reduce_dispatcher(dispatcher: Any) -> _Reduced:
    return make_dispatcher, (dispatcher.__wrapped__,), dict(dispatcher.registry), None, None, set_dispatcher


def _reduce_dispatching_method(method: Any) -> _Reduced:
    """Leave out the cache that it has from Python 3.13 on."""
    return make_dispatching_method, (method.func, method.dispatcher)


def _reduce_cached_property(value: Any) -> _Reduced:
    """Leave out the lock, which a property that is made anew has."""
    attributes = {name: item for name, item in vars(value).items() if name != "lock"}
    return functools.cached_property, (value.func,), attributes
