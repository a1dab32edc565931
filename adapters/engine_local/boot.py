"""The script that a fork server's interpreter starts with: ``python boot.py DESCRIPTOR``.

It reads its settings from the socket the engine's process left it, takes over that process's ``sys.path`` and hands
over to `engine_local.forkserver`. Until then it uses nothing but what every interpreter has loaded anyway, so nothing
in the user's directories can get in its way. If the engine's process is gone, the socket says so and it ends.
"""

from __future__ import annotations

import marshal
import os
import sys

__all__ = ["main"]


def _read(descriptor: int, size: int) -> bytes:  # pragma: no cover - see main
    data = b""
    while len(data) < size:
        more = os.read(descriptor, size - len(data))
        if not more:
            os._exit(1)
        data += more
    return data


def main() -> None:  # pragma: no cover - coverage does not know a script for a part of its package
    """Run a fork server."""
    descriptor = int(sys.argv[1])
    size = int.from_bytes(_read(descriptor, 4), "little")
    settings = marshal.loads(_read(descriptor, size))
    sys.path[:] = settings["sys_path"]
    from engine_local.forkserver import ForkServer

    ForkServer(descriptor, settings["engine_pid"], settings["preload"]).run()


if __name__ == "__main__":  # pragma: no cover
    main()
