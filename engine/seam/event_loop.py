"""The event loop of a worker: made before what it runs, closed after it, both on the worker's main thread."""

from __future__ import annotations

import asyncio

__all__ = ["close_event_loop", "new_event_loop"]


def new_event_loop(*, shares_process: bool = False) -> asyncio.AbstractEventLoop:
    """A loop for the calling thread: uvloop's where it is installed and the process is the engine's own."""
    loop = asyncio.new_event_loop() if shares_process else _fastest()
    asyncio.set_event_loop(loop)
    return loop


def close_event_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what still runs on it, as `asyncio.run` does at its end, and close it."""
    try:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _fastest() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
