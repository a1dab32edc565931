"""A started worker as the adapter sees it: its actor, its control channel, and how it is to end.

Only the controller's loop touches it. A worker is heard by its control channel, which it opens itself and introduces by
a `Hello`; its end is told by that channel, by what it said last, or by Ray.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from engine.adapter import Channel, ChannelClosed, WorkerSpec
from engine.errors import EngineError
from engine.messages import Control, Message
from engine_wire import SocketChannel

from .bodies import Bound, Leaving

__all__ = ["WatchedWorker", "described_death"]


class WatchedWorker:
    """One worker, from the call that starts its actor to its exit.

    Args:
        spec: What it is.
        actor: Ray's handle.
        said: Gets what it says (`engine.adapter.AdapterEvents.worker_said`).
        bound: Told at which port it listens on its public address.
        lost: Told when its control channel has ended.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        actor: Any,
        said: Callable[[str, Any], None],
        bound: Callable[[WatchedWorker, int], None],
        lost: Callable[[WatchedWorker], None],
    ) -> None:
        self.spec = spec
        self.worker_id = spec.worker_id
        self.actor = actor
        self.killed = False  # by the engine
        self.placed = False  # it runs somewhere
        self.exit_code: int | None = None  # that it said it would leave with
        self.deadline: asyncio.TimerHandle | None = None
        self.port: asyncio.Future[int] | None = None  # where it listens, if it is the first on a public address
        self._said = said
        self._bound = bound
        self._lost = lost
        self._channel: Channel | None = None
        self._untold: deque[Any] = deque()

    def __repr__(self) -> str:
        return f"<WatchedWorker {self.worker_id} placed={self.placed} killed={self.killed} {self._channel}>"

    def connected(self, channel: Channel) -> None:
        """It has opened its control channel."""
        self.placed = True
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        former, self._channel = self._channel, channel
        if former is not None:
            former.close()  # it came back before the end of that was noticed
        untold, self._untold = self._untold, deque()
        for body in untold:
            self.tell(body)

    def tell(self, body: Any) -> None:
        """Send a control body, now or once it has connected; does nothing when it is gone."""
        if self._channel is None:
            self._untold.append(body)
            return
        try:
            self._channel.send(Control(body))
        except ChannelClosed:
            pass  # `lost` follows

    def finish(self) -> None:
        """Deliver the rest of what it said, and release everything."""
        if self.deadline is not None:
            self.deadline.cancel()
        if self.port is not None and not self.port.done():
            self.port.cancel()
        channel = self._channel
        if isinstance(channel, SocketChannel):
            channel.read_rest()
        if channel is not None:
            channel.close()

    # -- engine.adapter.ChannelListener ------------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.adapter.ChannelListener.received`."""
        if not isinstance(message, Control):
            return
        body = message.body
        if isinstance(body, Leaving):
            self.exit_code = body.code
        elif isinstance(body, Bound):
            self._bound(self, body.port)
        else:
            self._said(self.worker_id, body)

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.adapter.ChannelListener.lost`."""
        if channel is self._channel:
            self._lost(self)


def described_death(error: BaseException | None) -> str:
    """What Ray says of the end of an actor, as a phrase for people."""
    from ray import exceptions

    if error is None:
        return "exited"
    if isinstance(error, exceptions.RuntimeEnvSetupError):
        return f"could not start, because its runtime_env could not be set up: {error}"
    text = str(error)
    if isinstance(error, exceptions.RayTaskError):
        return f"failed: {error.cause if isinstance(error.cause, EngineError) else repr(error.cause)}"
    for sign, phrase in _DEATHS.items():
        if sign in text:
            return phrase
    return f"died ({' '.join(text.split())})"


_DEATHS = {
    "killed by `ray.kill`": "was killed by ray.kill",
    "exit_actor() is called": "exited",
    "node has died": "died with its node",
    "node was terminated": "died with its node",
    "all references to the actor were removed": (
        "never ran: Ray could not bring its process up. Its logs on the nodes may say why; it happens, too, if the "
        "program has a token of Ray's and the cluster wants none"
    ),
    "unexpected": "died (killed by a signal, out of memory, or by a crash in native code; its standard error may say)",
}
"""Signs in Ray's messages, the most telling first."""
