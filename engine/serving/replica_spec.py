"""What a replica is made of, as it travels from the controller to a worker."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import BackendConfig

__all__ = ["ReplicaSpec"]


@dataclass(frozen=True)
class ReplicaSpec:
    """Everything a replica is made of.

    Attributes:
        definition: The pickled ``(function or class, init_args, init_kwargs)``.
        shares_process: Other replicas live in the same process.
    """

    engine_id: str
    adapter_name: str
    control_address: str
    backend_tag: str
    replica_tag: str
    definition: bytes
    config: BackendConfig
    debug: bool
    shares_process: bool
