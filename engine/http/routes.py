"""Which endpoint an HTTP path and verb mean.

A `RouteTable` is built once per routing snapshot and never changes. Literal routes cost one lookup; routes with
parameters are tried after them, in the order in which their endpoints were created. The patterns are Starlette's own,
which is imported only once such a route exists.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from starlette.convertors import Convertor

    from ..seam.snapshot import EndpointEntry, RoutingSnapshot

__all__ = ["Match", "NotFound", "RouteTable", "WrongMethod", "route_shape", "validate_route"]

_CONVERTORS = ("str", "int", "float", "path", "uuid")
_PARAMETER = re.compile(r"\{([a-zA-Z_][a-zA-Z0-9_]*)(?::([a-zA-Z_][a-zA-Z0-9_]*))?\}")
RESERVED = "/-/"
"""Paths below this one belong to the ingress itself."""


class Match(NamedTuple):
    """The endpoint to call, and what the path says about its parameters."""

    endpoint_name: str
    path_params: dict[str, Any]


class NotFound(NamedTuple):
    """No route has this path."""


class WrongMethod(NamedTuple):
    """There is such a route, but not for this verb. ``allowed`` is sorted."""

    allowed: tuple[str, ...]


class _Pattern(NamedTuple):
    regex: re.Pattern[str]
    convertors: dict[str, Convertor[Any]]
    endpoint_name: str
    methods: frozenset[str]


_NOT_FOUND = NotFound()
_NO_METHODS: dict[str, Match] = {}


class RouteTable:
    """The routes of one snapshot."""

    def __init__(self, snapshot: RoutingSnapshot) -> None:
        self._literals: dict[str, dict[str, Match]] = {}
        self._patterns: list[_Pattern] = []
        for endpoint in snapshot.endpoints.values():
            if endpoint.route is not None:
                self._add(endpoint.route, endpoint)

    def _add(self, route: str, endpoint: EndpointEntry) -> None:
        methods = _served(endpoint.methods)
        if "{" not in route:
            literal = self._literals.setdefault(route, {})
            for method in methods:
                literal.setdefault(method, Match(endpoint.name, {}))
            return
        from starlette.routing import compile_path

        regex, _, convertors = compile_path(route)
        self._patterns.append(_Pattern(regex, convertors, endpoint.name, methods))

    def match(self, path: str, method: str) -> Match | NotFound | WrongMethod:
        """Find the endpoint for a path (without the root path of a mount) and an upper-case verb."""
        literal = self._literals.get(path, _NO_METHODS)
        found = literal.get(method)
        if found is not None:
            return found
        allowed = set(literal)
        for pattern in self._patterns:
            matched = pattern.regex.match(path)
            if matched is None:
                continue
            if method in pattern.methods:
                try:
                    groups = matched.groupdict().items()
                    params = {name: pattern.convertors[name].convert(text) for name, text in groups}
                except ValueError:  # an integer of thousands of digits
                    continue
                return Match(pattern.endpoint_name, params)
            allowed |= pattern.methods
        return WrongMethod(tuple(sorted(allowed))) if allowed else _NOT_FOUND


def _served(methods: tuple[str, ...]) -> frozenset[str]:
    served = {method.upper() for method in methods}
    if "GET" in served:
        served.add("HEAD")
    return frozenset(served)


def validate_route(route: object) -> str:
    """Check a route before an endpoint gets it.

    Returns:
        The route.

    Raises:
        InvalidArgument: The route is not a path, is reserved, or its parameters are malformed.
    """
    if not isinstance(route, str):
        raise InvalidArgument(f"route must be a string such as '/predict', or None, not {route!r}")
    if not route.startswith("/"):
        raise InvalidArgument(f"route must start with '/', not {route!r}")
    if route.startswith(RESERVED) or route == RESERVED.rstrip("/"):
        raise InvalidArgument(f"route {route!r}: paths below {RESERVED!r} belong to the ingress")
    wrong = next((character for character in route if character in "?#" or character.isspace()), None)
    if wrong is not None or not route.isprintable():
        raise InvalidArgument(f"route {route!r} must be a plain path: no query, no fragment, no white space")
    seen: set[str] = set()
    for name, convertor in _PARAMETER.findall(route):
        if convertor and convertor not in _CONVERTORS:
            raise InvalidArgument(f"route {route!r}: {convertor!r} is none of {', '.join(_CONVERTORS)}")
        if name in seen:
            raise InvalidArgument(f"route {route!r}: parameter {name!r} occurs twice")
        seen.add(name)
    if set(_PARAMETER.sub("", route)) & {"{", "}"}:
        raise InvalidArgument(f"route {route!r}: a parameter is written {{name}} or {{name:convertor}}")
    return route


def route_shape(route: str) -> str:
    """What tells routes apart, their text without the names of parameters: the same paths match equal shapes."""
    return _PARAMETER.sub(lambda parameter: f"{{{parameter[2] or 'str'}}}", route)
