"""A backend as the application described it: what `Engine.create_backend` hands to the controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import BackendConfig
from ..errors import InvalidArgument, NotSerializable
from ..seam.resources import Resources
from ..seam.serialization import dumps, dumps_by_value, loads

__all__ = ["BackendPlan", "pack_definition", "private_copy"]


def private_copy(tag: str, config: BackendConfig | Mapping[str, Any]) -> BackendConfig:
    """A configuration that shares nothing with the one given, so that changing either leaves the other as it is.

    Raises:
        InvalidArgument: A field is wrong.
        NotSerializable: ``user_config`` cannot be pickled.
    """
    copy = BackendConfig().updated(config)
    if copy.user_config is not None:
        copy.user_config = loads(dumps(copy.user_config, f"config: user_config of backend {tag!r}"))
    return copy


def pack_definition(tag: str, func_or_class: Any, init_args: tuple[Any, ...], init_kwargs: dict[str, Any]) -> bytes:
    """Pickle what a backend is made of.

    Raises:
        NotSerializable: A part of it cannot be pickled; the message says which.
    """
    try:
        return dumps_by_value((func_or_class, init_args, init_kwargs), f"backend {tag!r}")
    except NotSerializable:
        dumps_by_value(func_or_class, f"backend {tag!r}")
        for position, value in enumerate(init_args):
            dumps_by_value(value, f"init argument {position} of backend {tag!r}")
        for name, value in init_kwargs.items():
            dumps_by_value(value, f"init argument {name!r} of backend {tag!r}")
        raise


@dataclass(frozen=True)
class BackendPlan:
    """A backend as the application described it.

    Attributes:
        definition: The pickled ``(function or class, init_args, init_kwargs)``.
        on_loop: It has an ``async def`` callable.
        batches: It has a callable marked with ``accept_batch``.
        reconfigurable: It is a class with a ``reconfigure`` method.
    """

    tag: str
    definition: bytes
    config: BackendConfig
    resources: Resources
    on_loop: bool
    batches: bool
    reconfigurable: bool

    def check(self, config: BackendConfig) -> None:
        """Refuse a configuration that this callable cannot honour.

        Raises:
            InvalidArgument: It can't.
            NotSerializable: ``user_config`` cannot be pickled.
        """
        dumps(config.user_config, f"config: user_config of backend {self.tag!r}")
        if config.max_batch_size is not None and not self.batches:
            raise InvalidArgument(
                f"config: max_batch_size={config.max_batch_size} of backend {self.tag!r} needs a callable that takes "
                "a list: mark the function or method with @accept_batch"
            )
        if config.user_config is not None and not self.reconfigurable:
            raise InvalidArgument(
                f"config: user_config of backend {self.tag!r} needs a class with a reconfigure(user_config) method"
            )
