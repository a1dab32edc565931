"""The user's function or class as a replica calls it: which methods there are and what each of them takes."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import InvalidArgument, MethodNotFound

__all__ = [
    "LIFECYCLE",
    "Method",
    "NoSuchMethod",
    "UserCallable",
    "accept_batch",
    "accepts_batches",
    "check_servable",
    "class_served",
    "is_open",
    "is_reconfigurable",
    "runs_on_loop",
]

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "_engine_accept_batch"
_LONGEST_COLLECTION_S = 1.0  # user code runs in it, and may never return
_collecting = threading.Lock()
LIFECYCLE = frozenset({"check_health", "close", "reconfigure", "websocket"})
"""Methods that the engine calls, or will, and no client can (``websocket`` is the one that it will)."""


def accept_batch(function: F) -> F:
    """Mark a function or method as taking a list of requests and returning an equally long list of results.

    How many calls at most come together, and how long the first of them waits for the others, are
    `BackendConfig.max_batch_size` and `BackendConfig.batch_wait_timeout`. Instead of a list, the results may be a
    tuple, an array or a generator.

    Raises:
        errors.InvalidArgument: It is a class or an object of one, or nothing that can be called or marked.
    """
    marked: Any = function.__func__ if isinstance(function, (staticmethod, classmethod)) else function
    if inspect.isclass(marked):
        raise InvalidArgument(
            f"accept_batch marks a function or a method, not a class: put it on the method of {marked.__name__} that "
            "takes a list, say __call__"
        )
    served = class_served(marked)
    if served is not None:
        raise InvalidArgument(
            f"accept_batch marks a function or a method, not an object: put it on the method of {served.__name__} that "
            "takes a list, say __call__"
        )
    try:
        setattr(marked, _MARK, True)
    except AttributeError:
        raise InvalidArgument(f"accept_batch cannot mark {marked!r}: mark a function that calls it") from None
    return function


def class_served(definition: Any) -> type | None:
    """The class whose methods callers can name: what is served is that class, or an object of it.

    Returns:
        None for a function, and for what stands for one: a partial, a cache around one.
    """
    if inspect.isclass(definition):
        return definition
    kind = type(definition)
    is_function = inspect.isroutine(definition) or isinstance(definition, functools.partial)
    if is_function or "__wrapped__" in getattr(definition, "__dict__", ()) or kind.__module__ == "builtins":
        return None
    return kind


def check_servable(definition: Any) -> None:
    """Refuse what nobody could call.

    Raises:
        errors.InvalidArgument: It is neither a function, nor a class, nor an object with public methods; or the engine
            could not call ``__init__``, ``close``, ``reconfigure`` or ``check_health`` as its class has it.
    """
    served = class_served(definition)
    if not callable(definition) and (served is None or not any(callable(method) for method in _methods_of(served))):
        raise InvalidArgument(
            f"func_or_class must be a function, a class, or an object with methods, not {definition!r}"
        )
    if served is not None:
        _check_hooks(served, constructs=inspect.isclass(definition))


def _check_hooks(served: type, *, constructs: bool) -> None:
    """Refuse what the engine would call in vain, or not at all; what only the object itself tells is seen later."""
    of = f"of {served.__name__}, which the engine calls,"
    if constructs and (_is_async(_static(served, "__init__")) or _has_yield(_static(served, "__init__"))):
        raise InvalidArgument(
            f"func_or_class: __init__ {of} must be a plain def: a constructor cannot be awaited. "
            "What is to be awaited can be started there, by asyncio.create_task, or awaited by the first call"
        )
    for name in ("close", "reconfigure", "check_health"):
        hook = _static(served, name)
        if _has_yield(hook):
            raise InvalidArgument(f"func_or_class: {name} {of} must not have a yield: its body would never run")
    for name in ("close", "check_health"):
        hook = _static(served, name)
        if hook is not None and not callable(hook) and not hasattr(hook, "__get__"):
            raise InvalidArgument(f"func_or_class: {name} {of} must be a method, not {hook!r}; give it another name")
        if not inspect.isfunction(hook):
            continue
        bound = not isinstance(inspect.getattr_static(served, name), staticmethod)
        try:
            inspect.signature(hook, follow_wrapped=False).bind(*[None] * bound)
        except TypeError as error:
            raise InvalidArgument(
                f"func_or_class: {name} {of} must need no arguments: {error}; give them defaults, or it another name"
            ) from None


def _static(served: type, name: str) -> Any:
    """What a class has under a name, without what makes it a method of a class or of none."""
    found = inspect.getattr_static(served, name, None)
    return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found


def _has_yield(function: Any) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def accepts_batches(definition: Any) -> bool:
    """Whether a function, or any method of a class or object, is marked with `accept_batch`."""
    served = class_served(definition)
    return any(getattr(one, _MARK, False) for one in ([definition] if served is None else _methods_of(served)))


def runs_on_loop(definition: Any) -> bool:
    """Whether a function, class or object has an ``async def`` callable; else its calls run one at a time."""
    served = class_served(definition)
    return any(map(_is_async, [definition] if served is None else _methods_of(served)))


def is_reconfigurable(definition: Any) -> bool:
    """Whether a class or object has a ``reconfigure``."""
    served = class_served(definition)
    return served is not None and callable(getattr(served, "reconfigure", None))


def _methods_of(served: type) -> list[Any]:
    """What callers may call of a class, and its other public attributes."""
    return [getattr(served, name, None) for name in dir(served) if is_open(name)]


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "__call__"


def is_open(name: str) -> bool:
    """Whether callers may use a method of this name, if there is one."""
    return not _is_private(name) and name not in LIFECYCLE


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return True
    if inspect.isfunction(function) or inspect.ismethod(function) or inspect.isclass(function):
        return False
    call = inspect.getattr_static(type(function), "__call__", None)
    return inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)


def _collect() -> None:
    """Run the collector, which does nothing while another thread runs it, say for another replica of this process."""
    import gc

    alone = _collecting.acquire(timeout=_LONGEST_COLLECTION_S)
    try:
        gc.collect()
    finally:
        if alone:
            _collecting.release()


class Method:
    """One callable of a backend.

    Attributes:
        function: Bound.
        takes_request: Whether a Python caller's arguments are wrapped in a request object.
        batched: Whether it takes a list.
    """

    __slots__ = ("batched", "function", "name", "takes_request")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self.takes_request = name == "__call__" or _wants_request(function)
        self.batched = bool(getattr(function, _MARK, False))


def _wants_request(function: Callable[..., Any]) -> bool:
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except (TypeError, ValueError):
        return False
    if first is None:
        return False
    if first.name == "request" or first.name.endswith("_request"):
        return True
    annotation = first.annotation
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return name.strip("'\"").rpartition(".")[2] in ("Request", "ServeRequest")


class NoSuchMethod(MethodNotFound):
    """A `MethodNotFound` of this backend's own callers; user code sees those of the calls that it makes.

    It has that name in tracebacks, too, and is just that wherever it arrives.
    """

    __module__ = MethodNotFound.__module__
    __qualname__ = MethodNotFound.__qualname__

    def __reduce__(self) -> tuple[Any, ...]:
        return MethodNotFound, self.args


class UserCallable:
    """A function, or an object and its public methods.

    Args:
        tag: The backend's tag, for messages; an attribute, too.
        func_or_class: A function, the class to instantiate, or an object.
        init_args: For the class.
        init_kwargs: For the class.

    Attributes:
        found: The methods that were called so far, by name: no call needs to ask `method` for those.
    """

    def __init__(self, tag: str, func_or_class: Any, init_args: tuple[Any, ...], init_kwargs: dict[str, Any]) -> None:
        self.tag = tag
        self._has_methods = class_served(func_or_class) is not None
        self.on_loop = runs_on_loop(func_or_class)
        is_class = inspect.isclass(func_or_class)
        self.subject = func_or_class(*init_args, **init_kwargs) if is_class else func_or_class
        self.found: dict[str, Method] = {}

    def method(self, name: str) -> Method:
        """Find a public method.

        Raises:
            NoSuchMethod: There is none of this name.
        """
        known = self.found.get(name)
        if known is None:
            if self._is_found_later(name):
                return Method(name, functools.partial(self._found, name))  # not kept: clients choose the names
            known = self.found[name] = Method(name, self._find(name))
        return known

    def reconfigure(self, user_config: Any) -> Any:
        """Pass ``user_config`` to the backend; what its ``reconfigure`` returned may have to be awaited.

        Raises:
            MethodNotFound: The backend has no ``reconfigure``.
        """
        function = getattr(self.subject, "reconfigure", None) if self._has_methods else None
        if not callable(function):
            raise MethodNotFound(
                f"backend {self.tag!r} has a user_config but no reconfigure(user_config) method to take it"
            )
        return function(user_config)

    def close(self) -> Any:
        """Call the backend's ``close``, if it has one; what that returned may have to be awaited."""
        if self._has_methods and inspect.getattr_static(self.subject, "close", None) is not None:
            return self.subject.close()
        return None

    @property
    def has_health_check(self) -> bool:
        """Whether the backend has a ``check_health``."""
        return self._has_methods and inspect.getattr_static(self.subject, "check_health", None) is not None

    def check_health(self) -> Any:
        """Call the backend's ``check_health``, if it has one; what that returned may have to be awaited."""
        return self.subject.check_health() if self.has_health_check else None

    def drop(self) -> None:
        """Let go of the object, so that its ``__del__`` runs."""
        has_finalizer = hasattr(type(self.subject), "__del__")
        self.found.clear()
        self.subject = None
        if has_finalizer:
            _collect()  # it may hold itself, by a bound method among its attributes for one

    def _find(self, name: str) -> Callable[..., Any]:
        if not self._has_methods:
            if name == "__call__":
                return self.subject  # type: ignore[no-any-return]
            raise NoSuchMethod(f"backend {self.tag!r} is a function and has no method {name!r}")
        if _is_private(name):
            raise NoSuchMethod(f"{name!r} of backend {self.tag!r} is private: only public methods can be called")
        if name in LIFECYCLE:
            raise NoSuchMethod(f"{name!r} of backend {self.tag!r} is called by the engine, and by nobody else")
        if _defines_method(type(self.subject), name):
            function = getattr(self.subject, name)
            if callable(function):
                return function  # type: ignore[no-any-return]
        raise self._missing(name)

    def _is_found_later(self, name: str) -> bool:
        """Whether only the ``__getattr__`` of the user's class knows, which is user code and not to be run here."""
        return (
            self._has_methods
            and is_open(name)
            and name != "__call__"
            and hasattr(type(self.subject), "__getattr__")
            and name not in getattr(self.subject, "__dict__", ())
            and not any(name in vars(cls) for cls in type(self.subject).__mro__)
        )

    def _found(self, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call what the ``__getattr__`` of the user's class finds."""
        try:
            function = getattr(self.subject, method_name)
        except AttributeError as error:
            raise self._missing(method_name) from error
        if not callable(function) or inspect.isclass(function):
            raise self._missing(method_name)
        return function(*args, **kwargs)

    def _missing(self, name: str) -> NoSuchMethod:
        kind = type(self.subject)
        names = ", ".join(name for name in dir(kind) if is_open(name) and _defines_method(kind, name))
        there = f"its methods are: {names}" if names else "it has no public methods"
        return NoSuchMethod(f"backend {self.tag!r} has no method {name!r}; {there}")


def _defines_method(kind: type, name: str) -> bool:
    """Whether a class itself, or one that it is derived from, has a method of this name.

    Looked at without evaluating it: a property is no method, and may cost or raise anything. Nor is a class inside of
    the class, or an object that can be called: they are there for the backend's own use.
    """
    if not any(name in vars(cls) for cls in kind.__mro__ if cls is not object):
        return False
    found = inspect.getattr_static(kind, name, None)
    if isinstance(found, (staticmethod, classmethod, functools.partialmethod, functools.singledispatchmethod)):
        return True
    return callable(found) and inspect.isroutine(found)
