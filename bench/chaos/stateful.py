"""Everything at once, in an order that Hypothesis thinks up: see `bench.chaos.racing`."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine import Engine
from engine.testing.instruments import Footprint, descendants

from .outcome import Outcome
from .racing import BACKENDS, ENDPOINTS, EXTRA, WAYS, Race

STEPS = 30


def machine(begin: Callable[[], Race], *, processes: bool) -> Any:
    """A state machine whose runs are races.

    Args:
        begin: Makes the race of one run.
        processes: Whether replicas are processes, which can die.
    """
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

    pick = st.integers(0, 99)
    calls = st.lists(
        st.tuples(
            st.sampled_from(WAYS),
            st.sampled_from([*ENDPOINTS, EXTRA]),
            st.sampled_from(["echo", "nap", "nap", "raise"]),
            st.sampled_from([None, None, 0.02, 0.2]),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )

    class Racing(RuleBasedStateMachine):
        """Each step begins calls, and does something to them or to what serves them."""

        def __init__(self) -> None:
            super().__init__()
            self.race = begin()

        def _begin(self, calls: list[Any]) -> None:
            for way, endpoint, deed, timeout_s, repeatable in calls:
                self.race.call(way, endpoint, deed, timeout_s, repeatable=repeatable)

        @rule(calls=calls, pick=pick)
        def cancel(self, calls: list[Any], pick: int) -> None:
            self._begin(calls)
            self.race.cancel(pick)

        @precondition(lambda self: processes)
        @rule(calls=calls, way=st.sampled_from(WAYS[:4]), endpoint=st.sampled_from(["one", "two"]), again=st.booleans())
        def a_call_ends_its_replica(self, calls: list[Any], way: str, endpoint: str, again: bool) -> None:
            self._begin(calls)
            self.race.call(way, endpoint, "exit", None, repeatable=again)

        @precondition(lambda self: processes)
        @rule(calls=calls, pick=pick, stop=st.booleans())
        def a_replica_is_killed_or_stopped(self, calls: list[Any], pick: int, stop: bool) -> None:
            self._begin(calls)
            self.race.kill(pick, stop=stop)

        @precondition(lambda self: processes)
        @rule(calls=calls)
        def what_was_stopped_goes_on(self, calls: list[Any]) -> None:
            self._begin(calls)
            self.race.go_on()

        @rule(calls=calls, tag=st.sampled_from(BACKENDS), replicas=st.integers(1, 3))
        def scale(self, calls: list[Any], tag: str, replicas: int) -> None:
            self._begin(calls)
            self.race.scale(tag, replicas)

        @rule(calls=calls, tag=st.sampled_from(BACKENDS), starts=st.sampled_from([True, True, False]))
        def update(self, calls: list[Any], tag: str, starts: bool) -> None:
            self._begin(calls)
            self.race.update(tag, starts=starts)

        @rule(calls=calls, share=st.sampled_from([0.0, 0.5, 1.0]))
        def traffic(self, calls: list[Any], share: float) -> None:
            self._begin(calls)
            self.race.traffic(share)

        @rule(calls=calls, name=st.sampled_from(["two", "many"]))
        def an_endpoint_is_deleted_and_created(self, calls: list[Any], name: str) -> None:
            self._begin(calls)
            self.race.recreate(name)

        @rule(calls=calls, force=st.booleans())
        def one_more_backend_comes_or_goes(self, calls: list[Any], force: bool) -> None:
            self._begin(calls)
            self.race.toggle_extra(force=force)

        def teardown(self) -> None:
            self.race.settle()

    return Racing


def run(backend: Any, *, examples: int, steps: int, derandomize: bool, until: float | None = None) -> int:
    """Race on one engine, again and again; returns how many calls there were.

    Args:
        backend: As for `Engine`.
        examples: How many races.
        steps: How long each is, at most.
        derandomize: Whether they are the same ones each time.
        until: When no more are begun, if that is sooner.

    Raises:
        AssertionError: Something was not as promised.
    """
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis.stateful import run_state_machine_as_test

    races: list[Race] = []
    before = Footprint.now()
    processes, own_refs = backend != "inline", backend != "ray"
    with tempfile.TemporaryDirectory() as directory, Engine(backend=backend, http_options={"port": 0}) as engine:
        engine.create_backend("first", str)  # so that the server and the fork server are there from now on
        engine.create_endpoint("first", backend="first", route="/first")
        engine.delete_endpoint("first")
        engine.delete_backend("first")
        own = descendants()

        def begin() -> Race:
            races.append(Race(engine, Path(directory), processes=processes, own_refs=own_refs))
            return races[-1]

        racing = machine(begin, processes=processes)
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            racing,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=derandomize,
                database=None,
                deadline=None,
                report_multiple_bugs=False,
                phases=[Phase.generate],  # what depends on moments cannot be made smaller
                suppress_health_check=list(HealthCheck),
            ),
        )
        if backend != "ray":  # which keeps processes in store
            assert not descendants() - own, "a process is left"
    if backend != "ray":
        before.check_unchanged()
    return sum(len(race.calls) for race in races)


def stateful(backend: str, seconds: float) -> Iterator[Outcome]:
    """Races at random, on one engine after the other."""
    end = time.monotonic() + seconds
    calls = engines = 0
    problem = ""
    logging.getLogger("engine").setLevel(logging.CRITICAL)  # what goes wrong here is what is wanted
    while time.monotonic() < end and not problem:
        try:
            calls += run(backend, examples=5 if backend == "local" else 2, steps=STEPS, derandomize=False)
        except AssertionError as error:
            problem = str(error)
        engines += 1
    yield Outcome(
        "calls, cancels, deaths, stops, versions, scaling, traffic and endpoints at random",
        "every call ends once, rightly or for a reason; nothing in flight, queued or left at the end",
        f"{calls:,} calls on {engines} engines; {problem or 'all as promised'}",
        not problem,
    )
