"""Real Ray clusters whose nodes are different hosts to each other, on one machine.

Each host is a set of Linux namespaces: a network of its own with loopback, address and cable; a process tree of its
own; a hostname; and a /dev/shm of its own, in which Ray keeps everything it writes. The cables meet in a bridge inside
one more network namespace, so nothing of the machine's own network changes, and the same addresses serve any number of
runs at once.

    with Hosts() as hosts:
        a, b = hosts.add(), hosts.add()
        a.start_head()
        b.join(a, resources={"b": 1})
        a.run(sys.executable, "-c", f"import ray; ray.init({a.ray_address!r}); ...")
        b.kill()

Nothing has a name outside: the kernel removes a namespace, with its network, files and mounts, after its first process,
and kills what still runs in it. That first process reads a pipe whose other end only this process has. So a host ends
by `kill()`, at the end of the `with`, and when this process dies in whatever way.

Needs the tools of util-linux and iproute2, and either root or user namespaces.
"""

from __future__ import annotations

import functools
import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from engine.testing.instruments import PATIENCE_S, eventually

_MOST_HOSTS = 20
_GCS_PORT = 6379
_SCRATCH = "/dev/shm"
"""Private to each host, gone with it, and short: Ray's unix sockets lie below, and their paths end after 107 bytes."""

_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MB
_SYSTEM_CONFIG = {
    # a host that does not answer is dead after some failures in a row (by default it is more than a minute). Five of
    # them, 5 to 6 s, are the least: after a cut of 2 s, TCP tries again when 3 s have passed
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
}
_RAY_ENVIRONMENT = {
    "RAY_TMPDIR": _SCRATCH,
    # the alternative is a token in a file below $HOME, which all of the machine's clusters would share
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # the machine's memory is not the test's business
    "RAY_memory_monitor_refresh_ms": "0",
    # no workers started on suspicion: they would compete for the CPU with those that the test waits for
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}

_SEPARATE = ("--net", "--pid", "--mount", "--uts", "--ipc")
_BOOT = """
set -e
hostname "$1"
ip link set lo up
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
printf '%s\\n' "$2" >/dev/shm/.hosts
: >/dev/shm/.resolv.conf  # unknown names fail at once instead of asking a server that cannot be reached
mount --bind /dev/shm/.hosts /etc/hosts
mount --bind /dev/shm/.resolv.conf /etc/resolv.conf
exec "$3" -ISc "$4"
"""
_STAY = """
import signal, sys
# the kernel reaps the orphans: Ray's workers take a raylet that died and stays a zombie for alive, and go on
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
"""
_CONNECT = """
import errno, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
host, port, timeout_s = sys.argv[2:]
try:
    with socket.create_connection((host, int(port)), float(timeout_s)) as connection:
        socket.send_fds(channel, [b"0"], [connection.fileno()])
except OSError as error:
    channel.send(str(error.errno or errno.ETIMEDOUT).encode())
"""
_CHECK_SUMS = """
import ctypes, fcntl, socket, struct, sys
for command in (0x17, 0x1F, 0x24):  # no check sums and no cutting into packets is left to the device
    value = bytearray(struct.pack("II", command, 0))
    address = ctypes.addressof((ctypes.c_char * len(value)).from_buffer(value))
    with socket.socket() as sock:
        fcntl.ioctl(sock, 0x8946, struct.pack("16sP", sys.argv[1].encode(), address))
"""
_SLOW_CABLE = """
import collections, random, select, socket, sys, time
delay_s, loss = float(sys.argv[3]), float(sys.argv[4])
ends = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) for _ in range(2)]
for end, name in zip(ends, sys.argv[1:3]):
    end.bind((name, 0))
    end.setblocking(False)
on_their_way = collections.deque()
print("ready", flush=True)
while True:
    waiting_s = max(0.0, on_their_way[0][0] - time.monotonic()) if on_their_way else None
    readable = select.select([*ends, sys.stdin], [], [], waiting_s)[0]
    if sys.stdin in readable:
        break
    for end in readable:
        try:
            while True:
                frame, about = end.recvfrom(1 << 16)
                if about[2] != socket.PACKET_OUTGOING and random.random() >= loss:
                    on_their_way.append((time.monotonic() + delay_s, ends[end is ends[0]], frame))
        except OSError:  # there is no more; or the cable is cut
            pass
    while on_their_way and on_their_way[0][0] <= time.monotonic():
        _, end, frame = on_their_way.popleft()
        try:
            end.send(frame)
        except OSError:  # lost, as on any cable
            pass
"""


@functools.cache
def why_not() -> str | None:
    """Why there can be no such hosts here, or None if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if missing := [tool for tool in ("ip", "mount", "nsenter", "unshare") if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    if importlib.util.find_spec("ray") is None:
        return "Ray is not installed"
    try:
        with Hosts() as hosts:
            hosts.add()
    except RuntimeError as error:
        return f"not allowed to make namespaces: {error}"
    return None


def _address(number: int) -> str:
    return f"10.203.0.{number}"


def _names() -> str:
    known = [f"{_address(number)} host{number}" for number in range(1, _MOST_HOSTS + 1)]
    return "\n".join(["127.0.0.1 localhost", "::1 localhost", *known])


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it is gone
        return []


def _ray_environment() -> dict[str, str]:
    """This process's environment, but Ray as the hosts need it, whatever the caller has set for Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | _RAY_ENVIRONMENT


class HostProcess(subprocess.Popen[str]):
    """A process on a host. `pid` is that of a go-between that waits for it; signals and the exit code are its own.

    The end of a `with` waits for it, as that of `subprocess.Popen` does, but an error kills it first.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, traceback)

    def send_signal(self, sig: int) -> None:
        eventually(lambda: self.poll() is not None or _children(self.pid))
        for pid in _children(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, sig)


class _Namespaces:
    """The namespaces of one host, or of the switch, and the first process in them."""

    def __init__(self, name: str, within: _Namespaces | None = None) -> None:
        """Make them, and return when they can be used.

        Args:
            name: The hostname in there.
            within: Whose user namespace to use. The first one, if it is not root's, has one of its own.

        Raises:
            RuntimeError: The system does not let us.
        """
        self._unprivileged = os.geteuid() != 0
        user = ("--user", "--map-root-user") if self._unprivileged and within is None else ()
        boot = ("unshare", *user, *_SEPARATE, "--mount-proc", "--fork", "--kill-child", "sh", "-c", _BOOT, "boot")
        self._outer = subprocess.Popen(
            [*(within.enter() if within else ()), *boot, name, _names(), sys.executable, _STAY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # an interrupt at the terminal is for the test
        )
        assert self._outer.stdin is not None and self._outer.stdout is not None
        with self._outer.stdout as said:
            line = said.readline()
            first = _children(self._outer.pid)
            if line != "ready\n" or not first:
                self._outer.stdin.close()
                line += said.read()
                self._outer.wait()
                raise RuntimeError(line.strip() or "nothing was said")
        [self.pid] = first

    def enter(self, *kinds: str) -> list[str]:
        """The start of a command that runs in namespaces of these kinds, and in the user namespace if there is one."""
        user = ("--user", "--preserve-credentials") if self._unprivileged else ()
        return ["nsenter", f"--target={self.pid}", *user, *kinds, "--"]

    def take_no_short_cuts(self, device: str) -> None:
        """Have packets leave a device as they would travel on a real cable, for those that read them there."""
        subprocess.run([*self.enter("--net"), sys.executable, "-ISc", _CHECK_SUMS, device], check=True)

    def ip(self, *commands: str) -> None:
        """Change the network in there. Outside of the process namespace, so that process ids are this process's."""
        argv = [*self.enter("--net"), "ip", "-batch", "-"]
        done = subprocess.run(argv, input="\n".join(commands), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{commands}: {done.stderr}")

    def close(self) -> None:
        """Kill everything in there; when this returns, all of it is dead. Does nothing the second time."""
        if self._outer.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, 9)
        with suppress(BrokenPipeError):
            self._outer.communicate()


class Hosts:
    """Hosts and the network between them, for the time of a `with`."""

    def __init__(self) -> None:
        self._closing = ExitStack()
        self._switch: _Namespaces
        self._count = 0

    def __enter__(self) -> Hosts:
        with ExitStack() as undo:
            self._switch = _Namespaces("switch")
            undo.callback(self._switch.close)
            self._switch.ip("link add bridge type bridge", "link set bridge up")
            self._closing = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.close()

    def add(self) -> Host:
        """A new host in the network, with nothing running on it."""
        self._count += 1
        assert self._count <= _MOST_HOSTS, "too many hosts"
        host = Host(self._count, self._switch)
        self._closing.callback(host.close)
        host.plug_in()
        return host


class Host:
    """One host: what runs here reaches other hosts by their address or name only. `Hosts.add` makes it."""

    def __init__(self, number: int, switch: _Namespaces) -> None:
        self.name = f"host{number}"
        self.address = _address(number)
        self.ray_address = f"{self.address}:{_GCS_PORT}"
        """Where a Ray driver connects to, once `start_head` has returned. It must run on a node: elsewhere it hangs."""
        self._switch = switch
        self._inside = _Namespaces(self.name, within=switch)
        self._processes: list[HostProcess] = []
        self._cable: subprocess.Popen[str] | None = None

    def __repr__(self) -> str:
        return f"<{self.name} at {self.address}>"

    def plug_in(self) -> None:
        """Lay the cable from the host to the switch."""
        self._switch.ip(
            f"link add {self.name} type veth peer name eth0 netns {self._inside.pid}",
            f"link set {self.name} master bridge up",
        )
        # a default route as any host has, although nobody is there: programs ask it for their own address
        self._inside.ip(f"addr add {self.address}/24 dev eth0", "link set eth0 up", "route add default dev eth0")

    def start_head(
        self, *, num_cpus: int = 2, resources: Mapping[str, float] | None = None, missed_health_checks: int = 5
    ) -> None:
        """Start a Ray cluster, of which this host is the head node.

        Args:
            num_cpus: Of this host, as Ray sees it.
            resources: Its others.
            missed_health_checks: After so many, a second each, a host is dead to Ray.
        """
        config = _SYSTEM_CONFIG | {"health_check_failure_threshold": missed_health_checks}
        head = ("--head", f"--port={_GCS_PORT}", "--include-dashboard=false", "--no-monitor")
        self._ray_start(*head, f"--system-config={json.dumps(config)}", num_cpus=num_cpus, resources=resources)

    def join(self, head: Host, *, num_cpus: int = 2, resources: Mapping[str, float] | None = None) -> None:
        """Make this host a node of the cluster."""
        self._ray_start(f"--address={head.ray_address}", num_cpus=num_cpus, resources=resources)

    def _ray_start(self, *options: str, num_cpus: int, resources: Mapping[str, float] | None) -> None:
        self.run(
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *options),
            f"--node-ip-address={self.address}",
            f"--num-cpus={num_cpus}",
            f"--resources={json.dumps(dict(resources or {}))}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
            "--include-log-monitor=false",
        )

    def popen(self, *argv: str, **options: Any) -> HostProcess:
        """Start a process on this host.

        Args:
            argv: The program and its arguments.
            options: As of `subprocess.Popen`. Here `env` is added to the environment, in which Ray is set up already.
        """
        environment = _ray_environment() | options.pop("env", {})
        # entering the host's mounts leads to the root directory
        there = ("env", f"--chdir={options.pop('cwd', Path.cwd())}")
        argv = (*self._inside.enter(*_SEPARATE), *there, *argv)
        process = HostProcess(argv, env=environment, text=True, **options)
        self._processes.append(process)
        return process

    def run(self, *argv: str, timeout_s: float = 50, **options: Any) -> str:
        """Run a process on this host to its end and return what it printed.

        Raises:
            AssertionError: It failed, or took too long; the message has what it printed.
        """
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(*argv, **pipes | options) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout_s)
                outcome = f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
                outcome = f"not done after {timeout_s} s"
        assert outcome == "exit code 0", f"{argv[:3]} on {self}: {outcome}\n{stdout}\n{stderr}"
        return stdout

    def cut(self) -> None:
        """Cut the cable: packets to and from here are lost, and nobody is told."""
        self._switch.ip(f"link set {self.name} down")

    def mend(self) -> None:
        """Undo `cut`."""
        self._switch.ip(f"link set {self.name} up")

    def slow_down(self, delay_s: float, loss: float) -> None:
        """Lay a long and bad cable, for good: packets take longer each way, and some are lost.

        A process hands them on: the kernel's own way (netem) is not in every kernel.

        Args:
            delay_s: How much longer, in seconds.
            loss: The share of packets that is lost, each way.
        """
        near, far = f"{self.name}-near", f"{self.name}-far"
        self._switch.ip(
            f"link set {self.name} nomaster",
            f"link add {near} type veth peer name {far}",
            f"link set {near} up",
            f"link set {far} up",
        )
        self._switch.take_no_short_cuts(far)
        self._inside.take_no_short_cuts("eth0")
        command = (sys.executable, "-ISc", _SLOW_CABLE, self.name, near, str(delay_s), str(loss))
        self._cable = subprocess.Popen(
            [*self._switch.enter("--net"), *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._cable.stdout is not None
        assert self._cable.stdout.readline() == "ready\n", "the cable could not be laid"
        self._switch.ip(f"link set {far} master bridge")

    def kill(self) -> None:
        """Let the host die. All its processes are dead when this returns.

        Its kernel still closes their connections, so peers notice soon; after `cut` they do not, as in a power failure.
        """
        self._inside.close()
        for process in self._processes:
            process.wait()

    def close(self) -> None:
        """Let the host die, and forget what its processes have printed. `Hosts` does that in the end."""
        self.kill()
        if self._cable is not None:
            self._cable.communicate()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()

    def connect(self, host: str, port: int, *, timeout_s: float = PATIENCE_S) -> socket.socket:
        """A TCP connection from this host that the test itself holds.

        Raises:
            OSError: It could not be made, as if the test ran here.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            arguments = (str(theirs.fileno()), host, str(port), str(timeout_s))
            self.run(sys.executable, "-ISc", _CONNECT, *arguments, pass_fds=[theirs.fileno()])
            said, descriptors, _, _ = socket.recv_fds(ours, 16, 1)
        if code := int(said):
            raise OSError(code, f"{os.strerror(code)}: {host}:{port} from {self}")
        connection = socket.socket(fileno=descriptors[0])
        connection.settimeout(timeout_s)
        return connection

    def get(self, url: str, *, timeout_s: float = PATIENCE_S) -> tuple[int, bytes]:
        """Make an HTTP request from this host, and return status and body. For others, see `connect`."""
        parts = urlsplit(url)
        assert parts.hostname, url
        client = http.client.HTTPConnection(parts.hostname, parts.port or 80)
        client.sock = self.connect(client.host, client.port, timeout_s=timeout_s)
        with closing(client):
            client.request("GET", url.partition(parts.netloc)[2] or "/")
            response = client.getresponse()
            return response.status, response.read()
