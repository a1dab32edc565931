"""Values as compact JSON, and saying what has no form in it."""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import datetime
import decimal
import enum
import json
import os
import uuid
from typing import Any

from ..errors import ResultNotSerializable
from .error_text import a_kind_of

__all__ = ["to_json"]


def to_json(value: Any) -> bytes:
    """Write compact JSON in UTF-8.

    Beside what JSON knows, it takes numpy arrays and scalars (and what else has ``dtype`` and ``tolist``), dataclasses,
    pydantic models, dates, times and time spans (in seconds), `Decimal` (as a string), `UUID`, `Path`, enumerations,
    sets and other collections, exceptions (their text), and bytes that are UTF-8.

    Raises:
        ResultNotSerializable: Some part of it has no form in JSON; the message says which.
        ValueError: A number is infinite or not a number, or the value contains itself.
    """
    try:
        text = _encode(value)
    except TypeError:
        # keys that are no strings, or a part that has no form: the slow way handles the one and names the other
        text = _encode(_plain(value, "the result", 0))
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate can be written as an escape only
        return _encode_ascii(_plain(value, "the result", 0)).encode("ascii")


def _default(value: Any) -> Any:
    plain = _simplify(value)
    if plain is _NO_FORM:
        raise TypeError(type(value).__qualname__)
    return plain


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_default).encode
_encode_ascii = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_default).encode

_NO_FORM = object()
_COLLECTIONS = (
    set,
    frozenset,
    range,
    collections.deque,
    collections.abc.KeysView,
    collections.abc.ValuesView,
    collections.abc.ItemsView,
)
_DEEPEST = 500


def _simplify(value: Any) -> Any:
    """Turn a value that JSON does not know into one that is nearer to it, or `_NO_FORM`."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, decimal.Decimal):
        return str(value)  # a number of JSON would lose digits on the way
    if isinstance(value, _COLLECTIONS):
        return list(value)
    if isinstance(value, collections.abc.Mapping):
        return dict(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            return _NO_FORM
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Exception):
        return str(value)
    if isinstance(value, type):
        return _NO_FORM
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return _NO_FORM


def _plain(value: Any, path: str, depth: int) -> Any:
    """The whole value in JSON's own types, with an error that says where it cannot be."""
    if depth > _DEEPEST:
        raise ValueError(f"{path[:80]}... is nested too deeply for JSON, or contains itself")
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {_plain_key(key, path): _plain(item, f"{path}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{position}]", depth + 1) for position, item in enumerate(value)]
    simpler = _simplify(value)
    if simpler is _NO_FORM:
        raise ResultNotSerializable(
            f"{path} is {a_kind_of(value)}, which has no form in JSON; "
            f"return a starlette Response, bytes, or something made of dicts, lists, strings and numbers"
        )
    return _plain(simpler, path, depth + 1)


def _plain_key(key: Any, path: str) -> str | int | float | bool | None:
    simpler = key
    for _ in range(3):  # an enumeration of numpy scalars, say
        if simpler is None or isinstance(simpler, (str, int, float)):
            return simpler
        simpler = _simplify(simpler)
    raise ResultNotSerializable(f"{path} has the key {key!r}, {a_kind_of(key)}, which has no form in JSON")
