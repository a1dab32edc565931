"""Runs the ingress on hypercorn: HTTP/1.1, HTTP/2 (over TLS, or by prior knowledge) and TLS.

Provides the entry point ``hypercorn`` of the group ``engine.ingress_servers``. Hypercorn itself is imported when a
setting must be checked or a worker serves, not before.
"""

from .server import HypercornServer

__all__ = ["HypercornServer"]
