"""A backend as the application described it: what `Engine.create_backend` hands to the controller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import BackendConfig
from ..errors import InvalidArgument, NotSerializable
from ..seam.importable import note_modules
from ..seam.resources import Resources
from ..seam.serialization import dumps, dumps_by_value

__all__ = ["BackendPlan", "pack_definition"]

_NOTHING = (0, "0%")


def pack_definition(tag: str, func_or_class: Any, init_args: tuple[Any, ...], init_kwargs: dict[str, Any]) -> bytes:
    """Pickle what a backend is made of.

    Raises:
        NotSerializable: A part of it cannot be pickled; the message says which.
    """
    note_modules()
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
        definition: The pickled ``(function, class or object, init_args, init_kwargs)``.
        on_loop: It has an ``async def`` callable.
        batches: It has a callable marked with ``accept_batch``.
        reconfigurable: It has a ``reconfigure`` method.
        version: Counts what ruled under this tag; a change of the configuration alone is no other version.
    """

    tag: str
    definition: bytes
    config: BackendConfig
    resources: Resources
    on_loop: bool
    batches: bool
    reconfigurable: bool
    version: int = 1

    def check(self, config: BackendConfig) -> None:
        """Refuse a configuration that this callable cannot honour.

        Raises:
            InvalidArgument: It can't.
            NotSerializable: ``user_config`` cannot be pickled.
        """
        dumps(config.user_config, f"config: user_config of backend {self.tag!r}")
        if config.max_batch_size not in (None, 1) and not self.batches:
            raise InvalidArgument(
                f"config: max_batch_size={config.max_batch_size} of backend {self.tag!r} needs a callable that takes "
                "a list: mark the function or method with @accept_batch"
            )
        if config.user_config is not None and not self.reconfigurable:
            raise InvalidArgument(
                f"config: user_config of backend {self.tag!r} needs a class with a reconfigure(user_config) method"
            )
        if config.max_surge in _NOTHING and config.max_unavailable in _NOTHING:
            raise InvalidArgument(
                f"config: max_surge={config.max_surge!r} and max_unavailable={config.max_unavailable!r} of backend "
                f"{self.tag!r} leave no way to exchange a replica: allow one of them at least 1"
            )
