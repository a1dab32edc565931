"""Where the sockets of an engine live: a directory of its own that only the user can enter.

``<temporary directory>/engine-<uid>/<8 hex digits>/``. An engine holds a lock on its directory as long as it lives; the
kernel drops it with the process, however that ended. Whoever makes a directory sweeps those of the dead. Making and
sweeping happen under a lock on the directory above, so that no directory is swept between its creation and its lock.
(A lock on a directory also keeps systemd from ageing the files in it.)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path

from engine.errors import InvalidArgument

__all__ = ["EngineDirectory", "temporary_directory"]

_LONGEST_NAME = "/engine-4294967295/01234567/1234567.sock"
_MAX_SOCKET_PATH = 103  # bytes: 107 on Linux, 103 on macOS
_LOCK_PATIENCE_S = 10.0
_LOCK_RETRY_S = 0.005


def temporary_directory(environ_value: str | None) -> Path:
    """Choose where to put sockets: ``TMPDIR`` unless their paths would be longer than a socket's may be.

    Args:
        environ_value: The value of ``TMPDIR``, if it is set.
    """
    if environ_value and os.path.isabs(environ_value) and os.path.isdir(environ_value):
        if len(os.fsencode(environ_value)) + len(_LONGEST_NAME) <= _MAX_SOCKET_PATH:
            return Path(environ_value)
    return Path("/tmp")


class EngineDirectory:
    """One engine's directory, from `create` to `remove`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._owner = os.getpid()

    @classmethod
    async def create(cls, temporary: Path) -> EngineDirectory:
        """Make a directory, and remove those of engines that are gone.

        Raises:
            engine.errors.InvalidArgument: The directory above it is not this user's alone.
        """
        base = temporary / f"engine-{os.geteuid()}"
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while (lock := _try_lock_base(base)) is None:
            if time.monotonic() > deadline:
                raise InvalidArgument(f"{base} has been locked for {_LOCK_PATIENCE_S:g} s by another process")
            await asyncio.sleep(_LOCK_RETRY_S)
        try:
            made = cls._make(base)
            for other in base.iterdir():
                if other != made.path:
                    _sweep(other)
        finally:
            os.close(lock)
        return made

    @classmethod
    def _make(cls, base: Path) -> EngineDirectory:
        path = base / os.urandom(4).hex()
        path.mkdir(0o700)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(path, lock)

    def remove(self) -> None:
        """Remove the directory and all in it, and the one above if it was the last (idempotent).

        In a process forked from the engine's it only lets go of the lock: the directory is not its own.
        """
        if self._lock < 0:
            return
        if os.getpid() == self._owner:
            _remove(self.path)
            with contextlib.suppress(InvalidArgument, OSError):
                base = _try_lock_base(self.path.parent)
                if base is not None:
                    _remove_empty(self.path.parent)
                    os.close(base)
        os.close(self._lock)
        self._lock = -1


def _try_lock_base(base: Path) -> int | None:
    try:
        base.mkdir(0o700)
    except FileExistsError:
        pass
    try:
        found = base.lstat()
    except FileNotFoundError:
        return None  # removed by the last engine in it just now
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise InvalidArgument(
            f"{base} must be a directory that belongs to user {os.geteuid()} and is closed to others (mode 0700), but "
            f"belongs to user {found.st_uid} and has mode {stat.filemode(found.st_mode)}: remove it, or set TMPDIR"
        )
    try:
        lock = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if base.stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except OSError:
        pass  # locked by another engine, or removed and perhaps made anew
    os.close(lock)
    return None


def _sweep(path: Path) -> None:
    """Remove the directory of an engine that is gone; leave that of a living one."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass
    else:
        _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    for entry in path.iterdir():
        entry.unlink(missing_ok=True)
    _remove_empty(path)


def _remove_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass
