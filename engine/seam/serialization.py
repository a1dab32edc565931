"""Pickling, and saying what could not be pickled.

The plain pickler is several times faster than cloudpickle but stores classes and functions by reference, which fails
for those of ``__main__``: another process has another ``__main__``. So whatever the plain pickler refuses, and whatever
mentions ``__main__``, goes to cloudpickle, which stores such things by value.
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import sys
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import EngineError, NotSerializable, RemoteError, RemoteTraceback

__all__ = [
    "dumps",
    "dumps_arguments",
    "dumps_by_value",
    "explain_unpicklable",
    "loads",
    "loads_during_imports",
    "pack_exception",
    "refuse",
    "unpack_exception",
]

loads = pickle.loads


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False):
            return super().find_class(module, name)
        from .by_value import find_global

        return find_global(module, name)


def loads_during_imports(data: bytes) -> Any:
    """As `loads`, in a process where another thread may be importing the very module that is needed.

    That thread may wait for what is loaded here: an application that uses an engine while one of its modules is
    imported. ``import`` would wait for that thread.
    """
    return _Unpickler(io.BytesIO(data)).load()


# By name the modules that any thread is importing. The pickle module waits for those it needs, which never ends if the
# thread that imports one waits for what is pickled: it may use an engine there.
_imports: Mapping[str, Any] = getattr(importlib._bootstrap, "_module_locks", {})
_SIMPLE = (int, str, bytes, float, bool, type(None))
_MAX_EXPLAINED_DEPTH = 6


def dumps(value: Any, what: str, error: type[EngineError] = NotSerializable) -> bytes:
    """Pickle a value for another process.

    Args:
        value: Anything.
        what: How to call the value in an error message, e.g. ``"the argument"``.
        error: The error to raise.

    Raises:
        EngineError: Of type ``error``: the value cannot be pickled; the message says which part.
    """
    try:
        # While something is imported, the plain pickler might wait for that.
        data = pickle.dumps(value, 5) if not _imports else b"__main__"
        if b"__main__" not in data and not (_refused and any(mark in data for mark in _refused)):
            return data
    except Exception:
        pass
    return dumps_by_value(value, what, error)


def dumps_by_value(value: Any, what: str, error: type[EngineError] = NotSerializable) -> bytes:
    """Pickle with cloudpickle: functions and classes of ``__main__``, lambdas and closures go by value.

    Raises:
        EngineError: Of type ``error``: the value cannot be pickled; the message says which part.
    """
    try:
        return _by_value(value)
    except Exception as failure:
        raise error(f"{what} cannot be pickled: {explain_unpicklable(value, failure)}") from failure


def _by_value(value: Any) -> bytes:
    buffer = io.BytesIO()
    _pickler()(buffer, 5).dump(value)
    return buffer.getvalue()


_refused: dict[bytes, tuple[type, str]] = {}  # by what pickles of the type contain


def refuse(kind: type, why: str) -> None:
    """Refuse to pickle values of a type, which pickle but mean nothing in another process.

    Concerns what the engine pickles, in this process. The error says why, and where it was, as for all that it refuses.
    """
    _refused[kind.__name__.encode()] = kind, why
    _pickler.cache_clear()


def _refusal(why: str, value: Any) -> Any:
    raise TypeError(why)


@functools.cache
def _pickler() -> Any:
    from .by_value import make_pickler

    return make_pickler({kind: functools.partial(_refusal, why) for kind, why in _refused.values()})


def dumps_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> bytes:
    """Pickle ``(args, kwargs)``.

    Raises:
        NotSerializable: One of them cannot be pickled; the message says which, and which part of it.
    """
    try:
        return dumps((args, kwargs), what)
    except NotSerializable:
        for position, value in enumerate(args):
            dumps(value, f"{what} {position}" if len(args) > 1 else what)
        for name, value in kwargs.items():
            dumps(value, f"{what} {name!r}")
        raise


def explain_unpicklable(value: Any, failure: BaseException) -> str:
    """Say which attribute, item or closure variable makes a value unpicklable."""
    try:
        reason = f"{type(failure).__name__}: {failure}"
    except Exception:
        reason = type(failure).__name__
    try:
        path, culprit = _find_culprit(value, "", 0, set())
    except Exception:  # it cannot even be looked at
        path, culprit = "", value
    if not path:
        return f"{_describe(culprit)} ({reason})"
    return f"{path.lstrip('.')} is {_describe(culprit)} ({reason})"


def _describe(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"whose repr raised {type(error).__name__}"
    return f"a {type(value).__qualname__}, {text if len(text) <= 80 else text[:77] + '...'}"


def _find_culprit(value: Any, path: str, depth: int, seen: set[int]) -> tuple[str, Any]:
    seen.add(id(value))
    if depth < _MAX_EXPLAINED_DEPTH:
        for step, part in _parts(value):
            if id(part) not in seen and not _picklable(part):
                return _find_culprit(part, path + step, depth + 1, seen)
    return path, value


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{position}]", item) for position, item in enumerate(value)]
    function = getattr(value, "__func__", value)
    parts: list[tuple[str, Any]] = []
    code = getattr(function, "__code__", None)
    if code is not None:
        cells = getattr(function, "__closure__", None) or ()
        for name, cell in zip(code.co_freevars, cells, strict=False):
            try:
                parts.append((f".closure variable {name!r}", cell.cell_contents))
            except ValueError:
                continue
        names = getattr(function, "__globals__", {})
        parts += [(f".global {name!r}", names[name]) for name in code.co_names if name in names]
        parts += [(f".default {position}", item) for position, item in enumerate(function.__defaults__ or ())]
    if isinstance(value, type):
        parts += [
            (f".{name}", item) for name, item in vars(value).items() if not name.startswith("__") or callable(item)
        ]
    parts += (
        [(f".attribute {name!r}", item) for name, item in getattr(value, "__dict__", {}).items()]
        if not isinstance(value, type)
        else []
    )
    if getattr(value, "__self__", None) is not None and not isinstance(value.__self__, type):
        parts.append((".__self__", value.__self__))
    return parts


def _picklable(value: Any) -> bool:
    if type(value) in _SIMPLE:
        return True
    try:
        _by_value(value)
    except Exception:
        return False
    return True


def pack_exception(error: BaseException) -> bytes:
    """Pickle an exception so that `unpack_exception` can always make something of it.

    The type's name, the message and the formatted traceback travel apart from the exception itself, which may refuse
    to be pickled here or to be rebuilt there.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    try:
        message = str(error)
    except Exception:
        message = "(its __str__ raised)"
    return pickle.dumps((name, message, text, _pack_itself(error)), 5)


class _Bare(NamedTuple):
    """An exception whose own way of being pickled fails, as what it is made of."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    attributes: dict[str, Any]


def _pack_itself(error: BaseException) -> bytes:
    try:
        inner = dumps(error, "the exception")
        # A constructor that takes other arguments than it passes on lets it be pickled but not be rebuilt.
        loads_during_imports(inner)
    except Exception:
        try:
            return dumps(_Bare(type(error), error.args, dict(vars(error))), "the exception")
        except EngineError:
            return b""
    return inner


def _rebuild(inner: bytes) -> Any:
    try:
        rebuilt = loads_during_imports(inner)
        if isinstance(rebuilt, _Bare):
            kind, args, attributes = rebuilt
            rebuilt = kind.__new__(kind, *args)
            rebuilt.__dict__.update(attributes)
    except Exception:
        return None
    return rebuilt


def unpack_exception(data: bytes) -> Exception:
    """Rebuild what `pack_exception` packed, with a `RemoteTraceback` as its cause.

    Returns:
        The exception itself, or a `RemoteError` that carries its type name, message and traceback where it cannot be
        rebuilt or is not an `Exception`.
    """
    name, message, text, inner = pickle.loads(data)
    rebuilt = _rebuild(inner) if inner else None
    # What is not an `Exception` means something to Python itself (SystemExit, KeyboardInterrupt, CancelledError):
    # raised here it would stop the caller, who did nothing of the kind.
    error = rebuilt if isinstance(rebuilt, Exception) else RemoteError(name, message, text)
    error.__cause__ = RemoteTraceback(text)
    return error
