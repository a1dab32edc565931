"""The environment variables of a worker, as decided in the engine's process. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.seam.resources import Resources

__all__ = ["extra_environ", "thread_limit"]

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def thread_limit(resources: Resources, environ: Mapping[str, str]) -> int | None:
    """How many threads numeric libraries may use in the worker; None when the user decided otherwise or not at all."""
    if resources.num_cpus is None or any(name in environ or name in resources.env_vars for name in _THREAD_VARIABLES):
        return None
    return max(1, int(resources.num_cpus))


def extra_environ(resources: Resources, gpus: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """What a worker's environment has beyond the engine's.

    Args:
        resources: What the worker asked for; its ``env_vars`` have the last word.
        gpus: The devices it was given.
        environ: The engine's environment, which has its say on thread counts.
    """
    extra = {}
    if resources.num_cpus is not None:
        threads = str(max(1, int(resources.num_cpus)))
        extra.update({name: threads for name in _THREAD_VARIABLES if name not in environ})
    if gpus:
        extra["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    extra.update(resources.env_vars)
    return extra
