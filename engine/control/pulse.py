"""Whether workers answer: one timer asks all of them, and whoever is silent is looked at from outside.

Silence alone proves little. A replica answers on a thread of its own, also while user code runs; but native code that
does not release Python's lock keeps that thread from it, for as long as it takes, and works all the same. So a worker
that is silent is ended on evidence only: its process is stopped, or does nothing at all. The adapter sees that
(`engine.seam.adapter.SeesProcesses`); where it cannot, a silent worker is left alone. But what it runs may have a limit
(``max_call_s``, ``stuck_after_s``), which native code keeps it from seeing to itself: then its silence is enough,
but for the time in which its process would run and may not: on a busy machine, or while it is read back from a disk.
An ingress answers on its event loop, which it shares with middlewares, and has such a limit, too. A
machine that is gone is found by the adapter itself, whose connections to it break.

Only the time counts in which this process was running: if it was stopped itself, or asleep with the whole machine, or
if its loop was held up, that was not the workers' silence.

Everything here runs on the controller's loop. `Pulse` decides and does nothing; `PulseWatch` asks, looks and tells.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from ..seam.adapter import Adapter, SeesProcesses, Vitals
from ..seam.control_messages import Ping
from ..seam.log import Log

__all__ = ["Pulse", "PulseWatch"]

_logger = Log("engine.controller")

PERIOD_S = 0.8
"""Between two questions. With `STOPPED_S`, a process that is stopped has ended less than 5 s later."""
STOPPED_S = 4.0
"""For so long a process may be stopped: debuggers and tools that look at memory stop one, too, but for less."""
FROZEN_S = 60.0
"""For so long a process may do nothing: it may wait for another machine and keep Python's lock meanwhile."""
_LEAST_WORK = 0.05
"""Of one CPU: a process whose Python does nothing uses less, also if libraries have threads of their own in it."""
_FIRST_LOOK_S = 2.4
_LOOK_AGAIN = 1.5
_LOOK_WITHIN_S = 10.0


class Pulse:
    """Whether one worker answers.

    Attributes:
        silent_s: For how many seconds it owes an answer.
        looking: Somebody looks at its process.
    """

    def __init__(self) -> None:
        self.silent_s = 0.0
        self.looking = False
        self._asked = False
        self._look_at_s = 0.0  # silent for so long, it is to be looked at
        self._first: tuple[float, float] | None = None  # its silence and its CPU time at the first look
        self._last: tuple[float, float] | None = None  # the same at the last one
        self._judged_s = 0.0  # until then in its silence it is known how long it was held up
        self._excused_s = 0.0  # so long
        self._mentioned = False

    def __repr__(self) -> str:
        return f"<Pulse {'asked' if self._asked else 'answered'} silent_s={self.silent_s:g}>"

    def ask(self) -> bool:
        """Whether to ask it now: one question at a time, so that none pile up."""
        if self._asked:
            return False
        self._asked = True
        self.silent_s = 0.0
        self._look_at_s = min(_FIRST_LOOK_S, STOPPED_S)
        self._first = None
        self._last = None
        self._judged_s = self._excused_s = 0.0
        return True

    def answered(self) -> None:
        """It answers."""
        self._asked = False
        self.silent_s = 0.0

    def passed(self, seconds: float, patience_s: float = math.inf) -> bool:
        """So much time has passed here; returns whether the worker is to be looked at now.

        Args:
            seconds: How much.
            patience_s: For how long it may be silent, whatever it does.
        """
        if not self._asked:
            return False
        self.silent_s = round(self.silent_s + seconds, 3)  # timers are not exact
        if self.silent_s < self._look_at_s or self.looking:
            return False
        again = self._look_at_s * _LOOK_AGAIN
        limits = STOPPED_S, FROZEN_S, max(patience_s, STOPPED_S)
        self._look_at_s = min([again, *(limit for limit in limits if limit > self._look_at_s)])
        return True

    def verdict(self, vitals: Vitals | None, patience_s: float = math.inf) -> str:
        """Why it must be ended, as far as a look at its process tells; empty if it need not."""
        if not self._asked:
            return ""
        if vitals is not None:
            if vitals.ended:
                return self._silence("its process has ended")
            self._excuse(vitals)
        if vitals is None or not vitals.stopped:
            if self.silent_s - self._excused_s >= max(patience_s, STOPPED_S):
                return self._silence(
                    "no Python runs in its process, or its event loop does not turn; nothing may take so long there"
                )
        if vitals is None:
            return ""
        if vitals.stopped:
            return self._silence("its process is stopped") if self.silent_s >= STOPPED_S else ""
        if self._first is None:
            self._first = self.silent_s, vitals.cpu_s
        since_s, cpu_s = self._first
        worked = vitals.cpu_s - cpu_s >= _LEAST_WORK * (self.silent_s - since_s)
        return self._silence("its process does nothing") if self.silent_s >= FROZEN_S and not worked else ""

    def _excuse(self, vitals: Vitals) -> None:
        """Do not count the time in which it was held up: then it wants a CPU, and uses less than it could."""
        last, self._last = self._last, (self.silent_s, vitals.cpu_s)
        if last is None:
            return
        since_s, cpu_s = last
        idle = 1.0 - min(1.0, (vitals.cpu_s - cpu_s) / max(self.silent_s - since_s, 0.001))
        if vitals.held_up:
            self._excused_s += idle * (self.silent_s - self._judged_s)
        self._judged_s = self.silent_s

    def mention(self) -> bool:
        """Whether people are to be told, for the first time, that it works without answering."""
        new = not self._mentioned and self._asked and self.silent_s >= STOPPED_S
        self._mentioned = self._mentioned or new
        return new

    def _silence(self, why: str) -> str:
        return f"has not answered for {self.silent_s:.0f} s ({why})"


class PulseWatch:
    """Asks the workers of one engine whether they are there. While there are none, it does nothing.

    Args:
        adapter: Runs them.
        end: Ends a worker, given its id and, in words for people, what it does not do.
        name: What people call a worker, given its id.
        patience: For how many seconds a worker may be silent, given its id, whatever it does.
        clock: Seconds that pass while this machine is awake.
    """

    def __init__(
        self,
        adapter: Adapter,
        end: Callable[[str, str], None],
        name: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
        patience: Callable[[str], float] = lambda worker_id: math.inf,
    ) -> None:
        self._adapter = adapter
        self._end = end
        self._name = name
        self._clock = clock
        self._patience = patience
        self._pulses: dict[str, Pulse] = {}
        self._looks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0  # when it last came by
        self._rounds = 0

    def add(self, worker_id: str) -> None:
        """A worker is ready. One that shares this process could only be silent together with whoever asks."""
        if self._adapter.shares_process:
            return
        self._pulses[worker_id] = Pulse()
        if self._timer is None:
            self._last = self._clock()
            self._wait()

    def answered(self, worker_id: str) -> None:
        """A worker answers."""
        pulse = self._pulses.get(worker_id)
        if pulse is not None:
            pulse.answered()

    def remove(self, worker_id: str) -> None:
        """A worker is gone."""
        self._pulses.pop(worker_id, None)
        if not self._pulses:
            self.close()

    def close(self) -> None:
        """Ask nobody any more (idempotent)."""
        self._pulses.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for look in self._looks:
            look.cancel()

    def tick(self) -> None:
        """Ask everybody, and look at those that owe an answer."""
        now = self._clock()
        passed_s, self._last = min(now - self._last, PERIOD_S), now
        self._rounds += 1
        for worker_id, pulse in self._pulses.items():
            if pulse.ask():
                self._adapter.tell(worker_id, Ping(self._rounds))
            elif pulse.passed(passed_s, self._patience(worker_id)):
                pulse.looking = True
                look = asyncio.get_running_loop().create_task(self._look(worker_id, pulse))
                self._looks.add(look)
                look.add_done_callback(self._looks.discard)

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._on_time)

    def _on_time(self) -> None:
        self._wait()
        self.tick()

    async def _look(self, worker_id: str, pulse: Pulse) -> None:
        try:
            vitals = None
            if isinstance(self._adapter, SeesProcesses):
                vitals = await asyncio.wait_for(self._adapter.vitals(worker_id), _LOOK_WITHIN_S)
        except Exception as error:
            _logger.warning("%s does not answer, and cannot be looked at: %r", self._name(worker_id), error)
            return
        finally:
            pulse.looking = False
        if self._pulses.get(worker_id) is not pulse:
            return
        patience_s = self._patience(worker_id)
        why = pulse.verdict(vitals, patience_s)
        if why:
            self._end(worker_id, why)
        elif pulse.mention():
            _logger.warning(
                "%s has not answered for %.0f s, though %s: native code that keeps Python's lock is likely the cause, "
                "in an ingress also a middleware that blocks its event loop. It can neither be drained nor have its "
                "calls cancelled meanwhile, and %s",
                self._name(worker_id),
                pulse.silent_s,
                "its process cannot be looked at" if vitals is None else "its process is not stopped",
                "is not replaced for it (set max_call_s to have such a replica replaced)"
                if patience_s == math.inf
                else f"is replaced if that goes on for {max(patience_s, STOPPED_S):g} s",
            )
