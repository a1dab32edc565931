"""Reading the bodies that clients send, of which no more are held at a time than there is room for.

Who announces a body gets no room for it: clients that announce much and send nothing would keep all others out. A body
that has begun to come gets as much again as has come, up to what was announced. So half of a body is enough to be sure
of the rest, of many large ones that come at a time those go on that are ahead, and no body waits for another one: what
finds no room is refused, and makes room.

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
    """How many bytes of bodies there may be at a time, from when they come until they are answered.

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

    __slots__ = ("_announced", "_budget", "_size")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._announced = 0
        self._size = 0

    def announce(self, size: int) -> None:
        """So many bytes are to come.

        Raises:
            Overloaded: There would be no room for them now.
        """
        self._announced = size
        self._check_room(size)

    def grow_to(self, size: int) -> None:
        """Claim what so many bytes need, which have come.

        Raises:
            Overloaded: There is no room for it now.
        """
        if size < self._announced:
            size = min(2 * size, self._announced)
        more = size - self._size
        if more > 0:
            self._check_room(more)
            self._size = size
            self._budget.held_bytes += more

    def _check_room(self, more: int) -> None:
        budget = self._budget
        if budget.held_bytes + more > budget.most_bytes:
            raise Overloaded(
                f"the bodies of other requests take {budget.held_bytes - self._size} of "
                f"max_bodies_bytes={budget.most_bytes} already"
            )

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
