"""How long calls may take: options, what is left to the call that makes them, and what belongs to no call."""

from __future__ import annotations

import contextvars
import pickle
import threading
import time
import weakref

import pytest
from fakes import a_call

from engine import Engine, remaining_s
from engine.calling.budget import NO_LIMIT, Budget, Remainder, deadline_error, limit_of, running_budget
from engine.calling.ref import Ref
from engine.errors import Cancelled, DeadlineExceeded, EngineClosed
from engine.seam.messages import LOW, NORMAL
from engine.testing.instruments import PATIENCE_S, Gate, eventually

LONG_S = 1000.0


@pytest.mark.parametrize(
    ("timeout_s", "left_s", "inherits", "expected_s"),
    [
        (None, None, True, None),
        (5, None, True, 5),
        (5, LONG_S, True, 5),
        (None, LONG_S, True, LONG_S),
        (2 * LONG_S, LONG_S, True, LONG_S),
        (None, LONG_S, False, None),
        (2 * LONG_S, LONG_S, False, 2 * LONG_S),
        (None, -5.0, True, 0),
        (5, -5.0, True, 0),
        (0, LONG_S, True, 0),
    ],
)
def test_the_shorter_limit_counts(timeout_s, left_s, inherits, expected_s):
    before = time.monotonic()
    with Budget(None if left_s is None else before + left_s):
        limit = limit_of(timeout_s, inherits=inherits)
    if expected_s is None:
        assert limit == NO_LIMIT
        return
    assert limit.timeout_s == pytest.approx(expected_s, abs=100)
    assert limit.deadline == pytest.approx(before + (expected_s or min(left_s, 0)), abs=100)
    own = timeout_s == expected_s and not (left_s is not None and left_s < 0)
    assert isinstance(limit.timeout_s, Remainder) != own


@pytest.mark.parametrize(
    ("given", "of_the_caller", "expected"),
    [
        (None, None, NORMAL),
        (None, NORMAL, NORMAL),
        (None, LOW, LOW),
        (NORMAL, LOW, NORMAL),
        (LOW, NORMAL, LOW),
        (LOW, None, LOW),
    ],
)
@pytest.mark.parametrize("timeout_s", [None, 5])
@pytest.mark.parametrize("inherits", [True, False])
def test_a_call_has_the_priority_of_the_one_that_makes_it_unless_it_says_otherwise(
    given, of_the_caller, expected, timeout_s, inherits
):
    with Budget(time.monotonic() + LONG_S, of_the_caller or NORMAL) as budget:
        assert limit_of(timeout_s, inherits=inherits, priority=given).priority == expected
        budget.end()  # answered: what goes on is as urgent as before
        assert limit_of(timeout_s, inherits=inherits, priority=given).priority == expected
    assert limit_of(timeout_s, inherits=inherits).priority == NORMAL


def test_who_is_told_of_a_deadline_is_told_whose_it_was():
    assert str(deadline_error("e", 0.5)) == "endpoint 'e' did not answer within timeout_s=0.5"
    inherited = pickle.loads(pickle.dumps(Remainder(0.5), 5))
    assert str(deadline_error("e", inherited)) == (
        "endpoint 'e' did not answer within the 0.5 s that were left to the call that made this one"
    )


def test_a_budget_ends_with_its_call_wherever_it_went():
    assert remaining_s() is None
    with Budget(time.monotonic() + LONG_S):
        copied = contextvars.copy_context()
        assert 0 < remaining_s() <= LONG_S
        assert copied.run(remaining_s) > 0
    assert remaining_s() is None
    assert copied.run(remaining_s) is None
    with Budget(time.monotonic() - 1):
        assert remaining_s() == 0.0
    with Budget(None):
        assert remaining_s() is None
    assert running_budget() is None


def test_callbacks_of_refs_belong_to_no_call():
    """They run in the thread that learns of the result, which may be at a call that has nothing to do with it."""
    told = []
    ref = Ref(None, "e")
    ref.stand_for(a_call(), None)
    ref.add_done_callback(lambda _: told.append(remaining_s()))
    with Budget(time.monotonic() + LONG_S):
        ref.fail(EngineClosed("closed"))
        assert remaining_s() is not None
        ref.add_done_callback(lambda _: told.append(remaining_s()))
    assert told[0] is None
    assert told[1] is not None, "what is called at once is part of the call that asks"


def test_threads_without_the_context_have_no_budget():
    told = []
    with Budget(time.monotonic() + LONG_S):
        context = contextvars.copy_context()
        for run in (
            lambda: told.append(contextvars.Context().run(remaining_s)),
            lambda: told.append(context.run(remaining_s)),
        ):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert told[0] is None
    assert told[1] > 0


@pytest.mark.parametrize("how", ["late", "cancelled"])
def test_a_call_that_waits_for_a_ref_leaves_nothing_there(how, tmp_path):
    class Large:
        pass

    gate = Gate(tmp_path / "gate")
    with Engine(backend="inline", http_options={"location": None}) as engine:
        engine.create_backend("b", lambda request: gate.pass_through())
        engine.create_endpoint("b", backend="b")
        handle = engine.get_handle("b")
        pending = handle.remote()
        large = Large()
        kept = weakref.ref(large)
        ref = handle.options(timeout_s=0.02 if how == "late" else None).remote(pending, large=large)
        del large
        if how == "cancelled":
            ref.cancel()
        with pytest.raises(DeadlineExceeded if how == "late" else Cancelled):
            ref.result(PATIENCE_S)
        assert not pending.done()
        eventually(lambda: kept() is None)
        gate.open()
        assert pending.result(PATIENCE_S) is None
