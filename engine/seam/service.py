"""What a worker that takes calls runs, and what runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .channel import ChannelListener

if TYPE_CHECKING:
    import asyncio

__all__ = ["Service", "ServiceLoop"]


class ServiceLoop(Protocol):
    """What runs a service, as the service sees it: reads its channels and gives it its turns."""

    def wake(self) -> None:
        """From any thread: call `Service.run_next` and look at `Service.finished` soon."""

    def poll(self, timeout_s: float | None) -> None:
        """Blocking services only, from within `Service.run_next`: read what comes within this time."""

    def step_out(self) -> None:
        """Blocking services only: the service's thread is about to run user code.

        Until `step_in`, another thread may deliver messages to the service, so that calls are refused and
        cancellations heard while user code takes long.
        """

    def step_in(self) -> None:
        """Blocking services only: user code returned; no other thread touches the service any more."""

    def open_channels(self) -> int:
        """How many callers are connected."""


class Service(ChannelListener, Protocol):
    """What a worker that takes calls runs: a replica. It hears every channel opened to the worker's address."""

    @property
    def event_loop(self) -> asyncio.AbstractEventLoop | None:
        """What to run it on, made and closed by whoever made the service.

        None if it is to be run by `run_next`, in turn with its sockets.
        """

    def attach(self, loop: ServiceLoop) -> None:
        """Take the loop; called once, before anything else, on the thread (and event loop) that runs the service."""

    def run_next(self) -> float | None:
        """Blocking services only: do one piece of work, then say for how many seconds there is nothing to do.

        0 means there is more to do at once, None means nothing until a message comes.
        """

    def delayed(self) -> None:
        """Blocking services only: user code has run for a while.

        Called by whoever delivers messages meanwhile, with the turn: before any, and after each `ServiceLoop.wake`.
        """

    def finished(self) -> bool:
        """Whether the loop should stop."""
