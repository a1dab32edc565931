"""The Ray cluster that scenarios run on with `--backend ray`: one that is theirs alone, because they kill on it.

Every engine finds it by the environment, those of programs that scenarios start included.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .. import procs
from ..cluster import Cluster

_keepers: list[int] = []
_BUSY = re.compile(r"ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent)")


@contextmanager
def own_cluster() -> Iterator[None]:
    """Have one, and lead this process and its children to it, until the block ends."""
    cluster = Cluster()
    former = dict(os.environ)
    _keepers.append(cluster.keeper)
    try:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(cluster.environment, RAY_ADDRESS=cluster.address)
        yield
    finally:
        os.environ.clear()
        os.environ.update(former)
        _keepers.remove(cluster.keeper)
        cluster.close()


def actors(kind: str = "") -> dict[int, str]:
    """The actors that live on it, by process, with their titles.

    Args:
        kind: The name of their class, or the beginning of it.
    """
    titles = {pid: procs.title(pid) for keeper in _keepers for pid in procs.descendants(keeper)}
    return {pid: title for pid, title in titles.items() if _BUSY.match(title) and title.startswith(f"ray::{kind}")}
