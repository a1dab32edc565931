"""Entry functions that the tests of the local adapter run in real workers."""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import random
import signal
import sys
import threading
import time
from typing import Any

from engine.seam.channel import Channel
from engine.seam.control_messages import Drain, LogLine, Ping, Pong, Ready, Started
from engine.seam.event_loop import close_event_loop, new_event_loop
from engine.seam.messages import Call, Message, Reply
from engine.seam.service import Service, ServiceLoop
from engine.seam.worker import WorkerHost
from engine_local import leaving

IMPORTED_BY = os.getpid()


class Echo:
    """The smallest service: answers a call with its payload, and ends when told to drain."""

    def __init__(self, on_loop: bool) -> None:
        self.event_loop = new_event_loop() if on_loop else None
        self._finished = False
        self._waiting: list[tuple[Channel, Call]] = []
        self._host: ServiceLoop | None = None

    def attach(self, host: ServiceLoop) -> None:
        self._host = host

    def received(self, channel: Channel, message: Message) -> None:
        if isinstance(message, Call):
            if self.event_loop is not None:
                channel.send(Reply(message.id, 0, b"", message.payload))
            else:
                self._waiting.append((channel, message))

    def lost(self, channel: Channel, reason: str) -> None:
        pass

    def run_next(self) -> float | None:
        if self._waiting:
            channel, call = self._waiting.pop(0)
            channel.send(Reply(call.id, len(self._waiting), b"", call.payload))
        return 0 if self._waiting else None

    def delayed(self) -> None:
        pass

    def finished(self) -> bool:
        return self._finished

    def control(self, host: WorkerHost, body: Any) -> None:
        if isinstance(body, Ping):
            host.tell(Pong(body.token, threading.get_native_id()))
        elif isinstance(body, Drain):
            self._finished = True
            if self._host is not None:
                self._host.wake()


def echo(host: WorkerHost, payload: bytes) -> None:
    """Serve an `Echo`; answer pings from the control thread."""
    service = Echo(on_loop=payload == b"loop")
    host.on_control(lambda body: service.control(host, body))
    typed: Service = service
    host.serve(typed)
    if service.event_loop is not None:
        close_event_loop(service.event_loop)


def run(host: WorkerHost, payload: bytes) -> None:
    """Call the pickled ``(function, *arguments)`` with the host in front."""
    function, *arguments = pickle.loads(payload)
    function(host, *arguments)


def answer(host: WorkerHost, value: Any) -> None:
    """Say something to the test. Any body will do."""
    host.tell(("answer", value))


def leave_a_mark(host: WorkerHost, path: str) -> None:
    """Tell of the life of a worker also where nobody hears what it says."""
    with open(path, "a") as file:
        file.write("x")
    answer(host, os.getpid())
    time.sleep(1000)


# -- ways to end ---------------------------------------------------------------------------------------------------


def end(host: WorkerHost, how: str, ready: bool) -> None:
    if ready:
        host.tell(Ready(""))
    _ENDS[how]()


def _raise() -> None:
    raise LookupError("no such thing")


def _interrupt() -> None:
    raise KeyboardInterrupt


_ENDS: dict[str, Any] = {
    "return": lambda: None,
    "raise": _raise,
    "interrupt": _interrupt,
    "sys.exit(3)": lambda: sys.exit(3),
    "sys.exit()": sys.exit,
    "sys.exit('why')": lambda: sys.exit("why"),
    "os._exit(4)": lambda: os._exit(4),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGSEGV": lambda: ctypes.string_at(0),
    "exec": lambda: os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)"]),
}


def last_words(host: WorkerHost) -> None:
    sys.stdout.write("printed\n")
    os.write(1, b"without a newline")
    os.write(2, b"an error")
    logging.getLogger("mine").error("logged")
    answer(host, "told")
    os.kill(os.getpid(), signal.SIGKILL)


def ignore_everything(host: WorkerHost) -> None:
    """Never let go of the interpreter lock, so that no other thread of this process ever runs."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answer(host, os.getpid())
    ctypes.PyDLL(None).pause()


def sleep(host: WorkerHost) -> None:
    answer(host, os.getpid())
    time.sleep(1000)


def start_and_sleep(host: WorkerHost) -> None:
    """As a replica does, whose fork server need not tell its process."""
    host.tell(Started(os.getpid()))
    sleep(host)


# -- what a worker finds -------------------------------------------------------------------------------------------


def look(host: WorkerHost, names: list[str]) -> None:
    """Tell values of expressions."""
    answer(host, {name: eval(name) for name in names})


def list_descriptors(host: WorkerHost) -> None:
    found = {}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found[descriptor] = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue  # the one that listed them
    answer(host, found)


def imported_by(host: WorkerHost, module: str) -> None:
    """Tell whether a module was imported before this process was forked."""
    answer(host, (__import__(module).IMPORTED_BY == os.getpid(), os.environ.get("COLOUR")))


def draw(host: WorkerHost) -> None:
    import numpy as np

    answer(host, (random.random(), float(np.random.random())))


def take_a_connection(host: WorkerHost) -> None:
    (sock,) = host.listen_sockets()
    sock.setblocking(True)
    host.tell(Ready(""))
    connection, _ = sock.accept()
    with connection:
        connection.sendall(host.worker_id.encode())


def call_home(host: WorkerHost) -> None:
    """Open a channel to the controller and send something over it."""
    adapter = host.connector()
    channel = adapter.open_channel(adapter.control_address, Echo(True), on_loop=False)
    channel.send(Call(1, 0, "", None, "", b"", b"from the worker"))
    leave = threading.Event()
    host.on_control(lambda body: leave.set())
    leave.wait()
    assert host.connector() is adapter
    adapter.close()


# -- what a worker says --------------------------------------------------------------------------------------------


def speak(host: WorkerHost) -> None:
    log = logging.getLogger("mine")
    log.debug("too quiet")
    log.info("%s things", 3)
    try:
        _raise()
    except LookupError:
        log.exception("it failed")
    log.warning("%d things", "three")
    print("printed")  # noqa: T201
    print("printed to stderr", file=sys.stderr)  # noqa: T201
    os.write(1, b"\xff\xc3\xa4\r\n")
    os.write(1, b"x" * 100_000 + b"\n")
    ctypes.CDLL(None).printf(b"by C\n")


def flood(host: WorkerHost, lines: int) -> None:
    for number in range(lines):
        print(f"{number} {'.' * 100}")  # noqa: T201
    answer(host, "done")


def listen_late(host: WorkerHost) -> None:
    """Give the handler only after messages came."""
    seen: list[Any] = []
    done = threading.Event()

    def handler(body: Any) -> None:
        seen.append((body.token, threading.current_thread() is threading.main_thread()))
        if body.token == 2:
            raise ValueError("a bad handler")
        if len(seen) == 4:
            done.set()

    while not host._early or len(host._early) < 3:  # type: ignore[attr-defined]
        time.sleep(0.001)
    host.on_control(handler)
    host.tell(Ready(""))
    done.wait()
    answer(host, seen)


def fork_a_child(host: WorkerHost, leave: str) -> None:
    """Leave a child behind that keeps the streams open, logs, and outlives the worker."""
    ready, parent = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()  # else it would end with the worker
        logging.getLogger("mine").error("the child logs")
        host.tell(LogLine(40, "mine", "the child has no say"))
        os.write(parent, b"x")
        while not os.path.exists(leave):
            time.sleep(0.005)
        os._exit(0)
    os.read(ready, 1)
    answer(host, pid)
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_thread(host: WorkerHost, leave: str) -> None:
    """End the entry function while a thread lasts."""

    def last() -> None:
        while not os.path.exists(leave):
            time.sleep(0.005)

    leaving._PATIENCE_S = 0.0
    threading.Thread(target=last, name="lasting").start()


def register_atexit(host: WorkerHost) -> None:
    import atexit

    atexit.register(answer, host, "atexit")
