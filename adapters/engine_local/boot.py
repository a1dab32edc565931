"""The script that a fork server's interpreter starts with: ``python boot.py DESCRIPTOR``.

It reads its settings from the socket the engine's process left it, imports the engine's packages from where that
process has them, takes over its ``sys.path`` and hands over to `engine_local.forkserver`. Until then it uses nothing
but what every interpreter has loaded anyway, so nothing in the user's directories can get in its way. If the engine's
process is gone, the socket says so and it ends.
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


def _import_from(name: str, home: str) -> None:  # pragma: no cover - see main
    """Import a package from where the engine's process has it: the user may have a module of that name."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec(name, [home])
    if spec is not None and spec.loader is not None:  # else an import hook found it there
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def main() -> None:  # pragma: no cover - coverage does not know a script for a part of its package
    """Run a fork server."""
    descriptor = int(sys.argv[1])
    size = int.from_bytes(_read(descriptor, 4), "little")
    settings = marshal.loads(_read(descriptor, size))
    if sys.version_info[:2] != settings["version"]:
        mine, theirs = (".".join(map(str, version)) for version in (sys.version_info[:2], settings["version"]))
        sys.stderr.write(f"{sys.executable} is Python {mine}, and cannot run what Python {theirs} has pickled\n")
        os._exit(1)
    own = []
    if settings["homes"] is None:
        own = list(sys.path)  # of another installation, whose standard library must be found
    else:
        for name, home in settings["homes"]:
            _import_from(name, home)
    sys.path[:] = [*own, *(path for path in settings["sys_path"] if path not in own)]
    from engine_local.forkserver import ForkServer

    ForkServer(descriptor, settings["engine_pid"], settings["preload"], own).run()


if __name__ == "__main__":  # pragma: no cover
    main()
