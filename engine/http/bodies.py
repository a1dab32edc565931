"""Reading the bodies that clients send, of which no more are held at a time than there is room for.

Everything here belongs to one ingress, and only its loop's thread touches it.
"""

from __future__ import annotations

from typing import Any

from ..errors import Overloaded
from .patience import Patience

__all__ = ["BodyTooLarge", "Budget", "Claim", "ClientLeft", "read_body"]


class ClientLeft(Exception):
    """The client left before its request was complete."""


class BodyTooLarge(Exception):
    """The body has more bytes than are allowed."""


class Budget:
    """How many bytes of bodies there may be at a time, from when they are announced until they are answered.

    Args:
        most_bytes: So many.

    Attributes:
        held_bytes: So many are claimed now.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0


class Claim:
    """What one request has of a budget. It is to be released, whatever happens.

    Args:
        budget: The budget.
    """

    __slots__ = ("_budget", "_size")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._size = 0

    def grow_to(self, size: int) -> None:
        """Claim so many bytes in all, if these are more than before.

        Raises:
            Overloaded: There is no room for them now.
        """
        more = size - self._size
        if more <= 0:
            return
        budget = self._budget
        if budget.held_bytes + more > budget.most_bytes:
            raise Overloaded(
                f"the bodies of other requests take {budget.held_bytes} of max_bodies_bytes={budget.most_bytes} already"
            )
        self._size = size
        budget.held_bytes += more

    def release(self) -> None:
        """Give all of it back (idempotent)."""
        self._budget.held_bytes -= self._size
        self._size = 0


async def read_body(receive: Any, most_bytes: int, claim: Claim, patience: Patience | None) -> bytes:
    """The whole body of a request.

    Args:
        receive: The server's, as ASGI has it.
        most_bytes: It may have.
        claim: Grows with it.
        patience: How long the client is waited for; None if it owes nothing.

    Raises:
        BodyTooLarge: There is more of it; the rest was not read.
        ClientLeft: Before it was complete.
        Overloaded: See `Claim.grow_to`.
        ClientStalled: See `Patience`.
        DeadlineExceeded: See `Patience`.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        if patience is None:
            message = await receive()
        else:
            with patience:
                message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > most_bytes:
            raise BodyTooLarge
        claim.grow_to(size)
        if not message.get("more_body", False) and not parts:
            return part
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
