"""Sends calls and takes their answers: the shell around one router.

There is one caller for all the threads of a process and one for each event loop that makes calls. A call is routed and
written by the thread that makes it, and its answer delivered by whoever reads the channel: no hop in between.

A call that was given up still counts against its replica until the replica's answer comes, so that no slot is ever
leaked or counted twice. When a replica dies, its calls fail with `ReplicaDied`; calls it refused or never got are
routed again. Its connection breaks then; or a snapshot has the news, if its machine is gone and all is silent.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import EngineClosed, EngineError, ReplicaDied
from ..seam.channel import Channel, ChannelClosed
from ..seam.connector import Connector
from ..seam.messages import Call, Cancel, Credit, End, Failure, FailureKind, Item, Message, Reply
from ..seam.snapshot import RoutingSnapshot
from .answers import CopySlot
from .home import Home
from .replica_set import RETRY_S, UNREACHABLE_S, ReplicaSet, Target
from .router import Router
from .slot import Slot

__all__ = ["Caller"]

_new = tuple.__new__  # a named tuple's own constructor takes longer
_NOT_TAKEN = frozenset((FailureKind.REFUSED, FailureKind.DRAINING, FailureKind.BUSY))
_COPIES_RETRY_S = 0.25
_LAST_WORDS_S = 0.5
"""For what a replica answered before it died, and for its connection to break by itself, which says more."""
_DEAD = "the engine has found it dead"


class Caller:
    """One party's calls. It hears all of its channels.

    Args:
        connector: Opens the channels.
        home: Where the channels are read and timers run.
        current: Returns the snapshot that rules now.
    """

    def __init__(self, connector: Connector, home: Home, current: Callable[[], RoutingSnapshot]) -> None:
        self._connector = connector
        self.home = home
        self._current = current
        self._lock = threading.RLock()  # guards the router, its targets and `_channels`; nobody does I/O under it
        self._opening = threading.RLock()  # held while a channel is opened, so that each target gets one
        self._router = Router()
        self._channels: dict[Channel, Target] = {}
        self._ids = itertools.count(1)
        self._pending: dict[int, Slot] = {}  # single dict operations only, which need no lock
        self._closed: EngineError | None = None

    def __repr__(self) -> str:
        return f"<Caller {'loop' if self.home.on_loop else 'threads'} pending={len(self._pending)} {self._router}>"

    # -- calls -----------------------------------------------------------------------------------------------------

    def submit(self, slot: Slot, *, again: bool = False) -> None:
        """Route a slot's call and send it, or queue it. Errors go to ``slot.fail``, possibly before this returns.

        A call that is routed ``again`` is neither counted nor copied a second time.
        """
        if self._router.snapshot is not self._current():
            self.apply(self._current())
        copies: list[ReplicaSet] = []
        try:
            with self._lock:
                if self._closed is not None:
                    raise self._closed
                if slot.given_up:  # meanwhile: it must be neither queued nor copied
                    return
                call = slot.call
                replica_set, endpoint = self._router.route(slot.endpoint, slot.shard_key)
                if not again:
                    endpoint.calls += 1
                    if endpoint.entry.shadows:
                        copies = list(self._router.shadows(endpoint))
                now = time.monotonic()
                target = replica_set.place(slot, now)
                if target is None:
                    self._schedule_retry(replica_set, RETRY_S, now)
        except EngineError as error:
            slot.fail(error)
            return
        if target is not None:
            self._send(slot, target, watch=again or not slot.drives)  # again: its thread drives another channel
        for copy in copies:
            self._submit_copy(call, copy)

    def cancel(self, slot: Slot) -> None:
        """Give a call up: its slot hears nothing any more, and the replica need not run it (idempotent)."""
        with self._lock:
            if slot.given_up:
                return
            # From here on the slot only stands for the answer that is due: whoever takes it sees that there is no
            # call to deliver to. Taking the slot out here instead would race with the thread that reads the answer.
            slot.give_up()
            channel, call_id = slot.channel, slot.call_id
            if channel is None or self._pending.get(call_id) is not slot:
                return
        try:
            channel.send(Cancel(call_id))
            channel.watch()
        except ChannelClosed:
            self.lost(channel, "the channel is closed")

    def credit(self, slot: Slot, amount: int) -> None:
        """Let a streaming replica send this many more items."""
        channel = slot.channel
        if channel is not None and not slot.given_up and self._pending.get(slot.call_id) is slot:
            try:
                channel.send(Credit(slot.call_id, amount))
            except ChannelClosed as error:
                self.lost(channel, str(error))

    # -- snapshots -------------------------------------------------------------------------------------------------

    def apply(self, snapshot: RoutingSnapshot) -> None:
        """Take a newer snapshot; calls queued for what is gone are routed again."""
        with self._lock:
            left, homeless = self._router.apply(snapshot)
            hung_up = [self._disconnect(target) for target in left if not target.in_flight]
            for target in left:
                if target.dead and target.channel is not None:
                    # not at once, and not here: `lost` tells slots, which may not happen under the lock
                    delay_s = _LAST_WORDS_S if target.channel.opened else 0.0
                    self.home.call_later(delay_s, self.lost, target.channel, _DEAD)
            ready = [
                placement
                for replica_set in self._router.replica_sets.values()
                for placement in replica_set.next_placements(time.monotonic())
            ]
        for channel in hung_up:
            if channel is not None:
                channel.close()
        for slot in homeless:
            self._route_again(slot)
        for slot, target in ready:
            self._send(slot, target)

    def statistics(self) -> dict[str, Any]:
        """What this caller counted and holds."""
        with self._lock:
            return {
                "endpoints": {name: {"calls": endpoint.calls} for name, endpoint in self._router.endpoints.items()},
                "backends": {
                    tag: {
                        "queued": len(replica_set.waiting),
                        "in_flight": sum(target.in_flight for target in replica_set.targets.values()),
                        "queued_copies": len(replica_set.copies),
                        "dropped_copies": replica_set.dropped_copies,
                    }
                    for tag, replica_set in self._router.replica_sets.items()
                },
            }

    def begin_close(self, error: EngineError) -> None:
        """Take no more calls and fail those that wait for a replica; what is in flight goes on (idempotent)."""
        with self._lock:
            self._closed = self._closed or error
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
                slot.deliver(message)  # type: ignore[arg-type]
            return
        if kind is not Reply and not isinstance(message, (Failure, End)):
            return
        slot = self._pending.pop(message.id, None)  # type: ignore[union-attr]
        if slot is None:
            return
        target: Target = slot.target
        taken = kind is not Failure or message.kind not in _NOT_TAKEN  # type: ignore[union-attr]
        self._settle(target, message, taken=taken)  # type: ignore[arg-type]
        if not taken:
            self._requeue(slot, target)
        elif not slot.given_up:
            slot.deliver(message)  # type: ignore[arg-type]

    def lost(self, channel: Channel, reason: str) -> None:
        """See `ChannelListener.lost`: the replica's calls fail, its place stays blocked for a while.

        Calls that it cannot have received are routed again.
        """
        with self._lock:
            target = self._channels.pop(channel, None)
            if target is None:
                return
            target.channel = None
            now = time.monotonic()
            dead = [
                slot
                for slot in list(self._pending.values())
                if slot.channel is channel and self._pending.pop(slot.call_id, None) is slot
            ]
            target.replica_set.unreachable(target, len(dead), now)
            self._schedule_retry(target.replica_set, UNREACHABLE_S, now)
        channel.close()
        if not channel.opened:
            for slot in dead:
                self._requeue(slot, target)
            return
        fate = "it was ended on purpose" if target.gone and not target.dead else "it is being replaced"
        for slot in dead:
            if not slot.given_up:
                slot.fail(
                    self._closed
                    or ReplicaDied(
                        f"replica {target.replica_tag} died while it held this call ({reason}); {fate}, "
                        "and the call may have run: repeat it only if that is safe"
                    )
                )

    # -- inside ----------------------------------------------------------------------------------------------------

    def _send(self, slot: Slot, target: Target, *, watch: bool = True) -> None:
        call = slot.call
        if slot.given_up:  # meanwhile
            self._withdraw(target)
            return
        call_id = next(self._ids)
        channel: Channel | None = None
        try:
            channel = target.channel or self._connect(target)
            if slot.given_up:  # opening may take long
                self._withdraw(target)
                return
            slot.send_on(channel, call_id, target)
            self._pending[call_id] = slot
            channel.send(_new(Call, (call_id, *call[1:])))
            if watch:
                channel.watch()
        except ChannelClosed as error:
            self._not_sent(slot, target, call_id, channel, str(error))
        except EngineError as error:
            if channel is None or self._pending.pop(call_id, None) is slot:
                self._withdraw(target)
                slot.fail(error)

    def _not_sent(self, slot: Slot, target: Target, call_id: int, channel: Channel | None, reason: str) -> None:
        # What the slot says may be of a later try already: whoever reads the channel may have found it lost meanwhile,
        # taken the slot out and sent the call elsewhere. Then there is nothing left to do here but for the channel.
        mine = channel is None or self._pending.pop(call_id, None) is slot
        if mine:
            with self._lock:
                target.replica_set.unreachable(target, 1, time.monotonic())
        if channel is not None:
            self.lost(channel, reason)
        if mine:
            self._requeue(slot, target)

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

    def _settle(self, target: Target, answer: Reply | Failure | End, *, taken: bool) -> None:
        """A replica answered a call: count it out and use the room."""
        with self._lock:
            now = time.monotonic()
            replica_set = target.replica_set
            if taken:
                replica_set.answered(target, answer.load, now)
            elif answer.kind == FailureKind.BUSY:  # type: ignore[union-attr]
                replica_set.handed_back(target, answer.load, now)
            else:
                replica_set.refused(target, answer.load, now)
            hung_up = self._disconnect(target) if target.gone and not target.in_flight else None
            ready = list(replica_set.next_placements(now)) if replica_set.waiting or replica_set.copies else ()
        if hung_up is not None:
            hung_up.close()
        for slot, chosen in ready:
            self._send(slot, chosen)

    def _withdraw(self, target: Target) -> None:
        """A call that was placed is not sent: use the room."""
        with self._lock:
            replica_set = target.replica_set
            replica_set.withdrawn(target)
            hung_up = self._disconnect(target) if target.gone and not target.in_flight else None
            ready = list(replica_set.next_placements(time.monotonic()))
        if hung_up is not None:
            hung_up.close()
        for slot, chosen in ready:
            self._send(slot, chosen)

    def _requeue(self, slot: Slot, target: Target) -> None:
        """Route a call again that its replica did not take, at the place it had; and see to those behind it."""
        replica_set = target.replica_set
        failure: EngineError | None = None
        with self._lock:
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
                failure = self._closed or replica_set.refusal()
                if failure is None:
                    replica_set.put_back(slot)
            now = time.monotonic()
            self._schedule_retry(replica_set, RETRY_S, now)
            ready = list(replica_set.next_placements(now))
        if failure is not None:
            slot.fail(failure)
        elif not stays:
            self._route_again(slot)
        for queued, chosen in ready:
            self._send(queued, chosen)

    def _route_again(self, slot: Slot) -> None:
        if not slot.given_up:
            slot.come_back()
            self.submit(slot, again=True)

    def _submit_copy(self, call: Call, replica_set: ReplicaSet) -> None:
        copy = CopySlot(call=call)
        with self._lock:
            if self._closed is not None:
                return
            target = replica_set.place_copy(copy, time.monotonic())
            if target is None:
                self._watch_copies(replica_set)
        if target is not None:
            self._send(copy, target)

    def _watch_copies(self, replica_set: ReplicaSet) -> None:
        """See to it that copies which wait go on, or are dropped, also if nothing else happens here."""
        if replica_set.copies and not replica_set.copies_watched and self._closed is None:
            replica_set.copies_watched = True
            self.home.call_later(_COPIES_RETRY_S, self._retry_copies, replica_set)

    def _retry_copies(self, replica_set: ReplicaSet) -> None:
        with self._lock:
            replica_set.copies_watched = False
            now = time.monotonic()
            replica_set.drop_late_copies(now)
            ready = list(replica_set.next_placements(now))
            self._watch_copies(replica_set)
        for slot, target in ready:
            self._send(slot, target)

    def _schedule_retry(self, replica_set: ReplicaSet, delay_s: float, now: float) -> None:
        worthwhile = replica_set.waiting and replica_set.some_blocked(now)
        if worthwhile and not replica_set.retry_scheduled and self._closed is None:
            replica_set.retry_scheduled = True
            self.home.call_later(delay_s, self._retry, replica_set)

    def _retry(self, replica_set: ReplicaSet) -> None:
        with self._lock:
            replica_set.retry_scheduled = False
            now = time.monotonic()
            ready = list(replica_set.next_placements(now))
            self._schedule_retry(replica_set, RETRY_S, now)
        for slot, target in ready:
            self._send(slot, target)
