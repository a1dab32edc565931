"""Errors: one family, told apart by who must act, and able to travel."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

from engine import errors
from engine.errors import (
    BackendError,
    CallCancelled,
    CallError,
    EngineClosed,
    EngineError,
    RemoteError,
    RemoteTraceback,
    RetryLater,
)
from engine.seam.serialization import pack_exception, unpack_exception

FAMILIES = {
    RetryLater: {"Overloaded", "NoReplica", "DeadlineExceeded", "ReplicaDied", "ResourcesUnavailable"},
    CallError: {
        "Cancelled",
        "EndpointNotFound",
        "InvalidArgument",
        "MethodNotFound",
        "NotSerializable",
        "Superseded",
        "WouldBlock",
    },
    BackendError: {"BackendStartError", "ResultNotSerializable", "RemoteError"},
}
BUILT_IN = {
    "DeadlineExceeded": TimeoutError,
    "InvalidArgument": ValueError,
    "EndpointNotFound": KeyError,
    "MethodNotFound": AttributeError,
    "NotSerializable": TypeError,
    "WouldBlock": RuntimeError,
    "ResultNotSerializable": TypeError,
    "EngineClosed": RuntimeError,
}
ARGUMENTS: dict[str, tuple[str, ...]] = {"RemoteError": ("pkg.Odd", "no luck", "Traceback ...")}
EVERY = [getattr(errors, name) for name in errors.__all__]


def make(kind: type[Exception]) -> Exception:
    return kind(*ARGUMENTS.get(kind.__name__, ("what happened",)))


def test_every_error_is_listed() -> None:
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("kind", EVERY)
def test_it_pickles(kind: type[Exception]) -> None:
    error = make(kind)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is kind
        assert copy.args == error.args
        assert vars(copy) == vars(error)
        assert str(copy) == str(error)


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind is not RemoteError])
def test_its_text_is_its_message(kind: type[Exception]) -> None:
    assert str(make(kind)).endswith("what happened")  # without the quotation marks of a KeyError


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind is not CallCancelled])
def test_it_survives_two_processes(kind: type[Exception]) -> None:
    error = make(kind)
    copy = unpack_exception(pack_exception(unpack_exception(pack_exception(error))))
    assert type(copy) is kind
    assert copy.args == error.args


def test_what_is_raised_in_backends_is_no_error_that_their_code_would_catch() -> None:
    assert not issubclass(CallCancelled, Exception)


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind not in (EngineError, RemoteTraceback, CallCancelled)])
def test_it_belongs_to_one_family(kind: type[Exception]) -> None:
    assert issubclass(kind, EngineError)
    families = [family for family in (*FAMILIES, EngineClosed) if issubclass(kind, family)]
    assert len(families) == 1
    if kind not in families:
        assert kind.__name__ in FAMILIES[families[0]]


@pytest.mark.parametrize(("name", "builtin"), BUILT_IN.items())
def test_code_that_knows_only_the_built_in_errors_catches_it(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


# -- exceptions of users ---------------------------------------------------------------------------------------------


class Plain(Exception):
    pass


class TwoArguments(Exception):
    """Pickles, but cannot be rebuilt: to be made it wants more than it passes on."""

    def __new__(cls, first: str, second: str) -> TwoArguments:
        return super().__new__(cls)

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.second = second


class HoldsALock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class BecomesAString(Exception):
    def __reduce__(self) -> Any:
        return str, ("not an exception",)


class NoWords(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def raised(error: BaseException) -> BaseException:
    """The error with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


def travelled(error: BaseException) -> BaseException:
    return unpack_exception(pack_exception(raised(error)))


def test_it_comes_back_as_what_it_was_with_the_traceback_as_its_cause() -> None:
    copy = travelled(Plain("no luck", 3))
    assert type(copy) is Plain
    assert copy.args == ("no luck", 3)
    assert isinstance(copy.__cause__, RemoteTraceback)
    assert "in raised" in copy.__cause__.text
    assert "Plain: ('no luck', 3)" in str(copy.__cause__)
    assert str(copy.__cause__).startswith("\n\nraised in a replica:\n")


def test_a_chain_is_told_in_the_traceback() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as first:
            raise Plain("second") from first
    except Plain as second:
        copy = unpack_exception(pack_exception(second))
    assert isinstance(copy.__cause__, RemoteTraceback)
    assert "KeyError: 'first'" in copy.__cause__.text


@pytest.mark.parametrize(
    ("error", "name", "message"),
    [
        pytest.param(TwoArguments("a", "b"), "TwoArguments", "a", id="the constructor refuses"),
        pytest.param(HoldsALock("locked"), "HoldsALock", "locked", id="it cannot be pickled"),
        pytest.param(BecomesAString("x"), "BecomesAString", "x", id="it turns into something else"),
    ],
)
def test_what_cannot_be_rebuilt_is_stood_for(error: Exception, name: str, message: str) -> None:
    copy = travelled(error)
    assert type(copy) is RemoteError
    assert copy.type_name == f"{__name__}.{name}"
    assert copy.message == message
    assert "in raised" in copy.remote_traceback
    assert isinstance(copy.__cause__, RemoteTraceback)
    assert str(copy).startswith(f"{__name__}.{name}: {message} (")


def test_an_exception_without_words() -> None:
    data = pack_exception(NoWords())
    assert "its __str__ raised" in pickle.loads(data)[1]
    assert type(unpack_exception(data)) is NoWords


def test_the_built_in_ones_are_named_without_their_module() -> None:
    class Local(HoldsALock):
        pass

    assert pickle.loads(pack_exception(KeyError("k")))[0] == "KeyError"
    copy = travelled(Local("here"))
    assert isinstance(copy, RemoteError)
    assert copy.type_name.endswith("Local")


def test_what_refuses_to_be_pickled_travels_as_what_it_is_made_of() -> None:
    class Refuses(ValueError):
        def __reduce__(self) -> Any:
            raise TypeError("stays here")

    error = Refuses("here")
    error.code = 7  # type: ignore[attr-defined]
    copy = travelled(error)
    assert type(copy) is Refuses
    assert (copy.args, vars(copy)) == (("here",), {"code": 7})


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("x"), GeneratorExit("x")])
def test_what_would_stop_the_caller_is_stood_for(error: BaseException) -> None:
    copy = travelled(error)
    assert type(copy) is RemoteError
    assert copy.type_name == type(error).__name__
    assert copy.message == str(error)
