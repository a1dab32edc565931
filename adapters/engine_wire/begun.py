"""How a caller knows, of a peer that has died, which of its calls had begun there: a page of memory that both share.

Whoever opens a channel over a Unix socket makes a page (`BegunPage`) and passes its descriptor along with its greeting.
Whoever accepts the channel maps the page (`adopted`) and, before user code sees a call, writes that call's number into
it. It costs no message and no system call, and it stands when the process is gone. Calls need not begin in the order of
their numbers: threads that send at the same time may overtake each other between taking a number and sending. So the
page has the numbers of the last calls that began, and of all others only the highest.

Both map the page, and keep no descriptor of it once it has been passed. Neither trusts the other with its life: who
makes a page seals it, and who gets one first sees that it is sealed, so that nobody can shrink it, since touching what
is gone would end the process. Where there is no such memory (other systems than Linux, no descriptor to spare just
then), channels do without: then a call that was sent may have begun.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import repeat, starmap
from typing import Final, NamedTuple

from .mapping import mapped

__all__ = ["FIRST_PLACE", "HALF", "Begun", "BegunPage", "adopted", "close_all", "descriptors_in", "greet_with", "room"]

_PAGE_BYTES = 4096
_FORGOTTEN, _ADOPTED = range(2)  # of its words of eight bytes: see `Begun.forgotten`; whether anybody says so
FIRST_PLACE: Final = 2  # the others are places for numbers, taken in turn
HALF: Final = 256  # of its words


class Begun(NamedTuple):
    """Which calls have begun.

    Attributes:
        numbers: Those of the last ones.
        forgotten: The highest of those before: calls up to that may have begun.
    """

    numbers: frozenset[int]
    forgotten: int

    def may_have(self, number: int) -> bool:
        """Whether the call of this number may have begun."""
        return number in self.numbers or number <= self.forgotten


def room(words: memoryview, place: int) -> int:
    """Make room in the half of the page that begins at a place; returns the place for the next number.

    To be called at a multiple of `HALF`, before anything is written there. Doing it twice does no harm.
    """
    first = place % len(words) or FIRST_PLACE
    words[_FORGOTTEN] = max(words[_FORGOTTEN], *words[first : first - first % HALF + HALF])
    return first


class BegunPage:
    """The side that reads: of one channel, which closes it.

    Raises:
        OSError: There is no memory for it, or no descriptor.
    """

    words: memoryview | None = None
    """Its memory; None once it is closed."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []  # one, until it has been passed
        try:
            # In one go: no signal handler runs between a descriptor's coming and its being noted.
            self._descriptors += map(os.memfd_create, ("engine-begun",), (os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING,))
            os.ftruncate(self.fd, _PAGE_BYTES)
            os.pwrite(self.fd, bytes(_PAGE_BYTES), 0)  # so that the memory is there when it is written to
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.words = mapped(self.fd, _PAGE_BYTES)
        except BaseException:
            self.close()
            raise

    @classmethod
    def made(cls, sock: socket.socket) -> Iterator[BegunPage]:
        """Make one for a channel over this socket; none where there can be none.

        Whoever is given it by a ``for`` statement has it before a signal handler can run.

        Raises:
            OSError: By the iterator: see the class.
        """
        if sock.family != socket.AF_UNIX or not (hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")):
            return iter(())
        return starmap(cls, ((),))

    @property
    def fd(self) -> int:
        """Of its file, until it has been passed."""
        return self._descriptors[0]

    def read(self) -> Begun | None:
        """Which calls have begun; None if nobody has kept the page."""
        if self.words is None or self.words[_ADOPTED] != 1:
            return None
        words = self.words.tolist()
        return Begun(frozenset(words[FIRST_PLACE:]), words[_FORGOTTEN])

    def passed(self) -> None:
        """The peer has it, or will never: its descriptor is not needed any more (idempotent)."""
        close_all(self._descriptors)

    def close(self) -> None:
        """Let go of it (idempotent)."""
        self.passed()
        self.words = None


def greet_with(sock: socket.socket, greeting: bytes, page: BegunPage | None) -> None:
    """Send a greeting, with the page if there is one and the system takes it.

    Raises:
        OSError: The peer is gone.
    """
    if page is None:
        sock.send(greeting, socket.MSG_DONTWAIT)
    else:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [page.fd]))]
        try:
            sock.sendmsg([greeting], rights, socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            # As many of this user's descriptors are on their way as it may have open: its replicas read none just now.
            sock.send(greeting, socket.MSG_DONTWAIT)
        page.passed()


def descriptors_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came along with some bytes; whoever takes them closes them."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


def close_all(descriptors: list[int]) -> None:
    """Close descriptors and take them off their list. No signal handler runs between the two."""
    deque(map(os.close, map(descriptors.pop, repeat(-1, len(descriptors)))), 0)


def adopted(descriptors: list[int]) -> memoryview | None:
    """The side that writes: map the page that came, and close what came, which takes it off the list.

    Returns:
        Its words, to be written to from `FIRST_PLACE` on; None if none came that can be trusted.
    """
    try:
        return _mapped(descriptors[0]) if descriptors else None
    except (OSError, ValueError):  # no descriptor or no memory is left, or it is something else
        return None
    finally:
        close_all(descriptors)


def _mapped(descriptor: int) -> memoryview | None:
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(descriptor).st_size != _PAGE_BYTES:
        return None
    words = mapped(descriptor, _PAGE_BYTES)
    words[_ADOPTED] = 1
    return words
