"""A control call's arguments, from what the user passed: by other names, and in the wrong place.

Pure; called on the user's thread before anything is done.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..config import BackendConfig
from ..errors import InvalidArgument
from ..seam.resources import ACTOR_OPTIONS
from ..seam.serialization import dumps, loads

__all__ = ["also_named", "check_init_options", "private_copy"]

T = TypeVar("T")


def also_named(**others: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Let arguments of a method be passed by another name, too.

    What looks at the method sees its own names alone. With ``**kwargs`` of its own the method gets an argument of such
    a name that it needs no more: it belongs to whatever the method passes its keyword arguments on to.

    Args:
        others: The other name of each argument that has one.
    """
    ours = {other: name for name, other in others.items()}

    def decorate(method: Callable[..., T]) -> Callable[..., T]:
        code = method.__code__
        positional = code.co_varnames[: code.co_argcount]
        passes_on = bool(code.co_flags & inspect.CO_VARKEYWORDS)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> T:
            for other in ours.keys() & kwargs.keys():
                name = ours[other]
                if name not in kwargs and name not in positional[: len(args)]:
                    kwargs[name] = kwargs.pop(other)
                elif not passes_on:
                    raise TypeError(f"{method.__name__}() got {name!r} twice: {other!r} is another name of it")
            return method(*args, **kwargs)

        return call

    return decorate


def private_copy(tag: str, config: BackendConfig | Mapping[str, Any]) -> BackendConfig:
    """A configuration that shares nothing with the one given, so that changing either leaves the other as it is.

    Raises:
        InvalidArgument: A field is wrong.
        NotSerializable: ``user_config`` cannot be pickled.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name in ACTOR_OPTIONS:
                raise InvalidArgument(f"config: {name} is no field of it, but belongs in {_in_its_place(name, value)}")
    copy = BackendConfig().updated(config)
    if copy.user_config is not None:
        copy.user_config = loads(dumps(copy.user_config, f"config: user_config of backend {tag!r}"))
    return copy


def check_init_options(tag: str, func_or_class: Any, init_kwargs: Mapping[str, Any]) -> None:
    """Refuse options of the engine that were passed as arguments of a constructor which does not take them.

    Raises:
        InvalidArgument: There is one; the message says where it belongs.
    """
    for name, value in init_kwargs.items():
        place = _in_its_place(name, value)
        if place and not _constructor_takes(func_or_class, name):
            what = getattr(func_or_class, "__qualname__", type(func_or_class).__qualname__)
            raise InvalidArgument(f"backend {tag!r}: {name} is no argument of {what}, but belongs in {place}")


def _in_its_place(name: str, value: Any) -> str | None:
    """Where an option of the engine belongs, as one writes it; None for a name that is none."""
    shown = reprlib.repr(value)
    if name in BackendConfig.__dataclass_fields__:
        return f"config={{{name!r}: {shown}}}"
    if name in ACTOR_OPTIONS:
        return f"ray_actor_options={{{name!r}: {shown}}}"
    if name in ("route", "methods"):
        return f"create_endpoint(..., {name}={shown})"
    if name == "env":
        return "ray_actor_options={'runtime_env': {...}}"
    return None


def _constructor_takes(func_or_class: Any, name: str) -> bool:
    if not inspect.isclass(func_or_class):
        return False
    try:
        parameters = inspect.signature(func_or_class).parameters
    except (TypeError, ValueError):  # written in C, say: let it speak for itself
        return True
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
