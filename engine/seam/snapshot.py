"""Routing snapshots: all that a caller must know to route, immutable and versioned.

The controller builds them and pushes them to every process that calls; a router only ever replaces one by the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BackendEntry", "EndpointEntry", "ReplicaEntry", "RoutingSnapshot"]


@dataclass(frozen=True)
class ReplicaEntry:
    """A replica that accepts calls.

    Attributes:
        replica_tag: Unique within the engine, e.g. ``"model#3"``.
        address: For `Connector.open_channel`.
        limit: Calls that this one holds at once, where that is not the backend's ``max_concurrent_queries``: it runs
            another version.
    """

    replica_tag: str
    address: str
    limit: int | None = None


@dataclass(frozen=True)
class BackendEntry:
    """A backend as callers see it.

    Attributes:
        replicas: Those that are ready.
        max_concurrent_queries: Calls one replica holds at once.
        max_queued_requests: Calls a caller may queue for this backend; None for any number.
        expecting: More replicas are on their way, so that calls may wait where there is none yet.
        failures: Tries to start a replica that failed, in a row. Those made side by side count once.
        dead: Tags of replicas that ended unasked, the last ones. No answer will come from there, though a caller's
            connection may not show it for long: that of a machine which lost its power just falls silent.
        max_retries: How often calls may be repeated that may have begun.
        retry_deaths: Whether they may be when their replica died with them.
        retry_posts: Whether HTTP requests by POST and PATCH may be, too.
        last_error: Why the last of these failures failed, in a line; empty if there are none.
        max_queue_wait_s: Calls that would wait longer with a caller are refused; None for no such bound.
        max_queued_bytes: What the arguments of the calls may have together which wait with a caller; None for any.
    """

    tag: str
    replicas: tuple[ReplicaEntry, ...]
    max_concurrent_queries: int
    max_queued_requests: int | None
    expecting: bool = True
    failures: int = 0
    dead: tuple[str, ...] = ()
    last_error: str = ""
    max_queue_wait_s: float | None = None
    max_retries: int = 0
    retry_deaths: bool = True
    retry_posts: bool = False
    max_queued_bytes: int | None = None


@dataclass(frozen=True)
class EndpointEntry:
    """An endpoint as callers see it.

    Attributes:
        route: The HTTP path, literal or with ``{name}`` segments, or None.
        methods: Upper-case HTTP verbs.
        traffic: Pairs of backend tag and weight, sorted by tag; the weights sum to 1.
        shadows: Pairs of backend tag and proportion of copied calls.
        call_methods: Methods beside ``__call__`` that HTTP clients may name; None for every public one.
    """

    name: str
    route: str | None
    methods: tuple[str, ...]
    traffic: tuple[tuple[str, float], ...]
    shadows: tuple[tuple[str, float], ...] = ()
    call_methods: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RoutingSnapshot:
    """One consistent picture of endpoints and backends; a higher version replaces a lower one.

    Attributes:
        closing: The last one: the engine is shutting down, so that there is nothing to call any more.
        draining: It is about to: callers take no new calls, but those of the engine's workers, and say when they hold
            none any more (`engine.seam.control_messages.AtRest`).
    """

    version: int = 0
    endpoints: dict[str, EndpointEntry] = field(default_factory=dict)
    backends: dict[str, BackendEntry] = field(default_factory=dict)
    closing: bool = False
    draining: bool = False
