"""A complete adapter: every worker is a Python that `subprocess.Popen` starts. docs/adapters.md walks through it.

Run as a script, it serves a function from two such processes. Elsewhere: Engine(backend=SubprocessAdapter()).
"""

import asyncio
import contextlib
import importlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from typing import NamedTuple

from engine import Engine
from engine.seam.adapter import AdapterBase
from engine.seam.worker import WorkerExit
from engine_wire import Acceptor, ChildHost, ControlChannel, WireConnector, listen_unix
from engine_wire.listening import ListeningSockets
from engine_wire.logs import LogToEngine


class SubprocessConnector(WireConnector):
    name = "subprocess"


class Running(NamedTuple):
    process: subprocess.Popen
    control: ControlChannel
    end: asyncio.Task


class SubprocessAdapter(SubprocessConnector, AdapterBase):
    async def start(self, engine_id, events):
        self.events = events
        self.workers = {}  # Running ones, by worker id
        self.public = ListeningSockets()
        self.directory = tempfile.TemporaryDirectory(prefix="engine-")  # nobody else can enter it
        path = f"{self.directory.name}/control"
        self.acceptor = Acceptor([listen_unix(path)], events.peer_connected, asyncio.get_running_loop())
        self.control_address = f"unix:{path}"

    async def start_worker(self, spec):
        public = [self.public.get(spec.listen)] if spec.listen else []
        ours, theirs = socket.socketpair()
        descriptors = [sock.fileno() for sock in (theirs, *public)]
        path = f"{self.directory.name}/{os.urandom(8).hex()}"
        level = logging.getLogger().getEffectiveLevel()
        with theirs, tempfile.TemporaryFile() as order:
            pickle.dump((sys.path, level, spec, descriptors, path, self.control_address), order)
            order.seek(0)
            process = subprocess.Popen(  # noqa: ASYNC220 - it does not wait for the interpreter
                [sys.executable, __file__, "worker"],
                stdin=order,
                pass_fds=descriptors,
                env={**os.environ, **spec.resources.env_vars},
                start_new_session=True,  # a terminal's Ctrl-C is for the application to handle
            )
        loop = asyncio.get_running_loop()
        lost = loop.create_future()
        control = ControlChannel(ours, lambda msg: self.events.worker_said(spec.worker_id, msg), lost.set_result, loop)
        end = loop.create_task(self.report_end(spec.worker_id, process, lost))
        self.workers[spec.worker_id] = Running(process, control, end)

    async def report_end(self, worker_id, process, lost):
        await lost
        code = await asyncio.to_thread(process.wait)
        with contextlib.suppress(OSError):  # nobody is left
            os.killpg(process.pid, 9)  # what it has started ends with it
        del self.workers[worker_id]
        reason = f"exited with code {code}" if code >= 0 else f"was killed by signal {-code}"
        self.events.worker_exited(WorkerExit(worker_id, reason))

    def tell(self, worker_id, body):
        if worker_id in self.workers:
            self.workers[worker_id].control.tell(body)

    def kill_worker(self, worker_id):
        if worker_id in self.workers:
            self.workers[worker_id].process.kill()

    def bound(self, listen, node_id):
        return self.public.bound(listen)

    async def stop(self):
        for worker_id in self.workers:
            self.kill_worker(worker_id)
        await asyncio.gather(*(worker.end for worker in self.workers.values()))
        self.acceptor.close()
        self.public.close()
        self.directory.cleanup()


def work():
    sys.path[:], level, spec, (control, *public), path, control_address = pickle.load(sys.stdin.buffer)
    host = ChildHost(spec.worker_id, control, public, path, SubprocessConnector(control_address))
    host.start()
    logging.basicConfig(level=level, handlers=[LogToEngine(host)])
    module, _, function = spec.entry.partition(":")
    getattr(importlib.import_module(module), function)(host, spec.payload)


def main():
    def greet(request):
        return f"Hello, {request.data}! This is process {os.getpid()}."

    print(f"process {os.getpid()} makes an engine")
    with Engine(backend=SubprocessAdapter()) as engine:
        engine.create_backend("greet", greet, config={"num_replicas": 2})
        engine.create_endpoint("greet", backend="greet")
        for name in ("Ada", "Grace", "Alan"):
            print(engine.get_handle("greet").call(name))


if __name__ == "__main__":
    work() if sys.argv[1:] == ["worker"] else main()
