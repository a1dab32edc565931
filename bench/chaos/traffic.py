"""Callers that go on calling while things go wrong, and keep account of every call.

Each call has a number. The backend notes in a file which numbers reached it, byte by byte, before it does anything
else: so a call that failed is known to have begun or not, whatever became of the replica.
"""

from __future__ import annotations

import http.client
import itertools
import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine import Engine, errors

MOST_CALLS = 2_000_000
PATIENCE_S = 30.0
"""A call without an answer for so long counts as unanswered."""


class Marks:
    """Says of each number how often a backend began with it. One file, shared by all processes.

    Attributes:
        numbers: Of the calls of this process: no two have the same.
    """

    def __init__(self, path: Path) -> None:
        with path.open("ab+") as file:  # whoever comes first makes it: several replicas may start at a time
            file.truncate(MOST_CALLS)
            self._bytes = mmap.mmap(file.fileno(), MOST_CALLS)
        self.numbers = itertools.count()

    def begin(self, number: int) -> None:
        """Note that a call began."""
        self._bytes[number] = min(self._bytes[number] + 1, 255)

    def begun(self, number: int) -> int:
        """How often a call began."""
        return self._bytes[number]

    def close(self) -> None:
        """Let go of the file."""
        self._bytes.close()


class Worker:
    """A backend that takes a moment for each call, and gives its number back."""

    def __init__(self, marks: str, seconds: float) -> None:
        self._marks = Marks(Path(marks))
        self._seconds = seconds

    def __call__(self, request: Any) -> str:
        number = request.query_params["n"]
        self._marks.begin(int(number))
        time.sleep(self._seconds)
        return str(number)


class Account:
    """What became of the calls of one kind. Outcomes are counted by name."""

    def __init__(self, name: str, marks: Marks) -> None:
        self.name = name
        self.outcomes: Counter[str] = Counter()
        self.latencies_s: list[float] = []
        self.records: list[tuple[float, float, str]] = []  # when it ended, how long it took, its outcome
        self.sent = 0
        self.begun_and_failed = 0
        self.failed_unbegun = 0
        self.began_twice = 0
        self._marks = marks
        self._lock = threading.Lock()

    def enter(self, number: int, outcome: str, latency_s: float) -> None:
        """Note what became of one call."""
        begun = self._marks.begun(number)
        with self._lock:
            self.sent += 1
            self.outcomes[outcome] += 1
            self.records.append((time.monotonic(), latency_s, outcome))
            self.began_twice += begun > 1
            if outcome == "ok":
                self.latencies_s.append(latency_s)
            elif begun:
                self.begun_and_failed += 1
            else:
                self.failed_unbegun += 1

    def count(self, *outcomes: str) -> int:
        """How many calls came to one of these ends."""
        return sum(self.outcomes[outcome] for outcome in outcomes)

    def as_dict(self) -> dict[str, Any]:
        """For another process."""
        kept = ("name", "records", "failed_unbegun", "began_twice")
        return {name: getattr(self, name) for name in kept} | {"text": str(self)}

    def __str__(self) -> str:
        others = {name: count for name, count in self.outcomes.items() if name != "ok"}
        return f"{self.sent:,} calls, {self.outcomes['ok']:,} answered" + (f", {others}" if others else "")


class Traffic:
    """Callers in threads, from `start` to `stop`.

    Args:
        engine: Runs the backend.
        endpoint: Is called.
        marks: Where the backend notes what began.
    """

    def __init__(self, engine: Engine, endpoint: str, marks: Marks) -> None:
        self._engine = engine
        self._endpoint = endpoint
        self._marks = marks
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.accounts: list[Account] = []

    def by_handle(self, name: str, callers: int, **options: Any) -> Account:
        """Add callers by sync handles; ``options`` are those of `Handle.options`."""
        handle: Any = self._engine.get_handle(self._endpoint).options(timeout_s=PATIENCE_S, **options)

        return self._by_python(name, callers, lambda number: handle.call(n=number))

    def by_ref(self, name: str, callers: int, **options: Any) -> Account:
        """Add callers that make refs, on Ray object refs, and wait for each."""
        handle: Any = self._engine.get_handle(self._endpoint).options(**options)
        return self._by_python(name, callers, lambda number: self._engine.get(handle.remote(n=number), PATIENCE_S))

    def _by_python(self, name: str, callers: int, make_call: Callable[[int], Any]) -> Account:
        def call(number: int) -> str:
            try:
                return "ok" if make_call(number) == str(number) else "wrong answer"
            except errors.DeadlineExceeded:
                return "unanswered"
            except errors.EngineError as error:
                return type(error).__name__

        return self._add(name, callers, lambda: call)

    def over_http(self, name: str, callers: int, route: str, method: str = "POST") -> Account:
        """Add callers over HTTP, each on a connection of its own."""
        host = str(self._engine.http_url).removeprefix("http://")

        def make() -> Callable[[int], str]:
            connection = http.client.HTTPConnection(host, timeout=PATIENCE_S)

            def call(number: int) -> str:
                try:
                    connection.request(method, f"{route}?n={number}")
                    response = connection.getresponse()
                    text = response.read().decode()
                except TimeoutError:
                    connection.close()
                    return "unanswered"
                except (OSError, http.client.HTTPException) as error:
                    connection.close()
                    return type(error).__name__
                if response.status != 200:
                    return str(response.status)
                return "ok" if text == str(number) else "wrong answer"

            return call

        return self._add(name, callers, make)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Call until the block ends, and until every call has come to its end."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in self._threads:
                thread.join(PATIENCE_S + 10)

    def _add(self, name: str, callers: int, make: Callable[[], Callable[[int], str]]) -> Account:
        account = Account(name, self._marks)
        self.accounts.append(account)

        def go_on() -> None:
            call = make()
            while not self._stopping.is_set():
                number = next(self._marks.numbers)
                began = time.monotonic()
                outcome = call(number)
                account.enter(number, outcome, time.monotonic() - began)
                if outcome != "ok":
                    self._stopping.wait(0.01)

        self._threads += [threading.Thread(target=go_on, name=f"{name}-{number}") for number in range(callers)]
        return account


class Watch:
    """How long a backend has been without any replica."""

    def __init__(self, engine: Engine, tag: str, period_s: float = 0.02) -> None:
        self._engine = engine
        self._tag = tag
        self._period_s = period_s
        self._stopping = threading.Event()
        self.looks = 0
        self.without = 0

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Look until the block ends."""

        def look() -> None:
            while not self._stopping.wait(self._period_s):
                self.looks += 1
                self.without += not ready_pids(self._engine, self._tag)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()

    @property
    def share(self) -> float:
        """Of the looks at it, those that found no replica."""
        return self.without / self.looks if self.looks else 0.0


def ready_pids(engine: Engine, tag: str) -> dict[str, int]:
    """The processes of the replicas that serve now, by replica tag."""
    details = engine.statistics()["backends"][tag]["details"]
    return {name: one["pid"] for name, one in details.items() if one["state"] == "ready" and one["pid"]}
