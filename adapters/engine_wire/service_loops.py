"""What a worker runs on its main thread to serve calls.

`BlockingServiceLoop` runs user code right between two reads of its sockets, on one thread: nothing is handed over.
`AsyncServiceLoop` runs an event loop, with an `engine_wire.acceptor.Acceptor` on it. Both stop when the service says it
is finished; channels that break are simply dropped, after the service heard of it.

Each listens on any number of sockets. Given a secret, it shows a connection to nobody before the peer has proved that
it knows it too (`engine_wire.lobby`); over TCP, by TLS if it is given that as well.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from engine.seam.descriptors import REST_S
from engine.seam.service import Service

from .acceptor import Acceptor, channel_of_calls, closed_on_error, lobby_for, note_shortage
from .addresses import accept_from, close_listening
from .channel import SocketChannel
from .kernel import READABLE, WRITABLE, make_kernel

if TYPE_CHECKING:
    import asyncio

    from .lobby import Lobby
    from .tls import TLS

__all__ = ["AsyncServiceLoop", "BlockingServiceLoop"]

_TICK_S = 0.01
"""How often the stand-in looks whether user code takes long. A call that is shorter costs no thread switch."""
_TICKS_A_RUN = 10
"""How long the stand-in stays awake for one run of user code. Who is called at least ten times a second need not wake
it; and what runs once in a while, such as a check of a replica's health, does not keep it awake for long."""
_MOST_TICKS = 100
_MOST_READY = 64
"""Channels that are served before the kernel is asked again; the others come next."""
_LONGEST_POLL_S = 86400.0  # the kernel takes no more than 2**31 ms; whoever waits longer looks again


class AsyncServiceLoop:
    """Runs a service on its event loop, on the calling thread.

    Args:
        listening: Closed at the end.
        service: That it runs.
        secret: What callers must prove to know, and this side proves to them; at least 16 random bytes.
        tls: With a secret: who this side is towards callers that come over TCP, who then have to use TLS.
    """

    def __init__(
        self,
        listening: Sequence[socket.socket],
        service: Service,
        *,
        secret: bytes | None = None,
        tls: TLS | None = None,
    ) -> None:
        self._listening = listening
        self._service = service
        self._secret = secret
        self._tls = tls

    def run(self) -> None:
        """Serve until the service is finished."""
        loop = self._service.event_loop
        assert loop is not None
        loop.run_until_complete(self._serve(loop))

    async def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio

        self._loop = loop
        self._changed = asyncio.Event()
        self._acceptor = Acceptor(
            self._listening, lambda channel: self._service, loop, secret=self._secret, calls=True, tls=self._tls
        )
        self._service.attach(self)
        try:
            while not self._service.finished():
                await self._changed.wait()
                self._changed.clear()
        finally:
            self._acceptor.close()

    def wake(self) -> None:
        """See `engine.seam.service.ServiceLoop.wake`."""
        self._loop.call_soon_threadsafe(self._changed.set)

    def poll(self, timeout_s: float | None) -> None:
        """See `engine.seam.service.ServiceLoop.poll`; the loop reads by itself."""

    def step_out(self) -> None:
        """See `engine.seam.service.ServiceLoop.step_out`; on a loop, only the loop's thread serves."""

    def step_in(self) -> None:
        """See `engine.seam.service.ServiceLoop.step_in`."""

    def open_channels(self) -> int:
        """See `engine.seam.service.ServiceLoop.open_channels`."""
        return self._acceptor.open_channels()


class BlockingServiceLoop:
    """Runs a service of plain functions: reads its sockets and calls ``run_next`` in turn, on the calling thread.

    While user code keeps that thread for longer than a tick, a second thread stands in for it and reads the sockets,
    so that a full replica refuses at once and hears cancellations. Only the holder of the turn (`_turn`) touches the
    sockets and the service; the service's thread gives it up for just as long as it runs user code.

    Args:
        listening: Closed at the end.
        service: That it runs.
        secret: What callers must prove to know, and this side proves to them; at least 16 random bytes.
        tls: With a secret: who this side is towards callers that come over TCP, who then have to use TLS.

    Raises:
        ValueError: The secret is too short.
        engine.errors.InvalidArgument: A certificate cannot be read.
    """

    drivable = False

    def __init__(
        self,
        listening: Sequence[socket.socket],
        service: Service,
        *,
        secret: bytes | None = None,
        tls: TLS | None = None,
    ) -> None:
        self._listening = tuple(listening)
        self._service = service
        with closed_on_error(self._listening):
            self._lobby = lobby_for(secret, self._admit, self, tls)
        self._resting: set[socket.socket] = set()  # of those it listens on
        self._rest_until = 0.0
        self._kernel = make_kernel()
        self._watched: dict[int, SocketChannel | Callable[[], None]] = {}  # by descriptor; what to call
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._turn = threading.Lock()
        self._out = False  # user code runs
        self._wanted = False  # the service's thread waits for the turn
        self._steps = 0  # counts runs of user code
        self._stand_in: threading.Thread | None = None
        self._dozing = False  # the stand-in sleeps until `_bell`
        self._bell = threading.Event()
        self._closed = False

    def run(self) -> None:
        """Serve until the service is finished."""
        service = self._service
        for sock in self._listening:
            sock.setblocking(False)
            self._listen(sock)
        self.watch(self._wake_in.fileno(), self._on_wake)
        self._turn.acquire()
        service.attach(self)
        try:
            while True:
                wait = service.run_next()
                if service.finished():
                    break
                self.poll(wait)
        finally:
            self._close()

    def step_out(self) -> None:
        """See `engine.seam.service.ServiceLoop.step_out`."""
        self._steps += 1
        self._out = True
        self._turn.release()
        if self._dozing:
            self._dozing = False
            self._bell.set()
        elif self._stand_in is None:
            self._stand_in = threading.Thread(target=self._watch, name="engine-stand-in", daemon=True)
            self._stand_in.start()

    def step_in(self) -> None:
        """See `engine.seam.service.ServiceLoop.step_in`."""
        if not self._turn.acquire(False):
            self._wanted = True
            self.wake()
            self._turn.acquire()
            self._wanted = False
        self._out = False

    def _watch(self) -> None:
        """Tick while there are calls; take the turn when one call lasts from one tick to the next."""
        ticks = 0  # before it dozes, if nothing runs any more
        while not self._closed:
            steps = self._steps
            self._bell.wait(None if self._dozing else _TICK_S)
            self._bell.clear()
            if self._steps != steps:
                ticks = min(_MOST_TICKS, ticks + _TICKS_A_RUN * (self._steps - steps))
            elif self._out:
                self._serve_meanwhile()
            else:
                ticks = max(0, ticks - 1)
                self._dozing = not ticks
                if self._steps != steps:
                    self._dozing = False  # a call began before it could know that nobody watches

    def _serve_meanwhile(self) -> None:
        if self._turn.acquire(False):
            try:
                while self._out and not (self._wanted or self._closed):
                    self._service.delayed()
                    self.poll(None)
            finally:
                self._turn.release()

    def open_channels(self) -> int:
        """See `engine.seam.service.ServiceLoop.open_channels`."""
        return sum(isinstance(watched, SocketChannel) for watched in self._watched.values())

    def wake(self) -> None:
        """See `engine.seam.service.ServiceLoop.wake`."""
        try:
            self._wake_out.send(b"x")
        except OSError:
            pass  # it is awake already, or gone

    def poll(self, timeout_s: float | None) -> None:
        """Read what there is, waiting at most ``timeout_s`` seconds for the first of it."""
        if self._lobby:  # there is one, and somebody waits in it
            timeout_s = self._look_after(self._lobby, timeout_s)
        if self._resting:
            timeout_s = self._rest(timeout_s)
        if timeout_s is not None and timeout_s > _LONGEST_POLL_S:
            timeout_s = _LONGEST_POLL_S
        for descriptor, ready in self._kernel.wait(timeout_s, _MOST_READY):
            watched = self._watched.get(descriptor)
            if isinstance(watched, SocketChannel):
                if ready != READABLE:
                    self._write_on(watched)
                watched.on_readable()
            elif watched is not None:  # else it was closed just now
                watched()

    def _write_on(self, channel: SocketChannel) -> None:
        if channel.on_writable() and not channel.closed:
            self._kernel.watch(channel.fd, READABLE)

    # -- the driver of its channels, for the holder of the turn ------------------------------------------------------

    def arm(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.arm`."""
        if not channel.armed:
            channel.armed = True
            self._watched[channel.fd] = channel
            self._kernel.watch(channel.fd, READABLE)

    def disarm(self, channel: SocketChannel) -> None:
        """Never needed: nobody else reads these channels."""

    def flush(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.flush`."""
        self._kernel.watch(channel.fd, READABLE | WRITABLE)

    def forget(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.forget`."""
        if channel.armed:
            channel.armed = False
            self.unwatch(channel.fd)

    # -- the watcher of its lobby --------------------------------------------------------------------------------------

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """See `engine_wire.lobby.Watcher.watch`."""
        self._watched[descriptor] = callback
        self._kernel.watch(descriptor, READABLE)

    def unwatch(self, descriptor: int) -> None:
        """See `engine_wire.lobby.Watcher.unwatch`."""
        self._watched.pop(descriptor, None)
        self._kernel.watch(descriptor, 0)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _listen(self, listening: socket.socket) -> None:
        self.watch(listening.fileno(), partial(self._on_connection, listening))

    def _rest(self, timeout_s: float | None) -> float | None:
        remaining_s = self._rest_until - time.monotonic()
        if remaining_s > 0:
            return remaining_s if timeout_s is None else min(remaining_s, timeout_s)
        while self._resting:
            self._listen(self._resting.pop())
        return timeout_s

    def _on_connection(self, listening: socket.socket) -> None:
        try:
            accepted = accept_from(listening, proves_itself=self._lobby is not None)
        except OSError as error:
            note_shortage(error)
            self.unwatch(listening.fileno())
            self._resting.add(listening)
            self._rest_until = time.monotonic() + REST_S
            return
        if accepted is None:
            return
        sock, peer = accepted
        if self._lobby is None:
            self._admit(sock)
        else:
            self._lobby.enter(sock, peer)

    def _admit(self, sock: socket.socket) -> None:
        channel_of_calls(sock, self._service, self, greet=self._lobby is None).watch()

    def _look_after(self, lobby: Lobby, timeout_s: float | None) -> float | None:
        lobby.expire()
        remaining_s = lobby.remaining_s()
        if remaining_s is None:
            return timeout_s
        return remaining_s if timeout_s is None else min(remaining_s, timeout_s)

    def _on_wake(self) -> None:
        self._wake_in.recv(4096)

    def _close(self) -> None:
        self._closed = True
        self._bell.set()
        if self._lobby is not None:
            self._lobby.close()
        for watched in list(self._watched.values()):
            if isinstance(watched, SocketChannel):
                watched.close()
        self._kernel.close()
        for sock in self._listening:
            close_listening(sock)
        self._wake_in.close()
        self._wake_out.close()
