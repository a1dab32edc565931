"""Which endpoint a path and a verb mean."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from engine.errors import InvalidArgument
from engine.http.routes import Match, NotFound, RouteTable, WrongMethod, validate_route
from engine.seam.snapshot import EndpointEntry, RoutingSnapshot


def table(*routes: tuple[str, str | None, tuple[str, ...]]) -> RouteTable:
    endpoints = {name: EndpointEntry(name, route, methods, (("b", 1.0),)) for name, route, methods in routes}
    return RouteTable(RoutingSnapshot(1, endpoints, {}))


def test_literal_routes() -> None:
    routes = table(("a", "/a", ("GET",)), ("b", "/b/c", ("POST", "PUT")), ("hidden", None, ("GET",)))
    assert routes.match("/a", "GET") == Match("a", {})
    assert routes.match("/a", "HEAD") == Match("a", {})
    assert routes.match("/b/c", "PUT") == Match("b", {})
    assert routes.match("/b/c", "GET") == WrongMethod(("POST", "PUT"))
    assert routes.match("/a/", "GET") == NotFound()
    assert routes.match("/", "GET") == NotFound()


@pytest.mark.parametrize(
    ("route", "path", "params"),
    [
        ("/u/{name}", "/u/ann", {"name": "ann"}),
        ("/u/{name}", "/u/ann/x", None),
        ("/u/{name}", "/u/", None),
        ("/u/{id:int}/x", "/u/12/x", {"id": 12}),
        ("/u/{id:int}/x", "/u/ab/x", None),
        ("/u/{id:int}/x", f"/u/{'9' * 5000}/x", None),
        ("/f/{x:float}", "/f/1.5", {"x": 1.5}),
        ("/p/{rest:path}", "/p/a/b/c", {"rest": "a/b/c"}),
        ("/p/{rest:path}", "/p/", {"rest": ""}),
        ("/s/{a:str}-{b}", "/s/x-y", {"a": "x", "b": "y"}),
        ("/i/{u:uuid}", f"/i/{uuid.UUID(int=5)}", {"u": uuid.UUID(int=5)}),
        ("/dot.{ext}", "/dotxpy", None),
    ],
)
def test_patterns(route: str, path: str, params: dict[str, Any] | None) -> None:
    found = table(("e", route, ("GET",))).match(path, "GET")
    assert found == (NotFound() if params is None else Match("e", params))


def test_literals_go_before_patterns_and_earlier_patterns_before_later() -> None:
    routes = table(("any", "/u/{name}", ("GET",)), ("me", "/u/me", ("GET",)), ("rest", "/u/{x:path}", ("GET", "PUT")))
    assert routes.match("/u/me", "GET") == Match("me", {})
    assert routes.match("/u/you", "GET") == Match("any", {"name": "you"})
    assert routes.match("/u/you", "PUT") == Match("rest", {"x": "you"})
    assert routes.match("/u/me", "DELETE") == WrongMethod(("GET", "HEAD", "PUT"))


@pytest.mark.parametrize("route", ["/", "/a", "/a/b.c", "/{x}", "/{x:int}/{y:path}", "/-x", "/ä"])
def test_good_routes(route: str) -> None:
    assert validate_route(route) == route


@pytest.mark.parametrize(
    ("route", "says"),
    [
        (7, "must be a string"),
        ("a", "must start with '/'"),
        ("", "must start with '/'"),
        ("/-/x", "belong to the ingress"),
        ("/-", "belong to the ingress"),
        ("/a b", "white space"),
        ("/a?b", "no query"),
        ("/a\x00", "plain path"),
        ("/{x", "is written"),
        ("/x}", "is written"),
        ("/{}", "is written"),
        ("/{1x}", "is written"),
        ("/{x:hex}", "none of str, int"),
        ("/{x}/{x}", "twice"),
    ],
)
def test_bad_routes(route: object, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        validate_route(route)
