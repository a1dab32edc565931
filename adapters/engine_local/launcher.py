"""The engine's side of one fork server.

Starts the process, sends it orders without blocking, hands on its reports, and makes sure that it is gone in the end.
Everything runs on the controller's loop; the thread of that loop must live as long as the engine, because the kernel
ties the fork server's life to it.

When the fork server dies, the kernel kills its workers, and ``on_gone`` is called once. When it is stopped (SIGSTOP)
for longer than a moment, it is retired: its workers go on. One that is importing cannot answer anything, so it is not
asked whether it is there, but looked at from outside; that costs microseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import engine.errors
from engine.errors import InvalidArgument
from engine.seam.log import Log
from engine_wire import StopWatch

from . import boot
from .interpreter import command, home_of
from .orders import Frames, Kill, pack
from .output import LineReader
from .process import describe_exit, kill_group

__all__ = ["Launcher", "search_path"]

_log = Log("engine.local")
_READ_SIZE = 1 << 16
_STOP_PATIENCE_S = 2.0
"""To kill and reap its workers takes a fork server milliseconds, unless it is importing."""
_REAP_POLL_S = 0.001
_REAP_PATIENCE_S = 1.0


class Launcher:
    """One fork server.

    Args:
        python: The interpreter to run it, or None for the one that runs this process.
        preload: Modules for it to import.
        on_report: Gets its reports (`engine_local.orders`).
        on_stuck: Told once, when it is found stopped, or stuck in an import.
        on_gone: Told once, with a phrase for people, when it is gone.
        loop: Runs all this.

    Raises:
        engine.errors.InvalidArgument: There is no Python interpreter to start.
        OSError: The machine lacks something else for it, e.g. descriptors; nothing is kept open.
    """

    def __init__(
        self,
        python: str | None,
        preload: Sequence[str],
        on_report: Callable[[Launcher, Any], None],
        on_stuck: Callable[[Launcher], None],
        on_gone: Callable[[Launcher, str], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._on_report = on_report
        self._on_stuck = on_stuck
        self._on_gone = on_gone
        self._loop = loop
        self._frames = Frames()
        self._python = python or sys.executable
        self._preloads = bool(preload)  # runs code of the user's before it says anything
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self._sock, end = socket.socketpair()
            undo.callback(self._sock.close)
            theirs.callback(end.close)
            readers = []
            writers = []
            for _ in range(2):
                reader, writer = os.pipe()
                undo.callback(os.close, reader)
                theirs.callback(os.close, writer)
                readers.append(reader)
                writers.append(writer)
            self._process = _start(python, end.fileno(), *writers)
            undo.pop_all()
        self._output = [
            LineReader(readers[0], lambda line: _log.info("fork server: %s", line), loop),
            LineReader(readers[1], lambda line: _log.warning("fork server: %s", line), loop),
        ]
        self.gone: asyncio.Future[str] = loop.create_future()
        self.heard = False  # whether it ever reported anything
        self.retired = ""  # it is to fork no more workers, for this reason: a phrase for people
        self._stops = StopWatch(self._process.pid, self._is_stopped, loop)
        self._reap_until = 0.0
        self._sock.setblocking(False)
        loop.add_reader(self._sock.fileno(), self._on_readable)
        settings: dict[str, Any] = {
            "engine_pid": os.getpid(),
            "version": sys.version_info[:2],
            "preload": list(preload),
            "sys_path": search_path(),
            "homes": None,
        }
        if python is None:
            settings["homes"] = [("engine", home_of(engine.errors)), ("engine_local", home_of(boot))]
        data = marshal.dumps(settings)
        self._queue(len(data).to_bytes(4, "little") + data, [])

    def send(self, order: NamedTuple, descriptors: Sequence[int] = ()) -> None:
        """Send an order, now or as soon as the fork server reads. Orders to a dead one vanish.

        Args:
            order: One of `engine_local.orders`.
            descriptors: To pass along; owned, and closed once they are sent.
        """
        self._queue(pack(order), list(descriptors))

    async def stop(self, *, at_once: bool) -> None:
        """End the fork server and its workers, and release everything (idempotent).

        Args:
            at_once: Do not let it kill and reap its workers itself; the kernel and the init process do.
        """
        if at_once or self.retired or not self.heard or self._stops.is_stopped():
            self.kill()  # it would not listen: what has not said a word is still importing
        if not self.gone.done():
            try:
                self._sock.shutdown(socket.SHUT_WR)
                await asyncio.wait([self.gone], timeout=_STOP_PATIENCE_S)
            except OSError:
                pass  # it was faster
            finally:
                if not self.gone.done():
                    self._process.kill()
        await asyncio.shield(self.gone)

    def kill_worker(self, worker_id: str, pid: int | None) -> None:
        """End one of its workers at once, if it lives.

        Args:
            worker_id: Of the worker.
            pid: Its process; None if the fork server has not told.
        """
        self.send(Kill(worker_id))
        if self.retired and pid is not None:
            # It does not listen. Nor does it reap, so the number still is this worker's.
            kill_group(pid)

    def retire(self, why: str) -> None:
        """It does not listen, for a reason to tell: order no more workers from it. Those that it has forked live on."""
        if not (self.retired or self.gone.done()):
            self.retired = why
            self._on_stuck(self)

    def was_killed(self) -> bool:
        """Whether somebody killed it, who need not have anything against what it did."""
        return self._process.returncode == -signal.SIGKILL

    def kill(self) -> None:
        """End the fork server and its workers at once; ``on_gone`` follows."""
        if not self.gone.done():
            self._process.kill()

    def _is_stopped(self) -> None:
        if not self.retired:
            _log.warning("a fork server (process %d) is stopped; starting another one", self._process.pid)
            self.retire("is stopped")

    # -- writing -----------------------------------------------------------------------------------------------------

    def _queue(self, data: bytes, descriptors: list[int]) -> None:
        if self._sock.fileno() < 0:
            _close_all(descriptors)
            return
        self._unsent.append((memoryview(data), descriptors))
        if len(self._unsent) == 1:
            self._on_writable()

    def _on_writable(self) -> None:
        while self._unsent:
            data, descriptors = self._unsent[0]
            try:
                sent = socket.send_fds(self._sock, [data], descriptors) if descriptors else self._sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._on_writable)
                return
            except OSError:
                break  # it is gone, as the reader will find
            _close_all(descriptors)
            if sent < len(data):
                self._unsent[0] = (data[sent:], [])
            else:
                self._unsent.popleft()
        self._loop.remove_writer(self._sock.fileno())

    # -- reading -----------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._on_end()
            return
        self.heard = True
        for report in self._frames.feed(data):
            self._on_report(self, report)

    def _on_end(self) -> None:
        self._stops.end()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, descriptors in self._unsent:
            _close_all(descriptors)
        self._unsent.clear()
        self._reap_until = self._loop.time() + _REAP_PATIENCE_S
        self._reap()

    def _reap(self) -> None:
        # The socket closes a moment before the process can be waited for; its workers are killed in between.
        if self._process.poll() is None:
            if self._loop.time() > self._reap_until:
                self._process.kill()  # it closed its socket but lives on
            self._loop.call_later(_REAP_POLL_S, self._reap)
            return
        for reader in self._output:
            reader.finish()
        code = self._process.returncode
        phrase = describe_exit(code << 8 if code >= 0 else -code)
        if code >= 0 and not self.heard and not self._preloads:
            phrase += f" before it did anything (it should run in {self._python!r}, with the engine installed there)"
        self.gone.set_result(phrase)
        self._on_gone(self, self.gone.result())


def _start(python: str | None, descriptor: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    try:
        return subprocess.Popen(
            command(python, flags, boot, descriptor),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(descriptor,),
            start_new_session=True,  # a terminal's Ctrl-C is for the application to handle
        )
    except (FileNotFoundError, PermissionError) as error:
        raise InvalidArgument(
            f"cannot start the Python interpreter {python or sys.executable!r} ({error.strerror}): "
            f"{'python' if python is not None else 'sys.executable'} must name one"
        ) from error


def search_path() -> list[str]:
    """``sys.path``, and where this package and the core are if they were found otherwise."""
    paths = [path for path in sys.path if isinstance(path, str)]
    for module in (engine.errors, boot):
        home = home_of(module)
        if home not in paths:
            paths.append(home)
    return paths


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
