"""The courier: an actor that carries calls which want an object ref. Each engine has one, from the first of them on.

It is a caller like any other: its own router places every call, and the calls travel on channels. No user code runs in
it and it unpickles nothing but refs among arguments, so what happens to a replica never happens to it. Should it be
killed all the same, the calls it held fail, and Ray starts it again for the next ones. The controller kills it if it is
stopped, where both are on one node.

It ends with the engine: when its channel to the controller is gone, the calls it holds fail with `EngineClosed`, and it
leaves as soon as all of them are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.calling.answers import answer_to
from engine.calling.budget import deadline_error, seconds_until
from engine.calling.client import Client
from engine.errors import EngineClosed, EngineError, NotSerializable
from engine.seam.control_messages import Subscribe
from engine.seam.messages import PYTHON, Call, Reply
from engine.seam.serialization import dumps, pack_exception

from ..link.actors import NAMESPACE, kill_actor
from ..link.surroundings import Surroundings, extend_path
from .carried import CarriedError, Filled, carried, refuse_refs
from .connector import RayConnector
from .turns import Turns

if TYPE_CHECKING:
    from engine_wire.tls import TLS

__all__ = ["COURIER", "Courier", "courier_name", "end_courier", "find_courier"]

_MAX_CALLS = 1_000_000
"""Calls at a time: as many as an async replica holds. The queues of the routers bound them, not this."""
COURIER = "courier"
"""What it calls itself towards the controller."""
_LEAVE_WITHIN_S = 3.0
_ON_ITS_WAY_S = 0.2
"""What the next call may take to come here that was made when the last one was. An engine that drains waits for it."""
_LAST_ANSWERS_S = 1.0
"""What Ray may need to bring the last answers to their callers; the engine, if it shuts down in order, is faster."""
_leave_process = os._exit


class Courier:
    """The actor. All of it runs on the actor's event loop.

    Args:
        engine_id: The engine.
        control_address: Where its controller is reached.
        secret: The engine's.
        paths: ``sys.path`` of whoever made the first call: refs among arguments are opened here.
        tls: Who it is to other nodes, if the engine uses TLS between them.
    """

    def __init__(
        self, engine_id: str, control_address: str, secret: bytes, paths: list[str], tls: TLS | None = None
    ) -> None:
        extend_path(paths)
        refuse_refs()  # inside of what the refs among arguments stand for
        loop = asyncio.get_running_loop()
        self._held = 0
        self._came_at = 0.0  # when the last call came
        self._idle = asyncio.Event()  # set when the last call that was held has been answered
        self._turns = Turns()
        self._over = asyncio.Event()  # set when the engine is gone
        connector = _OwnConnector(control_address, secret, tls, lambda: loop.call_soon_threadsafe(self._over.set))
        self._connector = connector
        # As an ingress is, it is waited for when routes change: a call made after that must follow them.
        try:
            request = Subscribe(ingress=True, worker_id=COURIER)
            self._client = Client.subscribe(
                engine_id, connector, control_address, request, owns_connector=True, carries=self._carries
            )
        except EngineClosed:
            if connector.returns(control_address):
                _leave_process(1)  # Ray starts an actor again that died, but never one whose constructor raised
            raise
        self._leaving = loop.create_task(self._leave_with_engine())

    async def carry(self, errand: bytes, lifted: Sequence[Any] = ()) -> Any:
        """Make a call.

        Args:
            errand: A packed `Errand`: Ray takes far longer for several arguments than for one of plain bytes.
            lifted: The refs among the call's arguments, waited for first.

        Raises:
            CarriedError: Whatever the call raised.
        """
        self._held += 1
        self._came_at = time.monotonic()
        self._idle.clear()
        try:
            source, number, endpoint, method, head, payload, shard_key, timeout_s, *more = pickle.loads(errand)
            *times, retries, priority = more
            deadline = self._deadline(*times)
            await self._turns.take(source, number)
            if lifted:
                payload = _filled(payload, await self._wait_for(lifted, endpoint, timeout_s, deadline))
            call = Call(0, PYTHON, method, deadline, "", head, payload, retries, priority)
            caller = self._client.loop_caller()
            answer = await answer_to(caller, endpoint, call, timeout_s, shard_key=shard_key)
        except EngineError as error:
            raise CarriedError(pack_exception(error)) from None
        finally:
            self._held -= 1
            if not self._held:
                self._idle.set()
        if type(answer) is Reply:
            return carried(answer.payload)
        raise CarriedError(answer.payload)  # a failure: only HTTP calls are answered by streams

    def _deadline(self, left_s: float | None, deadline: float | None, node_id: str) -> float | None:
        """When a call is over by the clock of this process: it may have waited for long in the actor's queue."""
        if left_s is None:
            return None
        longest = time.monotonic() + left_s
        return longest if deadline is None or node_id != self._connector.node_id() else min(longest, deadline)

    async def _wait_for(
        self, refs: Sequence[Any], endpoint: str, timeout_s: float | None, deadline: float | None
    ) -> list[Any]:
        """The results of refs, unless the call's time or the engine ends before."""
        results = asyncio.ensure_future(_results_of(refs))
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({results, over}, timeout=seconds_until(deadline), return_when=asyncio.FIRST_COMPLETED)
            if results.done():
                return results.result()
        finally:
            results.cancel()
            over.cancel()
        if timeout_s is not None and not self._over.is_set():
            raise deadline_error(endpoint, timeout_s)
        raise EngineClosed("the engine was shut down")

    async def statistics(self) -> dict[str, Any]:
        """What was counted of the calls of all processes: see `engine.calling.caller.Caller.statistics`."""
        return self._client.loop_caller().statistics()

    def _carries(self) -> bool:
        return self._held > 0 or time.monotonic() - self._came_at < _ON_ITS_WAY_S

    async def leave(self) -> None:
        """Return once the engine is gone and every call was answered, so that the actor can be killed."""
        await self._until_idle()

    async def _leave_with_engine(self) -> None:
        await self._until_idle()
        await asyncio.sleep(_LAST_ANSWERS_S)
        _leave_process(0)

    async def _until_idle(self) -> None:
        await self._over.wait()
        while self._held:
            await self._idle.wait()


class _OwnConnector(RayConnector):
    """The connector of a client that closes it with itself, and so when the engine is gone.

    Args:
        control_address: Where the controller is reached.
        secret: The engine's.
        tls: As that of `Courier`.
        closed: Told then, from any thread.
    """

    def __init__(self, control_address: str, secret: bytes, tls: TLS | None, closed: Callable[[], object]) -> None:
        super().__init__(control_address, secret, tls)
        self._tell_closed = closed

    def close(self) -> None:
        """See `engine.seam.connector.Connector.close`."""
        super().close()
        self._tell_closed()


async def _results_of(refs: Sequence[Any]) -> list[Any]:
    from ray.exceptions import RayError, RayTaskError

    try:
        return [await ref for ref in refs]
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise CarriedError(pack_exception(cause)) from None


def _filled(payload: bytes, results: list[Any]) -> bytes:
    try:
        return dumps(Filled(payload, results), "the argument")
    except NotSerializable:
        for result in results:
            dumps(result, "what a ref among the arguments stands for")  # says which part of it
        raise


def courier_name(engine_id: str) -> str:
    """What the engine's courier is called in `NAMESPACE`."""
    return f"engine-{engine_id}-courier"


def find_courier(engine_id: str, control_address: str, secret: bytes, tls: TLS | None) -> Any:
    """The engine's courier, started if it is not there yet; returns without waiting for it."""
    import ray

    return (
        ray.remote(Courier)
        .options(
            name=courier_name(engine_id),
            namespace=NAMESPACE,
            get_if_exists=True,
            # Whoever happens to make the first call must not take it along when it leaves: it leaves with the engine.
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=_MAX_CALLS,
            num_cpus=0,
        )
        .remote(engine_id, control_address, secret, Surroundings.here().sys_path, tls)
    )


def end_courier(engine_id: str) -> None:
    """End the engine's courier, if there is one, once it has answered all calls. Blocks for a while."""
    import ray

    try:
        courier = ray.get_actor(courier_name(engine_id), namespace=NAMESPACE)
    except ValueError:
        return
    with contextlib.suppress(Exception):  # it is gone, or takes too long: either way it has to go
        ray.get(courier.leave.remote(), timeout=_LEAVE_WITHIN_S)
    kill_actor(courier)
