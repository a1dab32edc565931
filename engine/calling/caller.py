"""Sends calls and takes their answers: the shell around one router.

There is one caller for all the threads of a process and one for each event loop that makes calls. A call is routed and
written by the thread that makes it, and its answer delivered by whoever reads the channel: no hop in between.

A call that was given up still counts against its replica until the replica's answer comes, so that no slot is ever
leaked or counted twice. When a replica dies, calls that had begun there fail with `ReplicaDied`; those it refused,
never got or had not begun are routed again, at their place. Its connection breaks then, and tells which are which; or
a snapshot has the news, if its machine is gone and all is silent.

A signal handler of the application may raise anywhere in here (`engine_wire.channel` tells where Python runs them).
What each slot says of itself, and what each target holds, changes between two such places; all else can be made anew
from that (`_mend`), by whoever is struck or, failing that, by whoever comes next. Calls of others that a struck thread
had in hand it sends before it passes the exception on; its own it gives up.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import EngineClosed, EngineError
from ..seam.channel import Channel, ChannelClosed
from ..seam.connector import Connector
from ..seam.messages import ANY_CALL, Call, Cancel, Credit, End, Failure, FailureKind, Item, Message, Reply
from ..seam.snapshot import RoutingSnapshot
from .answers import CopySlot
from .home import Home
from .line import bytes_of
from .repeating import died_before, died_with, repeat
from .replica_set import RETRY_S, UNREACHABLE_S, ReplicaSet, Target
from .retries import MOST_LOSSES
from .router import Router
from .slot import Slot

__all__ = ["Caller", "HasSnapshot"]

_new = tuple.__new__  # a named tuple's own constructor takes longer
_NOT_TAKEN = frozenset((FailureKind.REFUSED, FailureKind.DRAINING, FailureKind.BUSY))
_COPIES_RETRY_S = 0.25
_LAST_WORDS_S = 0.5
"""For what a replica answered before it died, and for its connection to break by itself, which says more."""
_DEAD = "the engine has found it dead"


class HasSnapshot(Protocol):
    """What a caller looks at for each call (`engine.calling.client.Client`)."""

    snapshot: RoutingSnapshot
    """The one that rules now."""


class Caller:
    """One party's calls. It hears all of its channels.

    Args:
        connector: Opens the channels.
        home: Where the channels are read and timers run.
        ruling: Has the snapshot that rules now.
    """

    def __init__(self, connector: Connector, home: Home, ruling: HasSnapshot) -> None:
        self._connector = connector
        self.home = home
        self._ruling = ruling
        self._lock = threading.RLock()  # guards the router, its targets and `_channels`; nobody does I/O under it
        self._opening = threading.RLock()  # held while a channel is opened, so that each target gets one
        self._router = Router()
        self._channels: dict[Channel, Target] = {}
        self._ids = itertools.count(1)
        self._pending: dict[int, Slot] = {}  # single dict operations only, which need no lock
        self._closed: EngineError | None = None
        self._refusal: EngineError | None = None  # of new calls: those that were taken may go on nevertheless
        self._may_call: Callable[[], bool] = _nobody  # asked then, where a call is made
        self._torn = False  # what the lock guards is being changed, or whoever did was struck

    def __repr__(self) -> str:
        return f"<Caller {'loop' if self.home.on_loop else 'threads'} pending={len(self._pending)} {self._router}>"

    # -- calls -----------------------------------------------------------------------------------------------------

    def submit(self, slot: Slot, *, again: bool = False) -> None:
        """Route a slot's call and send it, or queue it. Errors go to ``slot.fail``, possibly before this returns.

        A call that is routed ``again`` is neither counted nor copied a second time. One whose deadline has passed goes
        nowhere: whoever waits for it looks at the clock, too.
        """
        copies: list[ReplicaSet] = []
        target: Target | None = None
        try:
            router = self._router
            if router.snapshot is not self._ruling.snapshot:
                self.apply(self._ruling.snapshot)
            with self._lock:
                if self._torn:
                    self._mend()
                if self._refusal is not None:
                    self._check_taken(self._refusal, again=again)
                if slot.given_up:  # meanwhile: it must be neither queued nor copied
                    return
                call = slot.call
                now = time.monotonic()
                if call.deadline is not None and now >= call.deadline:
                    return
                endpoint = router.endpoints.get(slot.endpoint)
                replica_set = None if endpoint is None else endpoint.only
                if endpoint is None or replica_set is None:
                    replica_set, endpoint = router.route(slot.endpoint, slot.shard_key)
                if not again:
                    endpoint.calls += 1
                    if endpoint.entry.shadows:
                        copies = list(router.shadows(endpoint))
                self._torn = True
                try:
                    target = replica_set.place(slot, now)
                except EngineError:
                    self._torn = False  # it raises before it changes anything
                    raise
                if target is None:
                    self._schedule_retry(replica_set, RETRY_S, now)
                else:
                    slot.target = target
                    target.holds[slot] = None
                self._torn = False
            if target is not None:
                self._send(slot, watch=again or not slot.drives)  # again: its thread drives another channel
            for copy in copies:
                self._submit_copy(call, copy)
        except EngineError as error:
            slot.fail(error.with_traceback(None))  # which knows these frames, and so the call: they would keep it
        except BaseException:
            self._recover([])
            if again:
                self._send_all([slot])
            else:
                self._abandon(slot)
            raise

    def _abandon(self, slot: Slot) -> None:
        """Give a call up that this thread may have been about to send."""
        if not slot.waited:
            channel = slot.channel
            if channel is None or not channel.awaits(slot.call_id):
                self._pending.pop(slot.call_id, None)
                self._withdraw(slot)
        self.cancel(slot)

    def cancel(self, slot: Slot) -> None:
        """Give a call up: its slot hears nothing any more, and the replica need not run it (idempotent)."""
        try:
            with self._lock:
                if slot.given_up:
                    return
                # From here on the slot only stands for the answer that is due: whoever takes it sees that there is no
                # call to deliver to. Taking the slot out here instead would race with the thread that reads the answer.
                slot.give_up()
            self._tell_given_up(slot)
        except BaseException:
            with self._lock:
                slot.give_up()
            self._tell_given_up(slot)
            raise

    def _tell_given_up(self, slot: Slot) -> None:
        channel, call_id = slot.channel, slot.call_id
        if channel is None or self._pending.get(call_id) is not slot:
            return
        try:
            channel.send(Cancel(call_id))
        except ChannelClosed:
            pass  # its reader will find that out, and count the call out
        channel.watch()

    def credit(self, slot: Slot, amount: int) -> None:
        """Let a streaming replica send this many more items."""
        channel = slot.channel
        if channel is not None and not slot.given_up and self._pending.get(slot.call_id) is slot:
            try:
                channel.send(Credit(slot.call_id, amount))
            except ChannelClosed:
                channel.watch()  # its reader tells the slot

    # -- snapshots -------------------------------------------------------------------------------------------------

    def apply(self, snapshot: RoutingSnapshot) -> None:
        """Take a newer snapshot; calls queued for what is gone are routed again."""
        left: list[Target] = []
        homeless: list[Slot] = []
        ready: list[Slot] = []
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                self._torn = True
                self._router.apply(snapshot, left, homeless)
                hung_up = [self._disconnect(target) for target in left if not target.in_flight]
                for target in left:
                    if target.dead and target.channel is not None:
                        # not at once, and not here: `lost` tells slots, which may not happen under the lock
                        delay_s = _LAST_WORDS_S if target.channel.opened else 0.0
                        self.home.call_later(delay_s, self._hang_up_on_dead, target.channel)
                for replica_set in self._router.replica_sets.values():
                    replica_set.next_placements(time.monotonic(), ready)
                self._torn = False
            for channel in hung_up:
                if channel is not None:
                    channel.close()
            for slot in homeless:
                self._route_again(slot)
            self._send_all(ready)
        except BaseException:
            self._recover(ready)
            for slot in homeless:
                self._route_again(slot)
            raise

    def statistics(self) -> dict[str, Any]:
        """What this caller counted and holds."""
        with self._lock:
            return {
                "endpoints": {name: {"calls": endpoint.calls} for name, endpoint in self._router.endpoints.items()},
                "backends": {
                    tag: {
                        "queued": len(replica_set.waiting) + len(replica_set.pausing),
                        "queued_bytes": replica_set.waiting.bytes
                        + sum(bytes_of(slot.call) for slot in replica_set.pausing),
                        "in_flight": sum(target.in_flight for target in replica_set.targets.values()),
                        "queued_copies": len(replica_set.copies),
                        "dropped_copies": replica_set.dropped_copies,
                    }
                    for tag, replica_set in self._router.replica_sets.items()
                },
            }

    def held(self, *, nameless: bool = False) -> set[str]:
        """The backends that calls of this caller wait for, or are with.

        Args:
            nameless: Only calls whose endpoint is there no more, so that no other backend would take them.
        """
        on_way = list(self._pending.values())  # first: a call that comes back from there is in a queue before it is out
        with self._lock:
            replica_sets = self._router.replica_sets
            targets = {target for one in replica_sets.values() for target in one.targets.values()}
            targets.update(self._channels.values())  # also those that have left
            slots = [(target.replica_set.tag, slot) for target in targets for slot in target.holds]
            slots += [(tag, slot) for tag, one in replica_sets.items() for slot in (*one.waiting, *one.pausing)]
            slots += [(slot.target.replica_set.tag, slot) for slot in on_way]
            named = self._router.endpoints if nameless else ()
            return {tag for tag, slot in slots if slot.endpoint not in named and not isinstance(slot, CopySlot)}

    def begin_drain(self, error: EngineError, may_call: Callable[[], bool]) -> None:
        """Take no more calls; those that were taken go on, also the ones that wait for a replica.

        Args:
            error: What others are told.
            may_call: Whether a call may be made from where this is asked all the same.
        """
        with self._lock:
            self._may_call = may_call
            self._refusal = self._refusal or error

    def begin_close(self, error: EngineError) -> None:
        """Take no more calls and fail those that wait for a replica; what is in flight goes on (idempotent)."""
        with self._lock:
            self._refusal = self._closed = self._closed or error
            waiting = [
                slot for replica_set in self._router.replica_sets.values() for slot in replica_set.give_up_waiting()
            ]
        for slot in waiting:
            slot.fail(error)

    def close(self, error: EngineError | None = None) -> None:
        """Fail what waits and what is in flight, and close every channel (idempotent)."""
        error = error or EngineClosed("the engine was shut down")
        self.begin_close(error)
        with self._lock:
            channels, self._channels = list(self._channels), {}
        for channel in channels:
            channel.close()
        # Only now, when no call can be sent any more, have all that were sent become known.
        pending = [slot for slot in list(self._pending.values()) if self._pending.pop(slot.call_id, None) is slot]
        for slot in pending:
            if not slot.given_up:
                slot.fail(error)
        self.home.close()

    # -- what the channels say -------------------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
        kind = type(message)
        if kind is Item:
            slot = self._pending.get(message.id)  # type: ignore[union-attr]
            if slot is not None and not slot.given_up:
                slot.spoken = True
                slot.deliver(message)  # type: ignore[arg-type]
            return
        if kind is not Reply and not isinstance(message, (Failure, End)):
            if kind is Credit:
                self._welcomed(channel, message.amount)  # type: ignore[union-attr]
            return
        call_id = message.id  # type: ignore[union-attr]
        slot = self._pending.get(call_id)
        if slot is None:
            return
        taken = kind is not Failure or message.kind not in _NOT_TAKEN  # type: ignore[union-attr]
        if slot.call_id == call_id:  # else it is told a second time, and the call is on its way again
            self._settle(slot, message, taken=taken)  # type: ignore[arg-type]
        if self._pending.get(call_id) is not slot:
            return  # somebody else has found the channel lost, and told the slot
        if not taken:
            self._requeue(slot, call_id)
        elif not slot.given_up and not (
            kind is Failure
            and message.kind == FailureKind.REPEATABLE  # type: ignore[union-attr]
            and self._repeats(slot, call_id) is None
        ):
            slot.deliver(message)  # type: ignore[arg-type]
        self._pending.pop(call_id, None)

    def _welcomed(self, channel: Channel, places: int) -> None:
        """A replica that refused a call has a place for one: it is kept for a moment, so say if there is none."""
        ready: list[Slot] = []
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                target = self._channels.get(channel)
                if target is None:
                    return
                now = time.monotonic()
                self._torn = True
                if target.replica_set.welcomed(target, places):
                    target.replica_set.next_placements(now, ready, target)
                self._schedule_retry(target.replica_set, RETRY_S, now)
                self._torn = False
            if not any(slot.target is target for slot in ready):
                try:
                    channel.send(Cancel(ANY_CALL))
                except ChannelClosed:
                    channel.watch()  # its reader finds that out
            self._send_all(ready)
        except BaseException:
            self._recover(ready)
            raise

    def lost(self, channel: Channel, reason: str) -> None:
        """See `ChannelListener.lost`: the replica's calls fail, its place stays blocked for a while.

        Calls that it cannot have begun are routed again.
        """
        dead: list[tuple[Slot, int]] = []  # with the numbers under which they were sent
        target: Target | None = None
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                target = self._channels.get(channel)
                if target is None:
                    return
                now = time.monotonic()
                held = [slot for slot in target.holds if slot.channel is channel]
                self._torn = True
                pending = self._pending
                for slot in held:
                    call_id = slot.call_id
                    if call_id in pending:  # else it is not sent yet, as its sender will find out
                        del target.holds[slot], pending[call_id]
                        dead += ((slot, call_id),)
                target.channel = None
                target.replica_set.unreachable(target, len(dead), now)
                self._schedule_retry(target.replica_set, UNREACHABLE_S, now)
                del self._channels[channel]
                self._torn = False
            self._bury(channel, target, dead, reason)
        except BaseException:
            self._recover([])
            self.lost(channel, reason)
            self._bury(channel, target, dead, reason)
            raise

    def _hang_up_on_dead(self, channel: Channel) -> None:
        try:
            channel.close()  # first: a call that is being sent on it either is among those that were, or cannot be sent
        finally:
            self.lost(channel, _DEAD)

    def _bury(self, channel: Channel, target: Target | None, dead: list[tuple[Slot, int]], reason: str) -> None:
        channel.close()
        if target is None:
            return
        some_begun = channel.opened and any(channel.may_have_begun(call_id) for _, call_id in dead)
        while dead:
            slot, call_id = dead[0]
            if slot.given_up:
                pass
            elif not (channel.opened and channel.may_have_begun(call_id)):
                losses = slot.remember().losses
                if channel.opened and not some_begun:
                    losses.add(call_id)
                if len(losses) < MOST_LOSSES:
                    self._requeue(slot, call_id, lost=True)
                else:
                    slot.fail(died_before(target, reason))
            elif self._closed is not None:
                slot.fail(self._closed)
            else:
                advice = self._repeats(slot, call_id, died=True)
                if advice is not None:
                    slot.fail(died_with(target, reason, advice))
            del dead[0]

    def _repeats(self, slot: Slot, call_id: int, *, died: bool = False) -> str | None:
        """Repeat a call that has begun, or may have, if that is allowed; None if so, else why not."""
        with self._lock:
            closed = self._closed is not None
            verdict = repeat(slot, call_id, self._router, time.monotonic(), died=died, closed=closed)
        if isinstance(verdict, str):
            return verdict
        self.home.call_later(verdict.delay_s, self._resume, slot, call_id, verdict.replica_set)
        return None

    def _resume(self, slot: Slot, call_id: int, replica_set: ReplicaSet) -> None:
        """Place a call again that paused; does nothing if that was done, or it has failed."""
        paused = False
        try:
            with self._lock:
                paused = slot in replica_set.pausing
                replica_set.pausing.pop(slot, None)
            if paused:
                self._requeue(slot, call_id, lost=True)
        except BaseException:
            with self._lock:
                paused = replica_set.pausing.pop(slot, self) is None or paused
            if paused:
                self._requeue(slot, call_id, lost=True)  # which was done already, or does it now
            raise

    # -- inside ----------------------------------------------------------------------------------------------------

    def _check_taken(self, refusal: EngineError, *, again: bool) -> None:
        if self._closed is not None or not (again or self._may_call()):
            raise self._closed or refusal

    def _send(self, slot: Slot, *, watch: bool = True) -> None:
        """Send a call to the target that it was placed on; does nothing if that was done before."""
        target: Target = slot.target
        channel = slot.channel
        if slot not in target.holds or (channel is not None and self._was_sent(slot, channel)):
            return
        call = slot.call
        if slot.given_up:  # meanwhile
            self._withdraw(slot)
            return
        call_id = slot.call_id = next(self._ids)
        try:
            channel = target.channel or self._connect(target)
            if slot.given_up:  # opening may take long
                self._withdraw(slot)
                return
            slot.send_on(channel)
            self._pending[call_id] = slot
            channel.send(_new(Call, (call_id, *call[1:-1], target.slow_for > 0)))
            if watch:
                channel.watch()
        except ChannelClosed:
            self._not_sent(slot, target, call_id, channel)
        except EngineError as error:
            if slot.call_id == call_id and slot in target.holds:
                self._withdraw(slot)
                self._pending.pop(call_id, None)
                slot.fail(error.with_traceback(None))

    def _was_sent(self, slot: Slot, channel: Channel) -> bool:
        if channel.awaits(slot.call_id):
            channel.watch()
            return True
        self._pending.pop(slot.call_id, None)
        slot.come_back()
        return False

    def _not_sent(self, slot: Slot, target: Target, call_id: int, channel: Channel | None) -> None:
        # What the slot says may be of a later try already: whoever reads the channel may have found it lost meanwhile,
        # taken the slot out and sent the call elsewhere. Then there is nothing left to do here. What becomes of the
        # channel's other calls depends on the replica's last words, so it is its reader who tells.
        mine = False
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                if slot.call_id == call_id and slot in target.holds:
                    self._torn = mine = True
                    del target.holds[slot]
                    target.replica_set.unreachable(target, 1, time.monotonic())
                    self._torn = False
            if channel is not None:
                channel.watch()
            if mine:
                self._pending.pop(call_id, None)
                self._requeue(slot, call_id)
        except BaseException:
            self._recover([])
            if mine:
                self._pending.pop(call_id, None)
                self._requeue(slot, call_id)
            if channel is not None:
                channel.watch()
            raise

    def _connect(self, target: Target) -> Channel:
        """Open a target's channel, or return the one that somebody else has opened meanwhile."""
        with self._opening:
            with self._lock:
                self._check_worth_opening(target)
                if target.channel is not None:
                    return target.channel
            opened = self._connector.open_channel(target.address, self, on_loop=self.home.on_loop)
            wanted = False
            try:
                with self._lock:
                    self._check_worth_opening(target)  # again: the engine may have been closed, or have found it dead
                    if target.channel is None:  # else opening it called back here, and made another call to it
                        target.channel = opened
                        self._channels[opened] = target
                        wanted = True
                    return target.channel
            finally:
                if not wanted:
                    opened.close()

    def _check_worth_opening(self, target: Target) -> None:
        if self._closed is not None:
            raise self._closed
        if target.dead:
            raise ChannelClosed(_DEAD)

    def _disconnect(self, target: Target) -> Channel | None:
        """Take a target's channel away; returns what is to be closed, without the lock."""
        channel, target.channel = target.channel, None
        if channel is not None:
            self._channels.pop(channel, None)
        return channel

    def _settle(self, slot: Slot, answer: Reply | Failure | End, *, taken: bool) -> None:
        """A replica answered a call: count it out and use the room."""
        ready: list[Slot] = []
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                target: Target = slot.target
                if slot not in target.holds:
                    return
                now = time.monotonic()
                replica_set = target.replica_set
                self._torn = True
                del target.holds[slot]
                if taken:
                    replica_set.answered(target, answer.load, now)
                elif answer.kind == FailureKind.BUSY:  # type: ignore[union-attr]
                    replica_set.handed_back(target, answer.load, now)
                else:
                    replica_set.refused(target, answer.load, now, bytes_of(slot.call))
                hung_up = self._disconnect(target) if target.gone and not target.in_flight else None
                line = replica_set.waiting
                some_wait = line.normal or line.low or replica_set.copies.normal
                if taken and some_wait:  # else this call comes first: `_requeue`
                    replica_set.next_placements(now, ready)
                    self._schedule_retry(replica_set, RETRY_S, now)  # it may not be reachable now that it has room
                self._torn = False
            if hung_up is not None:
                hung_up.close()
            if ready:
                self._send_all(ready)
        except BaseException:
            self._recover(ready)
            raise

    def _withdraw(self, slot: Slot) -> None:
        """A call that was placed is not sent: use the room."""
        ready: list[Slot] = []
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                target: Target | None = slot.target
                if target is None or slot not in target.holds:
                    return
                self._torn = True
                del target.holds[slot]
                replica_set = target.replica_set
                replica_set.withdrawn(target)
                hung_up = self._disconnect(target) if target.gone and not target.in_flight else None
                now = time.monotonic()
                replica_set.next_placements(now, ready)
                self._schedule_retry(replica_set, RETRY_S, now)  # no answer will come from there
                self._torn = False
            if hung_up is not None:
                hung_up.close()
            self._send_all(ready)
        except BaseException:
            self._recover(ready)
            raise

    def _requeue(self, slot: Slot, call_id: int, *, lost: bool = False) -> None:
        """Route a call again that its replica did not take, at the place it had; and see to those behind it.

        One that is ``lost`` with its replica may wait although the queue is full: it had a place.
        """
        replica_set = slot.target.replica_set
        failure: EngineError | None = None
        stays = True
        ready: list[Slot] = []
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                now = time.monotonic()
                self._torn = True
                if slot.call_id == call_id and slot.queue is None and slot not in slot.target.holds:
                    slot.come_back()
                    stays = self._router.replica_sets.get(replica_set.tag) is replica_set
                    if isinstance(slot, CopySlot):
                        if stays and self._closed is None and not replica_set.hopeless:
                            replica_set.put_copy_back(slot)
                            self._watch_copies(replica_set)
                        else:
                            replica_set.dropped_copies += 1
                            slot.give_up()
                    elif stays and not slot.given_up:
                        failure = self._closed or (replica_set.absence() if lost else replica_set.refusal(slot))
                        if failure is None:
                            replica_set.put_back(slot, now)
                self._schedule_retry(replica_set, RETRY_S, now)
                replica_set.next_placements(now, ready)
                self._torn = False
            if failure is not None:
                slot.fail(failure)
            elif not stays:
                self._route_again(slot)
            self._send_all(ready)
        except BaseException:
            self._recover(ready)
            if failure is not None:
                slot.fail(failure)
            elif not stays:
                self._route_again(slot)
            raise

    def _route_again(self, slot: Slot) -> None:
        target: Target | None = slot.target
        if not slot.given_up and slot.queue is None and (target is None or slot not in target.holds):
            slot.come_back()
            self.submit(slot, again=True)

    def _send_all(self, placed: list[Slot]) -> None:
        for slot in placed:
            self._send(slot)

    # -- after an exception that struck ---------------------------------------------------------------------------

    def _mend(self) -> None:
        """Make anew what whoever was struck under the lock has torn. Called under it."""
        for replica_set in self._router.replica_sets.values():
            replica_set.mend()
        for target in self._channels.values():
            target.in_flight = len(target.holds)  # also of those that have left
        self._torn = False

    def _recover(self, placed: list[Slot]) -> None:
        """Do what the thread that was struck would have done for the calls of others."""
        hung_up: list[Channel] = []
        with self._lock:
            now = time.monotonic()
            if self._torn:
                self._mend()
            for replica_set in self._router.replica_sets.values():
                replica_set.next_placements(now, placed)
                self._schedule_retry(replica_set, RETRY_S, now)
                self._watch_copies(replica_set)
            for target in list(self._channels.values()):
                if target.gone and not target.in_flight and target.channel is not None:
                    hung_up.append(target.channel)
                    self._disconnect(target)
        for channel in hung_up:
            channel.close()
        self._send_all(placed)

    def _submit_copy(self, call: Call, replica_set: ReplicaSet) -> None:
        copy = CopySlot(call=call)
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                if self._closed is not None:
                    return
                self._torn = True
                target = replica_set.place_copy(copy, time.monotonic())
                if target is None:
                    self._watch_copies(replica_set)
                else:
                    copy.target = target
                    target.holds[copy] = None
                self._torn = False
            if target is not None:
                self._send(copy)
        except BaseException:
            self._recover([])
            self._abandon(copy)
            raise

    def _watch_copies(self, replica_set: ReplicaSet) -> None:
        """See to it that copies which wait go on, or are dropped, also if nothing else happens here."""
        if replica_set.copies and not replica_set.copies_watched and self._closed is None:
            replica_set.copies_watched = True
            self.home.call_later(_COPIES_RETRY_S, self._retry_copies, replica_set)

    def _retry_copies(self, replica_set: ReplicaSet) -> None:
        ready: list[Slot] = []
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                self._torn = True
                replica_set.copies_watched = False
                now = time.monotonic()
                replica_set.drop_late_copies(now)
                replica_set.next_placements(now, ready)
                self._watch_copies(replica_set)
                self._torn = False
            self._send_all(ready)
        except BaseException:
            replica_set.copies_watched = False  # there is no timer for them any more
            self._recover(ready)
            raise

    def _schedule_retry(self, replica_set: ReplicaSet, delay_s: float, now: float) -> None:
        worthwhile = replica_set.waiting and replica_set.some_blocked(now)
        if worthwhile and not replica_set.retry_scheduled and self._closed is None:
            replica_set.retry_scheduled = True
            self.home.call_later(delay_s, self._retry, replica_set)

    def _retry(self, replica_set: ReplicaSet) -> None:
        ready: list[Slot] = []
        try:
            with self._lock:
                if self._torn:
                    self._mend()
                self._torn = True
                replica_set.retry_scheduled = False
                now = time.monotonic()
                replica_set.next_placements(now, ready)
                self._schedule_retry(replica_set, RETRY_S, now)
                self._torn = False
            self._send_all(ready)
        except BaseException:
            replica_set.retry_scheduled = False  # there is no timer any more
            self._recover(ready)
            raise


def _nobody() -> bool:
    return False
