"""What a lane is: it serves the requests of one connection.

There are two, `engine_http.plain.PlainLane` and `engine_http.full.FullLane`; `engine_http.connection` says which
requests take which. A lane runs on the loop of its connection, and only the loop's thread touches it.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["IN_HOST", "NO_LANE", "READ_AHEAD", "Lane", "LaneWithTask"]

IN_HOST = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=%[]:"
"""What a host and its port may consist of. With anything else, as a slash, who puts a URL together gets another one."""
READ_AHEAD = 64 * 1024
"""Bytes taken from a client before the application took those before."""


class Lane(Protocol):
    """What serves the requests of one connection."""

    def data(self, data: bytes) -> None:
        """Take what the client sent."""

    def ended(self) -> None:
        """The client is gone, or nothing more is to be sent to it: nobody may wait for it any longer. Called once."""

    def farewell(self) -> None:
        """Write what was held back, and that the connection ends, if the protocol has words for that."""


class LaneWithTask(Lane, Protocol):
    """A lane that serves in a task of its own, which the connection runs."""

    async def serve(self) -> None:
        """Serve what comes until the client is gone."""


class _NoLane:
    def data(self, data: bytes) -> None:
        """Nobody is there to take it."""

    def ended(self) -> None:
        """It has."""

    def farewell(self) -> None:
        """Nobody is there to be told."""


NO_LANE: Lane = _NoLane()
"""The lane of a connection that is over."""
