"""What an application passes to an engine, checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import BackendConfig
from ..errors import InvalidArgument
from ..seam.adapter import Adapter, lacking
from ..seam.detached import Detachable
from ..seam.plugins import load_adapter
from ..seam.resources import resources_of
from ..serving.user_callable import (
    accepts_batches,
    check_servable,
    class_served,
    is_open,
    is_reconfigurable,
    runs_on_loop,
)
from .arguments import check_init_options, private_copy
from .backend_plan import BackendPlan, pack_definition

__all__ = ["adapter_of", "check_name", "checked_call_methods", "checked_methods", "detachable", "plan_of"]

_VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


def plan_of(
    tag: str,
    func_or_class: Any,
    init_args: tuple[Any, ...],
    init_kwargs: dict[str, Any],
    config: BackendConfig | Mapping[str, Any] | None,
    ray_actor_options: Mapping[str, Any] | None,
) -> BackendPlan:
    """A backend from what the user passed; whether it fits its configuration is yet to be checked.

    Raises:
        errors.InvalidArgument: An argument is wrong.
        errors.NotSerializable: A part of it cannot be pickled.
    """
    check_servable(func_or_class)
    check_init_options(tag, func_or_class, init_kwargs)
    if (init_args or init_kwargs) and not isinstance(func_or_class, type):
        kind = "a function" if class_served(func_or_class) is None else "an object, constructed already"
        raise InvalidArgument(f"backend {tag!r} is {kind}: only a class takes init arguments")
    return BackendPlan(
        tag=tag,
        definition=pack_definition(tag, func_or_class, init_args, init_kwargs),
        config=private_copy(tag, {} if config is None else config),
        resources=resources_of(ray_actor_options),
        on_loop=runs_on_loop(func_or_class),
        batches=accepts_batches(func_or_class),
        reconfigurable=is_reconfigurable(func_or_class),
    )


def adapter_of(backend: Any) -> Adapter:
    """What `Engine(backend=...)` selects.

    Raises:
        errors.InvalidArgument: It is something else.
    """
    adapter: Adapter = load_adapter(backend) if isinstance(backend, str) else backend
    if isinstance(adapter, type) and hasattr(adapter, "start_worker"):
        raise InvalidArgument(f"backend must be an instance, not the class {adapter.__name__}: {adapter.__name__}(...)")
    if not hasattr(adapter, "start_worker"):
        raise InvalidArgument(f"backend must be the name of an adapter or an adapter instance, not {backend!r}")
    if missing := lacking(adapter):
        raise InvalidArgument(f"backend={backend!r} is no adapter: it lacks {', '.join(missing)}")
    return adapter


def detachable(adapter: Adapter, name: str) -> Detachable:
    """The adapter, if an engine of it can outlive its creator.

    Raises:
        errors.InvalidArgument: It is something else.
    """
    if not isinstance(adapter, Detachable):
        raise InvalidArgument(
            f"detached engine {name!r}: what the {adapter.name} adapter runs ends with this process; "
            'one that outlives its creator needs backend="ray"'
        )
    return adapter


def check_name(value: Any, field: str) -> None:
    """Refuse what names nothing.

    Raises:
        errors.InvalidArgument: It is something else.
    """
    if not isinstance(value, str) or not value:
        raise InvalidArgument(f"{field} must be a non-empty str, not {value!r}")


def checked_methods(methods: Any) -> tuple[str, ...]:
    """HTTP verbs, in capitals and each once.

    Raises:
        errors.InvalidArgument: It is something else.
    """
    if isinstance(methods, str) or not isinstance(methods, (list, tuple, set, frozenset)) or not methods:
        raise InvalidArgument(f'methods must be a list of HTTP verbs such as ["GET"], not {methods!r}')
    for verb in methods:
        if not isinstance(verb, str) or verb.upper() not in _VERBS:
            raise InvalidArgument(f"methods: every verb must be one of {', '.join(_VERBS)}, not {verb!r}")
    return tuple(dict.fromkeys(verb.upper() for verb in methods))


def checked_call_methods(call_methods: Any) -> tuple[str, ...] | None:
    """Names of methods that HTTP clients may call, each once; None for all that are open anyway.

    Raises:
        errors.InvalidArgument: It is something else.
    """
    if call_methods is None:
        return None
    if isinstance(call_methods, str) or not isinstance(call_methods, (list, tuple, set, frozenset)):
        raise InvalidArgument(
            f'call_methods must be a list of names such as ["predict"], or None, not {call_methods!r}'
        )
    for name in call_methods:
        if not isinstance(name, str) or not name.isidentifier() or not is_open(name):
            raise InvalidArgument(
                "call_methods: every name must be that of a public method which the engine does not call itself, "
                f"not {name!r}"
            )
    return tuple(dict.fromkeys(call_methods))
