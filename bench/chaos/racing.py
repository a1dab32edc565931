"""Calls of every kind that race faults and changes of one engine, and an account of what they all came to.

A `Race` starts things and waits for none of them, so that they meet in any order; `settle` then waits for all and says
what was not as promised. What a call may come to depends on what happened while it was on its way: a replica's death
excuses `ReplicaDied` only of calls that had begun, and nothing excuses a second answer, a wrong one, or none.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from engine import Engine, accept_batch, errors
from engine.testing.instruments import descendants, eventually

from .traffic import Marks, ready_pids

__all__ = ["BACKENDS", "ENDPOINTS", "EXTRA", "WAYS", "Race"]

BACKENDS: Final = ("plain", "loop", "batch")
ENDPOINTS: Final = {"one": "plain", "two": "loop", "many": "batch"}
EXTRA: Final = "extra"
WAYS: Final = ("call", "remote", "async", "http", "stream")
DEEDS: Final = ("echo", "nap", "raise", "exit")
PATIENCE_S = 30.0
"""So long everything may take to end, once nothing happens any more."""
_NAP_S = 0.03
_EARLY_S = 0.02
_PARTS = 5


class Asked(ValueError):
    """What a backend raises when it is asked to."""


class Plain:
    """Does what a call asks for, and tells who did it."""

    def __init__(self, marks: str, tag: str, version: int, starts: bool) -> None:
        if not starts:
            raise Asked("this version does not start")
        self._marks = Marks(Path(marks))
        self._who = f"{tag} {version}"

    def __call__(self, request: Any) -> Any:
        number, deed = self._begin(request)
        if deed == "nap":
            time.sleep(_NAP_S)
        if deed == "stream":
            return self._parts(number)
        return f"{number} {self._who}"

    def _begin(self, request: Any) -> tuple[str, str]:
        number, deed = str(request.query_params["n"]), request.query_params["do"]
        self._marks.begin(int(number))
        if deed == "raise":
            raise Asked(number)
        if deed == "exit":
            os._exit(3)
        return number, deed

    def _parts(self, number: str) -> Any:
        for _ in range(_PARTS):
            time.sleep(_NAP_S / _PARTS)
            yield f"{number} {self._who};"


class Loop(Plain):
    """The same on an event loop."""

    async def __call__(self, request: Any) -> Any:  # type: ignore[override]
        number, deed = self._begin(request)
        if deed == "nap":
            await asyncio.sleep(_NAP_S)
        if deed == "stream":
            return self._async_parts(number)
        return f"{number} {self._who}"

    async def _async_parts(self, number: str) -> Any:
        for _ in range(_PARTS):
            await asyncio.sleep(_NAP_S / _PARTS)
            yield f"{number} {self._who};"


class Batch(Plain):
    """The same for several calls at once."""

    @accept_batch
    def __call__(self, requests: list[Any]) -> Any:
        begun = [self._begin(request) for request in requests]
        if any(deed == "nap" for _, deed in begun):
            time.sleep(_NAP_S)
        return [f"{number} {self._who}" for number, _ in begun]


_KINDS: Final[dict[str, type[Plain]]] = {"plain": Plain, "loop": Loop, "batch": Batch, EXTRA: Plain}
_CONFIG: Final[dict[str, dict[str, Any]]] = {
    "plain": {"num_replicas": 2, "max_queued_requests": None, "cancel_grace_s": 5.0},
    "loop": {"num_replicas": 1, "max_queued_requests": None, "max_concurrent_queries": 4},
    "batch": {"num_replicas": 1, "max_queued_requests": None, "max_batch_size": 4, "batch_wait_timeout": 0.005},
    EXTRA: {"num_replicas": 1, "max_queued_requests": None},
}


@dataclass
class Call:
    """One call, and what came of it."""

    number: int
    way: str
    endpoint: str
    deed: str
    timeout_s: float | None
    repeatable: bool
    floors: dict[str, int]
    began_at: float = field(default_factory=time.monotonic)
    ended_at: float = 0.0
    cancelled: bool = False
    answers: list[Any] = field(default_factory=list)
    cancel: Callable[[], object] | None = None
    future: Future[Any] | None = None

    def __str__(self) -> str:
        return f"call {self.number} ({self.way} of {self.deed} to {self.endpoint}, timeout {self.timeout_s})"


@dataclass
class Gap:
    """From when to when an endpoint may not be there."""

    endpoint: str
    since: float = field(default_factory=time.monotonic)
    until: float = math.inf


@dataclass
class Lane:
    """Changes that follow each other: of one backend, or of the endpoints."""

    running: Future[None] | None = None

    def start(self, pool: ThreadPoolExecutor, change: Callable[[], None]) -> None:
        """Start a change once the former one is done."""
        self.finish()
        self.running = pool.submit(change)

    def finish(self) -> None:
        """Wait for the change that goes on.

        Raises:
            BaseException: What it raised, unless that was expected.
        """
        running, self.running = self.running, None
        if running is not None:
            running.result(4 * PATIENCE_S)


class Race:
    """Backends of an engine, and everything that happens to them.

    Args:
        engine: Runs them. It has an HTTP server.
        directory: For a file, where backends note which calls have begun.
        processes: Whether replicas are processes, which can die.
        own_refs: Whether refs can be cancelled.
    """

    def __init__(self, engine: Engine, directory: Path, *, processes: bool, own_refs: bool) -> None:
        self._engine = engine
        self._processes = processes
        self._own_refs = own_refs
        self._path = directory / f"marks-{os.urandom(4).hex()}"
        self._marks = Marks(self._path)
        self._numbers = itertools.count()
        self._versions = itertools.count(1)
        self._pool = ThreadPoolExecutor(24, thread_name_prefix="racing-call")
        self._control = ThreadPoolExecutor(4, thread_name_prefix="racing-control")
        self._lanes = {name: Lane() for name in (*BACKENDS, EXTRA, "endpoints")}
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._loop.run_forever, name="racing-loop")
        self._loop_thread.start()
        self.calls: list[Call] = []
        self.wanted = {tag: _CONFIG[tag]["num_replicas"] for tag in BACKENDS}
        self._floors: dict[str, int] = dict.fromkeys((*BACKENDS, EXTRA), 0)
        self._deaths: list[tuple[float, str]] = []  # when, and of which backend a replica may have died
        self._gaps: list[Gap] = []
        self._stopped: set[int] = set()
        self._has_extra = False
        for tag in BACKENDS:
            engine.create_backend(tag, _KINDS[tag], str(self._path), tag, 0, True, config=_CONFIG[tag])
        for name, tag in ENDPOINTS.items():
            engine.create_endpoint(name, backend=tag, route=f"/{name}", methods=["GET", "POST"])

    # -- calls ---------------------------------------------------------------------------------------------------------

    def call(self, way: str, endpoint: str, deed: str, timeout_s: float | None, *, repeatable: bool = False) -> None:
        """Begin a call. What a batch cannot do without harm to others, or the way not at all, is an echo instead."""
        if way == "stream":
            deed = "stream" if endpoint != "many" else "echo"
        if (deed == "exit" and not self._processes) or (deed in ("raise", "exit") and endpoint == "many"):
            deed = "echo"
        if endpoint == EXTRA and not self._has_extra:
            endpoint = "one"
        number = next(self._numbers)
        if deed == "exit":
            self._deaths.append((time.monotonic(), ENDPOINTS.get(endpoint, endpoint)))
        call = Call(number, way, endpoint, deed, timeout_s, repeatable, dict(self._floors))
        self.calls.append(call)
        {"call": self._by_call, "remote": self._by_ref, "async": self._by_task}.get(way, self._over_http)(call)

    def _handle(self, call: Call, *, sync: bool = True) -> Any:
        handle: Any = self._engine.get_handle(call.endpoint, sync=sync)
        return handle.options(timeout_s=call.timeout_s, idempotent=True if call.repeatable else None)

    def _enter(self, call: Call, answer: Any) -> None:
        call.ended_at = time.monotonic()
        call.answers.append(answer)

    def _by_call(self, call: Call) -> None:
        def make() -> None:
            try:
                answer = self._handle(call).call(n=call.number, do=call.deed)
            except BaseException as error:
                answer = error
            self._enter(call, answer)

        call.future = self._pool.submit(make)

    def _by_ref(self, call: Call) -> None:
        try:
            ref = self._handle(call).remote(n=call.number, do=call.deed)
        except BaseException as error:
            self._enter(call, error)
            return
        if self._own_refs:
            call.cancel = ref.cancel

        def wait() -> None:
            try:
                answer = self._engine.get(ref)
            except BaseException as error:
                answer = error
            self._enter(call, answer)

        call.future = self._pool.submit(wait)

    def _by_task(self, call: Call) -> None:
        async def make() -> None:
            try:
                answer = await self._handle(call, sync=False).call(n=call.number, do=call.deed)
            except asyncio.CancelledError as error:
                self._enter(call, error)
                raise
            except BaseException as error:
                answer = error
            self._enter(call, answer)

        call.future = asyncio.run_coroutine_threadsafe(make(), self._loop)
        call.cancel = call.future.cancel

    def _over_http(self, call: Call) -> None:
        def make() -> None:
            connection = http.client.HTTPConnection(
                str(self._engine.http_url).removeprefix("http://"), timeout=2 * PATIENCE_S
            )
            headers = {} if call.timeout_s is None else {"x-request-timeout-ms": str(int(call.timeout_s * 1000))}
            try:
                path = f"/{call.endpoint}?n={call.number}&do={call.deed}"
                connection.request("POST", path, headers=headers)
                response = connection.getresponse()
                text = response.read().decode()
                answer: Any = text if response.status == 200 else response.status
            except (OSError, http.client.HTTPException) as error:
                answer = error
            finally:
                connection.close()
            self._enter(call, answer)

        call.future = self._pool.submit(make)

    def cancel(self, pick: int) -> None:
        """Give up one of the last calls that can be given up."""
        living = [call for call in self.calls[-30:] if call.cancel is not None and not call.answers]
        if living:
            call = living[pick % len(living)]
            assert call.cancel is not None
            call.cancelled = True
            call.cancel()

    # -- faults --------------------------------------------------------------------------------------------------------

    def kill(self, pick: int, *, stop: bool = False) -> None:
        """Kill a replica that is ready (SIGKILL), or stop it until `go_on` (SIGSTOP)."""
        if not self._processes:
            return
        tag = BACKENDS[pick % len(BACKENDS)]
        pids = sorted(ready_pids(self._engine, tag).values())
        if pids:
            self._deaths.append((time.monotonic(), tag))
            pid = pids[pick // len(BACKENDS) % len(pids)]
            try:
                os.kill(pid, signal.SIGSTOP if stop else signal.SIGKILL)
            except ProcessLookupError:
                return
            if stop:
                self._stopped.add(pid)

    def go_on(self) -> None:
        """Let what was stopped go on."""
        for pid in self._stopped & descendants():
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass
        self._stopped.clear()

    # -- changes -------------------------------------------------------------------------------------------------------

    def scale(self, tag: str, replicas: int) -> None:
        """Change how many replicas a backend has."""
        self._change(tag, lambda: self._engine.update_backend_config(tag, {"num_replicas": replicas}))
        self.wanted[tag] = replicas

    def update(self, tag: str, *, starts: bool) -> None:
        """Give a backend a new version, which may fail to start."""
        version = next(self._versions)

        def update() -> None:
            try:
                self._engine.update_backend(tag, _KINDS[tag], str(self._path), tag, version, starts)
            except Asked:
                assert not starts, "a version that starts was said not to"
            else:
                assert starts, "a version that does not start was said to"
                self._floors[tag] = version

        self._change(tag, update)

    def _change(self, tag: str, change: Callable[[], None]) -> None:
        began_at = time.monotonic()

        def go() -> None:
            try:
                change()
            except errors.BackendStartError:
                if not self._may_have_died(tag, began_at, time.monotonic()):
                    raise

        self._lanes[tag].start(self._control, go)

    def traffic(self, share: float) -> None:
        """Send a share of what goes to the plain backend to the one on a loop."""
        weights = {"plain": 1.0 - share, "loop": share} if share else {"plain": 1.0}
        self._lanes["endpoints"].start(self._control, lambda: self._engine.set_traffic("one", weights))

    def recreate(self, name: str) -> None:
        """Delete an endpoint, and create it again."""

        def go() -> None:
            gap = Gap(name)
            self._gaps.append(gap)
            self._engine.delete_endpoint(name)
            self._engine.create_endpoint(name, backend=ENDPOINTS[name], route=f"/{name}", methods=["GET", "POST"])
            gap.until = time.monotonic()

        self._lanes["endpoints"].start(self._control, go)

    def toggle_extra(self, *, force: bool) -> None:
        """Create one more backend with its endpoint, or delete both."""
        self._lanes[EXTRA].finish()
        if not self._has_extra:
            version = next(self._versions)
            self._engine.create_backend(
                EXTRA, _KINDS[EXTRA], str(self._path), EXTRA, version, True, config=_CONFIG[EXTRA]
            )
            self._engine.create_endpoint(EXTRA, backend=EXTRA, route=f"/{EXTRA}", methods=["GET", "POST"])
            self._has_extra = True
            return
        self._has_extra = False
        self._gaps.append(Gap(EXTRA))
        if force:
            self._deaths.append((time.monotonic(), EXTRA))

        def go() -> None:
            self._engine.delete_endpoint(EXTRA)
            self._engine.delete_backend(EXTRA, force=force)

        self._lanes[EXTRA].start(self._control, go)

    # -- the end -------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let everything come to its end, delete all, and look.

        Raises:
            AssertionError: Something was not as promised.
        """
        self.go_on()
        try:
            for lane in self._lanes.values():
                lane.finish()
            for call in self.calls:
                if call.future is not None:
                    try:
                        call.future.result(PATIENCE_S)
                    except (CancelledError, asyncio.CancelledError):
                        pass
                    except TimeoutError:
                        raise AssertionError(f"{call} has no answer; begun: {self._marks.begun(call.number)}") from None
            wrong = [f"{call}: {problem}" for call in self.calls if (problem := self._problem(call))]
            assert not wrong, "\n".join(wrong)
            assert len(self._died_unbegun()) <= len(self._deaths), "\n".join(map(str, self._died_unbegun()))
            eventually(self._rests, PATIENCE_S)
        finally:
            self._clear()

    def _died_unbegun(self) -> list[Call]:
        """Calls that died with their replica, and of which user code knows nothing.

        Of each replica it may be one: a death may come after a call was noted as begun, and before user code has it.
        """
        return [
            call
            for call in self.calls
            if not self._marks.begun(call.number)
            and any(answer == 502 or isinstance(answer, errors.ReplicaDied) for answer in call.answers)
        ]

    def _rests(self) -> bool:
        backends = self._engine.statistics()["backends"]
        return all(
            not (backends[tag]["in_flight"] or backends[tag]["queued"])
            and list(backends[tag]["replicas"].values()) == ["ready"] * self.wanted[tag]
            for tag in BACKENDS
        )

    def _clear(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._control.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join(PATIENCE_S)
        self._loop.close()
        self._marks.close()
        for name in self._engine.list_endpoints():
            self._engine.delete_endpoint(name)
        for tag in self._engine.list_backends():
            self._engine.delete_backend(tag, force=True)
        self._path.unlink()

    def _may_have_died(self, tag: str, since: float, until: float) -> bool:
        """Whether a replica of a backend may have died then. One that was stopped before may be ended later."""
        return any(dead == tag and at <= until for at, dead in self._deaths if at > since - 2 * PATIENCE_S) or any(
            call.deed == "exit" and call.began_at <= until and (not call.answers or call.ended_at >= since)
            for call in self.calls
        )

    def _problem(self, call: Call) -> str:
        """What is wrong with what a call came to; empty if nothing is."""
        if call.cancelled and not call.answers:
            return ""  # its task was cancelled before it began
        if len(call.answers) != 1:
            return f"it has {len(call.answers)} answers: {call.answers}"
        (answer,) = call.answers
        begun = self._marks.begun(call.number)
        if begun > (3 if call.repeatable else 1):
            return f"it ran {begun} times"
        if isinstance(answer, str):
            return self._wrong_text(call, answer)
        tags = {"one": ("plain", "loop")}.get(call.endpoint, (ENDPOINTS.get(call.endpoint, call.endpoint),))
        died = call.deed == "exit" or any(self._may_have_died(tag, call.began_at, call.ended_at) for tag in tags)
        gone = any(
            gap.endpoint == call.endpoint and gap.since <= call.ended_at and gap.until >= call.began_at
            for gap in self._gaps
        )
        late = call.timeout_s is not None
        over = late and call.ended_at - call.began_at >= (call.timeout_s or 0.0) - _EARLY_S
        allowed: dict[Any, bool] = {
            Asked: call.deed == "raise",
            500: call.deed == "raise" or (call.way == "stream" and died),
            errors.ReplicaDied: died,
            502: died,
            errors.DeadlineExceeded: over,
            504: over,
            errors.Overloaded: late,
            503: late,
            errors.EndpointNotFound: gone,
            404: gone,
            errors.Cancelled: call.cancelled,
            CancelledError: call.cancelled,
            asyncio.CancelledError: call.cancelled,
            http.client.IncompleteRead: call.deed == "stream" and begun > 0 and (died or late),
            ConnectionResetError: call.deed == "stream" and begun > 0 and (died or late),
        }
        kind = answer if isinstance(answer, int) else type(answer)
        if not allowed.get(kind):
            return f"it came to {answer!r}, which nothing excuses; begun: {begun}, died: {died}, gone: {gone}"
        return ""

    def _wrong_text(self, call: Call, text: str) -> str:
        parts = text.split(";")[:-1] if call.deed == "stream" else [text]
        number, tag, version = parts[0].split()
        complete = len(parts) == (_PARTS if call.deed == "stream" else 1) and len(set(parts)) == 1
        if int(number) != call.number or not complete or call.deed in ("raise", "exit"):
            return f"it was answered {text!r}"
        if int(version) < call.floors[tag]:
            return f"it was answered by version {version} of {tag}, though {call.floors[tag]} ruled before it was made"
        return ""
