"""What the kernel watches: descriptors, and whether they can be read or written.

On Linux there is nothing between us and its epoll: the books of a selector could disagree with it, and what stands on
the way of every message costs every call. Several threads may change what one waits for, and say everything twice.
"""

from __future__ import annotations

import abc
import contextlib
import select
import selectors
from collections.abc import Callable
from typing import Final

__all__ = ["READABLE", "WRITABLE", "Kernel", "make_kernel"]

_HAS_EPOLL = hasattr(select, "epoll")
READABLE: Final[int] = select.EPOLLIN if _HAS_EPOLL else selectors.EVENT_READ
WRITABLE: Final[int] = select.EPOLLOUT if _HAS_EPOLL else selectors.EVENT_WRITE
"""To be watched for, and reported; errors and ends are reported, too, by other bits: whoever reads or writes finds what
they are. So it can be read when anything but `WRITABLE` is reported, and written when anything but `READABLE` is."""


class Kernel(abc.ABC):
    """One such set of descriptors.

    Attributes:
        wait: Waits until something is ready, for so many seconds or for ever (None), and returns descriptors and what
            they are ready for, as many as wanted at most.
    """

    wait: Callable[[float | None, int], list[tuple[int, int]]]

    @abc.abstractmethod
    def watch(self, descriptor: int, events: int) -> None:
        """Watch for these events from now on, or for none."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release its own descriptor (idempotent)."""


class _Epoll(Kernel):
    """That of Linux."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.wait = self._epoll.poll

    def watch(self, descriptor: int, events: int) -> None:
        try:
            if events:
                self._epoll.register(descriptor, events)
            else:
                self._epoll.unregister(descriptor)
        except FileExistsError:
            self._epoll.modify(descriptor, events)
        except FileNotFoundError:
            pass

    def close(self) -> None:
        self._epoll.close()


class _Selector(Kernel):
    """That of other systems."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.wait = self._select

    def watch(self, descriptor: int, events: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)
        if events:
            self._selector.register(descriptor, events)

    def _select(self, timeout_s: float | None, most: int) -> list[tuple[int, int]]:
        return [(key.fd, events) for key, events in self._selector.select(timeout_s)][:most]

    def close(self) -> None:
        self._selector.close()


def make_kernel() -> Kernel:
    """The one of this system.

    Raises:
        OSError: There is no descriptor left for it.
    """
    return _Epoll() if _HAS_EPOLL else _Selector()
