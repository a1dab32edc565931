"""Every error the engine raises, as siblings by who must act.

`RetryLater` waits for the engine or the machine, `CallError` for the caller, `BackendError` for the author of the
backend, `EngineClosed` for nobody: it is over. An exception raised by user code is none of these: it arrives at the
caller as its own type, with a `RemoteTraceback` as its cause.

Every error pickles (all arguments go to ``super().__init__``) so that it survives any number of workers.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BackendStartError",
    "CallCancelled",
    "CallError",
    "Cancelled",
    "DeadlineExceeded",
    "EndpointNotFound",
    "EngineClosed",
    "EngineError",
    "InvalidArgument",
    "MethodNotFound",
    "NoReplica",
    "NotSerializable",
    "Overloaded",
    "RemoteError",
    "RemoteTraceback",
    "ReplicaDied",
    "ResourcesUnavailable",
    "ResultNotSerializable",
    "RetryLater",
    "Superseded",
    "WouldBlock",
]


class EngineError(Exception):
    """Root of everything the engine raises on its own account."""


# -- retry later ---------------------------------------------------------------------------------------------------


class RetryLater(EngineError):
    """The call was fine; the engine could not serve it now."""


class Overloaded(RetryLater):
    """The queue of the endpoint is full (HTTP: 503 with Retry-After)."""


class NoReplica(RetryLater):
    """The backend has no replica, and the last tries to start one failed (HTTP: 503 with Retry-After).

    The message says why. The engine keeps trying, more and more slowly; an update of the backend is tried at once.
    """


class DeadlineExceeded(RetryLater, TimeoutError):
    """The call's ``timeout_s`` passed before its answer came, or it ran for longer than ``max_call_s`` (HTTP: 504)."""


class ReplicaDied(RetryLater):
    """The replica died with the call, which had begun there or may have (HTTP: 502). Others are placed again."""


class ResourcesUnavailable(RetryLater):
    """What is needed is not free here; the message says what, and what there is.

    It is what ``ray_actor_options`` asks for, or file descriptors (HTTP: 503 with Retry-After).
    """


# -- fix the call --------------------------------------------------------------------------------------------------


class CallError(EngineError):
    """The caller must change the call."""


class InvalidArgument(CallError, ValueError):
    """An argument or option is wrong; the message names the field, the value and what is allowed."""


class EndpointNotFound(CallError, KeyError):
    """No endpoint has this name (HTTP: 404)."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # that of KeyError would show the message in quotation marks


class MethodNotFound(CallError, AttributeError):
    """The backend has no public method of this name (HTTP: 400)."""


class NotSerializable(CallError, TypeError):
    """An argument or a backend cannot be pickled; the message says which part of it."""


class Cancelled(CallError):
    """The call was given up by ``ref.cancel()``, so that there is no result to wait for."""


class Superseded(CallError):
    """A newer update of the same backend came before this one was done; what it asks for takes its place."""


class WouldBlock(CallError, RuntimeError):
    """A sync handle would block the event loop of the async backend that uses it."""


# -- fix the backend -----------------------------------------------------------------------------------------------


class BackendError(EngineError):
    """The author of the backend must act."""


class BackendStartError(BackendError):
    """A replica did not become ready: it died, or its constructor outlasted the deadline."""


class ResultNotSerializable(BackendError, TypeError):
    """What the backend returned cannot be pickled; the message says which part of it."""


class RemoteError(BackendError):
    """Stands for a user's exception that cannot be rebuilt here.

    Args:
        type_name: The qualified name of the original exception's type.
        message: ``str()`` of the original exception.
        remote_traceback: The formatted traceback of the replica.
    """

    def __init__(self, type_name: str, message: str, remote_traceback: str) -> None:
        super().__init__(type_name, message, remote_traceback)
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message} (the exception itself could not be rebuilt in this process)"


# -- it is over ----------------------------------------------------------------------------------------------------


class EngineClosed(EngineError, RuntimeError):
    """The engine was shut down, or belongs to the process this one was forked from."""


# -- in user code --------------------------------------------------------------------------------------------------


class CallCancelled(BaseException):
    """Raised in a plain callable whose call nobody wants any more; what `asyncio.CancelledError` is to an async one.

    Like that one it is no `Exception`, so that ``except Exception`` does not swallow it. Clean up in ``finally``.
    """


class RemoteTraceback(Exception):
    """The traceback of a replica, as the ``__cause__`` of the exception raised there."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\nraised in a replica:\n{self.text}"
