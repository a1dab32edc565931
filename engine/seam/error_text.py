"""What can be said of any exception, whatever its own methods do.

An exception of user code may raise anything when it is asked for its text, its type's name or its cause. Nothing here
ever raises, so that whoever reports a failure cannot fail over it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable

__all__ = ["message_of", "shortened", "summary_of", "traceback_of", "type_name_of"]


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
