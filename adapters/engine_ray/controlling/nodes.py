"""The nodes of the cluster. Ray announces them to nobody but itself: whoever wants to know has to ask again and again.

Belongs to the controller's loop; Ray is asked in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.seam.adapter import Node
from engine.seam.log import Log

__all__ = ["NodeWatch"]

_log = Log("engine.ray")
_LOOK_EVERY_S = 1.0


class NodeWatch:
    """Knows the nodes that live, as of the last look.

    Args:
        own_id: Returns the id of the node that this process runs on; called in threads.
        changed: Told when the watch finds others than before.

    Attributes:
        nodes: The node of this process first.
    """

    def __init__(self, own_id: Callable[[], str], changed: Callable[[], None]) -> None:
        self._own_id = own_id
        self._changed = changed
        self._task: asyncio.Task[None] | None = None
        self.nodes: tuple[Node, ...] = ()

    async def look(self) -> bool:
        """Ask Ray; returns whether there are others than before."""
        nodes = await asyncio.to_thread(_living, self._own_id)
        changed = nodes != self.nodes
        self.nodes = nodes
        return changed

    def begin(self) -> None:
        """Look from now on until `end` (idempotent)."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def end(self) -> None:
        """Look no more (idempotent)."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                changed = await self.look()
            except Exception as error:
                _log.warning("cannot ask Ray for the cluster's nodes: %s", error)
                continue
            if changed:
                self._changed()


def _living(own_id: Callable[[], str]) -> tuple[Node, ...]:
    import ray

    own = own_id()
    alive = [Node(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    return tuple(sorted(alive, key=lambda node: (node.node_id != own, node.node_id)))
