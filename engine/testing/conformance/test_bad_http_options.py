"""Wrong HTTP options: one clear error each, and nothing left of the engine that was refused."""

from __future__ import annotations

import socket

import pytest

from engine import Engine, errors


def ok(request):
    return "ok"


BAD_OPTIONS = {
    "unknown location": ({"location": "Somewhere"}, "location.*'Somewhere'"),
    "port too high": ({"port": 70000}, "port.*70000"),
    "port as text": ({"port": "8000"}, "port.*'8000'"),
    "host is no string": ({"host": 5}, "host.*5"),
    "no workers": ({"workers": 0}, "workers.*0"),
    "negative body limit": ({"max_body_bytes": -1}, "max_body_bytes.*-1"),
    "timeout as text": ({"request_timeout_s": "1"}, "request_timeout_s.*'1'"),
    "middlewares is no list": ({"middlewares": 5}, "middlewares.*5"),
    "middleware is not callable": ({"middlewares": [5]}, r"middlewares\[0\].*5"),
    "debug is no bool": ({"debug": "yes"}, "debug.*'yes'"),
    "unknown setting": ({"keyfle": "x"}, "'?keyfle'?.*keyfile"),
    "missing certificate": ({"certfile": "/nowhere/cert", "keyfile": "/nowhere/key"}, "/nowhere/cert"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(adapter, leaves_nothing, name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(errors.InvalidArgument, match=message):
        adapter.engine(**options).shutdown()


def test_options_that_are_no_dict(adapter, leaves_nothing):
    with pytest.raises(errors.InvalidArgument, match=r"http_options.*5"):
        Engine(backend=adapter.backend(), http_options=5).shutdown()


def test_port_in_use(own_engine):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        engine = own_engine(port=port)
        engine.create_backend("ok", ok)
        with pytest.raises(errors.InvalidArgument, match=rf"127\.0\.0\.1.*{port}"):
            engine.create_endpoint("ok", backend="ok", route="/ok")
        assert engine.list_endpoints() == {}
        engine.create_endpoint("ok", backend="ok")
        assert engine.get_handle("ok").call() == "ok"
        engine.delete_endpoint("ok")
    engine.create_endpoint("ok", backend="ok", route="/ok")
    assert engine.http_url == f"http://127.0.0.1:{port}", "once the port is free, the same call works"


def test_host_that_is_not_ours(own_engine):
    engine = own_engine(host="192.0.2.1")
    engine.create_backend("ok", ok)
    with pytest.raises(errors.InvalidArgument, match=r"192\.0\.2\.1"):
        engine.create_endpoint("ok", backend="ok", route="/ok")
    engine.create_endpoint("ok", backend="ok")
    assert engine.get_handle("ok").call() == "ok"


def test_middleware_that_cannot_be_built(own_engine):
    def broken(app):
        raise KeyError("of the middleware")

    engine = own_engine(middlewares=[broken])
    engine.create_backend("ok", ok)
    with pytest.raises(KeyError, match="of the middleware"):
        engine.create_endpoint("ok", backend="ok", route="/ok")
    engine.create_endpoint("ok-2", backend="ok")
    assert engine.get_handle("ok-2").call() == "ok"
