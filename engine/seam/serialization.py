"""Pickling, and saying what could not be pickled.

The plain pickler is several times faster than cloudpickle but stores classes and functions by reference, which fails
for those of ``__main__``: another process has another ``__main__``. So whatever the plain pickler refuses, and whatever
mentions ``__main__`` or a module that cannot be imported by its name, goes to cloudpickle, which stores such things by
value (`engine.seam.by_value`).
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from ..errors import EngineError, NotSerializable, RemoteError, RemoteTraceback
from .descriptors import is_shortage, shortage
from .error_text import a_kind_of, message_of, shortened, summary_of, traceback_of, type_name_of
from .importable import marks_of_unimportable

__all__ = [
    "dumps",
    "dumps_arguments",
    "dumps_by_value",
    "explain_unpicklable",
    "loads",
    "loads_during_imports",
    "loads_leniently",
    "pack_exception",
    "pack_exception_briefly",
    "refuse",
    "shorten_packed_exception",
    "unpack_exception",
    "was_struck",
]

loads = pickle.loads


def _find(module: str, name: str, usually: Callable[[str, str], Any]) -> Any:
    if not getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False):
        return usually(module, name)
    from .rebuilding import find_global

    return find_global(module, name)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _find(module, name, super().find_class)


def loads_during_imports(data: bytes) -> Any:
    """As `loads`, in a process where another thread may be importing the very module that is needed.

    That thread may wait for what is loaded here: an application that uses an engine while one of its modules is
    imported. ``import`` would wait for that thread.
    """
    return _Unpickler(io.BytesIO(data)).load()


# By name the modules that any thread is importing. The pickle module waits for those it needs, which never ends if the
# thread that imports one waits for what is pickled: it may use an engine there.
_imports: Mapping[str, Any] = getattr(importlib._bootstrap, "_module_locks", {})
_marks = marks_of_unimportable
"""What is in pickles that may not travel as they are."""
_PLAINLY_UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError, ImportError, RecursionError)
_SIMPLE = frozenset((int, str, bytes, float, bool, type(None)))
"""Types whose pickles are only what they are."""
_NO_ARGUMENTS = pickle.dumps(((), {}), 5)
_BRIEF_BYTES = 1 << 20
_BRIEF_MESSAGE = 2000
_BRIEF_TRACEBACK = 20_000
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
    if type(value) in _SIMPLE:
        return pickle.dumps(value, 5)
    try:
        # While something is imported, the plain pickler might wait for that.
        data = pickle.dumps(value, 5) if not _imports else b"__main__"
        if b"__main__" not in data and not (_marks and any(mark in data for mark in _marks)):
            return data
    except _PLAINLY_UNPICKLABLE:
        pass
    except Exception:
        if was_struck(lambda: pickle.dumps(value, 5)):
            raise
    return dumps_by_value(value, what, error)


def was_struck(again: Callable[[], object]) -> bool:
    """Whether what has failed on this thread succeeds when it is done ``again``.

    Then it was not at fault: a signal handler of the application raised in its midst, as only the main thread knows it.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        again()
    except KeyboardInterrupt:
        raise
    except BaseException:
        return False
    return True


def dumps_by_value(value: Any, what: str, error: type[EngineError] = NotSerializable) -> bytes:
    """Pickle with cloudpickle: functions and classes of ``__main__``, lambdas and closures go by value.

    Raises:
        EngineError: Of type ``error``: the value cannot be pickled; the message says which part.
    """
    try:
        return _by_value(value)
    except Exception as failure:
        if is_shortage(failure):  # what pickling needs could not be imported
            raise shortage(failure) from failure
        if was_struck(lambda: _by_value(value)):
            raise
        raise error(f"{what} cannot be pickled: {explain_unpicklable(value, failure)}") from failure


def _by_value(value: Any) -> bytes:
    buffer = io.BytesIO()
    _pickler()(buffer, 5).dump(value)
    return buffer.getvalue()


_refused: dict[type, str] = {}


def refuse(kind: type, why: str) -> None:
    """Refuse to pickle values of a type, which pickle but mean nothing in another process.

    Concerns what the engine pickles, in this process. The error says why, and where it was, as for all that it refuses.
    """
    _refused[kind] = why
    _marks.add(kind.__name__.encode())
    _pickler.cache_clear()


def _refusal(why: str, value: Any) -> Any:
    raise TypeError(why)


@functools.cache
def _pickler() -> Any:
    from .by_value import make_pickler

    return make_pickler({kind: functools.partial(_refusal, why) for kind, why in _refused.items()})


def dumps_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> bytes:
    """Pickle ``(args, kwargs)``.

    Raises:
        NotSerializable: One of them cannot be pickled; the message says which, and which part of it.
    """
    if not kwargs:
        if not args:
            return _NO_ARGUMENTS
        if len(args) == 1 and type(args[0]) in _SIMPLE:
            return pickle.dumps((args, kwargs), 5)
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
    reason = summary_of(failure)
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
    return f"{a_kind_of(value)}, {text if len(text) <= 80 else text[:77] + '...'}"


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
    return pickle.dumps((type_name_of(error), message_of(error), traceback_of(error), _pack_itself(error)), 5)


def pack_exception_briefly(error: BaseException) -> bytes:
    """As `pack_exception`, but for what must not be large: beyond a megabyte it is the shortened text alone."""
    packed = pack_exception(error)
    return packed if len(packed) <= _BRIEF_BYTES else shorten_packed_exception(packed)


def shorten_packed_exception(packed: bytes) -> bytes:
    """Keep of a packed exception what can always be sent: its type's name, and the ends of its texts."""
    name, message, text, _ = pickle.loads(packed)
    size = f" (shortened: with all it carries it has {len(packed)} bytes)"
    brief = (
        shortened(name, _BRIEF_MESSAGE),
        shortened(message, _BRIEF_MESSAGE) + size,
        shortened(text, _BRIEF_TRACEBACK),
    )
    return pickle.dumps((*brief, b""), 5)


class _Bare(NamedTuple):
    """An exception whose own way of being pickled fails, as what it is made of."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    attributes: dict[str, Any]


def _pack_itself(error: BaseException) -> bytes:
    # A constructor that takes other arguments than it passes on lets an exception be pickled, but be rebuilt as
    # something else or not at all. So both ways are tried.
    rebuildable = b""
    for its_parts in (lambda: error, lambda: _Bare(type(error), error.args, dict(vars(error)))):
        try:
            packed = dumps(its_parts(), "the exception")
            rebuilt = _rebuild(packed)
        except BaseException:  # its methods may raise anything at all
            continue
        if rebuilt is not None:
            its_own_choice = not issubclass(type(rebuilt), BaseException)
            if its_own_choice or message_of(rebuilt) == message_of(error):
                return packed
            rebuildable = rebuildable or packed
    return rebuildable


def loads_leniently(data: bytes) -> Any:
    """Unpickle what `loads` could not because of exceptions in it whose constructors take other arguments.

    Such an exception is rebuilt from its arguments and attributes, without its constructor.

    Raises:
        Exception: It cannot be rebuilt this way either.
    """
    return _LenientUnpickler(io.BytesIO(data)).load()


class _LenientUnpickler(pickle._Unpickler):  # the one in Python, whose steps can be replaced
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        return _find(module, name, super().find_class)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        make = self.stack[-1]
        try:
            self.stack[-1] = make(*args)
        except Exception:
            if not (isinstance(make, type) and issubclass(make, BaseException)):
                raise
            self.stack[-1] = make.__new__(make, *args)

    dispatch[pickle.REDUCE[0]] = load_reduce


def _rebuild(inner: bytes) -> Any:
    try:
        try:
            rebuilt = loads_during_imports(inner)
        except Exception:
            rebuilt = loads_leniently(inner)
        if isinstance(rebuilt, _Bare):
            kind, args, attributes = rebuilt
            rebuilt = kind.__new__(kind, *args)
            rebuilt.__dict__.update(attributes)
    except BaseException as failure:  # SystemExit, say: what its methods raise here is not the caller's doing
        if isinstance(failure, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # of whoever sits before the application
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
    error: Any = rebuilt if issubclass(type(rebuilt), Exception) else RemoteError(name, message, text)
    try:
        # not by its own way of setting attributes, which a frozen dataclass does not have
        BaseException.__setattr__(error, "__cause__", RemoteTraceback(text))
    except Exception:  # it has a `__cause__` of its own
        error = RemoteError(name, message, text)
        error.__cause__ = RemoteTraceback(text)
    return error  # type: ignore[no-any-return]
