"""The fork server: a process that imports modules once and forks workers that share them.

Owns the workers as their parent: it forks, kills and reaps them, and reports each end exactly once. It runs no user
code but the import of the modules it is told to preload, and it never starts a thread, because threads do not survive a
fork. Runs on the main thread of an interpreter of its own, started by `engine_local.launcher`.

Each worker leads a process group of its own, in which all that it starts stays unless it asks for another one. When the
worker has ended, however it did, what is left of its group is ended, too.

When the engine's process dies, a signal from the kernel (Linux) or the end of its socket tells this one; it then kills
its workers and their groups. While an import of the user's has it, which may never end, the kernel kills it instead.
When it dies itself, the kernel kills the workers.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from .process import die_with_parent, end_group, kill_group

if TYPE_CHECKING:
    from .orders import Spawn

__all__ = ["ForkServer"]

_LIGHT = (
    "cloudpickle",
    "engine.seam.serialization",
    "engine.seam.control_messages",
    "engine_wire",
    "engine_local.worker",
    "engine.serving.replica_worker",
)
"""What every worker needs, imported before the first one."""
_LATER = ("asyncio", "uvloop", "anyio", "starlette.requests", "starlette.responses")
"""What many workers need but the first answer should not wait for: imported one by one while there is nothing to do."""
_IDLE_MS = 300
_IDLE_STEP_MS = 20
_MAX_DESCRIPTORS = 250  # Linux passes 253 at once
_READ_SIZE = 1 << 16


class ForkServer:
    """Serves one engine until its socket closes.

    Args:
        descriptor: The socket to the engine's process.
        engine_pid: That process.
        preload: The user's modules; one that cannot be imported is reported and ends the server.
        own_path: What comes first in every worker's ``sys.path``, whatever the engine's process has there.
    """

    def __init__(self, descriptor: int, engine_pid: int, preload: list[str], own_path: list[str]) -> None:
        die_with_parent(engine_pid)
        self._pid = os.getpid()
        self._engine_pid = engine_pid
        self._descriptor = descriptor
        self._preload = preload
        self._own_path = own_path
        self._later = list(_LATER)
        self._workers: dict[int, str] = {}  # by process id
        self._pids: dict[str, int] = {}
        self._frozen = False  # whether all that was imported has left the collector's sight
        self._has_forked = False

    def run(self) -> None:
        """Serve; never returns."""
        import sys

        status = 0
        try:
            self._set_up()
            if self._import_preload():
                self._serve()
        except ConnectionError:
            pass  # the engine is gone
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        finally:
            self._leave(status)

    # -- starting ----------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        import gc
        import select
        import signal
        import socket
        import sys
        from collections import deque

        from .orders import Frames
        from .process import adopt_orphans, name_process

        gc.disable()  # nothing here makes cycles worth collecting, and a collection would unshare pages
        adopt_orphans()  # and bury them: the init process of a container often does not
        _import_if_possible("setproctitle")  # names processes in full, for those who have installed it
        name_process("engine-forks")
        self._sock = socket.socket(fileno=self._descriptor)
        self._sock.set_inheritable(False)
        self._frames = Frames()
        self._received: deque[int] = deque()
        # Whoever stops the application signals all its processes; when this one is to end is for the engine to say.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the starting thread may have blocked some
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)
        self._poll.register(self._wake_in, select.POLLIN)
        streams: list[Any] = [sys.stdout, sys.stderr]
        for stream in streams:
            # Lines must leave as they are written, and reach the engine whatever the locale is.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
        for name in _LIGHT:
            _import_if_possible(name)

    def _on_sigterm(self, number: int, frame: object) -> None:
        # The kernel's word that the engine has died; anybody else's is not for this process to follow.
        if os.getpid() == self._pid and os.getppid() != self._engine_pid:
            self._leave(0)

    def _import(self, name: str) -> bool:
        """As `_import_if_possible`, which may take for ever, and run no handler meanwhile."""
        die_with_parent(self._engine_pid)
        try:
            return _import_if_possible(name)
        finally:
            self._end_with_engine()

    def _end_with_engine(self) -> None:
        import signal

        die_with_parent(self._engine_pid, signal.SIGTERM)

    def _import_preload(self) -> bool:
        from engine.seam.workplace import enter_worker

        from .orders import PreloadDone, PreloadFailed

        enter_worker()  # all that is forked here is
        for name in self._preload:
            try:
                __import__(name)
            except BaseException as error:
                from engine.seam.serialization import pack_exception

                self._report(PreloadFailed(name, pack_exception(error)))
                return False
        if self._preload:
            self._report(PreloadDone())
        return True

    # -- serving -----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        self._end_with_engine()
        while True:
            ready = {descriptor for descriptor, _ in self._poll.poll(self._patience_ms())}
            if self._wake_in in ready:
                os.read(self._wake_in, 4096)
                self._reap()
            if self._descriptor in ready and not self._read():
                return
            if not ready:
                _import_if_possible(self._later.pop(0))
                self._frozen = False

    def _patience_ms(self) -> int | None:
        if not self._later or not self._has_forked:
            return None
        return _IDLE_MS if len(self._later) == len(_LATER) else _IDLE_STEP_MS

    def _read(self) -> bool:
        import socket

        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        data, descriptors, _, _ = socket.recv_fds(self._sock, _READ_SIZE, _MAX_DESCRIPTORS, flags)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        self._received.extend(descriptors)
        for order in self._frames.feed(data):
            self._obey(order)
        return bool(data)

    def _obey(self, order: object) -> None:
        import signal

        from .orders import Kill, Spawn

        if isinstance(order, Spawn):
            self._spawn(order)
        elif isinstance(order, Kill) and order.worker_id in self._pids:
            # Not reaped yet, so the number is still this worker's. What it has started follows when it is buried.
            os.kill(self._pids[order.worker_id], signal.SIGKILL)

    def _report(self, report: object) -> None:
        from .orders import pack

        self._sock.sendall(pack(report))  # type: ignore[arg-type]

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._workers:  # else a child of a preloaded module, or an orphan
                self._bury(pid, status)

    def _bury(self, pid: int, status: int) -> None:
        from .orders import Exited

        end_group(pid)  # the number is nobody else's as long as there is anybody left in the group
        worker_id = self._workers.pop(pid)
        del self._pids[worker_id]
        self._report(Exited(worker_id, status))

    # -- forking -----------------------------------------------------------------------------------------------------

    def _spawn(self, order: Spawn) -> None:
        from .orders import Forked, ForkFailed

        descriptors = [self._received.popleft() for _ in range(order.descriptors)]
        try:
            if _hung_up(descriptors[0]):  # this process was stopped, and another one was told since
                return
            self._follow(order)
            for name in order.preload:
                self._frozen = not self._import(name) and self._frozen
            pid = self._fork(order, descriptors)
        except OSError as error:
            self._report(ForkFailed(order.worker_id, f"could not be forked ({error.strerror})"))
        else:
            self._has_forked = True
            self._workers[pid] = order.worker_id
            self._pids[order.worker_id] = pid
            self._report(Forked(order.worker_id, pid))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _follow(self, order: Spawn) -> None:
        """Take on the engine's paths and environment, which may have changed since the last worker."""
        import sys

        sys.path[:] = [*self._own_path, *(path for path in order.sys_path if path not in self._own_path)]
        try:
            os.chdir(order.cwd or "/")
        except OSError:
            pass  # the worker says so
        _adopt_environ(order.environ)

    def _fork(self, order: Spawn, descriptors: list[int]) -> int:
        import gc
        import warnings

        if not self._frozen:
            gc.freeze()  # a worker's collector then leaves these objects, and so their shared pages, alone
            self._frozen = True
        server = os.getpid()
        with warnings.catch_warnings():
            # A preloaded library may have threads; those made for being preloaded cope with a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            self._become_worker(order, descriptors, server)
        with contextlib.suppress(OSError):  # it is gone already
            os.setpgid(pid, pid)  # as it does itself: whoever comes first
        return pid

    def _become_worker(self, order: Spawn, descriptors: list[int], server: int) -> None:
        try:
            die_with_parent(server)
            os.setpgid(0, 0)
            import signal

            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # A worker takes no notice of Ctrl-C. What it starts must: it would inherit that a signal is ignored, but
            # not that a handler does nothing.
            signal.signal(signal.SIGINT, _ignore)
            signal.siginterrupt(signal.SIGINT, False)
            self._sock.close()
            for descriptor in (self._wake_in, self._wake_out, *self._received):
                os.close(descriptor)
            from .worker import run_worker

            run_worker(order, descriptors)
        finally:
            os._exit(1)  # reached only if even that failed: this is not the fork server any more

    # -- leaving -----------------------------------------------------------------------------------------------------

    def _leave(self, status: int) -> None:
        for pid in self._workers:
            kill_group(pid)
        with contextlib.suppress(OSError):  # nobody listens any more: then the init process reaps the rest
            for pid in list(self._workers):
                self._bury(*os.waitpid(pid, 0))
        os._exit(status)


def _ignore(number: int, frame: object) -> None:
    """Do nothing, but as a handler: only for a signal that has one does Python write to the wake-up descriptor."""


def _hung_up(control: int) -> bool:
    """Whether nobody is left at the other end of a worker's control channel."""
    import select

    poll = select.poll()
    poll.register(control, 0)  # that is told in any case
    return bool(poll.poll(0))


def _import_if_possible(name: str) -> bool:
    """Import a module; returns whether anything may have been loaded."""
    import sys

    if name in sys.modules:
        return False
    try:
        __import__(name)
    except BaseException:
        pass  # whoever needs it meets the error where it can be told
    return True


def _adopt_environ(environ: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in environ]:
        del os.environ[name]
    for name, value in environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
