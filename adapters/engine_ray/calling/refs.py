"""Calls as object refs: what ``handle.remote()`` gives on Ray, and waiting for it.

An object ref can only come from a call to an actor. So calls that want one go to the engine's courier
(`engine_ray.calling.courier`), which sends them on over the engine's channels, where all rules for calls hold. The
courier starts with the first such call of the engine, wherever it is made.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from engine.config import LONGEST_S
from engine.errors import CallError, DeadlineExceeded, ReplicaDied, RetryLater
from engine.seam.may_block import running_asyncio_loop

from ..link.actors import NAMESPACE
from ..link.connection import check_connected
from .addresses import engine_of
from .carried import Errand, Placeholder, refuse_refs
from .connector import RayConnector
from .courier import courier_name, find_courier

if TYPE_CHECKING:
    from engine.seam.connector import PlatformRefs
    from engine.seam.messages import Call
    from engine_wire.tls import TLS

__all__ = ["RayCaller", "RayRefs"]

_COUNT_WITHIN_S = 2.0
"""For the courier to say what it counted, which takes a millisecond or two."""


class RayCaller(RayConnector):
    """A connector of a process that makes calls: it has refs as well."""

    def __init__(self, control_address: str = "", secret: bytes | None = None, tls: TLS | None = None) -> None:
        super().__init__(control_address, secret, tls)
        self._lock = threading.Lock()  # guards the refs while they are made
        self._refs: RayRefs | None = None

    @property
    def refs(self) -> PlatformRefs:
        """See `engine.seam.connector.HasRefs.refs`."""
        with self._lock:
            if self._refs is None:
                self._refs = RayRefs(self)
            return self._refs


class RayRefs:
    """See `engine.seam.connector.PlatformRefs`.

    Args:
        connector: Knows the engine, once a channel was opened with it.
    """

    def __init__(self, connector: RayConnector) -> None:
        import ray

        self._connector = connector
        self._kind = ray.ObjectRef
        refuse_refs()
        self._source = os.urandom(6).hex()
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards `_courier` while it is made
        self._courier: Any = None

    def is_ref(self, value: Any) -> bool:
        """See `engine.seam.connector.PlatformRefs.is_ref`."""
        return isinstance(value, self._kind)

    def lift(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """See `engine.seam.connector.PlatformRefs.lift`."""
        lifted = [value for value in (*args, *kwargs.values()) if self.is_ref(value)]
        if not lifted:
            return args, kwargs, lifted
        places = iter(range(len(lifted)))

        def lowered(value: Any) -> Any:
            return Placeholder(next(places)) if self.is_ref(value) else value

        return tuple(map(lowered, args)), {name: lowered(value) for name, value in kwargs.items()}, lifted

    def start(
        self, endpoint: str, call: Call, shard_key: str | None, lifted: list[Any], timeout_s: float | None
    ) -> Any:
        """See `engine.seam.connector.PlatformRefs.start`."""
        check_connected()
        courier = self._courier or self._find_courier()
        deadline = call.deadline
        errand = Errand(
            self._source,
            next(self._numbers),
            endpoint,
            call.method,
            call.head,
            call.payload,
            shard_key,
            timeout_s,
            None if deadline is None else max(0.0, deadline - time.monotonic()),
            deadline,
            "" if deadline is None else self._connector.node_id(),
            call.retries,
            call.priority,
        ).packed()
        return courier.carry.remote(errand, lifted) if lifted else courier.carry.remote(errand)

    def results(self, refs: list[Any], timeout_s: float | None) -> list[Any]:
        """See `engine.seam.connector.PlatformRefs.results`."""
        import ray

        check_connected()
        try:
            results: list[Any] = ray.get(refs, timeout=_bounded(timeout_s))
        except Exception as error:
            raise self._translated(error, timeout_s) from _cause_of(error)
        return results

    async def result(self, ref: Any, timeout_s: float | None) -> Any:
        """See `engine.seam.connector.PlatformRefs.result`."""
        check_connected()
        if running_asyncio_loop() is None:
            from anyio import to_thread

            return (await to_thread.run_sync(functools.partial(self.results, [ref], timeout_s)))[0]
        future = asyncio.wrap_future(ref.future())
        try:
            if timeout_s is not None:
                await asyncio.wait([future], timeout=timeout_s)
                if not future.done():
                    raise DeadlineExceeded(f"the result of a ref did not come within {timeout_s:g} s")
            return await future
        except DeadlineExceeded:
            raise
        except Exception as error:
            raise self._translated(error, None) from _cause_of(error)

    def wait(self, refs: list[Any], num_returns: int, timeout_s: float | None) -> tuple[list[Any], list[Any]]:
        """See `engine.seam.connector.PlatformRefs.wait`."""
        import ray

        check_connected()
        ray.wait(refs, num_returns=num_returns, timeout=_bounded(timeout_s), fetch_local=False)
        # Of several that are ready Ray returns any; the first ones are wanted.
        ready = set(ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0])
        chosen = [ref for ref in refs if ref in ready][:num_returns]
        return chosen, [ref for ref in refs if ref not in chosen]

    def statistics(self) -> list[dict[str, Any]]:
        """See `engine.seam.connector.PlatformRefs.statistics`."""
        import ray

        control_address = self._connector.control_address
        if not control_address or not ray.is_initialized():
            return []
        try:
            courier = ray.get_actor(courier_name(engine_of(control_address)), namespace=NAMESPACE)
            counted: dict[str, Any] = ray.get(courier.statistics.remote(), timeout=_COUNT_WITHIN_S)
        except (ValueError, ray.exceptions.RayError):  # there is none, or it is being started again and knows nothing
            return []
        return [counted]

    def _find_courier(self) -> Any:
        with self._lock:
            if self._courier is None:
                own = self._connector
                control_address = own.control_address
                self._courier = find_courier(engine_of(control_address), control_address, own.secret(), own.tls())
            return self._courier

    @staticmethod
    def _translated(error: BaseException, timeout_s: float | None) -> BaseException:
        from ray import exceptions

        if isinstance(error, exceptions.RayTaskError):
            cause: BaseException = error.cause
            if not isinstance(cause, exceptions.TaskCancelledError):
                return cause
            error = cause  # of the courier's own call
        if isinstance(error, exceptions.GetTimeoutError):
            return DeadlineExceeded(f"the results did not come within timeout={timeout_s:g} s; the calls go on")
        if isinstance(error, exceptions.TaskCancelledError):
            return CallError("the call was cancelled")
        if isinstance(error, exceptions.RayActorError):
            return ReplicaDied(
                "the process that carried this call died, and the call may have run: repeat it only if that is safe "
                f"({error})"
            )
        if isinstance(error, exceptions.RayError):
            return RetryLater(f"Ray could not bring the result: {error}")
        return error


def _cause_of(error: BaseException) -> BaseException | None:
    """What to raise a translated error from: the remote traceback of a user's error, or else Ray's own error."""
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError) and not isinstance(error.cause, exceptions.TaskCancelledError):
        return error.cause.__cause__ if isinstance(error.cause, BaseException) else None
    return error if isinstance(error, exceptions.RayError) else error.__cause__


def _bounded(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else min(timeout_s, LONGEST_S)
