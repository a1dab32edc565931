"""How arguments, results and errors travel by way of the courier, which does not open them.

What a replica answers is pickled already, and the courier need not be able to import what is in it. It hands Ray
objects that, when Ray pickles them, turn into the instruction to unpickle what they hold: so whoever gets them gets
the content.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, NamedTuple

from engine.seam.messages import AS_CONFIGURED, NORMAL
from engine.seam.serialization import loads, loads_leniently, refuse, unpack_exception

__all__ = ["CarriedError", "CarriedResult", "Errand", "Filled", "Placeholder", "carried", "refuse_refs"]

_SMALL_BYTES = 4096


def refuse_refs() -> None:
    """Have this process refuse refs where Ray does not see them.

    Pickled by anybody but Ray, a ref forgets its owner, and whoever waits for it waits for ever.
    """
    import ray

    refuse(
        ray.ObjectRef,
        "a ref can be an argument of a call on its own, as in handle.remote(ref), and nothing else: elsewhere, pass on "
        "what it stands for, ray.get(ref)",
    )


class Errand(NamedTuple):
    """A call on its way to the courier.

    Attributes:
        source: Who made it.
        number: Of all that this source made, from 0 on.
        timeout_s: How many seconds it may take, or None.
        left_s: How many of them are left.
        deadline: When they are over, by the clock of whoever made it.
        node_id: Ray's id of the node with that clock.

    The others are those of `engine.seam.messages.Call`, and its shard key.
    """

    source: str
    number: int
    endpoint: str
    method: str
    head: bytes
    payload: bytes
    shard_key: str | None
    timeout_s: float | None
    left_s: float | None
    deadline: float | None = None
    node_id: str = ""
    retries: int = AS_CONFIGURED
    priority: int = NORMAL

    def packed(self) -> bytes:
        """As bytes, for `pickle.loads`."""
        return pickle.dumps(tuple(self), 5)


def carried(payload: bytes) -> Any:
    """What to hand to Ray so that whoever gets the object gets the pickled result.

    Small results of nothing but built-in types are opened after all: Ray passes those on several times as fast.
    """
    if len(payload) <= _SMALL_BYTES:
        try:
            return _PlainUnpickler(io.BytesIO(payload)).load()
        except pickle.UnpicklingError:
            pass
    return CarriedResult(payload)


class _PlainUnpickler(pickle.Unpickler):
    """Refuses whatever would import or call something."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain")


class CarriedResult:
    """A pickled result; pickled again, it is the result."""

    __slots__ = ("_payload",)

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def __reduce__(self) -> Any:
        return _load, (self._payload,)


class CarriedError(Exception):
    """A packed exception (`engine.seam.serialization.pack_exception`); pickled, it is that exception with its cause."""

    def __init__(self, payload: bytes) -> None:
        super().__init__(payload)
        self._payload = payload

    def __reduce__(self) -> Any:
        return unpack_exception, (self._payload,)

    def __str__(self) -> str:
        _, _, text, _ = pickle.loads(self._payload)
        return f"raised in a replica:\n{text}"


class Placeholder(NamedTuple):
    """Stands for a ref among the arguments of a call, by its place among the call's refs."""

    place: int


class Filled:
    """Pickled arguments with placeholders, and what to put there; pickled again, they are the arguments."""

    __slots__ = ("_payload", "_values")

    def __init__(self, payload: bytes, values: list[Any]) -> None:
        self._payload = payload
        self._values = values

    def __reduce__(self) -> Any:
        return _fill, (self._payload, self._values)


def _load(payload: bytes) -> Any:
    try:
        return loads(payload)
    except Exception:
        return loads_leniently(payload)


def _fill(payload: bytes, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = _load(payload)

    def filled(value: Any) -> Any:
        return values[value.place] if type(value) is Placeholder else value

    return tuple(map(filled, args)), {name: filled(value) for name, value in kwargs.items()}
