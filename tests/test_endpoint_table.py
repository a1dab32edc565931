"""Endpoints, decided without a controller."""

from __future__ import annotations

import pytest

from engine.control.endpoint_table import EndpointTable
from engine.errors import InvalidArgument
from engine.seam.snapshot import EndpointEntry


def entry(name: str, route: str | None = None) -> EndpointEntry:
    return EndpointEntry(name, route, ("GET",), (("b", 1.0),))


TABLE = EndpointTable({}).with_new(entry("plain")).with_new(entry("routed", "/r"))


def test_a_change_leaves_the_table_as_it_was() -> None:
    before = TABLE.entries()
    assert set(TABLE.with_new(entry("new")).entries()) == {"plain", "routed", "new"}
    assert set(TABLE.without("plain").entries()) == {"routed"}
    assert TABLE.with_traffic("plain", {"z": 0.5, "a": 0.5}).entries()["plain"].traffic == (("a", 0.5), ("z", 0.5))
    assert TABLE.with_shadow("plain", "c", 0.5).entries()["plain"].shadows == (("c", 0.5),)
    TABLE.entries().clear()
    assert TABLE.entries() == before


def test_a_name_or_a_route_is_taken_once() -> None:
    with pytest.raises(InvalidArgument, match="endpoint 'plain' exists already"):
        TABLE.with_new(entry("plain"))
    with pytest.raises(InvalidArgument, match="route '/r' is taken by endpoint 'routed'"):
        TABLE.with_new(entry("new", "/r"))
    TABLE.without("routed").with_new(entry("new", "/r"))


def test_routes_that_differ_in_names_are_one() -> None:
    table = TABLE.with_new(entry("user", "/u/{name}")).with_new(entry("number", "/u/{n:int}"))
    for route in ("/u/{id}", "/u/{id:str}"):
        with pytest.raises(InvalidArgument, match=r"by endpoint 'user' as '/u/\{name\}', which the same paths"):
            table.with_new(entry("new", route))
    table.with_new(entry("new", "/u/{name}/{id}"))


def test_what_does_not_exist_is_not_changed() -> None:
    for change in (
        lambda: TABLE.without("other"),
        lambda: TABLE.with_traffic("other", {"b": 1.0}),
        lambda: TABLE.with_shadow("other", "b", 1.0),
    ):
        with pytest.raises(InvalidArgument, match="there is no endpoint 'other'; the endpoints are: 'plain', 'routed'"):
            change()
    with pytest.raises(InvalidArgument, match=r"; there are no endpoints$"):
        EndpointTable({}).without("other")


def test_a_shadow_of_nothing_is_none() -> None:
    two = TABLE.with_shadow("plain", "d", 1.0).with_shadow("plain", "c", 0.5)
    assert two.entries()["plain"].shadows == (("c", 0.5), ("d", 1.0))
    assert two.with_shadow("plain", "d", 0).entries()["plain"].shadows == (("c", 0.5),)


def test_a_backend_is_in_use_by_calls_and_by_copies() -> None:
    TABLE.check_unused("c")
    with pytest.raises(InvalidArgument, match="backend 'b' is in use by endpoint 'plain', 'routed'"):
        TABLE.check_unused("b")
    with pytest.raises(InvalidArgument, match="backend 'c' is in use by endpoint 'plain'"):
        TABLE.with_shadow("plain", "c", 0.1).check_unused("c")
