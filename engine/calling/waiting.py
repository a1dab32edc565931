"""Waiting for a ref in whichever async library runs: asyncio (any loop) or trio."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from .ref import Ref

__all__ = ["running_asyncio_loop", "settled"]


def running_asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The asyncio loop that runs in this thread, if any."""
    if "asyncio" not in sys.modules:
        return None
    import asyncio

    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def settled(ref: Ref) -> None:
    """Return once the ref is done. Cancelling the wait leaves the call alone."""
    loop = running_asyncio_loop()
    if loop is None:
        await _settled_on_trio(ref)
        return
    future: asyncio.Future[None] = loop.create_future()

    def finish() -> None:
        if not future.done():
            future.set_result(None)

    def wake(_: Ref) -> None:
        if running_asyncio_loop() is loop:
            finish()
            return
        try:
            loop.call_soon_threadsafe(finish)
        except RuntimeError:
            pass  # the loop was closed: nobody waits any more

    ref.add_done_callback(wake)
    await future


async def _settled_on_trio(ref: Ref) -> None:
    trio: Any = sys.modules.get("trio")
    if trio is None:
        raise RuntimeError("a ref can be awaited on asyncio and on trio")
    token = trio.lowlevel.current_trio_token()
    event = trio.Event()

    def wake(_: Ref) -> None:
        try:
            token.run_sync_soon(event.set)
        except trio.RunFinishedError:
            pass  # nobody waits any more

    ref.add_done_callback(wake)
    await event.wait()
