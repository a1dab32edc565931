"""Pickling: what goes by value, and saying precisely what cannot go at all."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from harness import run_python

from engine.errors import NotSerializable, ResultNotSerializable
from engine.seam import serialization
from engine.seam.serialization import dumps, dumps_by_value, explain_unpicklable, loads

LOCK = threading.Lock()


class Holder:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def method(self) -> None: ...


class WithLock:
    lock = threading.Lock()

    def read(self) -> Any:
        return self.lock


def uses_a_global() -> Any:
    return LOCK


def by_value(function: Any) -> Any:
    """Let cloudpickle take a function or class apart, as it does with those of a script."""
    function.__module__ = "__main__"
    return function


def explanation(value: Any) -> str:
    with pytest.raises(NotSerializable) as caught:
        dumps(value, "the argument")
    assert caught.value.__cause__ is not None
    text = str(caught.value)
    assert text.startswith("the argument cannot be pickled: ")
    return text.removeprefix("the argument cannot be pickled: ")


@pytest.mark.parametrize("value", [None, 7, "text", b"bytes", [1, {"a": (2.0, True)}], range(3)])
def test_plain_values_come_back(value: Any) -> None:
    assert loads(dumps(value, "the argument")) == value
    assert dumps(value, "the argument") == pickle.dumps(value, 5)


def test_lambdas_and_closures_come_back() -> None:
    offset = 3
    assert loads(dumps(lambda x: x + offset, "the argument"))(4) == 7


def test_a_value_by_itself() -> None:
    assert explanation(threading.Lock()).startswith("a lock, <unlocked _thread.lock")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        pytest.param(lambda: [1, LOCK], "[1]", id="item of a list"),
        pytest.param(lambda: (LOCK,), "[0]", id="item of a tuple"),
        pytest.param(lambda: {"a": 1, "b": LOCK}, "['b']", id="value of a dict"),
        pytest.param(lambda: {"a": [0, {"b": LOCK}]}, "['a'][1]['b']", id="nested"),
        pytest.param(lambda: Holder(ok=1, lock=LOCK), "attribute 'lock'", id="attribute"),
        pytest.param(lambda: Holder(inner=Holder(lock=LOCK)), "attribute 'inner'.attribute 'lock'", id="deeper"),
        pytest.param(lambda: Holder(lock=LOCK).method, "__self__.attribute 'lock'", id="bound method"),
    ],
)
def test_the_part_is_named(value: Callable[[], Any], path: str) -> None:
    text = explanation(value())
    assert text.startswith(f"{path} is a lock, <unlocked _thread.lock")
    assert "cannot pickle '_thread.lock' object" in text


def test_a_set_is_searched() -> None:
    assert explanation({threading.Lock()}).startswith("[0] is a lock, ")


def test_a_closure_variable_is_named() -> None:
    lock, fine = threading.Lock(), 1

    def closure() -> Any:
        return lock, fine

    assert explanation(by_value(closure)).startswith("closure variable 'lock' is a lock, ")


def test_a_closure_variable_without_a_value_is_passed_over() -> None:
    def closure() -> Any:
        return later, LOCK

    text = explain_unpicklable(by_value(closure), TypeError("no"))
    assert text.startswith("global 'LOCK' is a lock, ")
    if False:
        later = 1


def test_a_global_is_named() -> None:
    original = uses_a_global.__module__
    try:
        assert explanation(by_value(uses_a_global)).startswith("global 'LOCK' is a lock, ")
    finally:
        uses_a_global.__module__ = original


def test_a_default_is_named() -> None:
    def function(first: int, lock: Any = LOCK) -> None: ...

    assert explanation(by_value(function)).startswith("default 0 is a lock, ")


def test_an_attribute_of_a_class_is_named() -> None:
    class Local:
        lock = threading.Lock()

    assert explanation(Local).startswith("attribute") or explanation(Local).startswith("lock is a lock, ")


def test_a_circle_is_walked_once() -> None:
    circle: dict[str, Any] = {"lock": LOCK}
    circle["again"] = circle
    assert "'lock'" in explanation(circle)


def test_the_search_stops_at_some_depth() -> None:
    value: Any = LOCK
    for _ in range(20):
        value = [value]
    assert explanation(value).startswith("[0][0][0][0][0][0] is a list, ")


def test_long_representations_are_cut() -> None:
    class Wordy:
        def __repr__(self) -> str:
            return "x" * 500

        def __reduce__(self) -> Any:
            raise ValueError("no")

    text = explanation(Wordy())
    assert "x" * 77 + "..." in text
    assert len(text) < 200


def test_the_caller_chooses_the_error() -> None:
    with pytest.raises(ResultNotSerializable, match=r"^the result cannot be pickled: \[0\] is a lock"):
        dumps([LOCK], "the result", ResultNotSerializable)
    with pytest.raises(ResultNotSerializable):
        dumps_by_value([LOCK], "the result", ResultNotSerializable)


SCRIPT = """
import pickle
from engine.seam.serialization import dumps

class Point:
    def __init__(self, x):
        self.x = x

def double(point):
    return 2 * point.x

print(dumps((Point(4), double), "the argument").hex())
"""


def test_what_a_script_defines_goes_by_value() -> None:
    data = bytes.fromhex(run_python("-", stdin=SCRIPT).strip())
    point, double = pickle.loads(data)  # this process's __main__ has neither
    assert double(point) == 8
    assert type(point).__name__ == "Point"


class Ticket:
    """Pickles, but is worth nothing elsewhere."""


def test_what_is_refused_says_why_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "_refused", {})
    assert isinstance(loads(dumps([Ticket()], "the argument"))[0], Ticket)
    serialization.refuse(Ticket, "tickets cannot be passed on")
    try:
        with pytest.raises(NotSerializable, match=r"the argument cannot be pickled: \['a'\] is a Ticket.*be passed on"):
            dumps({"a": Ticket()}, "the argument")
        assert loads(dumps("a Ticket by name only", "the argument")) == "a Ticket by name only"
    finally:
        serialization._pickler.cache_clear()
