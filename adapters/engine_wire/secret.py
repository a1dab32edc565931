"""What must be seen nowhere: it is passed on as what it is, and shown as nothing.

Dataclasses and named tuples show their fields, log lines and error messages what they are given, and some tracebacks
all local variables. So it is the value itself that does not show, wherever it goes.
"""

from __future__ import annotations

__all__ = ["Secret", "SecretText"]

_SHOWN = "<secret>"


class Secret(bytes):
    """Bytes that no ``repr``, ``str`` or format shows. What is made of them, as a slice, is bytes again."""

    __slots__ = ()

    def __repr__(self) -> str:
        return _SHOWN

    def __str__(self) -> str:
        return _SHOWN


class SecretText(str):
    """Text that no ``repr`` shows; what is printed or formatted is the text, since it has to be written somewhere."""

    __slots__ = ()

    def __repr__(self) -> str:
        return _SHOWN
