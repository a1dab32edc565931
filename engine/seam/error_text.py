"""What messages say: of any exception, whatever its own methods do, of types, and of names.

An exception of user code may raise anything when it is asked for its text, its type's name or its cause. Nothing here
ever raises, so that whoever reports a failure cannot fail over it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable

__all__ = ["a_kind_of", "all_there_are", "message_of", "shortened", "summary_of", "traceback_of", "type_name_of"]


def type_name_of(error: BaseException) -> str:
    """The qualified name of its type: ``ValueError``, ``package.module.OwnError``."""
    return _text(
        lambda: f"{type(error).__module__}.{type(error).__qualname__}", "an exception without a name"
    ).removeprefix("builtins.")


def message_of(error: BaseException) -> str:
    """What ``str()`` makes of it."""
    return _text(lambda: str(error), "(its __str__ raised)")


def summary_of(error: BaseException) -> str:
    """Type and message in one line, as a traceback ends."""
    return f"{type_name_of(error).rpartition('.')[2]}: {message_of(error)}"


def traceback_of(error: BaseException) -> str:
    """The formatted traceback, with causes; type and message alone where that cannot be formatted."""
    return (
        _text(lambda: "".join(traceback.format_exception(type(error), error, error.__traceback__)), "")
        or f"{type_name_of(error)}: {message_of(error)}\n"
    )


def a_kind_of(value: object) -> str:
    """Its type's name with an article: ``a list``, ``an int``."""
    name = type(value).__qualname__
    return f"an {name}" if name[:1] in "aeioAEIO" else f"a {name}"


def all_there_are(kind: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is none: ``the endpoints are: 'a', 'b'``, ``there are no endpoints``."""
    known = ", ".join(map(repr, names))
    return f"the {kind} are: {known}" if known else f"there are no {kind}"


def shortened(text: str, most: int) -> str:
    """A text of not much more than ``most`` characters: what is left out of its middle is counted there."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}... ({len(text) - 2 * half} characters left out) ...{text[-half:]}"


def _text(make: Callable[[], str], otherwise: str) -> str:
    try:
        return "".join((make(), ""))  # a plain string, also of a type that is derived from it
    except BaseException:  # whatever user code raises there, the failure it is about must be told
        return otherwise
