"""Whether a library of green threads has replaced what the engine is made of: threads, locks, sockets, polling.

It then would hang: a thread that waits for an answer must not be the one that brings it.
"""

from __future__ import annotations

import sys
from typing import Any

from ..errors import InvalidArgument

__all__ = ["check_unpatched"]

_NEEDED = ("_thread", "threading", "socket", "select")
_NEEDED_OF_EVENTLET = ("thread", "socket", "select")


def check_unpatched() -> None:
    """Refuse to work on what gevent or eventlet has patched.

    Raises:
        errors.InvalidArgument: One of them has, in this process.
    """
    modules = sys.modules
    gevent: Any = modules.get("gevent.monkey")
    if gevent is not None:
        _refuse("gevent", [name for name in _NEEDED if gevent.is_module_patched(name)])
    eventlet: Any = modules.get("eventlet.patcher")
    if eventlet is not None:
        _refuse("eventlet", [name for name in _NEEDED_OF_EVENTLET if eventlet.is_monkey_patched(name)])


def _refuse(library: str, patched: list[str]) -> None:
    if patched:
        raise InvalidArgument(
            f"{library} has patched {', '.join(patched)} in this process, where calls of the engine would hang: "
            "create or call it in a process that is not patched (of gunicorn: worker_class 'gthread', not "
            f"'{library}'), and from here over HTTP"
        )
