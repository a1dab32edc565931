"""This process's connection to Ray, which all of its engines share.

A connection that the application made before is used and never touched. Otherwise the first engine connects, and the
last one to leave disconnects, which also ends a cluster that was started for them. All of that happens on one thread
that lives as long as the connection: the kernel ties the processes of a cluster started here to the thread that started
them, and Ray installs a signal handler when it is started on the main thread.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from engine.errors import EngineClosed, EngineError, InvalidArgument
from engine.seam.log import Log

from .knocking import knock

__all__ = ["announce", "check_connected", "cluster", "join", "leave", "started_here", "where"]

_log = Log("engine.ray")

_NONE_RUNS = "Could not find any running Ray instance"
"""How Ray says that there is no cluster, rather than one that it cannot connect to."""
_KNOCK_S = 10.0

_lock = threading.Lock()  # guards the next two
_keeper: _Connection | None = None
_users = 0
_last = ""  # the cluster that this process is connected to, or was last: for messages


def join(address: str | None, options: Mapping[str, Any], *, start: bool = True) -> bool:
    """Be connected to Ray.

    Args:
        address: The cluster, or None for the one that runs here, or else a new one on this machine.
        options: Further arguments of ``ray.init``.
        start: Start a cluster on this machine if no address is given and none runs.

    Returns:
        Whether `leave` has to be called in the end: false for a connection of the application's own.

    Raises:
        engine.errors.InvalidArgument: There is no such cluster, another one is connected, or an option is wrong.
    """
    global _keeper, _users, _last
    import ray

    if ray.util.client.ray.is_connected():
        raise InvalidArgument(
            "this process is connected to Ray through a client server (ray://), which channels cannot pass: "
            "run the application on a node of the cluster"
        )
    with _lock:
        if _keeper is None and ray.is_initialized():
            _check_same(address)
            _last = cluster()
            return False
        if _keeper is None:
            keeper = _Connection(address, options, start=start)
            keeper.connect()
            _keeper = keeper
            _last = cluster()
        else:
            _check_same(address)
        _users += 1
        return True


def leave() -> None:
    """Take one `join` back; the last one disconnects."""
    global _keeper, _users
    with _lock:
        _users -= 1
        if _users == 0 and _keeper is not None:
            _keeper.disconnect()
            _keeper = None


def cluster() -> str:
    """``"host:port"`` of the head of the cluster that this process is connected to."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def where() -> str:
    """The cluster that this process is connected to, or was last, as messages name it."""
    import ray

    address = cluster() if ray.is_initialized() else _last
    return f"the Ray cluster at {address}" if address else "the Ray cluster"


def announce(engine: str) -> None:
    """Tell the log which cluster an engine is on, and where Ray finds the token; never what it is."""
    with _lock:
        how = "this program's own connection" if _keeper is None else "started here" if _keeper.started else "connected"
    _log.info("engine %s is on %s (%s, %s)", engine, where(), how, _token())


def _token() -> str:
    """Where Ray takes its token from, in the order in which it looks."""
    import ray

    raylet: Any = ray._raylet
    try:
        asked_for = raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN
    except Exception:  # this Ray knows of none, or has another way to say so
        asked_for = False
    if not asked_for:
        return "without a token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "with the token in RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return f"with the token in {path}, as RAY_AUTH_TOKEN_PATH says" if path else "with the token in ~/.ray/auth_token"


def check_connected() -> None:
    """Refuse to ask anything of a Ray that this process has left: Ray would connect anew, to whatever it finds.

    Raises:
        engine.errors.EngineClosed: The process has left it.
    """
    import ray

    if not ray.is_initialized():
        raise EngineClosed(
            f"this process is not connected to {where()} any more: ray.shutdown() was called, or the engine was shut "
            "down that had connected it"
        )


def started_here() -> bool:
    """Whether the cluster that this process is connected to was started for its engines, and ends with the last one."""
    with _lock:
        return _keeper is not None and _keeper.started


def _check_same(address: str | None) -> None:
    connected = cluster()
    if address not in (None, "auto", "local") and _canonical(address) != _canonical(connected):
        raise InvalidArgument(
            f"address={address!r}: this process is connected to the Ray cluster at {connected!r}, and Ray allows one "
            "cluster a process: use that one, or disconnect with ray.shutdown() first"
        )


def _canonical(address: str) -> str:
    """The address as Ray itself writes it, whichever name of this machine it was given by."""
    from ray._private import services

    try:
        return str(services.canonicalize_bootstrap_address(address))
    except Exception:  # it is none, or this Ray has another way to do it
        return address


class _Connection:
    """The thread that holds the connection.

    Attributes:
        started: Whether it has started the cluster that it is connected to.
    """

    def __init__(self, address: str | None, options: Mapping[str, Any], *, start: bool) -> None:
        self._address = address
        self._may_start = start and address in (None, "local")
        self._options = {"log_to_driver": False, "configure_logging": False, **options}
        self._connected = threading.Event()
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self.started = False
        self._thread = threading.Thread(target=self._run, name="engine-ray", daemon=True)

    def connect(self) -> None:
        """Connect; returns when that is done."""
        self._thread.start()
        self._connected.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def disconnect(self) -> None:
        """Disconnect; returns when that is done."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        import ray

        try:
            self._init()
        except Exception as error:
            self._failure = error
        self._connected.set()
        if self._failure is None:
            self._over.wait()
            ray.shutdown()

    def _describe(self) -> str:
        if self._address is not None:
            return f"address={self._address!r}: cannot connect to a Ray cluster there"
        return (
            f"cannot connect to {_sought(self._options.get('_temp_dir'))} (name one by "
            "RayAdapter(address='host:port'), or take a new one by RayAdapter(address='local'))"
        )

    def _init(self) -> None:
        logger = logging.getLogger("ray._private.worker")
        logger.addFilter(_expected)
        try:
            if not self._connected_to_another():
                self._start()
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, EngineError):
                raise
            given = "" if self._address is None else f" (address={self._address!r})"
            raise InvalidArgument(f"RayAdapter: ray.init refused its arguments{given}: {error}") from error
        finally:
            logger.removeFilter(_expected)

    def _connected_to_another(self) -> bool:
        """Connect to the cluster that is wanted, or that there is; false if one has to be started."""
        import ray

        address: str | None
        if self._address == "local":
            return False
        if self._address in (None, "auto"):
            address = _running(self._options.get("_temp_dir"))
            if address is None:
                return False
        else:
            address = self._address
            _check_reachable("address", address)
        try:
            ray.init(address=address, **self._options)
        except (ConnectionError, ray.exceptions.RayError) as error:
            if self._address in (None, "auto") and _NONE_RUNS in str(error):
                return False
            raise InvalidArgument(f"{self._describe()}: {_essence(error)}. {_ADVICE}") from error
        return True

    def _start(self) -> None:
        import ray

        if not self._may_start:
            raise InvalidArgument(
                "no Ray cluster runs on this machine: start one with `ray start --head`, or name another one by "
                "RayAdapter(address='host:port')"
            )
        if getattr(sys, "frozen", False) or not sys.executable:  # Ray starts its processes with it
            raise InvalidArgument(
                f"cannot start a Ray cluster from this process: sys.executable, {sys.executable!r}, is no Python "
                "interpreter; start one with `ray start --head`, and name it by RayAdapter(address='host:port')"
            )
        ray.init(address="local", **{"include_dashboard": False, **self._options})
        self.started = True


def _running(directory: str | None) -> str | None:
    """The cluster that Ray would find by itself: an address for ``ray.init``; None if it is gone.

    Ray notes the address of the cluster that was started last, and knocks there for minutes when that has died
    without being stopped.

    Args:
        directory: Where Ray keeps its files, if not where it does by default.
    """
    from ray._private import services

    named = os.environ.get("RAY_ADDRESS", "")
    if named.startswith("ray://"):
        raise InvalidArgument(
            f"RAY_ADDRESS={named!r} is that of a Ray client server, which channels cannot pass: run the application on "
            "a node of the cluster, and unset it"
        )
    if named == "local":
        return None
    if named:
        _check_reachable("RAY_ADDRESS", named)
        return "auto"
    noted = services.find_bootstrap_address(directory)
    if not noted or knock(noted, _KNOCK_S) is None:
        return "auto"
    _log.info("no Ray answers at %s, which was the last one that was started here", noted)
    others = sorted(services.find_gcs_addresses())
    return next((other for other in others if knock(other, _KNOCK_S) is None), None)


def _sought(directory: str | None) -> str:
    """The cluster that Ray looks for by itself, as messages name it."""
    from ray._private import services

    if named := os.environ.get("RAY_ADDRESS"):
        return f"the Ray cluster at {named}, which RAY_ADDRESS names"
    noted = services.find_bootstrap_address(directory)
    return f"the Ray cluster{f' at {noted}' if noted else ''} that seems to run on this machine"


_ADVICE = (
    "Is a cluster running there (ray start --head), by this version of Ray, and with the same authentication "
    "(RAY_AUTH_MODE)?"
)


def _essence(error: BaseException) -> str:
    """The last line of what an error goes back to: Ray puts whole tracebacks into its messages."""
    reason = error.__cause__ or error.__context__ or error
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(reason).__name__


def _check_reachable(field: str, address: str) -> None:
    """Refuse an address where nobody listens: Ray would knock there for minutes."""
    error = knock(address, _KNOCK_S)
    if error is not None:
        raise InvalidArgument(
            f"{field}={address!r}: cannot connect to a Ray cluster there: {error}. Is one running (ray start --head), "
            "and can its head be reached from here?"
        ) from error


def _expected(record: logging.LogRecord) -> bool:
    """Pass all records but Ray's regret that it could not install a signal handler."""
    return "SIGTERM handler is not set" not in record.getMessage()
