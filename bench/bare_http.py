"""The reference of the HTTP benchmark: hypercorn as it comes, one worker on uvloop, serving one Starlette route.

Run as a script it is the server: `bare_http.py FD`, with a listening socket. It ends when its standard input ends.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

BODY = "ok"


class BareServer:
    """Owner of the server's process; `address` takes connections as soon as this exists."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
            self.address: tuple[str, int] = listener.getsockname()[:2]
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
            )

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


async def _serve(fd: int) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def noop(request: Request) -> PlainTextResponse:
        return PlainTextResponse(BODY)

    async def until_input_ends() -> None:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)

    config = Config()
    config.bind = [f"fd://{fd}"]
    config.loglevel = "WARNING"
    config.graceful_timeout = 1
    await serve(Starlette(routes=[Route("/noop", noop)]), config, shutdown_trigger=until_input_ends)


if __name__ == "__main__":
    import uvloop

    _loop = uvloop.new_event_loop()
    _loop.run_until_complete(_serve(int(sys.argv[1])))
