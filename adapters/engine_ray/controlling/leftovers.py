"""What engines left with the control plane that ended without a word: swept by the next engine that starts."""

from __future__ import annotations

from ..calling.addresses import Address
from ..link.knocking import knock
from ..link.registry import Registry

__all__ = ["sweep_leftovers"]

_KNOCK_S = 1.0


def sweep_leftovers() -> None:
    """Remove the rows of engines whose job is over and whose controller is not there any more. Blocks."""
    ended = _ended_jobs()
    Registry.sweep(lambda entry: entry.job_id in ended and not _answers(entry.control_address))


def _ended_jobs() -> set[str]:
    """The ids of Ray's jobs that are over."""
    import ray

    return {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}


def _answers(control_address: str) -> bool:
    """Whether somebody listens there: an engine in an actor may outlive the job that it was made in."""
    for way in Address.parse(control_address).ways:
        scheme, _, rest = way.partition(":")
        if scheme == "tcp" and knock(rest, _KNOCK_S) is None:
            return True
    return False
