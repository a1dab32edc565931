"""Methods chosen by name, and what they are given."""

from __future__ import annotations

import functools

import pytest
from starlette.requests import Request

from engine import ServeRequest, errors


class Base:
    def inherited(self, value):
        return ["inherited", value]


class CallableObject:
    def __call__(self, *values):
        return "must not be called"


class Calculator(Base):
    constant = 5
    Callable = CallableObject()

    class Nested:
        def __init__(self, *values):
            self.text = "must not be called"

    def check_health(self, *values):
        return "must not be called"

    reconfigure = websocket = check_health

    def close(self):
        pass

    def __init__(self, start=0):
        self.start = start
        self.assigned = len

    def __call__(self, request):
        return "called"

    def add(self, amount, by=1):
        return self.start + amount * by

    async def later(self, amount):
        return self.start + amount

    def nothing(self):
        return "no arguments"

    def typed(self, incoming: ServeRequest):
        return [type(incoming).__name__, incoming.data]

    def typed_starlette(self, incoming: Request):
        return [type(incoming).__name__, incoming.data]

    def named(self, request):
        return [type(request).__name__, request.data]

    def ending(self, web_request):
        return [type(web_request).__name__, web_request.data]

    def similar(self, requested):
        return [type(requested).__name__, requested]

    def over_http(self, anything):
        return [isinstance(anything, Request), anything.query_params["a"]]

    def _private(self, value):
        return "must not be called"


@pytest.fixture
def calculator(serve_once):
    return serve_once(Calculator, 100)


def test_call_is_the_default(calculator):
    assert calculator.call(5) == "called"
    assert calculator.http().text == "called"


def test_state_comes_from_the_constructor(serve):
    assert serve(Calculator, route=None, start=7).call(1, method_name="add") == 8


def test_named_methods_get_plain_arguments(calculator):
    add = calculator.handle.options(method_name="add")
    assert add.call(5) == 105
    assert add.call(5, by=2) == 110
    assert add.call(5, 3) == 115
    assert add.call(amount=4) == 104
    assert calculator.call(1, method_name="inherited") == ["inherited", 1]
    assert calculator.call(method_name="nothing") == "no arguments"
    assert calculator.call("x", method_name="similar") == ["str", "x"]


@pytest.mark.parametrize("method", ["typed", "typed_starlette", "named", "ending"])
def test_methods_that_ask_for_the_request_get_it(calculator, method):
    assert calculator.call("x", method_name=method) == ["ServeRequest", "x"]


def test_async_method_beside_sync_ones(calculator):
    assert calculator.call(5, method_name="later") == 105


def test_wrong_plain_arguments_are_the_callers_error(calculator):
    with pytest.raises(TypeError, match="add"):
        calculator.call(1, 2, 3, method_name="add")
    with pytest.raises(TypeError, match="nothing"):
        calculator.call(1, method_name="nothing")


def test_http_methods_get_the_request(calculator):
    answer = calculator.http_json(params={"a": "b"}, headers={"X-SERVE-CALL-METHOD": "over_http"})
    assert answer == [True, "b"]


def test_async_method_over_http(serve):
    class Reader:
        async def read(self, request):
            return (await request.body()).decode()

    served = serve(Reader)
    assert served.http("POST", content="x", headers={"X-Serve-Call-Method": "read"}).text == "x"


def test_a_class_without_call_serves_its_methods(serve):
    class Reader:
        def length(self, value):
            return len(value)

    served = serve(Reader)
    assert served.call("four", method_name="length") == 4
    with pytest.raises(errors.MethodNotFound, match="__call__"):
        served.call("four")
    assert served.http().status_code == 400


MISSING = [
    "Nested",
    "Callable",
    "check_health",
    "close",
    "reconfigure",
    "websocket",
    "absent",
    "_private",
    "__init__",
    "__class__",
    "constant",
    "assigned",
    "",
    "two words",
]


@pytest.mark.parametrize("method", MISSING)
def test_missing_methods(calculator, method):
    with pytest.raises((errors.MethodNotFound, errors.InvalidArgument), match=repr(method)):
        calculator.call(1, method_name=method)
    if method:
        response = calculator.http(headers={"X-SERVE-CALL-METHOD": method})
        assert response.status_code == 400
        assert "must not be called" not in response.text
    assert calculator.call(5, method_name="add") == 105


def test_clients_choose_only_among_the_methods_that_are_opened(serve):
    class Backend:
        def __call__(self, request):
            return "call"

        def opened(self, request):
            return "opened"

        def kept(self, request):
            return "kept"

    served = serve(Backend, route=None)
    url = f"/{served.name}"
    ways = {"all": None, "one": ["opened"], "none": []}
    for name, call_methods in ways.items():
        served.engine.create_endpoint(
            f"{served.name}-{name}", backend=served.tag, route=f"{url}/{name}", call_methods=call_methods
        )
    listed = served.engine.list_endpoints()
    assert {name: listed[f"{served.name}-{name}"]["call_methods"] for name in ways} == ways

    def told(name, **headers):
        response = served.client.get(f"{served.engine.http_url}{url}/{name}", headers=headers)
        return response.text if response.status_code == 200 else response.status_code

    for method, answers in {
        "opened": ["opened", "opened", 400],
        "kept": ["kept", 400, 400],
        "__call__": ["call"] * 3,
    }.items():
        assert [told(name, **{"X-SERVE-CALL-METHOD": method}) for name in ways] == answers, method
    assert [told(name) for name in ways] == ["call"] * 3
    for name in ways:
        handle = served.engine.get_handle(f"{served.name}-{name}")
        assert handle.options(method_name="kept").call("") == "kept"
        served.engine.delete_endpoint(f"{served.name}-{name}")


def test_a_property_is_neither_a_method_nor_evaluated(serve, journal):
    class Backend:
        def __call__(self, request):
            return "ok"

        @property
        def costly(self):
            journal.add("evaluated")
            raise RuntimeError("of the property")

    served = serve(Backend)
    with pytest.raises(errors.MethodNotFound, match="'costly'"):
        served.call(method_name="costly")
    assert served.http(headers={"X-SERVE-CALL-METHOD": "costly"}).status_code == 400
    assert served.http().text == "ok"
    assert journal.lines() == []


class Delegating:
    """As a proxy does, its class finds methods by name."""

    def __init__(self):
        self._names = {"upper", "later", "fails", "reconfigure", "_hidden", "check_health", "Nested"}

    def own(self, value):
        return ["own", value]

    def __getattr__(self, name):
        if name.startswith("__") or name not in self._names:
            raise AttributeError(name)
        if name == "later":
            return self._later
        return str if name == "Nested" else getattr(self, "_" + name, None) or str.upper

    async def _later(self, value="later"):
        return ["later", str(value)[:5]]

    def _fails(self, *values):
        raise KeyError("of the method")


def test_methods_that_the_class_finds_by_getattr(serve):
    served = serve(Delegating)
    assert served.call("text", method_name="own") == ["own", "text"]
    assert served.call("text", method_name="upper") == "TEXT"
    assert served.call("text", method_name="later") == ["later", "text"]
    assert served.http_json(headers={"X-SERVE-CALL-METHOD": "later"})[0] == "later"
    with pytest.raises(KeyError, match="of the method"):
        served.call(method_name="fails")
    for name in ("reconfigure", "check_health", "_hidden", "absent", "Nested", "_names"):
        with pytest.raises((errors.MethodNotFound, errors.InvalidArgument), match=name):
            served.call(method_name=name)
        assert served.http(headers={"X-SERVE-CALL-METHOD": name}).status_code == 400, name


def test_static_and_class_methods(serve):
    class Backend:
        @staticmethod
        def static(value):
            return ["static", value]

        @classmethod
        def of_class(cls, value):
            return [cls.__name__, value]

    served = serve(Backend, route=None)
    assert served.call(1, method_name="static") == ["static", 1]
    assert served.call(1, method_name="of_class") == ["Backend", 1]


def test_a_function_has_no_methods(serve):
    def function(request):
        return "ok"

    served = serve(function)
    with pytest.raises(errors.MethodNotFound, match="'other'"):
        served.call(1, method_name="other")
    assert served.http(headers={"X-SERVE-CALL-METHOD": "other"}).status_code == 400
    assert served.http().text == "ok"


def test_kinds_of_callables(serve):
    def function(request):
        return request.data + 1

    async def coroutine(request):
        return request.data + 1

    class SyncClass:
        def __call__(self, request):
            return request.data + 1

    class AsyncClass:
        async def __call__(self, request):
            return request.data + 1

    for backend in (function, coroutine, SyncClass, AsyncClass, lambda request: request.data + 1):
        assert serve(backend, route=None).call(1) == 2


class Scaler:
    """To be served as an object."""

    def __init__(self, factor):
        self.factor = factor
        self.calls = 0

    def __call__(self, request):
        self.calls += 1
        return request.data * self.factor

    def count(self):
        return self.calls

    def reconfigure(self, factor):
        self.factor = factor


class AsyncScaler(Scaler):
    async def later(self, value):
        return value * self.factor


class OnlyMethods:
    def greet(self, name):
        return f"hello {name}"


@pytest.mark.parametrize("kind", [Scaler, AsyncScaler])
def test_an_object_is_served_with_its_methods(serve, engine, kind):
    scaler = kind(3)
    served = serve(scaler, route=None)
    assert served.call(2) == 6
    assert served.call(method_name="count") == 1
    assert scaler.calls == 0, "it is a copy that is served"
    engine.update_backend_config(served.tag, {"user_config": 5})
    assert served.call(2) == 10
    if kind is AsyncScaler:
        assert served.call(2, method_name="later") == 10
    for name in ("factor", "_private", "reconfigure", "no_such"):
        with pytest.raises(errors.MethodNotFound):
            served.call(method_name=name)


def test_an_object_need_not_be_callable(serve):
    assert serve(OnlyMethods(), route=None).call("Ada", method_name="greet") == "hello Ada"


def test_what_stands_for_a_function_is_one(serve, engine):
    served = serve(functools.partial(Scaler(2)), route=None)
    assert served.call(2) == 4
    with pytest.raises(errors.MethodNotFound, match="is a function"):
        served.call(method_name="func")
    for nothing in (5, "text", None, [1], OnlyMethods.__dict__):
        with pytest.raises(errors.InvalidArgument, match="a function, a class, or an object with methods"):
            engine.create_backend("never", nothing)
    with pytest.raises(errors.InvalidArgument, match="constructed already"):
        engine.create_backend("never", Scaler(2), 3)
