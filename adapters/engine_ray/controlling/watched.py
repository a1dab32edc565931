"""A started worker as the adapter sees it: its actor, its control channel, and how it is to end.

Only the controller's loop touches it. A worker is heard by its control channel, which it opens itself and introduces by
a `Hello`. It has ended when that channel has, and Ray or the worker itself said why, or nobody did for a while.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from engine.errors import EngineError
from engine.seam.adapter import Vitals
from engine.seam.channel import Channel, ChannelClosed
from engine.seam.messages import Control, Message
from engine.seam.worker import WorkerSpec
from engine_wire import SocketChannel

from ..link.actors import kill_actor
from ..link.connection import where
from ..working.bodies import Bound, Leaving
from .process import Process

__all__ = ["WatchedWorker", "described_death"]

_REASON_PATIENCE_S = 1.0
"""Ray knows of the end of an actor some 10 ms after its channel has ended."""
_GONE_PATIENCE_S = 1.0
"""The process of an actor that Ray has ended is gone some 10 ms later."""
_WITH_ITS_NODE = "died with its node"


class WatchedWorker:
    """One worker, from the call that starts its actor to its exit.

    Args:
        spec: What it is.
        actor: Ray's handle.
        said: Gets what it says (`engine.seam.adapter.AdapterEvents.worker_said`).
        bound: Told at which port it listens on its public address.
        ended: Told once, with a phrase for people, that it has ended.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        actor: Any,
        said: Callable[[str, Any], None],
        bound: Callable[[WatchedWorker, int], None],
        ended: Callable[[WatchedWorker, str], None],
    ) -> None:
        self.spec = spec
        self.worker_id = spec.worker_id
        self.actor = actor
        self.killed = False  # by the engine
        self.placed = False  # it runs somewhere
        self.exit_code: int | None = None  # that it said it would leave with
        self.port: asyncio.Future[int] | None = None  # where it listens, if it is the first on a public address
        self._said = said
        self._bound = bound
        self._ended = ended
        self._why = ""  # it has ended, as Ray says, although its channel stands
        self._timer: asyncio.TimerHandle | None = None  # until its end is taken for granted
        self._channel: Channel | None = None
        self._connected = False
        self._process: Process | None = None  # that it runs in
        self._untold: deque[Any] = deque()

    def __repr__(self) -> str:
        return f"<WatchedWorker {self.worker_id} placed={self.placed} killed={self.killed} {self._channel}>"

    def connected(self, channel: Channel, process: Process | None = None) -> None:
        """It has opened its control channel, and said which process it is."""
        self.placed = self._connected = True
        self._process = process
        self._stop_timer()
        former, self._channel = self._channel, channel
        if former is not None:
            former.close()  # it came back before the end of that was noticed
        untold, self._untold = self._untold, deque()
        for body in untold:
            self.tell(body)

    async def vitals(self) -> Vitals | None:
        """Look at its process."""
        process = self._process if self._connected else None
        return None if process is None else await process.vitals()

    def kill(self) -> None:
        """End it at once."""
        self.killed = True
        kill_actor(self.actor)
        if self._process is not None and self._connected:
            self._process.kill_if_stopped()

    def tell(self, body: Any) -> None:
        """Send a control body, now or once it has connected; does nothing when it is gone."""
        if self._channel is None:
            self._untold.append(body)
            return
        try:
            self._channel.send(Control(body))
        except ChannelClosed:
            pass  # `lost` follows

    def expect_within(self, timeout_s: float, otherwise: str) -> None:
        """Take it for ended, for this reason, unless it connects within so many seconds."""
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._ended, self, otherwise)

    def ray_ended(self, why: str) -> None:
        """Ray says that the actor has ended.

        It says so when it has decided that. The process lives a moment longer, with all that it holds; and if this
        process left the cluster before, it would be ended in a way of which Ray prints a long story.
        """
        if self._connected and why != _WITH_ITS_NODE:  # whose channels nobody closes
            self._why = why
            self.expect_within(_GONE_PATIENCE_S, why)
        else:
            self._ended(self, why)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def finish(self) -> None:
        """Deliver the rest of what it said, and release everything."""
        if self.port is not None and not self.port.done():
            self.port.cancel()
        channel = self._channel
        if isinstance(channel, SocketChannel):
            channel.read_rest()
        if channel is not None:
            channel.close()
        self._stop_timer()  # at last: the end of what it said may have started it

    # -- engine.seam.channel.ChannelListener -------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
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
        """See `engine.seam.channel.ChannelListener.lost`."""
        if channel is not self._channel:
            return
        self._connected = False
        if self._why or self.exit_code is not None:
            self._ended(self, self._why or "exited")
        elif self._timer is None:
            # Ray knows better why; and if it does not know at all, the worker can no longer be spoken with.
            self.expect_within(_REASON_PATIENCE_S, "lost its connection to the engine")


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
            return phrase.format(cluster=where())
    return f"died ({' '.join(text.split())})"


_DEATHS = {
    "killed by `ray.kill`": "was killed by ray.kill",
    "exit_actor() is called": "exited",
    "node has died": _WITH_ITS_NODE,
    "node was terminated": _WITH_ITS_NODE,
    "all references to the actor were removed": (
        "never ran: {cluster} could not bring its process up. Its logs on the nodes may say why; it happens, too, if "
        "the program has a token of Ray's and the cluster wants none"
    ),
    "unexpected": "died (killed by a signal, out of memory, or by a crash in native code; its standard error may say)",
}
"""Signs in Ray's messages, the most telling first."""
