"""Where workers run: options of actors, and what is lacking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.seam.resources import Resources
from engine.seam.worker import WorkerSpec

from ..link.connection import where

__all__ = ["options_of", "shortage", "trifle"]

_OURS = frozenset(
    {
        "allow_out_of_order_execution",
        "concurrency_groups",
        "get_if_exists",
        "lifetime",
        "max_concurrency",
        "max_pending_calls",
        "max_restarts",
        "max_task_retries",
        "name",
        "namespace",
    }
)
"""Options of actors that would change how the engine itself names, calls and replaces its workers."""


def options_of(spec: WorkerSpec, runtime_env: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of a worker's actor, and the names of those that were given and are not honoured.

    Args:
        spec: The worker.
        runtime_env: What that of the spec is laid over.
    """
    needs = spec.resources
    other = dict(needs.other)
    given_env = dict(other.pop("runtime_env", {}))
    ignored = sorted(_OURS & other.keys())
    options = {name: value for name, value in other.items() if name not in _OURS}
    # Ray's own default would ask for a whole processor to start on and none to run with: a full cluster would then
    # take no replica, though it needs nothing in particular.
    options["num_cpus"] = needs.num_cpus or 0
    if needs.num_gpus:
        options["num_gpus"] = needs.num_gpus
    variables = {**runtime_env.get("env_vars", {}), **given_env.get("env_vars", {}), **needs.env_vars}
    environment = {**runtime_env, **given_env, **({"env_vars": variables} if variables else {})}
    if environment:
        options["runtime_env"] = environment
    if spec.node_id is not None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(spec.node_id, soft=False)
    elif not options.keys() & {"scheduling_strategy", "placement_group", "label_selector"}:
        options["scheduling_strategy"] = "SPREAD"
    if _needs_nothing(options) and _is_for_nodes(options.get("scheduling_strategy")):
        options["resources"] = trifle()
    return options, ignored


def trifle() -> dict[str, float]:
    """Next to nothing of a resource that every node has, for actors that need none.

    Ray puts an actor without resources on a node at random: it neither spreads such actors nor heeds a preferred node.
    """
    import ray

    prefix = getattr(ray._raylet, "IMPLICIT_RESOURCE_PREFIX", None)
    return {} if prefix is None else {f"{prefix}engineroom": _TRIFLE}


_TRIFLE = 0.0001
"""The least that Ray counts. Every node has 1, so this is no limit."""


def _needs_nothing(options: Mapping[str, Any]) -> bool:
    return not any(options.get(name) for name in ("num_cpus", "num_gpus", "memory", "resources"))


def _is_for_nodes(strategy: Any) -> bool:
    """Whether a strategy chooses among nodes; a placement group, for one, has only the resources it was made with."""
    return strategy == "SPREAD" or _names(strategy)


def shortage(asked: Resources) -> str | None:
    """Say what a worker that has not started yet asked for and what the cluster has.

    Returns:
        None if some node has what it asked for, so that it lacks nothing but time.
    """
    import ray

    amounts = {"CPU": asked.num_cpus or 0, "GPU": asked.num_gpus, **asked.other.get("resources", {})}
    amounts["memory"] = asked.other.get("memory", 0)
    wanted = {name: amount for name, amount in amounts.items() if amount}
    chosen = {name: asked.other[name] for name in _CHOOSING if asked.other.get(name)}
    free = ray._private.state.available_resources_per_node()
    if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in _eligible(chosen, free)):
        return None
    names = sorted({"CPU", "GPU", *wanted})
    has = "; ".join(
        f"on {node['NodeManagerAddress']} {_free(names, free.get(node['NodeID'], {}), node['Resources'])}"
        for node in ray.nodes()
        if node["Alive"]
    )
    return f"it asked for {_listed(wanted | chosen)}; {where()} has free: {has or 'nothing'}"


_CHOOSING = ("accelerator_type", "label_selector", "placement_group", "scheduling_strategy")
"""Options that choose among nodes by more than amounts."""


def _eligible(chosen: Mapping[str, Any], free: Mapping[str, Mapping[str, float]]) -> list[Mapping[str, float]]:
    """What is free on the nodes that may be chosen, as far as that can be told from here."""
    strategy: Any = chosen.get("scheduling_strategy", "DEFAULT")
    if chosen.keys() - {"scheduling_strategy"} or not (isinstance(strategy, str) or _names(strategy)):
        return []
    return [node for node_id, node in free.items() if not _names(strategy) or strategy.node_id == node_id]


def _names(strategy: Any) -> bool:
    """Whether a strategy names one node."""
    return hasattr(strategy, "node_id")


def _free(names: list[str], free: Mapping[str, float], total: Mapping[str, float]) -> str:
    there = {name: f"{_amount(name, free.get(name, 0))} of {_amount(name, amount)}" for name, amount in total.items()}
    return ", ".join(f"{name} {there[name]}" if name in there else f"no {name}" for name in names)


def _listed(amounts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_amount(name, amount)}" for name, amount in amounts.items())


def _amount(name: str, amount: Any) -> str:
    if _names(amount):
        return f"NodeAffinity(node_id={amount.node_id!r}, soft={amount.soft})"
    if not isinstance(amount, (int, float)):
        return str(amount)
    return f"{amount / 2**30:.3g} GiB" if name == "memory" else f"{amount:g}"
