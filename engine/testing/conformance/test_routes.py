"""Routes: exact ones, patterns, and when they come and go."""

from __future__ import annotations

import pytest


def path_params(request):
    return {key: [type(value).__name__, value] for key, value in request.path_params.items()}


@pytest.fixture
def prefix(request):
    return f"/{request.node.name}"


def test_pattern(serve, prefix):
    served = serve(path_params, route=prefix + "/{user}/files/{file_id}")
    url = served.url

    def at(path):
        served.route = prefix + path
        return served.http()

    assert at("/ann/files/7").json() == {"user": ["str", "ann"], "file_id": ["str", "7"]}
    assert at("/a%20b/files/%C3%BF").json() == {"user": ["str", "a b"], "file_id": ["str", "ÿ"]}
    assert at("/ann/files").status_code == 404
    assert at("/ann/files/7/8").status_code == 404
    assert at("//files/7").status_code == 404
    assert at("/ann/other/7").status_code == 404
    assert "{user}" in url


def test_convertors(serve, prefix):
    served = serve(path_params, route=prefix + "/{number:int}/{rest:path}")
    served.route = prefix
    assert served.http(suffix="/5/a/b").json() == {"number": ["int", 5], "rest": ["str", "a/b"]}
    assert served.http(suffix="/five/a/b").status_code == 404


def test_exact_route_wins_over_pattern(serve, prefix):
    pattern = serve(lambda request: "pattern", route=prefix + "/{name}")
    exact = serve(lambda request: "exact", route=prefix + "/one")
    assert exact.http().text == "exact"
    pattern.route = prefix + "/two"
    assert pattern.http().text == "pattern"


def test_pattern_characters_are_literal(serve, prefix):
    served = serve(lambda request: "ok", route=prefix + "/a.b/{name}")
    served.route = prefix
    assert served.http(suffix="/a.b/x").text == "ok"
    assert served.http(suffix="/axb/x").status_code == 404


def test_root(serve):
    served = serve(lambda request: "root", route="/")
    assert served.http().text == "root"
    assert served.http(suffix="other").status_code == 404


def test_the_backend_sees_the_path_and_url(serve, prefix):
    def backend(request):
        return [request.url.path, request.url.query]

    served = serve(backend, route=prefix + "/{name}")
    served.route = prefix + "/x"
    assert served.http(params={"a": "1"}).json() == [prefix + "/x", "a=1"]


def test_a_route_is_live_and_gone_with_the_call_that_says_so(serve, engine):
    served = serve(lambda request: "ok", route=None)
    served.route = f"/{served.name}"
    for _ in range(10):
        engine.create_endpoint(f"{served.name}-http", backend=served.tag, route=served.route)
        assert served.http().status_code == 200
        engine.delete_endpoint(f"{served.name}-http")
        assert served.http().status_code == 404


def test_several_endpoints_share_a_backend(serve, engine):
    served = serve(lambda request: request.url.path)
    engine.create_endpoint(f"{served.name}-2", backend=served.tag, route=f"{served.route}/second")
    try:
        assert served.http().text == served.route
        assert served.http(suffix="/second").text == f"{served.route}/second"
        assert engine.get_handle(f"{served.name}-2") is not None
    finally:
        engine.delete_endpoint(f"{served.name}-2")
