"""What any process needs to make calls, and what a platform may have beyond that."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from .channel import Channel, ChannelListener
from .messages import Call

__all__ = ["Connector", "HasRefs", "MayReturn", "PlatformRefs", "may_return", "refs_of"]


class PlatformRefs(Protocol):
    """Refs that are the platform's own, where it has some that its users know how to pass on and to wait for.

    Calls that are started here take their way through the same routers as all others. Any thread may use it.
    """

    def is_ref(self, value: Any) -> bool:
        """Whether this is a ref of the platform."""

    def lift(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """Take the refs out of a call's arguments; before the callee runs, their results take their places."""

    def start(
        self, endpoint: str, call: Call, shard_key: str | None, lifted: list[Any], timeout_s: float | None
    ) -> Any:
        """Start a call without waiting for it.

        Args:
            endpoint: Its name.
            call: Its ``id`` is not looked at.
            shard_key: Calls with equal keys go to the same backend.
            lifted: The refs taken out of its arguments, waited for first.
            timeout_s: How many seconds the call may take, up to its deadline, or None: for those who are told by
                `engine.errors.DeadlineExceeded` that it took longer.

        Returns:
            The platform's ref. Every error arrives through it.
        """

    def results(self, refs: list[Any], timeout_s: float | None) -> list[Any]:
        """Wait for the results of refs.

        Raises:
            engine.errors.DeadlineExceeded: They did not come within ``timeout_s`` seconds; the calls go on.
            BaseException: What a call raised, as its own type.
        """

    async def result(self, ref: Any, timeout_s: float | None) -> Any:
        """As `results`, for one ref, without blocking the running asyncio or trio loop."""

    def wait(self, refs: list[Any], num_returns: int, timeout_s: float | None) -> tuple[list[Any], list[Any]]:
        """Wait until some have settled: those, at most ``num_returns``, and the others, in the order given."""

    def statistics(self) -> list[dict[str, Any]]:
        """What the callers counted and hold that make these calls, as `Caller.statistics` says it.

        Empty while there are none, or they cannot be asked.
        """


class Connector(Protocol):
    """What any process needs to make calls: it opens channels, and starts nothing.

    Any thread of the process may use it.
    """

    name: str
    """What ``Engine(backend=...)`` calls its adapter."""
    control_address: str
    """Where the controller is reached, once that is known."""

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> Channel:
        """Open a channel to a worker's address, or to a `control_address`.

        Args:
            address: What the worker announced.
            listener: Who hears the channel.
            on_loop: True to deliver on the asyncio loop running in this thread, False to deliver from a thread of
                the adapter's or from `Channel.drive`.

        Never blocks for long: messages sent before the connection stands are kept.

        Raises:
            ChannelClosed: Nobody is at that address.
        """

    def close(self) -> None:
        """Release what `open_channel` needs in this process (threads, wake-up descriptors)."""


@runtime_checkable
class HasRefs(Protocol):
    """A connector of a platform with refs of its own; where it is none, refs are the engine's."""

    refs: PlatformRefs
    """The platform's own refs, there from the constructor on, and valid wherever `Connector.open_channel` is."""


@runtime_checkable
class MayReturn(Protocol):
    """A connector of a platform on which a controller can outlive its process; elsewhere, a lost one is gone."""

    def returns(self, control_address: str) -> bool:
        """Whether a controller that cannot be reached there will be again, at the same address."""


def refs_of(connector: Connector) -> PlatformRefs | None:
    """The refs of the connector's platform, if that has some."""
    return connector.refs if isinstance(connector, HasRefs) else None


def may_return(connector: Connector, control_address: str) -> bool:
    """Whether a controller that cannot be reached there will be again, at the same address."""
    return isinstance(connector, MayReturn) and bool(connector.returns(control_address))
