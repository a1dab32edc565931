"""Which adapter opens an engine's channels in this process."""

from __future__ import annotations

import threading

from .adapter import Adapter

__all__ = ["connector_for", "register_connector", "unregister_connector"]

_lock = threading.Lock()  # guards `_connectors`, which maps engine ids: engines do not see each other
_connectors: dict[str, Adapter] = {}


def register_connector(engine_id: str, adapter: Adapter) -> None:
    """Say which adapter opens this engine's channels in this process."""
    with _lock:
        _connectors[engine_id] = adapter


def unregister_connector(engine_id: str) -> None:
    """Take `register_connector` back."""
    with _lock:
        _connectors.pop(engine_id, None)


def connector_for(engine_id: str, adapter_name: str) -> Adapter:
    """The adapter that opens this engine's channels in this process."""
    from .plugins import load_adapter

    with _lock:
        known = _connectors.get(engine_id)
    return known if known is not None else load_adapter(adapter_name)
