"""Answers that come in parts. Runs in the replica."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any, TypeAlias

from ..seam.jsonable import to_json
from .heads import (
    BYTES,
    EMPTY_HEAD,
    JSON_LINES,
    TEXT,
    WITHOUT_BODY,
    announced_length,
    encode_head,
    stream_head,
    wrong_length,
)

__all__ = ["Background", "Part", "Streamed"]

Background: TypeAlias = Callable[[], Awaitable[Any]]

Part: TypeAlias = tuple[bytes, bytes]
"""A head, empty from the second part on, and a piece of the body."""


class Streamed:
    """An answer that comes in parts: an iterator of user code, or a Starlette response that is not a plain one.

    Each iteration gives ``(head, chunk)``, the head being empty from the second part on. No part is asked for before
    the one before it was taken. Closing the iteration closes the user's generator. An error before the first part is
    the call's error; one after it breaks the answer off. To be iterated once, either way.

    Attributes:
        step: How an ordinary iterator is asked for its next item; by default with `next`.
        background: What the response wants to have run once the answer is out. Known when the iteration has ended.
    """

    def __init__(self, source: Any, *, response: bool = False) -> None:
        self._source = source
        self._response = response
        self._ordinary = not response and not isinstance(source, AsyncIterator)
        self.background: Background | None = None
        self.step: Callable[[Iterator[Any]], Any] = next

    def _iterate(self) -> Generator[Part, None, None]:
        source: Iterator[Any] = self._source
        try:
            items = iter(source)
            first = True
            while True:
                try:
                    item = self.step(items)
                except StopIteration:
                    break
                yield _part(item, first=first)
                first = False
            if first:
                yield EMPTY_HEAD, b""
        finally:
            _close(source)

    async def parts(self, scope: dict[str, Any], *, on_loop: bool = False) -> AsyncGenerator[Part, None]:
        """Iterate on the running asyncio loop.

        Args:
            scope: The ASGI scope of the request; a Starlette response wants it.
            on_loop: The loop serves other calls, too: an ordinary iterator is asked for its items in a thread.
        """
        if self._response:
            parts = self._of_response(scope)
        elif self._ordinary:
            parts = self._in_thread() if on_loop else self._of_iterator()
        else:
            parts = self._of_async_iterator()
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()

    async def close(self) -> None:
        """Close the user's generator if nothing was or will be iterated (idempotent)."""
        source: Any = getattr(self._source, "body_iterator", None) if self._response else self._source
        if hasattr(source, "aclose"):
            await source.aclose()
        else:
            _close(source)

    async def _of_iterator(self) -> AsyncGenerator[Part, None]:
        parts = self._iterate()
        try:
            for part in parts:
                yield part
        finally:
            parts.close()

    async def _in_thread(self) -> AsyncGenerator[Part, None]:
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        parts = self._iterate()

        def advance() -> Part | None:
            return context.run(next, parts, None)

        step: asyncio.Future[Part | None] | None = None
        try:
            while True:
                step = loop.run_in_executor(None, advance)
                part = await asyncio.shield(step)
                if part is None:
                    break
                yield part
        finally:
            if step is not None and not step.done():  # cancelled: a generator that runs cannot be closed
                await asyncio.wait([step])
            step = None  # what it raised knows this frame: they would keep each other in memory
            parts.close()

    async def _of_async_iterator(self) -> AsyncGenerator[Part, None]:
        source: AsyncIterator[Any] = self._source
        try:
            first = True
            async for item in source:
                yield _part(item, first=first)
                first = False
            if first:
                yield EMPTY_HEAD, b""
        finally:
            if hasattr(source, "aclose"):
                await source.aclose()

    async def _of_response(self, scope: dict[str, Any]) -> AsyncGenerator[Part, None]:
        response = self._source
        handover = _Handover()
        if isinstance(getattr(response, "body_iterator", None), AsyncIterable):
            response.body_iterator = _Contained(response.body_iterator)
        task = asyncio.ensure_future(_contained(response, scope, handover))
        head = b""
        announced: int | None = None
        size = 0
        over = False
        try:
            while not over:
                message = await handover.next(task)
                if message is None:
                    raise RuntimeError(f"{type(response).__qualname__} returned before its answer was complete")
                if message["type"] == "http.response.start":
                    status, headers = message["status"], [*message.get("headers", ())]
                    head = encode_head(status, headers)
                    if status not in WITHOUT_BODY and scope["method"] != "HEAD":
                        announced = announced_length(headers)
                elif message["type"] == "http.response.body":
                    last = not message.get("more_body", False)
                    chunk = bytes(message.get("body", b""))
                    size += len(chunk)
                    if announced is not None and (size > announced or (last and size < announced)):
                        raise ValueError(wrong_length(announced, size if last else f"at least {size}"))
                    over = last
                    if chunk or head or over:
                        yield head, chunk
                        head = b""
                if not over:
                    handover.taken()
        finally:
            if over:
                # the rest of the call is the response's background task
                handover.taken()
                self.background = functools.partial(_itself, task)
            else:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.exception()
                await self.close()
            del task  # what it raised knows this frame: they would keep each other in memory


class _Handover:
    """Passes an ASGI application's messages to an iterator, one at a time: `send` returns once it was taken."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._message: dict[str, Any] | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._taken: asyncio.Future[None] | None = None

    async def receive(self) -> dict[str, Any]:
        # the iterator is closed when the client leaves, which cancels the application
        return await self._loop.create_future()  # type: ignore[no-any-return]

    async def send(self, message: dict[str, Any]) -> None:
        self._message = message
        self._taken = self._loop.create_future()
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
        await self._taken

    async def next(self, task: asyncio.Future[None]) -> dict[str, Any] | None:
        if self._message is None:
            self._arrived = self._loop.create_future()
            await asyncio.wait([task, self._arrived], return_when=asyncio.FIRST_COMPLETED)
            if self._message is None:
                self._arrived.cancel()
                try:
                    await task  # raises what the application raised
                finally:
                    del task  # what it raised knows this frame: they would keep each other in memory
                return None
        message, self._message = self._message, None
        return message

    def taken(self) -> None:
        if self._taken is not None and not self._taken.done():
            self._taken.set_result(None)


def _itself(task: Awaitable[Any]) -> Awaitable[Any]:
    return task


# In a task either would end the whole event loop. A response is run in one, and may iterate in others.
_ENDS_A_LOOP = (SystemExit, KeyboardInterrupt)


async def _contained(response: Any, scope: dict[str, Any], handover: _Handover) -> None:
    try:
        await response(scope, handover.receive, handover.send)
    except _ENDS_A_LOOP as error:
        raise RuntimeError(f"{type(response).__qualname__} raised {type(error).__name__}") from error


class _Contained:
    """The iterator of a response, whose errors end no event loop."""

    def __init__(self, source: AsyncIterable[Any]) -> None:
        self._source = source.__aiter__()

    def __aiter__(self) -> _Contained:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._source.__anext__()
        except _ENDS_A_LOOP as error:
            raise RuntimeError(f"the iterator of a response raised {type(error).__name__}") from error

    async def aclose(self) -> None:
        if hasattr(self._source, "aclose"):
            await self._source.aclose()


def _part(item: Any, *, first: bool) -> Part:
    chunk, content_type = _chunk(item)
    return stream_head(content_type) if first else b"", chunk


def _chunk(item: Any) -> tuple[bytes, str]:
    if isinstance(item, str):
        return item.encode("utf-8"), TEXT
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item), BYTES
    return to_json(item) + b"\n", JSON_LINES


def _close(source: Any) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()
