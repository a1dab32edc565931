"""The workers of one engine: their lives, from start to exit, as the controller sees them.

Everything here runs on the controller's loop. A worker's life is one of `Life`, and `_MOVES` says which follows which.
"""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections.abc import Callable
from typing import Any

from ..errors import BackendStartError, EngineClosed, EngineError, ResourcesUnavailable
from ..seam.adapter import Adapter, FindsPlaces, done_by
from ..seam.control_messages import (
    Answered,
    Drain,
    Drained,
    LogLine,
    Ready,
    Reconfigure,
    Reconfigured,
    Started,
    StartFailed,
    Unhealthy,
)
from ..seam.detached import KeepsState
from ..seam.log import Log
from ..seam.serialization import unpack_exception
from ..seam.worker import WorkerExit, WorkerSpec
from .last_words import LastWords
from .pulse import PulseWatch

__all__ = ["Life", "Worker", "Workers"]

_logger = Log("engine.controller")
_EXIT_MARGIN_S = 0.5
"""What a worker gets on top of its drain time to leave by itself, before it is killed."""


class Life(enum.Enum):
    """The stages of a worker."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


_MOVES = {
    Life.STARTING: {Life.READY, Life.DRAINING, Life.GONE},
    Life.READY: {Life.DRAINING, Life.GONE},
    Life.DRAINING: {Life.GONE},
    Life.GONE: set[Life](),
}


class Worker:
    """One worker.

    Attributes:
        watched: The adapter has taken it, and would report its death.
        ready: Set once it is ready, or it is certain that it never will be.
        gone: Set once it has exited.
        error: Why it did not become ready.
        since: When it came to this stage of its life, in monotonic seconds.
        pid: Its process, once it has told.
        exit_reason: How it ended, as a phrase for people.
        last_words: The last lines of its standard error, as far as the adapter passes them on.
        fault: For what it was ended, as a phrase for people; empty if it was not, or not for a fault of its own.
        answered: It said that it has answered a call.
        drained: It said that it holds no call any more.
        version: Of what it runs, if it is a replica.
        complaint: What it said of itself before it was in service, and nobody has heeded yet.
    """

    def __init__(self, spec: WorkerSpec, version: int = 1) -> None:
        self.spec = spec
        self.version = version
        self.life = Life.STARTING
        self.watched = False
        self.address = ""
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.error: BaseException | None = None
        self.exit_reason = ""
        self.fault = ""
        self.ready_at = 0.0
        self.since = time.monotonic()
        self.pid: int | None = None
        self.answered = False
        self.drained = False
        self.complaint: Unhealthy | None = None
        self.last_words = LastWords()
        self.replies: dict[int, asyncio.Future[Reconfigured]] = {}

    def __repr__(self) -> str:
        return f"<Worker {self.spec.name} {self.life.value}>"

    def move(self, life: Life) -> None:
        """Enter the next stage.

        Raises:
            RuntimeError: No worker can go from its stage to this one.
        """
        if life not in _MOVES[self.life]:
            raise RuntimeError(f"{self.spec.name} cannot go from {self.life.value} to {life.value}")
        self.life = life
        self.since = time.monotonic()

    def describe(self) -> dict[str, Any]:
        """The ``state`` it is in, since when (``since_s``, seconds) and as which process (``pid``, None if unknown)."""
        return {"state": self.life.value, "since_s": time.monotonic() - self.since, "pid": self.pid}


class Workers:
    """Starts, watches, drains and kills workers. The controller passes on to it what the adapter says of them.

    Args:
        adapter: Runs them.
        on_exit: Called with a worker that was ready and exited without being asked to.
        on_unhealthy: Called with a worker that asks to be replaced, and what it says; returns whether it is in service.
            If it is not yet, it is ended if it hangs, and otherwise asks again as its ``complaint``.
        patience: Says for how many seconds a worker may run no Python code, given the worker.
    """

    def __init__(
        self,
        adapter: Adapter,
        on_exit: Callable[[Worker], None],
        on_unhealthy: Callable[[Worker, Unhealthy], bool] = lambda worker, told: True,
        patience: Callable[[Worker], float] = lambda worker: math.inf,
    ) -> None:
        self._adapter = adapter
        self._on_exit = on_exit
        self._on_unhealthy = on_unhealthy
        self._by_id: dict[str, Worker] = {}
        self._tokens = 0
        self._closed = False
        self._patience = patience
        self._pulses = PulseWatch(adapter, self.end_useless, self._name, patience=self._patience_with)

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, worker_id: str) -> Worker | None:
        """A worker that has not exited."""
        return self._by_id.get(worker_id)

    async def start(self, spec: WorkerSpec, timeout_s: float, version: int = 1) -> Worker:
        """Start a worker and wait until it is ready. If it does not become ready, nothing of it is left.

        Raises:
            errors.BackendStartError: It died, or outlasted ``timeout_s``.
            errors.ResourcesUnavailable: What it needs is not free, or was not for ``timeout_s``.
            BaseException: What its constructor raised.
        """
        if self._closed:
            raise _closed_error()
        worker = self._by_id[spec.worker_id] = Worker(spec, version)
        try:
            await done_by(self._adapter, "start_worker", spec)
        except BaseException:
            del self._by_id[spec.worker_id]
            raise
        worker.watched = True
        if self._closed or worker.error is not None:  # meanwhile
            await self.kill(worker)
            raise worker.error or _closed_error()
        try:
            await asyncio.wait_for(worker.ready.wait(), timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            unplaced = self._adapter.unplaced(spec.worker_id) if isinstance(self._adapter, FindsPlaces) else None
            await self.kill(worker)
            # an ingress has no such setting
            within = f"within start_timeout_s={timeout_s:g}" if spec.listen is None else f"within {timeout_s:g} s"
            if unplaced is not None:
                raise ResourcesUnavailable(f"{spec.name} found no place {within}: {unplaced}") from None
            raise BackendStartError(
                f"{spec.name} was not ready {within}; it was killed{worker.last_words.told()}"
            ) from None
        except BaseException:
            await self.kill(worker)
            raise
        if worker.error is not None:
            await self.kill(worker)
            raise worker.error
        if worker.life is Life.GONE:
            raise BackendStartError(
                f"{spec.name} {worker.exit_reason} as soon as it was ready{worker.last_words.told()}"
            )
        return worker

    async def adopt(self, spec: WorkerSpec, version: int = 1) -> Worker:
        """Take over a worker of a former controller; returns it once it has come back, or is certain not to."""
        worker = self._by_id[spec.worker_id] = Worker(spec, version)
        worker.watched = True
        assert isinstance(self._adapter, KeepsState)  # as whoever knows of former workers does
        await done_by(self._adapter, "adopt_worker", spec)
        await worker.ready.wait()
        return worker

    async def close(self) -> None:
        """Start no more workers, and kill those that are not ready yet: whoever waits for one is told why."""
        self._closed = True
        starting = [worker for worker in self._by_id.values() if worker.watched and worker.life is Life.STARTING]
        for worker in starting:
            worker.error = worker.error or _closed_error()
        await asyncio.gather(*[self.kill(worker) for worker in starting])

    def release(self) -> None:
        """Ask no worker any more whether it is there (idempotent)."""
        self._pulses.close()

    def end_useless(self, worker_id: str, why: str) -> None:
        """End a worker that does not answer, or hangs, as if it had died. Told again, it tries again."""
        worker = self._by_id.get(worker_id)
        if worker is not None:
            worker.fault = why
            self._adapter.kill_worker(worker_id)

    def _patience_with(self, worker_id: str) -> float:
        worker = self._by_id.get(worker_id)
        if worker is None or worker.replies:  # what takes a configuration has a limit of its own
            return math.inf
        return self._patience(worker)

    def hurry(self) -> None:
        """Kill all workers, also those that are finishing what they hold. Does not wait for their ends."""
        for worker in self._by_id.values():
            if worker.watched:
                self._adapter.kill_worker(worker.spec.worker_id)

    async def drain(self, worker: Worker, timeout_s: float, *, others: bool = False) -> None:
        """Let a worker finish what it holds and leave; kill it if it takes longer than ``timeout_s`` seconds.

        Args:
            worker: The worker.
            timeout_s: Seconds.
            others: There are others, or will be, to take what it has not begun.
        """
        if not timeout_s:
            await self.kill(worker)
        elif worker.life is not Life.GONE:
            if worker.life is not Life.DRAINING:
                worker.move(Life.DRAINING)
            self._adapter.tell(worker.spec.worker_id, Drain(timeout_s, others))
            try:
                await asyncio.wait_for(worker.gone.wait(), timeout_s + _EXIT_MARGIN_S)
            except (asyncio.TimeoutError, TimeoutError):
                what = "its close(), exit functions or threads keep it" if worker.drained else "its calls fail"
                _logger.warning("%s did not finish within %g s and is killed; %s", worker.spec.name, timeout_s, what)
                await self.kill(worker)

    async def kill(self, worker: Worker) -> None:
        """End a worker at once and wait until it is gone."""
        if worker.life is not Life.GONE:
            if worker.life is not Life.DRAINING:
                worker.move(Life.DRAINING)
            self._adapter.kill_worker(worker.spec.worker_id)
            await worker.gone.wait()

    async def reconfigure(self, worker: Worker, config: bytes, timeout_s: float, *, user_config_changed: bool) -> bool:
        """Pass a configuration to a replica and wait until it has taken it.

        Returns:
            Whether it has, within ``timeout_s`` seconds.

        Raises:
            BaseException: What the backend's ``reconfigure`` raised.
        """
        if worker.life is Life.GONE:  # it died since the caller looked: nobody would ever answer
            raise EngineError(f"{worker.spec.name} {worker.exit_reason}")
        self._tokens += 1
        token = self._tokens
        reply = worker.replies[token] = asyncio.get_running_loop().create_future()
        try:
            self._adapter.tell(worker.spec.worker_id, Reconfigure(token, config, user_config_changed))
            answer = await asyncio.wait_for(reply, timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            return False
        finally:
            worker.replies.pop(token, None)
        if answer.error is not None:
            raise unpack_exception(answer.error)
        return True

    # -- what the adapter says ---------------------------------------------------------------------------------------

    def worker_said(self, worker_id: str, body: Any) -> None:
        """See `engine.seam.adapter.AdapterEvents.worker_said`."""
        worker = self._by_id.get(worker_id)
        if worker is None:
            return
        if isinstance(body, LogLine):
            self._log(worker, body)  # which may have been in a pipe for long
            return
        # Whatever it says, it is there. One that has come back on another channel was asked on the former.
        self._pulses.answered(worker_id)
        if isinstance(body, Ready):
            if worker.life is Life.STARTING:
                worker.move(Life.READY)
                worker.address = body.address
                worker.ready_at = time.monotonic()
                worker.ready.set()
                self._pulses.add(worker_id)
        elif isinstance(body, Answered):
            worker.answered = True
        elif isinstance(body, Drained):
            worker.drained = True
        elif isinstance(body, Started):
            worker.pid = body.pid
        elif isinstance(body, Unhealthy):
            if worker.life is Life.READY and not self._on_unhealthy(worker, body):
                if body.hung:
                    self.end_useless(worker_id, body.reason)
                else:
                    worker.complaint = body
        elif isinstance(body, StartFailed):
            worker.error = unpack_exception(body.error)
            worker.ready.set()
        elif isinstance(body, Reconfigured):
            reply = worker.replies.get(body.token)
            if reply is not None and not reply.done():
                reply.set_result(body)

    def worker_exited(self, exit: WorkerExit) -> None:
        """See `engine.seam.adapter.AdapterEvents.worker_exited`."""
        worker = self._by_id.pop(exit.worker_id, None)
        if worker is None:
            return
        self._pulses.remove(exit.worker_id)
        before = worker.life
        worker.move(Life.GONE)
        worker.exit_reason = reason = f"{worker.fault} and was killed" if worker.fault else exit.reason
        if before is Life.STARTING and worker.error is None:
            worker.error = BackendStartError(
                f"{worker.spec.name} ended before it was ready: it {reason}{worker.last_words.told()}"
            )
        worker.ready.set()
        worker.gone.set()
        for reply in worker.replies.values():
            if not reply.done():
                reply.set_exception(EngineError(f"{worker.spec.name} {reason}"))
        if before is Life.READY:
            self._on_exit(worker)

    def _name(self, worker_id: str) -> str:
        worker = self._by_id.get(worker_id)
        return worker_id if worker is None else worker.spec.name

    def _log(self, worker: Worker, line: LogLine) -> None:
        if line.logger == "stderr":
            worker.last_words.add(line.text)
        Log(f"engine.{worker.spec.name}").log(line.level, "%s", line.text, extra={"worker_logger": line.logger})


def _closed_error() -> EngineClosed:
    return EngineClosed("the engine was shut down")
