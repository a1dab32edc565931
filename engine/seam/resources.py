"""What a worker needs of the place it runs on: ``ray_actor_options``, validated.

Every message names the field, the value and what is allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import BackendConfig
from ..errors import InvalidArgument

__all__ = ["ACTOR_OPTIONS", "Resources", "resources_of"]


ACTOR_OPTIONS = (
    "num_cpus",
    "num_gpus",
    "runtime_env",
    "memory",
    "resources",
    "object_store_memory",
    "accelerator_type",
    "label_selector",
    "fallback_strategy",
    "scheduling_strategy",
    "placement_group",
    "placement_group_bundle_index",
    "placement_group_capture_child_tasks",
    "max_restarts",
    "max_task_retries",
    "max_concurrency",
    "max_pending_calls",
    "concurrency_groups",
    "name",
    "namespace",
    "lifetime",
    "get_if_exists",
    "enable_task_events",
    "allow_out_of_order_execution",
)
"""Those of ``ray.actor.ActorClass.options`` (2.x)."""
_RUNTIME_ENV = (
    "conda",
    "config",
    "container",
    "env_vars",
    "excludes",
    "image_uri",
    "nsight",
    "pip",
    "py_executable",
    "py_modules",
    "uv",
    "worker_process_setup_hook",
    "working_dir",
)
"""Those of ``ray.runtime_env.RuntimeEnv`` (2.x)."""


@dataclass(frozen=True)
class Resources:
    """What a worker needs: the fields of ``ray_actor_options``.

    Attributes:
        num_cpus: Logical processors, or None for the adapter's default.
        num_gpus: Accelerators; fractions share one.
        env_vars: ``runtime_env["env_vars"]``.
        other: Every other option as given; an adapter that cannot honour one says so in its log.
    """

    num_cpus: float | None = None
    num_gpus: float = 0.0
    env_vars: dict[str, str] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)


def resources_of(options: Mapping[str, Any] | None) -> Resources:
    """Validate ``ray_actor_options``.

    Raises:
        errors.InvalidArgument: A field has the wrong type or value.
    """
    from difflib import get_close_matches

    if options is None:
        return Resources()
    if not isinstance(options, Mapping):
        raise InvalidArgument(f"ray_actor_options must be a dict, not {options!r}")
    other = {str(key): value for key, value in options.items()}
    for name in other:
        if name in BackendConfig.__dataclass_fields__:
            raise InvalidArgument(f"ray_actor_options: {name} is none of them, but belongs in config={{{name!r}: ...}}")
        if name not in ACTOR_OPTIONS:
            near = get_close_matches(name, ACTOR_OPTIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(ACTOR_OPTIONS)}"
            raise InvalidArgument(f"ray_actor_options: unknown option {name!r}{hint}")
    num_cpus = _amount(other.pop("num_cpus", None), "num_cpus")
    num_gpus = _amount(other.pop("num_gpus", None), "num_gpus")
    runtime_env = other.get("runtime_env") or {}
    if not isinstance(runtime_env, Mapping):
        raise InvalidArgument(f"ray_actor_options: runtime_env must be a dict, not {runtime_env!r}")
    env_vars = runtime_env.get("env_vars") or {}
    if not isinstance(env_vars, Mapping) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in env_vars.items()
    ):
        raise InvalidArgument(f"ray_actor_options: runtime_env['env_vars'] must map str to str, not {env_vars!r}")
    for name in runtime_env:
        near = get_close_matches(str(name), _RUNTIME_ENV, 1, 0.75)
        if near and name not in _RUNTIME_ENV:  # others may be plug-ins of the cluster
            raise InvalidArgument(f"ray_actor_options: runtime_env has no field {name!r}; did you mean {near[0]!r}?")
    rest = {key: value for key, value in runtime_env.items() if key != "env_vars"}
    other.pop("runtime_env", None)
    if rest:
        other["runtime_env"] = rest
    return Resources(num_cpus=num_cpus, num_gpus=num_gpus or 0.0, env_vars=dict(env_vars), other=other)


def _amount(value: Any, name: str) -> float | None:
    if value is None:
        return None
    # no question of isfinite(): an integer may be too large to be asked as a float
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise InvalidArgument(f"ray_actor_options: {name} must be a number of at least 0, not {value!r}")
    return float(value)
