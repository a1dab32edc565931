"""Which endpoints there are, and what may become of them. Pure: a change gives another table, or raises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import InvalidArgument
from ..http.routes import route_shape
from ..seam.error_text import all_there_are
from ..seam.snapshot import EndpointEntry

__all__ = ["EndpointTable"]


class EndpointTable:
    """The endpoints of one engine at one moment. Whether the backends exist that they name is the controller's to know.

    Args:
        entries: By name.
    """

    def __init__(self, entries: Mapping[str, EndpointEntry]) -> None:
        self._entries = dict(entries)

    def entries(self) -> dict[str, EndpointEntry]:
        """Every endpoint by name; the dict is the caller's own."""
        return dict(self._entries)

    def with_new(self, entry: EndpointEntry) -> EndpointTable:
        """A table with one more endpoint.

        Raises:
            InvalidArgument: Its name or its route is taken.
        """
        if entry.name in self._entries:
            raise InvalidArgument(f"endpoint {entry.name!r} exists already: choose another name or delete it first")
        if entry.route is not None:
            shape = route_shape(entry.route)
            for other in self._entries.values():
                if other.route is not None and route_shape(other.route) == shape:
                    same = "" if other.route == entry.route else f" as {other.route!r}, which the same paths match"
                    raise InvalidArgument(f"route {entry.route!r} is taken by endpoint {other.name!r}{same}")
        return self._with(entry)

    def without(self, name: str) -> EndpointTable:
        """A table with one endpoint less.

        Raises:
            InvalidArgument: There is no such endpoint.
        """
        gone = self._entry(name)
        return EndpointTable({name: entry for name, entry in self._entries.items() if entry is not gone})

    def with_traffic(self, name: str, weights: Mapping[str, float]) -> EndpointTable:
        """A table in which the calls of an endpoint are split like this.

        Raises:
            InvalidArgument: There is no such endpoint.
        """
        return self._with(replace(self._entry(name), traffic=tuple(sorted(weights.items()))))

    def with_shadow(self, name: str, tag: str, proportion: float) -> EndpointTable:
        """A table in which this proportion of the calls of an endpoint is copied to a backend; 0 for none.

        Raises:
            InvalidArgument: There is no such endpoint.
        """
        entry = self._entry(name)
        shadows = {**dict(entry.shadows), tag: proportion}
        kept = tuple(sorted((known, share) for known, share in shadows.items() if share > 0))
        return self._with(replace(entry, shadows=kept))

    def check_unused(self, tag: str) -> None:
        """Make sure that no endpoint sends calls or copies to a backend.

        Raises:
            InvalidArgument: One does; the message says which.
        """
        users = [
            name
            for name, entry in self._entries.items()
            if any(tag == used for used, _ in entry.traffic + entry.shadows)
        ]
        if users:
            raise InvalidArgument(
                f"backend {tag!r} is in use by endpoint {', '.join(map(repr, users))}: "
                "set_traffic (or shadow_traffic) to another backend, or delete the endpoint, first"
            )

    def _with(self, entry: EndpointEntry) -> EndpointTable:
        return EndpointTable({**self._entries, entry.name: entry})

    def _entry(self, name: str) -> EndpointEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise InvalidArgument(f"there is no endpoint {name!r}; {all_there_are('endpoints', self._entries)}")
        return entry
