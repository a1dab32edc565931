"""The public ports of an engine, each shared by all workers that listen on one address of one node.

If the system is to choose the port, the first worker there gets one and says which; the others wait for its word. Only
the controller's loop touches this.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection

from engine.seam.worker import Listen

__all__ = ["PublicPorts"]


class PublicPorts:
    """Knows, or waits for, the port that an address came to on a node."""

    def __init__(self) -> None:
        self._ports: dict[tuple[Listen, str], asyncio.Future[int]] = {}

    async def place(self, listen: Listen, node_id: str) -> tuple[Listen, asyncio.Future[int] | None]:
        """Where one more worker is to listen; waits while another one is about to say it.

        Returns:
            The address, and for the first worker there what must be cancelled if it ends before `learn` was called:
            then the next one is the first.
        """
        while True:
            known = self._ports.get((listen, node_id))
            if known is None or known.cancelled():
                mine = self._ports[listen, node_id] = asyncio.get_running_loop().create_future()
                return listen, mine
            await asyncio.wait([known])
            if not known.cancelled():
                return dataclasses.replace(listen, port=known.result()), None

    def learn(self, listen: Listen, node_id: str, port: int) -> None:
        """A worker has bound its address at this port; the first word counts.

        After an adoption any worker may say it first, since the one that once chose the port may be dead.
        """
        known = self._ports.get((listen, node_id))
        if known is None or known.cancelled():
            known = self._ports[listen, node_id] = asyncio.get_running_loop().create_future()
        if not known.done():
            known.set_result(port)

    def bound(self, listen: Listen, node_id: str) -> Listen:
        """The address with its real port.

        Raises:
            KeyError: No worker was placed there.
        """
        return dataclasses.replace(listen, port=self._ports[listen, node_id].result())

    def keep_only(self, node_ids: Collection[str]) -> None:
        """Forget the ports of all other nodes, which have left the cluster."""
        for key in [key for key in self._ports if key[1] not in node_ids]:
            del self._ports[key]
