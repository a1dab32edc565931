"""The local adapter: workers as processes of this machine, forked by a fork server.

Owns everything of the operating system that an engine on local processes needs: fork servers, control sockets, pipes,
listening sockets, the directory of Unix sockets, the table of GPUs. All of it belongs to the controller's loop and is
released by `LocalAdapter.stop`. It starts no thread, installs no signal handler and changes nothing global.

When a worker dies, what it had said and printed is delivered first, then its exit, once. When a fork server dies, the
kernel takes its workers along, each is reported, and the next `start_worker` starts another fork server. When the
process that holds the adapter dies, the kernel takes the fork servers along, and so all workers.

There are at most two fork servers that fork. The shared one imports the modules that backends come from, so that their
replicas share them. Workers with environment variables of their own come from a plain one that does not: a module reads
its environment when it is imported, and must not have read that of somebody else. One that is stopped, or stuck in an
import, is retired: another takes its place, also for what was ordered from it, and it is ended once its workers are
gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.errors import EngineClosed, EngineError, InvalidArgument, RemoteError, ResourcesUnavailable
from engine.seam.adapter import AdapterBase, AdapterEvents, Vitals
from engine.seam.descriptors import is_shortage, shortage
from engine.seam.log import Log
from engine.seam.serialization import unpack_exception
from engine.seam.worker import Listen, WorkerExit, WorkerSpec
from engine_wire import Acceptor, listen_unix, look_at
from engine_wire.listening import ListeningSockets

from .connector import LocalConnector
from .directory import EngineDirectory, temporary_directory
from .environment import extra_environ, thread_limit
from .gpus import GpuTable, visible_devices
from .launcher import Launcher, search_path
from .life import Stage
from .orders import Exited, Forked, ForkFailed, PreloadDone, PreloadFailed, Spawn
from .watched import WatchedWorker

__all__ = ["LocalAdapter"]

_log = Log("engine.local")
_MAX_INLINE_BYTES = 1 << 15
"""Larger payloads reach the worker as a file in memory: the fork server need not hold and copy them."""


class _Running(NamedTuple):
    """What `LocalAdapter.start` took."""

    events: AdapterEvents
    loop: asyncio.AbstractEventLoop
    directory: EngineDirectory
    acceptor: Acceptor
    gpus: GpuTable
    listening: ListeningSockets


class _Order(NamedTuple):
    """For a worker that is not known to have been forked yet."""

    spec: WorkerSpec
    gpus: list[str]
    again: bool  # its first fork server did not


class LocalAdapter(LocalConnector, AdapterBase):
    """Runs replicas as processes on this machine: ``Engine(backend="local")``.

    Args:
        preload: Names of modules to import once, before the first replica: every replica then starts with them and
            shares their memory. They must cope with a fork after their import; most do, also numpy and torch as long
            as nothing uses a GPU while they are imported. They see the environment the engine was started in.
        gpus: The devices to hand out, as ``CUDA_VISIBLE_DEVICES`` names them. By default those that variable shows
            when the engine starts, or else all of this machine.
        python: The interpreter that runs replicas, where it cannot be the one that runs this process: in a frozen
            application, say. It must be of the same version, and have the engine and what backends import.

    Raises:
        engine.errors.InvalidArgument: ``preload`` is not a sequence of module names, ``gpus`` names one twice, or
            ``python`` is not a path.
    """

    def __init__(
        self,
        preload: Sequence[str] = (),
        gpus: Sequence[int | str] | None = None,
        python: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__("")
        if isinstance(preload, str) or not all(isinstance(name, str) and name for name in preload):
            raise InvalidArgument(f"preload must be a list of module names, not {preload!r}")
        if isinstance(gpus, str):
            raise InvalidArgument(f"gpus must be a list of devices, not {gpus!r}")
        if python is not None and (not isinstance(python, (str, os.PathLike)) or not os.fspath(python)):
            raise InvalidArgument(f"python must be the path of an interpreter or None, not {python!r}")
        self._preload = tuple(preload)
        self._python = None if python is None else os.fspath(python)
        self._devices = None if gpus is None else [str(device) for device in gpus]
        GpuTable(self._devices or ())
        # Only the loop that `start` ran on touches what follows.
        self._running: _Running | None = None
        self._launchers: dict[Launcher, bool] = {}  # all that are not gone, and whether it is a shared one
        self._preloaded: asyncio.Future[None] | None = None
        self._workers: dict[str, WatchedWorker] = {}
        self._orders: dict[str, _Order] = {}
        self._deserted = asyncio.Event()  # set while there are no workers
        self._deserted.set()
        self._process = 0  # that `start` was called in
        self._sequence = 0
        self._ignored: set[tuple[str, ...]] = set()  # options that the log has mentioned

    # -- engine.seam.adapter.Adapter ---------------------------------------------------------------------------------

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """See `engine.seam.adapter.Adapter.start`.

        Raises:
            engine.errors.InvalidArgument: A module of ``preload`` cannot be imported, the directory for sockets is not
                safe, there is no interpreter to start, or the adapter already serves an engine.
            engine.errors.ResourcesUnavailable: The machine lacks descriptors, processes or disk space.
        """
        if self._running is not None or self._launchers:
            raise InvalidArgument("this LocalAdapter already serves an engine: give each engine one of its own")
        loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self._preloaded = loop.create_future() if self._preload else None
        try:
            self._launch(True, loop)  # first: it has the most to do
            directory = await EngineDirectory.create(temporary_directory(os.environ.get("TMPDIR")))
            try:
                acceptor = Acceptor([listen_unix(str(directory.path / "c.sock"))], events.peer_connected, loop)
            except BaseException:
                directory.remove()
                raise
            devices = visible_devices(os.environ) if self._devices is None else self._devices
            self._running = _Running(events, loop, directory, acceptor, GpuTable(devices), ListeningSockets())
            self.control_address = f"unix:{directory.path}/c.sock"
            if self._preloaded is not None:
                await self._preloaded
        except BaseException as error:
            if self._preloaded is not None:
                self._preloaded.cancel()
            await self.stop()
            if isinstance(error, OSError):
                raise _lacking("cannot start the engine", error) from error
            raise

    async def start_worker(self, spec: WorkerSpec) -> None:
        """See `engine.seam.adapter.Adapter.start_worker`."""
        running = self._running
        if running is None:
            raise EngineClosed("the local adapter is not running")
        if spec.worker_id in self._workers:
            raise InvalidArgument(f"there is a worker {spec.worker_id!r} already")
        (node,) = self.nodes()
        if spec.node_id not in (None, node.node_id):
            raise InvalidArgument(f"node_id must be {node.node_id!r} here, not {spec.node_id!r}")
        self._mention_ignored(spec)
        gpus = running.gpus.take(spec.worker_id, spec.resources.num_gpus) if spec.resources.num_gpus else []
        try:
            self._start(running, _Order(spec, gpus, again=False))
        except BaseException as error:
            running.gpus.give_back(spec.worker_id)
            if isinstance(error, OSError):
                raise _lacking(f"cannot start {spec.name}", error) from error
            raise

    def tell(self, worker_id: str, body: Any) -> None:
        """See `engine.seam.adapter.Adapter.tell`."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.tell(body)

    def kill_worker(self, worker_id: str) -> None:
        """See `engine.seam.adapter.Adapter.kill_worker`."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.kill()

    async def vitals(self, worker_id: str) -> Vitals | None:
        """See `engine.seam.adapter.SeesProcesses.vitals`."""
        worker = self._workers.get(worker_id)
        return None if worker is None or worker.pid is None else await look_at(worker.pid)

    def close_ports(self) -> None:
        """See `engine.seam.adapter.KeepsPorts.close_ports`."""
        if self._running is not None:
            self._running.listening.close()

    def bound(self, listen: Listen, node_id: str) -> Listen:
        """See `engine.seam.adapter.Adapter.bound`."""
        if self._running is None:
            raise KeyError(listen)
        return self._running.listening.bound(listen)

    async def stop(self) -> None:
        """See `engine.seam.adapter.Adapter.stop`."""
        if self._process not in (0, os.getpid()):
            return  # a fork of the engine's process: nothing of this is its own
        for worker in self._workers.values():
            worker.doom()
        if self._running is not None:
            self._running.acceptor.close()
        # One that has not forked all of its workers is perhaps importing, and would not listen.
        importing = {worker.launcher for worker in self._workers.values() if worker.stage is Stage.ORDERED}
        await asyncio.gather(*(launcher.stop(at_once=launcher in importing) for launcher in self._launchers))
        await self._deserted.wait()  # workers of a fork server that was killed end a moment later
        running, self._running = self._running, None
        if running is not None:
            running.listening.close()
            running.directory.remove()
        self.control_address = ""

    # -- starting ----------------------------------------------------------------------------------------------------

    def _launch(self, shared: bool, loop: asyncio.AbstractEventLoop) -> Launcher:
        for launcher in self._launchers:
            if self._launchers[launcher] is shared and not launcher.retired:
                return launcher
        launcher = Launcher(self._python, self._preload, self._on_report, self._on_stuck, self._on_gone, loop)
        self._launchers[launcher] = shared
        return launcher

    def _start(self, running: _Running, order: _Order) -> None:
        spec = order.spec
        environ = dict(os.environ)
        extra = extra_environ(spec.resources, order.gpus, environ)
        with contextlib.ExitStack() as undo:
            descriptors = []
            if spec.listen is not None:
                descriptors.append(os.dup(running.listening.get(spec.listen).fileno()))
                undo.callback(os.close, descriptors[-1])
            if len(spec.payload) > _MAX_INLINE_BYTES:
                descriptors.append(_file_in_memory(spec.payload))
                undo.callback(os.close, descriptors[-1])
            launcher = self._launch(not extra, running.loop)
            self._sequence += 1
            path = running.directory.path / f"{self._sequence}.sock"
            worker = WatchedWorker(
                spec.worker_id, launcher, path, running.events.worker_said, self._on_ended, running.loop
            )
            undo.pop_all()
        self._workers[spec.worker_id] = worker
        self._orders[spec.worker_id] = order
        self._deserted.clear()
        descriptors[:0] = worker.descriptors
        launcher.send(
            Spawn(
                worker_id=spec.worker_id,
                name=spec.name,
                entry=spec.entry,
                payload=None if len(spec.payload) > _MAX_INLINE_BYTES else spec.payload,
                address=str(path),
                control_address=self.control_address,
                preload=() if extra else spec.preload,
                sys_path=search_path(),
                argv=list(getattr(sys, "argv", [""])),
                cwd=_working_directory(),
                environ=environ,
                extra_environ=extra,
                threads=thread_limit(spec.resources, environ),
                log_level=logging.getLogger().getEffectiveLevel(),
                descriptors=len(descriptors),
            ),
            descriptors,
        )

    def _mention_ignored(self, spec: WorkerSpec) -> None:
        other = dict(spec.resources.other)
        inner = other.pop("runtime_env", {})  # of which `env_vars` was taken
        keys = tuple(sorted([*other, *(f"runtime_env[{name!r}]" for name in inner)]))
        if keys and keys not in self._ignored:
            self._ignored.add(keys)
            _log.info("ray_actor_options: only a cluster has a use for %s; ignored here", ", ".join(keys))

    # -- what fork servers report --------------------------------------------------------------------------------------

    def _on_report(
        self, launcher: Launcher, report: Forked | ForkFailed | Exited | PreloadDone | PreloadFailed
    ) -> None:
        if isinstance(report, (PreloadDone, PreloadFailed)):
            self._on_preload(report)
            return
        worker = self._workers.get(report.worker_id)
        if worker is not None and worker.launcher is launcher:  # else it was given up before, or ordered elsewhere
            worker.reported(report)
            if worker.stage is not Stage.ORDERED:
                self._orders.pop(report.worker_id, None)  # it may be large

    def _on_preload(self, report: PreloadDone | PreloadFailed) -> None:
        error: EngineError | None = None
        if isinstance(report, PreloadFailed):
            cause = unpack_exception(report.error)
            error = InvalidArgument(f"preload: module {report.module!r} cannot be imported: {_described(cause)}")
            error.__cause__ = cause
        if self._preloaded is not None and not self._preloaded.done():
            if error is None:
                self._preloaded.set_result(None)
            else:
                self._preloaded.set_exception(error)
        elif error is not None:
            _log.error("%s", error)

    def _on_stuck(self, launcher: Launcher) -> None:
        for worker in self._of(launcher):
            if worker.awaited:
                self._order_again(worker)
            else:
                worker.left_alone()
        if not self._of(launcher):
            launcher.kill()

    def _on_gone(self, launcher: Launcher, phrase: str) -> None:
        del self._launchers[launcher]
        if self._preloaded is not None and not self._preloaded.done():
            self._preloaded.set_exception(InvalidArgument(f"preload: the fork server {phrase} while it was importing"))
        at_work = True  # the first order may be what killed it
        for worker in self._of(launcher):
            if worker.awaited and not self._orders[worker.worker_id].again and (launcher.was_killed() or not at_work):
                self._order_again(worker)
            else:
                at_work = at_work and not worker.awaited
                worker.orphaned()

    def _order_again(self, worker: WatchedWorker) -> None:
        """Have a worker made that its fork server has not made, and will not."""
        running = self._running
        order = self._orders[worker.worker_id]._replace(again=True)
        worker.abandon()
        assert running is not None
        try:
            self._start(running, order)
        except Exception as error:
            self._on_ended(worker, f"could not be started again: {error}")

    # -- how workers end -----------------------------------------------------------------------------------------------

    def _on_ended(self, worker: WatchedWorker, reason: str) -> None:
        del self._workers[worker.worker_id]
        self._orders.pop(worker.worker_id, None)
        if not self._workers:
            self._deserted.set()
        running = self._running
        assert running is not None
        running.gpus.give_back(worker.worker_id)
        if worker.launcher.retired and not self._of(worker.launcher):
            worker.launcher.kill()
        running.events.worker_exited(WorkerExit(worker.worker_id, reason))

    def _of(self, launcher: Launcher) -> list[WatchedWorker]:
        return [worker for worker in self._workers.values() if worker.launcher is launcher]


def _lacking(what: str, error: OSError) -> ResourcesUnavailable:
    return shortage(error, what) if is_shortage(error) else ResourcesUnavailable(f"{what}: {error.strerror}")


def _described(error: Exception) -> str:
    if isinstance(error, RemoteError):
        return f"{error.type_name}: {error.message}"
    return f"{type(error).__name__}: {error}"


def _file_in_memory(payload: bytes) -> int:
    """A descriptor of a nameless file that holds the payload, positioned at its start."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("engine-payload")
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    view = memoryview(payload)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None  # it was removed
