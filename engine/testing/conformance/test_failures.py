"""Errors of user code, errors that do not travel, and constructors that fail."""

from __future__ import annotations

import asyncio
import builtins
import threading

import pytest

from engine import errors
from engine.testing.instruments import eventually


class OwnError(Exception):
    def __init__(self, code, detail):
        super().__init__(code, detail)
        self.code = code


class CannotBeRebuilt(Exception):
    def __new__(cls, code, detail):
        return super().__new__(cls)

    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")


class OtherArguments(Exception):
    def __init__(self, code, *, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code


class CannotBePickled(Exception):
    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()


def raises_own(request):
    raise OwnError(7, "the detail")  # the line that raises


async def raises_own_async(request):
    raise OwnError(7, "the detail")  # the line that raises


class Raising:
    def __call__(self, request):
        return self.inner()

    def inner(self):
        raise OwnError(7, "the detail")  # the line that raises


@pytest.mark.parametrize("backend", [raises_own, raises_own_async, Raising])
def test_user_errors_arrive_as_their_own_type(serve, engine, backend):
    served = serve(backend, route=None)
    for attempt in (served.handle.call, lambda: engine.get(served.handle.remote())):
        with pytest.raises(OwnError) as caught:
            attempt()
        assert caught.value.code == 7
        assert caught.value.args == (7, "the detail")
        cause = caught.value.__cause__
        assert isinstance(cause, errors.RemoteTraceback)
        assert "# the line that raises" in str(cause)
        assert __file__.rpartition("/")[2] in str(cause)


def test_an_errors_own_cause_is_in_the_traceback(serve):
    def backend(request):
        try:
            raise KeyError("the first one")
        except KeyError as error:
            raise ValueError("the second one") from error

    with pytest.raises(ValueError, match="the second one") as caught:
        serve(backend, route=None).call()
    assert "the first one" in str(caught.value.__cause__)


def test_an_error_of_a_local_class(serve):
    class LocalError(ValueError):
        pass

    def backend(request):
        raise LocalError("local")

    with pytest.raises(LocalError, match="local"):
        serve(backend, route=None).call()


@pytest.mark.parametrize("error", [lambda: CannotBeRebuilt(7, "the detail"), lambda: CannotBePickled("7: the detail")],
                         ids=["cannot be rebuilt", "cannot be pickled"])  # fmt: skip
def test_errors_that_do_not_travel(serve, error):
    def backend(request):
        raise error()  # the line that raises

    served = serve(backend)
    with pytest.raises(errors.RemoteError) as caught:
        served.call()
    assert caught.value.type_name.rpartition(".")[2] in ("CannotBeRebuilt", "CannotBePickled")
    assert caught.value.message == "7: the detail"
    assert "# the line that raises" in caught.value.remote_traceback
    assert "7: the detail" in str(caught.value)
    assert served.http().status_code == 500


class CannotBeShown(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


def test_an_error_that_cannot_be_shown(serve):
    def backend(request):
        raise CannotBeShown("hidden")

    served = serve(backend)
    with pytest.raises(CannotBeShown):
        served.call()
    assert served.http().status_code == 500


def test_errors_whose_constructor_takes_other_arguments(serve):
    def backend(request):
        raise OtherArguments(7, detail="the detail")  # the line that raises

    with pytest.raises(OtherArguments, match=r"^7: the detail$") as caught:
        serve(backend).call()
    assert caught.value.code == 7
    assert "# the line that raises" in str(caught.value.__cause__)


def test_errors_inside_of_others_and_of_results_arrive_as_their_own_types(serve):
    def backend(request):
        inner = OtherArguments(7, detail="the detail")
        if request.data == "result":
            return [inner, {"key": inner}]
        error = ValueError("outer", inner)
        error.inner = inner
        if request.data == "group" and hasattr(builtins, "ExceptionGroup"):
            error = builtins.ExceptionGroup("group", [error, inner])
        raise error

    def check(error):
        assert type(error) is OtherArguments
        assert (str(error), error.code) == ("7: the detail", 7)

    served = serve(backend, route=None)
    listed, mapped = served.call("result")
    check(listed)
    check(mapped["key"])
    with pytest.raises(ValueError, match="outer") as caught:
        served.call("attribute")
    check(caught.value.inner)
    check(caught.value.args[1])
    if hasattr(builtins, "ExceptionGroup"):
        with pytest.raises(builtins.ExceptionGroup) as caught:
            served.call("group")
        check(caught.value.exceptions[0].inner)
        check(caught.value.exceptions[1])


def test_an_error_inside_of_an_argument_arrives_as_its_own_type(serve):
    def backend(request):
        return [type(request.data).__name__, str(request.data), request.data.code]

    assert serve(backend, route=None).call(OtherArguments(7, detail="it")) == ["OtherArguments", "7: it", 7]


class SaysMore(Exception):
    def __init__(self, code):
        super().__init__(f"the code is {code}")
        self.code = code


def test_an_error_whose_constructor_changes_its_text(serve):
    def backend(request):
        raise SaysMore(7)

    with pytest.raises(SaysMore, match=r"^the code is 7$") as caught:
        serve(backend, route=None).call()
    assert caught.value.code == 7


ODD = [StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError, SystemExit, KeyboardInterrupt]


def raises_what_it_gets(request):
    if request.data is not None:
        raise request.data
    return "fine"


async def raises_what_it_gets_on_a_loop(request):
    return raises_what_it_gets(request)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
def test_odd_exceptions_are_answered(serve_once, odd, kind):
    """What means something to Python itself must neither hang the caller nor stop the replica for good."""
    backend = raises_what_it_gets if kind == "sync" else raises_what_it_gets_on_a_loop
    served = serve_once(backend, route=None)
    with pytest.raises(BaseException) as caught:
        served.call(odd, timeout_s=10)
    assert not isinstance(caught.value, errors.DeadlineExceeded)
    assert isinstance(caught.value, (odd, RuntimeError, errors.RemoteError, errors.ReplicaDied))
    assert eventually(lambda: served.call(None, timeout_s=10)) == "fine"


class Broken:
    def __init__(self, journal):
        journal.add("tried")
        raise OwnError(7, "of the constructor")  # the line that raises

    def __call__(self, request):
        return "never"


def test_a_constructor_that_raises(engine, journal):
    with pytest.raises(OwnError) as caught:
        engine.create_backend("broken", Broken, journal)
    assert journal.lines() == ["tried"], "it must not be tried over and over"
    assert caught.value.args == (7, "of the constructor")
    assert isinstance(caught.value.__cause__, errors.RemoteTraceback)
    assert "# the line that raises" in str(caught.value.__cause__)
    assert "broken" not in engine.list_backends()
    engine.create_backend("broken", raises_own)
    engine.delete_backend("broken")


def test_one_of_many_constructors_raises(engine, journal):
    class SometimesBroken:
        def __init__(self):
            journal.add("made")
            if len(journal.lines()) > 1:  # at least the last one to come
                raise OwnError(7, "not the first")

        def __call__(self, request):
            return "never"

    with pytest.raises(OwnError):
        engine.create_backend("sometimes", SometimesBroken, config={"num_replicas": 3})
    assert "sometimes" not in engine.list_backends()


def test_a_constructor_with_wrong_arguments(engine):
    class Backend:
        def __init__(self, needed):
            pass

        def __call__(self, request):
            return "never"

    with pytest.raises(TypeError, match="needed"):
        engine.create_backend("arguments", Backend)
    assert "arguments" not in engine.list_backends()


def test_scaling_up_that_fails_keeps_what_there_is(serve, engine, journal):
    class OnlyOne:
        def __init__(self):
            journal.add("made")
            if len(journal.lines()) > 1:
                raise OwnError(7, "only one")

        def __call__(self, request):
            return "served"

    served = serve(OnlyOne, route=None)
    with pytest.raises(OwnError):
        engine.update_backend_config(served.tag, {"num_replicas": 2})
    assert served.call() == "served"
    assert engine.get_backend_config(served.tag).num_replicas == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_log_names_what_clients_are_not_told(serve, caplog, asynchronous):
    """As of a call that the backend made: its client hears of no other backends."""

    def fails(request):
        raise getattr(errors, request.query_params["kind"], ValueError)("what is\ninside")

    async def fails_on_loop(request):
        fails(request)

    served = serve(fails_on_loop if asynchronous else fails)
    kinds = {"ReplicaDied": 502, "NoReplica": 503, "DeadlineExceeded": 504, "ValueError": 500}
    for kind, status in kinds.items():
        answer = served.http(params={"kind": kind})
        assert answer.status_code == status
        assert kind not in answer.text
        assert "what is" not in answer.text
        line = f" -> {status}: endpoint {served.name!r}: the backend failed: {kind}: what is (request "
        assert eventually(lambda line=line: any(line in record.getMessage() for record in caplog.records)), line
