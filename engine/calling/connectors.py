"""Which connector opens an engine's channels in this process."""

from __future__ import annotations

import os
import threading

from ..seam.connector import Connector

__all__ = ["connector_for", "register_connector", "unregister_connector"]

_lock = threading.Lock()  # guards `_connectors`, which maps engine ids to process ids and connectors
_connectors: dict[str, tuple[int, Connector]] = {}


def register_connector(engine_id: str, connector: Connector) -> None:
    """Say which connector opens this engine's channels in this process."""
    with _lock:
        _connectors[engine_id] = os.getpid(), connector


def unregister_connector(engine_id: str) -> None:
    """Take `register_connector` back."""
    with _lock:
        _connectors.pop(engine_id, None)


def connector_for(engine_id: str, adapter_name: str) -> tuple[Connector, bool]:
    """The connector that opens this engine's channels in this process, and whether it was made for whoever asks."""
    from ..seam.plugins import load_adapter

    with _lock:
        pid, known = _connectors.get(engine_id, (0, None))
    # A forked copy's threads and selectors are not its own: a handle passed on to it needs one that is.
    return (known, False) if known is not None and pid == os.getpid() else (load_adapter(adapter_name), True)
