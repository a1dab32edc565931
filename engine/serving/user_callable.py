"""The user's function or class as a replica calls it: which methods there are and what each of them takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import MethodNotFound

__all__ = ["LIFECYCLE", "Method", "UserCallable", "accept_batch", "accepts_batches", "runs_on_loop"]

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "_engine_accept_batch"
LIFECYCLE = frozenset({"close", "reconfigure"})
"""Methods that the engine calls, and no client can."""


def accept_batch(function: F) -> F:
    """Mark a function or method as taking a list of requests and returning an equally long list of results.

    How many calls at most come together, and how long the first of them waits for the others, are
    `BackendConfig.max_batch_size` and `BackendConfig.batch_wait_timeout`.
    """
    setattr(function, _MARK, True)
    return function


def accepts_batches(func_or_class: Any) -> bool:
    """Whether a function, or any method of a class, is marked with `accept_batch`."""
    if getattr(func_or_class, _MARK, False):
        return True
    return inspect.isclass(func_or_class) and any(
        getattr(getattr(func_or_class, name, None), _MARK, False) for name in dir(func_or_class) if _is_open(name)
    )


def runs_on_loop(func_or_class: Any) -> bool:
    """Whether a function or class has an ``async def`` callable; else its calls run one at a time."""
    if not inspect.isclass(func_or_class):
        return _is_async(func_or_class)
    return any(_is_async(getattr(func_or_class, name, None)) for name in dir(func_or_class) if _is_open(name))


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "__call__"


def _is_open(name: str) -> bool:
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


class UserCallable:
    """A function, or an instance of a class, and its public methods.

    Args:
        tag: The backend's tag, for messages; an attribute, too.
        func_or_class: A function or another callable object, or the class to instantiate.
        init_args: For the class.
        init_kwargs: For the class.
    """

    def __init__(self, tag: str, func_or_class: Any, init_args: tuple[Any, ...], init_kwargs: dict[str, Any]) -> None:
        self.tag = tag
        self._is_class = inspect.isclass(func_or_class)
        self.on_loop = runs_on_loop(func_or_class)
        self.subject = func_or_class(*init_args, **init_kwargs) if self._is_class else func_or_class
        self._methods: dict[str, Method] = {}

    def method(self, name: str) -> Method:
        """Find a public method.

        Raises:
            MethodNotFound: There is none of this name.
        """
        known = self._methods.get(name)
        if known is None:
            known = self._methods[name] = Method(name, self._find(name))
        return known

    def reconfigure(self, user_config: Any) -> Any:
        """Pass ``user_config`` to the backend; what its ``reconfigure`` returned may have to be awaited.

        Raises:
            MethodNotFound: The backend has no ``reconfigure``.
        """
        function = getattr(self.subject, "reconfigure", None) if self._is_class else None
        if not callable(function):
            raise MethodNotFound(
                f"backend {self.tag!r} has a user_config but no reconfigure(user_config) method to take it"
            )
        return function(user_config)

    def close(self) -> Any:
        """Call the backend's ``close``, if it has one; what that returned may have to be awaited."""
        if self._is_class and inspect.getattr_static(self.subject, "close", None) is not None:
            return self.subject.close()
        return None

    def drop(self) -> None:
        """Let go of the object, so that its ``__del__`` runs."""
        has_finalizer = hasattr(type(self.subject), "__del__")
        self._methods.clear()
        self.subject = None
        if has_finalizer:
            import gc

            gc.collect()  # it may hold itself, by a bound method among its attributes for one

    def _find(self, name: str) -> Callable[..., Any]:
        if not self._is_class:
            if name == "__call__":
                return self.subject  # type: ignore[no-any-return]
            raise MethodNotFound(f"backend {self.tag!r} is a function and has no method {name!r}")
        if _is_private(name):
            raise MethodNotFound(f"{name!r} of backend {self.tag!r} is private: only public methods can be called")
        if name in LIFECYCLE:
            raise MethodNotFound(f"{name!r} of backend {self.tag!r} is called by the engine, and by nobody else")
        defined = any(name in vars(cls) for cls in type(self.subject).__mro__ if cls is not object)
        # Looked at without evaluating it: a property is no method, and may cost or raise anything.
        found = inspect.getattr_static(self.subject, name, None) if defined else None
        is_method = callable(found) or isinstance(found, (staticmethod, classmethod, functools.partialmethod))
        function = getattr(self.subject, name) if is_method else None
        if not callable(function):
            raise MethodNotFound(f"backend {self.tag!r} has no method {name!r}; {self._public_names()}")
        return function  # type: ignore[no-any-return]

    def _public_names(self) -> str:
        kind = type(self.subject)
        names = [name for name in dir(kind) if _is_open(name) and callable(getattr(kind, name, None))]
        names = [name for name in names if name != "__call__" or "__call__" in vars(kind)]
        return f"its methods are: {', '.join(names) or 'none'}"
