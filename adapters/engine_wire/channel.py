"""One channel over a connected socket.

The socket stays in blocking mode, whoever uses it. All I/O here passes ``MSG_DONTWAIT``, but for reads of a thread that
has nothing else to wait for.

Who reads: exactly one party at a time, the holder of the reader role (`_role`). It is either the driver (a loop, or
a polling thread) or a thread inside `SocketChannel.drive`, which waits for its own answer and delivers everybody else's
on the way. Who writes: any thread, under `_write_lock`; what the kernel does not take at once is kept and written by
the driver, or by the driving thread.

A channel may begin with an opening (`engine_wire.opening.Opening`), which whoever reads or writes moves on, under
`_write_lock`. Until it is done messages are kept, and nothing that the peer sends is taken for one.

When the peer dies, the reader delivers what was complete and then calls ``listener.lost`` once. Which calls had begun
there it knows from a page that both share (`engine_wire.begun`), if there is one; and only if the peer's end was
closed, so that no more can begin.

Signal handlers of the application may raise wherever Python runs them: when a function begins, when a call returns,
when a loop turns. That neither tears a frame nor loses another caller's answer nor keeps the role:

* What the kernel gave or took is noted before a handler can run. A ``for`` statement asks its iterator for the next
  item and stores it in one go, so reads and writes are iterators here, whose items are calls of ``recv`` and ``send``.
* All else is either done between two calls, or can be done again. Whoever is struck does it again, and only then passes
  the exception on.
* The role belongs to a lock that its holder keeps locked in a ``with`` statement, which no handler can come between. A
  holder whose lock is free has left without saying so, and whoever comes next takes over from it.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from operator import getitem
from typing import TYPE_CHECKING, Any, Final, Protocol

from engine.seam.channel import ChannelClosed, ChannelListener
from engine.seam.log import Log
from engine.seam.messages import Call, End, Failure, Message, Reply

from .addresses import is_foreign
from .begun import FIRST_PLACE, HALF, Begun, BegunPage, greet_with, room
from .protocol import GREETING, Decoder, ProtocolError, encode

if TYPE_CHECKING:
    from .opening import Opening, Welcome

__all__ = ["Driver", "SocketChannel"]

_log = Log("engine.wire")
_READ_SIZE = 1 << 16
_JOINED = 64  # frames in one write, at most
_NOWAIT = socket.MSG_DONTWAIT
_LONGEST_POLL_S = 86400.0  # poll takes no more than 2**31 ms; whoever waits longer looks again
_TERMINAL = frozenset((Reply, Failure, End))
_READER: Final = "reader"


class Driver(Protocol):
    """What reads a channel when no thread drives it."""

    drivable: bool
    """Whether threads may take the reader role for themselves."""

    def arm(self, channel: SocketChannel) -> None:
        """Call `SocketChannel.on_readable` whenever there is something to read (idempotent)."""

    def disarm(self, channel: SocketChannel) -> None:
        """Stop doing so (idempotent)."""

    def flush(self, channel: SocketChannel) -> None:
        """Call `SocketChannel.on_writable` once the socket takes more bytes."""

    def forget(self, channel: SocketChannel) -> None:
        """The channel's socket is about to be closed."""


class SocketChannel:
    """A `engine.seam.channel.Channel` over a socket.

    Args:
        sock: Connected; owned by the channel from now on.
        listener: Who hears it; may be set later, but before the channel is watched or driven.
        driver: What reads it.
        greet: Exchange greetings first. Off where the socket itself is proof of the peer, as in a socketpair, and
            where a handshake is.
        opening: What must be done first on a socket that is not connected or whose peer is to prove who it is. It
            says what to send before the first message, be it the greeting.
        page: On which the peer says which calls have begun there; owned by the channel. It goes with the greeting.
    """

    def __init__(
        self,
        sock: socket.socket,
        listener: ChannelListener | None,
        driver: Driver,
        *,
        greet: bool = True,
        opening: Opening | Welcome | None = None,
        page: BegunPage | None = None,
    ) -> None:
        sock.setblocking(True)
        self.sock = sock
        self.fd = sock.fileno()
        self.listener = listener
        self._driver = driver
        greeted = greet or (opening is not None and opening.greeted)
        self._decoder = Decoder(greeting=greeted, same_machine=sock.family == socket.AF_UNIX)
        self._role: dict[str, threading.Lock] = {}  # the reader role, if somebody has it: `_take` and `_leave`
        self._taking_over = threading.Lock()
        self._write_lock = threading.Lock()  # guards changes of _opening, _unsent and _closed, and the order of frames
        self._opening: Opening | Welcome | None = opening
        self._unsent: list[bytes | memoryview] = []
        # Each item is what the kernel gave, or how much of the first of `_unsent` it took.
        self._receives: Iterator[bytes] = map(sock.recv, repeat(_READ_SIZE), repeat(_NOWAIT))
        self._waits: Iterator[bytes] = map(sock.recv, repeat(_READ_SIZE))  # the same, and waits for something to come
        first: Iterator[Any] = map(getitem, repeat(self._unsent), repeat(0))
        self._sends: Iterator[int] = map(sock.send, first, repeat(_NOWAIT))
        if opening is not None:
            self._unsent.append(b"")  # the place of what goes first; and so `send` keeps what follows
        self._closed = False
        self._told = False
        self._why_lost: str | None = None
        # Whoever accepts a connection greets before it reads calls. Across a network even that may not arrive.
        self._greeting_proves = greet if opening is None else opening.greeted
        self._never_accepted = False
        self.armed = False  # whether the driver reads; only the driver's arm and disarm touch it
        self._poll_input = select.poll()  # for the holder of the reader role alone
        self._poll_input.register(self.fd, select.POLLIN)
        self._delivering = False  # the listener is taking the first of the decoder's messages
        self._unanswered: dict[int, None] = {}  # numbers of calls; somebody must read while there are any
        # Which calls have begun: here, where the peer is to read it, with the place for the next; there, once it ended
        self._begun_words: memoryview | None = None
        self._begun_place = FIRST_PLACE
        self._page = page
        self._begun_there: Begun | None = None
        self._stopped_writing = False
        if greet and opening is None:
            try:
                greet_with(sock, GREETING, page)
            except OSError:
                pass  # the peer is gone already, as whoever reads will find

    def __repr__(self) -> str:
        state = "closed" if self._closed else "driven" if self._is_read() else "armed" if self.armed else "idle"
        if self._opening is not None and not self._closed:
            state += " opening"
        return f"<SocketChannel fd={self.fd} {state} open_calls={len(self._unanswered)} unsent={len(self._unsent)}>"

    @property
    def closed(self) -> bool:
        """Whether it takes no more messages."""
        return self._closed

    @property
    def opened(self) -> bool:
        """See `engine.seam.channel.Channel.opened`."""
        return self._opening is None and not self._never_accepted

    @property
    def has_unsent(self) -> bool:
        """Whether it keeps bytes that the kernel has not taken yet, and that it waits for nothing else to write."""
        opening = self._opening
        return bool(self._unsent) and (opening is None or opening.wants_write)

    # -- writing ---------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """See `engine.seam.channel.Channel.send`."""
        data = encode(message)
        frame = data if len(data) < _READ_SIZE else memoryview(data)  # of which a part can be cut off without a copy
        unsent = self._unsent
        try:
            with self._write_lock:
                if self._closed:
                    raise ChannelClosed("the channel is closed")
                if type(message) is Call:
                    self._unanswered[message.id] = None  # with no call before the next line: see `awaits`
                unsent += (frame,)
                if unsent[0] is not frame:
                    return  # whoever empties it will come to this
                try:
                    for sent in self._sends:
                        unsent[0] = unsent[0][sent:]
                        break
                except BlockingIOError:
                    pass
                except OSError as error:
                    if is_foreign(error):
                        raise
                    self._stop_writing()
                    raise ChannelClosed(f"the peer is gone ({error.strerror})") from error
                if not unsent[0]:
                    del unsent[0]
                    return
            self._driver.flush(self)
        except ChannelClosed:
            raise
        except BaseException:
            if unsent:  # who put the frame there cannot write it any more
                self._driver.flush(self)
            raise

    def awaits(self, call_id: int) -> bool:
        """See `engine.seam.channel.Channel.awaits`."""
        return call_id in self._unanswered and not self._closed

    def begin(self, call_id: int) -> bool:
        """See `engine.seam.channel.Channel.begin`."""
        words = self._begun_words
        if words is not None:
            place = self._begun_place
            if not place % HALF:
                place = room(words, place)
            words[place] = call_id  # from here on there is no call, at which a signal handler could strike
            self._begun_place = place + 1
        return not self._closed

    def may_have_begun(self, call_id: int) -> bool:
        """See `engine.seam.channel.Channel.may_have_begun`."""
        begun = self._begun_there
        return begun is None or begun.may_have(call_id)

    def on_writable(self) -> bool:
        """Write what is kept; returns whether everything is out. A broken socket is left for the reader to find."""
        with self._write_lock:
            if self._opening is not None and not self._open(self._opening):
                return not self.has_unsent
            unsent = self._unsent
            try:
                while unsent:
                    if len(unsent) > 1:
                        _join_first(unsent)
                    for sent in self._sends:
                        unsent[0] = unsent[0][sent:]
                        break
                    if not unsent[0]:
                        del unsent[0]
            except BlockingIOError:
                return False
            except OSError as error:
                if is_foreign(error):
                    raise
                self._stop_writing()
            return True

    def _stop_writing(self) -> None:
        """Nothing more can be written, perhaps after half a frame: the peer ends the connection, if it has not yet."""
        self._learn_what_began()
        self._stopped_writing = True
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if is_foreign(error):
                raise
            # else it is broken altogether, as whoever reads will find
        self._unsent.clear()  # only now: as long as there is something, whoever is struck comes back here

    def _open(self, opening: Opening | Welcome) -> bool:
        first = None if self._closed else opening.advance()
        if first is None:
            return False
        self._unsent[0] = first
        self._begun_words = opening.words
        self._opening = None
        return True

    def flush_blocking(self) -> None:
        """Write what is kept, waiting for the peer to take it. For channels that no loop and no poller drives."""
        while not self.on_writable():
            self._poll(select.POLLOUT, None)

    # -- reading ---------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """See `engine.seam.channel.Channel.watch`."""
        # Whoever holds the role arms the driver when it leaves calls behind.
        if not (self.armed or self._closed or self._is_read()):
            self._driver.arm(self)

    def drive(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        """See `engine.seam.channel.Channel.drive`."""
        if not self._driver.drivable:
            return False
        me = threading.Lock()
        with me:
            try:
                if self._role.setdefault(_READER, me) is not me and not self._take_over(me):
                    return False
                if self.armed:
                    self._driver.disarm(self)
                deadline = None if timeout_s is None else time.monotonic() + timeout_s
                while not self._closed and not done():
                    if deadline is None and not self._unsent and self._decoder.large is None:  # as almost always
                        self._read(waits=True)  # an opening keeps something unsent
                    elif self._await_input(deadline):
                        self._read()
                    else:
                        break
                del self._role[_READER]
                if self._closed or self._unanswered or self._opening is not None:
                    self._leave(me)
            except BaseException:
                self._recover(me)
                raise
        return True

    def _await_input(self, deadline: float | None) -> bool:
        while True:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return False
            events = self._poll(select.POLLIN | (select.POLLOUT if self._unsent and self.has_unsent else 0), remaining)
            if events & select.POLLOUT:
                self.on_writable()
            if events & ~select.POLLOUT:
                return True

    def _poll(self, events: int, timeout_s: float | None) -> int:
        poll = self._poll_input
        if events != select.POLLIN:
            poll = select.poll()
            poll.register(self.fd, events)
        ready = poll.poll(None if timeout_s is None else min(max(0.0, timeout_s), _LONGEST_POLL_S) * 1000)
        return ready[0][1] if ready else 0

    def on_readable(self) -> None:
        """Read once, without blocking, and deliver what came. Called by the driver.

        Whatever the listener raises comes out of here; if it was in the middle of a message that only it can tell
        whether it took, the channel is lost.
        """
        me = threading.Lock()
        with me:
            try:
                role = self._role
                if role.setdefault(_READER, me) is me or self._take_over(me):
                    self._read()
                    del role[_READER]
                    if self._closed or (self._unanswered and not self.armed) or self._opening is not None:
                        self._leave(me)
            except BaseException:
                self._recover(me)
                raise

    def read_rest(self) -> None:
        """Deliver all that has arrived, and the peer's end if that has, too; waits for nothing.

        On the thread of the loop that drives it, before `close`, which drops what the peer said last.
        """
        arrived = select.poll()
        arrived.register(self.fd, select.POLLIN)
        while not self._closed and arrived.poll(0):
            self.on_readable()

    def _read(self, *, waits: bool = False) -> None:
        """Read once, and deliver what came; on request, wait for it."""
        if self._opening is not None:
            self._read_opening()
            return
        decoder = self._decoder
        ended = False
        try:
            if decoder.large is not None:
                for count in map(self.sock.recv_into, (decoder.spare,), (0,), (_NOWAIT,)):
                    decoder.filled += count
                    ended = not count
                    break
            elif decoder.arrived is None:  # else it is left from a reader that was struck
                for decoder.arrived in self._waits if waits else self._receives:
                    break
                ended = not decoder.arrived
        except BlockingIOError:
            return
        except OSError as error:
            if is_foreign(error):
                raise
            self._end(f"the connection broke ({error.strerror})")
            return
        if ended:
            self._end("the peer closed the connection")
            return
        try:
            decoder.cut()
        except ProtocolError as error:
            self._cut_again(error)
        if decoder.messages:
            self._deliver(decoder.messages)

    def _end(self, reason: str) -> None:
        """All that the peer said has been read."""
        # It may have been dying already, and its connection have waited for it in vain. (One that was closed here ends,
        # too, and may still be accepted.)
        self._never_accepted = self._greeting_proves and self._decoder.greeting_due and not self._closed
        if not self._stopped_writing:  # else that was seen then, before the socket looked as if the peer had ended it
            self._learn_what_began()
        self.lose(reason)

    def _learn_what_began(self) -> None:
        """Look at the page if the peer has closed its end, as its death does, so that nothing more begins there."""
        page = self._page
        if page is None or not self._poll(0, 0.0) & select.POLLHUP or self._closed:  # closed: it is our own doing
            return
        self._begun_there = page.read()

    def _cut_again(self, error: ProtocolError) -> None:
        try:
            self._decoder.cut()
        except ProtocolError:
            _log.warning("%s: the peer broke the protocol: %s; the connection is closed", self, error)
            self.lose(f"the peer broke the protocol: {error}")
        else:  # it was not the peer's fault: a signal handler raised while a message was made of bytes
            raise error.__cause__ or error

    def _deliver(self, messages: list[Message]) -> None:
        listener = self.listener
        assert listener is not None
        unanswered = self._unanswered
        while messages:
            message = messages[0]
            self._delivering = True
            listener.received(self, message)
            if unanswered and type(message) in _TERMINAL and message.id in unanswered:  # type: ignore[union-attr]
                del unanswered[message.id]  # type: ignore[union-attr]
            self._delivering = False
            del messages[0]

    def _read_opening(self) -> None:
        written = self.on_writable()
        opening = self._opening
        if opening is not None and opening.failure is not None:
            self.lose(opening.failure)
        elif not written:
            self._driver.flush(self)

    # -- closing ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See `engine.seam.channel.Channel.close`."""
        self._told = True
        self._shut()

    def lose(self, reason: str) -> None:
        """Close it and tell the listener why (idempotent)."""
        self._why_lost = reason
        self._shut()
        if not self._told:
            assert self.listener is not None
            self.listener.lost(self, reason)
            self._told = True

    def _shut(self) -> None:
        with self._write_lock:
            self._closed = True
            self._unsent.clear()
        if self.sock.fileno() >= 0:  # else its number may be another socket's by now
            self._driver.forget(self)
            try:
                self.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that drives the channel
            except OSError as error:
                if is_foreign(error):
                    raise
                # else the peer was faster
        me = threading.Lock()
        with me:
            self._leave(me)

    # -- the reader role -------------------------------------------------------------------------------------------

    def _is_read(self) -> bool:
        holder = self._role.get(_READER)
        return holder is not None and holder.locked()

    def _take(self, me: threading.Lock) -> bool:
        """Take the role for a lock that the caller holds; returns whether that could be done."""
        return self._role.setdefault(_READER, me) is me or self._take_over(me)

    def _take_over(self, me: threading.Lock) -> bool:
        """The same if it is taken, which only helps if whoever has it has left without giving it back."""
        role = self._role
        with self._taking_over:
            while True:
                holder = role.setdefault(_READER, me)
                if holder is me:
                    return True
                if holder.locked():
                    return False
                if role.get(_READER) is holder:
                    break  # and stays so: it has left for good, and the others come by here
                # else it has given the role back since, and another one may have it
            role[_READER] = me
        self._finish()
        return True

    def _leave(self, me: threading.Lock) -> None:
        """Give the role back, if the caller has it, and see to what nobody else would (idempotent)."""
        role = self._role
        if role.get(_READER) is me:
            del role[_READER]
        # Only now: whoever closes it or sends a call and finds the role taken counts on its holder, who may have
        # looked before.
        if self._closed:
            # Only who holds the role closes the socket: its descriptor must not be reused under a thread that reads.
            if self.sock.fileno() >= 0 and self._take(me):
                self._begun_words = None  # with which the memory goes
                if self._page is not None:
                    self._page.close()
                self.sock.close()
                del role[_READER]
        elif not self.armed and (self._unanswered or self._opening is not None) and not self._is_read():
            self._driver.arm(self)

    def _recover(self, me: threading.Lock) -> None:
        """After an exception, which may have struck anywhere: finish what was begun, and leave the role."""
        try:
            if self._role.get(_READER) is me:
                self._finish()
        finally:
            self._leave(me)

    def _finish(self) -> None:
        """Deliver what a reader that was struck has left."""
        if self._why_lost is not None and not self._told:
            self.lose(self._why_lost)
        if self._closed or self._opening is not None:
            return
        try:
            if self._delivering and type(self._decoder.messages[0]) not in _TERMINAL:
                raise _TakenOrNot
            self._decoder.cut()
            self._deliver(self._decoder.messages)
        except BaseException:
            # Nobody knows any more who got what. An answer can be taken twice, but its listener will not have it.
            self.lose("taking a message from it was interrupted")


def _join_first(unsent: list[bytes | memoryview]) -> None:
    """Make one of the first frames, if they are small: fewer writes, and fewer that are taken out of a long list."""
    first = unsent[:_JOINED]
    if sum(map(len, first)) <= _READ_SIZE:
        joined = b"".join(first)
        unsent[: len(first)] = (joined,)


class _TakenOrNot(Exception):
    """A listener was interrupted while it took a message that it must not take twice."""
