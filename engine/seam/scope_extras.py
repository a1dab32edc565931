"""What middlewares and frameworks leave in a request's scope, on its way to a backend: a user, a session, a state.

Each value travels on its own, so that one that cannot does not keep the others or the request from arriving. It is then
left out, which the log says once. What frameworks leave for themselves (an application, its routes) stays behind
silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .log import Log
from .serialization import dumps, loads

__all__ = ["Extra", "pack_extras", "restore_extras"]

_log = Log("engine.http")

_LARGEST = 1 << 20
"""Bytes of one value. What is larger, a model in the state of an application say, is not meant for each request."""
_FRAMEWORKS = frozenset(("app", "app_root_path", "endpoint", "route", "route_root_path", "router"))
_FRAMEWORK_PREFIXES = ("starlette.", "fastapi")
_MOST_REFUSALS = 1000

_refused: set[tuple[str, type]] = set()  # what was named in the log is neither named nor tried again


class Extra(NamedTuple):
    """One value of a scope, or of the scope's state."""

    key: str
    in_state: bool
    pickled: bytes


def pack_extras(scope: Mapping[str, Any], known: Mapping[str, Any]) -> list[Extra]:
    """Pack what a scope has beyond what servers put there.

    Args:
        scope: The scope.
        known: What travels anyway.
    """
    extras = []
    for key, value in scope.items():
        if key not in known and key not in _FRAMEWORKS and not key.startswith(_FRAMEWORK_PREFIXES):
            if key == "state":
                if isinstance(value, Mapping):
                    extras += [_packed(str(name), True, part) for name, part in list(value.items())]
            elif key not in ("asgi", "extensions"):
                extras.append(_packed(key, False, value))
    return [extra for extra in extras if extra is not None]


def restore_extras(scope: dict[str, Any], extras: list[Extra]) -> None:
    """Put back what `pack_extras` packed."""
    for key, in_state, pickled in extras:
        name = _name(key, in_state)
        try:
            value = loads(pickled)
        except Exception as error:
            if _is_new((name, bytes)):
                _log.warning("%s cannot be rebuilt in the replica and is left out: %r", name, error)
            continue
        if in_state:
            scope.setdefault("state", {})[key] = value
        else:
            scope[key] = value


def _packed(key: str, in_state: bool, value: Any) -> Extra | None:
    name = _name(key, in_state)
    mark = (name, type(value))
    if mark in _refused:
        return None
    try:
        pickled = dumps(value, name)
    except Exception as error:
        why = str(error)
    else:
        if len(pickled) <= _LARGEST:
            return Extra(key, in_state, pickled)
        why = f"{name} has {len(pickled)} bytes pickled, and at most {_LARGEST} travel with a request"
    if _is_new(mark):
        _log.warning("a part of a request does not reach its backend: %s", why)
    return None


def _name(key: str, in_state: bool) -> str:
    return f"request.state.{key}" if in_state else f"request.scope[{key!r}]"


def _is_new(mark: tuple[str, type]) -> bool:
    if mark in _refused:
        return False
    if len(_refused) >= _MOST_REFUSALS:  # keys that somebody makes up, one for each request
        _refused.clear()
    _refused.add(mark)
    return True
