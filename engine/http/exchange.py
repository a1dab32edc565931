"""One HTTP request of the ingress, and what its client is answered."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

from ..seam.log import Log
from .heads import Headers

__all__ = ["TEXT_TYPE", "Exchange", "printable", "request_id_of"]

_logger = Log("engine.http")

TEXT_TYPE = (b"content-type", b"text/plain; charset=utf-8")
_JSON_TYPE = (b"content-type", b"application/json")
_LONGEST_REQUEST_ID = 128
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._~:@/+=-]")


class Exchange:
    """One request and the way back to its client.

    Args:
        scope: The ASGI scope.
        send: The server's ``send``.
        request_id: Returned with the answer and logged.

    Attributes:
        headless: Whether the client wants no body.
    """

    __slots__ = ("headless", "request_id", "scope", "send")

    def __init__(self, scope: Any, send: Any, request_id: str) -> None:
        self.scope = scope
        self.send = send
        self.request_id = request_id
        self.headless = scope["method"] == "HEAD"

    async def start(self, status: int, headers: Headers) -> None:
        """Begin an answer. The headers are the exchange's from now on."""
        headers.append((b"x-request-id", self.request_id.encode("ascii")))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Give a whole answer. The headers are the exchange's from now on."""
        headers.append((b"x-request-id", self.request_id.encode("ascii")))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": b"" if self.headless else body, "more_body": False})

    async def say(self, status: int, sentence: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Answer with a sentence of the ingress's own."""
        body = sentence.encode("utf-8")
        await self.answer(status, [(b"content-length", b"%d" % len(body)), TEXT_TYPE, *headers], body)

    async def say_json(self, status: int, content: Any) -> None:
        """Answer with something of the ingress's own for programs."""
        body = json.dumps(content).encode("ascii")
        await self.answer(status, [(b"content-length", b"%d" % len(body)), _JSON_TYPE], body)

    def log_failure(self, status: int, endpoint_name: str, why: str) -> None:
        """Say in the log what the client is not told."""
        scope = self.scope
        _logger.error(
            "%s %s -> %d: endpoint %r: %s (request %s)",
            scope["method"],
            printable(scope["path"]),
            status,
            endpoint_name,
            why,
            self.request_id,
        )


def request_id_of(given: bytes | None) -> str:
    """A request's id: the client's, only as far as it is harmless in a header and in a log; or a new one."""
    cleaned = "" if given is None else _NOT_IN_REQUEST_ID.sub("", given.decode("latin-1"))[:_LONGEST_REQUEST_ID]
    return cleaned or f"{random.getrandbits(64):016x}"


def printable(path: str) -> str:
    """A path for the log, where no client may write lines of its own."""
    return path if path.isprintable() else repr(path)
