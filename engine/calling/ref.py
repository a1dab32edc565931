"""Refs: the future-like results of ``handle.remote()``, and waiting for them."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Generator, Sequence
from queue import Empty, SimpleQueue
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any, Generic

from ..config import LONGEST_S
from ..errors import Cancelled, DeadlineExceeded, InvalidArgument, WouldBlock
from ..seam.may_block import check_may_block, warn_if_on_loop
from ..seam.messages import Call, End, Failure, Item, Reply
from .answers import open_answer, settled
from .budget import deadline_error, outside, running_budget
from .caller import Caller
from .slot import NO_CALL, Slot

if TYPE_CHECKING:
    from concurrent.futures import Future

    from typing_extensions import TypeVar

    from ..seam.connector import PlatformRefs

    T_co = TypeVar("T_co", covariant=True, default=Any)
else:
    from typing import TypeVar

    T_co = TypeVar("T_co", covariant=True)

__all__ = ["Ref", "get", "wait"]


class Ref(Slot, Generic[T_co]):
    """The result of a call that may still run; ``Ref[int]`` says what it is to type checkers.

    ``await ref``, ``ref.result(timeout)``, ``ref.future()`` and `Engine.get` give the result or raise what the call
    raised; passed to another ``remote()`` it is replaced by its result before the callee sees it. Any thread or loop
    may use it. Dropping it does not stop the call.
    """

    __slots__ = ("__weakref__", "_callbacks", "_caller", "_error", "_lock", "_message", "_opened", "_timer", "_value")

    def __init__(self, caller: Caller | None, endpoint: str) -> None:
        Slot.__init__(self, endpoint)
        self._caller = caller
        self._lock = threading.Lock()  # guards `_callbacks` against `_settle`
        self._callbacks: list[Callable[[Ref], None]] | None = []
        self._message: Any = None
        self._error: BaseException | None = None
        self._opened = False
        self._value: Any = None
        self._timer: Any = None

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "failed" if self._error is not None else "done"
        return f"<Ref {self.endpoint!r} {state}>"

    def __dir__(self) -> list[str]:
        return [*dir(object), "__await__", "add_done_callback", "cancel", "done", "future", "result"]

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ref can only be an argument of its own, as in handle.remote(ref): "
            "get the result first to put it inside another object"
        )

    def done(self) -> bool:
        """Whether the result is there."""
        return self._callbacks is None

    def result(self, timeout: float | None = None) -> T_co:
        """Wait for the result.

        Args:
            timeout: Seconds to wait, or None for as long as it takes.

        Raises:
            errors.DeadlineExceeded: It did not come in time; the call goes on.
            errors.WouldBlock: Called on the event loop of an async backend, or on the one the ref belongs to.
            BaseException: Whatever the call raised.
        """
        if not self.done():
            self._check_may_wait()
            # Not an event: a signal handler that raises in one, which is made in Python, can leave its lock locked.
            ready: SimpleQueue[Ref] = SimpleQueue()
            self.add_done_callback(ready.put)
            try:
                ready.get(timeout=None if timeout is None else min(max(0.0, timeout), LONGEST_S))
            except BaseException as error:
                self.drop_done_callback(ready.put)
                if not isinstance(error, Empty):
                    raise
                raise DeadlineExceeded(
                    f"the result of {self.endpoint!r} did not come within timeout={timeout:g} s"
                ) from None
        return self._open()

    def _check_may_wait(self) -> None:
        check_may_block("waiting for a ref")
        if self._caller is not None and self._caller.home.runs_here():
            raise WouldBlock(
                "waiting for this ref would block the event loop that its answer comes to, for ever: await it instead"
            )
        warn_if_on_loop("waiting for a ref")

    def future(self) -> Future[T_co]:
        """A `concurrent.futures.Future` of the same result."""
        from concurrent.futures import Future

        future: Future[T_co] = Future()
        future.set_running_or_notify_cancel()

        def copy(ref: Ref) -> None:
            try:
                result = ref._open()
            except BaseException as error:
                future.set_exception(error.with_traceback(None))  # which knows this frame, and so the future
            else:
                future.set_result(result)

        self.add_done_callback(copy)
        return future

    def cancel(self) -> bool:
        """Give the call up: whoever waits for the ref gets `errors.Cancelled`, and the replica need not run it.

        What runs is stopped: an async callable is cancelled, `errors.CallCancelled` is raised in a plain one.

        Returns:
            Whether the call was given up; False if it had settled before, so that the ref stays as it is.
        """
        if self.done() or self._caller is None:
            return False
        self._caller.cancel(self)
        return self._settle(None, Cancelled(f"the call of {self.endpoint!r} was cancelled by ref.cancel()"))

    def add_done_callback(self, callback: Callable[[Ref], None]) -> None:
        """Call ``callback(ref)`` once the result is there, in the thread that learns of it; it must not block."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks.append(callback)
                return
        callback(self)

    def drop_done_callback(self, callback: Callable[[Ref], None]) -> None:
        """Forget a callback (idempotent): whoever looks again and again must not leave one each time."""
        with self._lock:
            if self._callbacks is not None and callback in self._callbacks:
                self._callbacks.remove(callback)

    def __await__(self) -> Generator[Any, Any, T_co]:
        if not self.done():
            yield from settled(self).__await__()
        return self._open()

    def stand_for(self, call: Call, shard_key: str | None) -> None:
        """Take the call whose result this is, now that its arguments are known."""
        self.call = call
        self.shard_key = shard_key

    # -- what the caller says ----------------------------------------------------------------------------------------

    def deliver(self, message: Reply | Failure | Item | End) -> None:
        """See `Slot.deliver`."""
        self._settle(message, None)

    def fail(self, error: BaseException) -> None:
        """See `Slot.fail`."""
        self._settle(None, error)

    def expire_at(self, deadline: float, timeout_s: float) -> None:
        """Fail with `DeadlineExceeded` unless the result comes before the deadline, ``timeout_s`` after the call."""
        assert self._caller is not None
        if not self.done():
            delay_s = max(0.0, deadline - time.monotonic())
            self._timer = self._caller.home.call_later(delay_s, self._expire, timeout_s)

    def _expire(self, timeout_s: float) -> None:
        if not self.done():
            assert self._caller is not None
            self._caller.cancel(self)
            self.fail(deadline_error(self.endpoint, timeout_s))

    def _settle(self, message: Any, error: BaseException | None) -> bool:
        """Take the first outcome; one that comes later (an answer after the deadline, say) changes nothing: False."""
        due: list[Callable[[Ref], None]] = []
        try:
            with self._lock:
                if self._callbacks is None:
                    return False
                self._message, self._error = message, error
                due = self._callbacks
                self._callbacks = None
                self.call = NO_CALL  # its arguments may be large
            timer, self._timer = self._timer, None
            if timer is not None:
                timer.cancel()
            self._call_back(due)
        except BaseException:  # an interrupt, which may have come between: those who wait are told all the same
            self._call_back(due)
            raise
        return True

    def _call_back(self, due: list[Callable[[Ref], None]]) -> None:
        if due and running_budget() is not None:  # of a call that has nothing to do with this ref
            outside(self._call_back, due)
            return
        interrupt: BaseException | None = None
        while due:
            callback = due[0]
            try:
                callback(self)
            except BaseException as raised:  # it must not stop whoever brings the other answers
                from ..seam.log import Log, must_go_on

                # What is not made in Python does not fail here: a signal handler raised, which is for this thread.
                if must_go_on(raised) and not isinstance(callback, BuiltinFunctionType):
                    Log("engine.ref").exception("a callback of %r failed", self)
                else:
                    interrupt = interrupt or raised
            del due[0]
        if interrupt is not None:
            raise interrupt

    def _open(self) -> T_co:
        # An error is made anew each time. It will know all frames it passes, and they know the ref: if that knew the
        # error, they would keep each other in memory.
        if self._error is not None:
            raise _anew(self._error)
        message = self._message  # first, for another thread may be opening it just now
        if not self._opened:
            self._value = open_answer(message)
            self._opened = True
            self._message = None
        return self._value  # type: ignore[no-any-return]


def _anew(error: BaseException) -> BaseException:
    try:
        another = copy.copy(error)
        if type(another) is type(error) and str(another) == str(error):
            another.__cause__ = error.__cause__
            return another
    except Exception:  # one of user code that cannot be copied
        pass
    return error


def get(refs: Any, timeout: float | None = None, platform: PlatformRefs | None = None) -> Any:
    """The result of a ref, or the list of the results of several, within ``timeout`` seconds for all of them.

    ``platform`` knows the refs that are not the engine's own.
    """
    if isinstance(refs, Ref):
        return refs.result(timeout)
    single = platform is not None and platform.is_ref(refs)
    checked = [refs] if single else _checked(refs, platform)
    deadline = None if timeout is None else time.monotonic() + timeout
    foreign = [ref for ref in checked if not isinstance(ref, Ref)]
    if foreign:
        assert platform is not None
        check_may_block("waiting for a ref")
        warn_if_on_loop("waiting for a ref")
        theirs = iter(platform.results(foreign, timeout))
    results = [
        ref.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if isinstance(ref, Ref)
        else next(theirs)
        for ref in checked
    ]
    return results[0] if single else results


def wait(
    refs: Sequence[Any], num_returns: int = 1, timeout: float | None = None, platform: PlatformRefs | None = None
) -> tuple[list[Any], list[Any]]:
    """Wait until ``num_returns`` of the refs have settled, or for ``timeout`` seconds.

    Returns:
        ``(ready, not_ready)``, each in the order given; ``ready`` has at most ``num_returns``.
    """
    checked = _checked(refs, platform)
    if not checked:
        raise InvalidArgument("refs must be a list of at least one ref")
    if isinstance(num_returns, bool) or not isinstance(num_returns, int) or not 1 <= num_returns <= len(checked):
        raise InvalidArgument(f"num_returns must be an integer from 1 to the {len(checked)} refs, not {num_returns!r}")
    if len(set(map(id, checked))) != len(checked):
        raise InvalidArgument("refs must all be different")
    own = [ref for ref in checked if isinstance(ref, Ref)]
    if not own:
        assert platform is not None
        check_may_block("waiting for a ref")
        warn_if_on_loop("waiting for a ref")
        return platform.wait(checked, num_returns, timeout)
    if len(own) < len(checked):
        raise InvalidArgument("refs must all be of one engine: wait for those of each engine by a call of its own")
    settled: SimpleQueue[Ref] = SimpleQueue()
    if sum(ref.done() for ref in own) < num_returns:
        for ref in own:
            if not ref.done():
                ref._check_may_wait()
        deadline = None if timeout is None else time.monotonic() + timeout
        for ref in own:
            ref.add_done_callback(settled.put)
        try:
            for _ in range(num_returns):
                remaining = None if deadline is None else min(max(0.0, deadline - time.monotonic()), LONGEST_S)
                settled.get(timeout=remaining)
        except Empty:
            pass
        finally:
            for ref in own:
                ref.drop_done_callback(settled.put)
    ready = [ref for ref in own if ref.done()][:num_returns]
    chosen = set(map(id, ready))
    return ready, [ref for ref in checked if id(ref) not in chosen]


def _checked(refs: Any, platform: PlatformRefs | None) -> list[Any]:
    if isinstance(refs, Ref) or not isinstance(refs, Sequence):
        raise InvalidArgument(f"refs must be a list of refs, not {refs!r}{_where_it_belongs(refs)}")
    for position, ref in enumerate(refs):
        if not isinstance(ref, Ref) and not (platform is not None and platform.is_ref(ref)):
            raise InvalidArgument(
                f"refs[{position}] must be a ref as handle.remote() returns it, not {ref!r}{_where_it_belongs(ref)}"
            )
    return list(refs)


def _where_it_belongs(value: Any) -> str:
    if hasattr(value, "__await__"):
        return ": await it; what an async handle's remote() gives is a ref once it was awaited"
    return ""
