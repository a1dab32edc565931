"""How long clients are waited for, and what becomes of bodies that do not come."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from engine.errors import DeadlineExceeded, Overloaded
from engine.http.bodies import BodyTooLarge, Budget, Claim, ClientLeft
from engine.http.bodies import read_body as read_claimed
from engine.http.patience import ClientStalled, Patience

pytestmark = pytest.mark.anyio

LONG_S = 3600.0
SOON_S = 0.02


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def client(*parts: bytes, then: str = "") -> Callable[[], Awaitable[dict[str, Any]]]:
    """What a client sends: these parts, and then it has ended its request, "left", or falls "silent"."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if not then:
        messages[-1]["more_body"] = False
    if then == "left":
        messages.append({"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    return receive


async def read_body(receive: Any, most_bytes: int, patience: Patience | None) -> bytes:
    return await read_claimed(receive, most_bytes, Claim(Budget(1000)), patience)


async def test_a_body_comes_in_parts() -> None:
    for patience in (None, Patience(LONG_S), Patience(None), Patience(LONG_S, time.monotonic() + LONG_S)):
        assert await read_body(client(b"ab", b"", b"c"), 3, patience) == b"abc"
        assert await read_body(client(b"abc"), 3, patience) == b"abc"
        with pytest.raises(BodyTooLarge):
            await read_body(client(b"ab", b"cd", b"e", then="silent"), 3, patience)
        with pytest.raises(ClientLeft):
            await read_body(client(b"ab", then="left"), 3, patience)


@pytest.mark.parametrize("parts", [(), (b"a", b"b")])
async def test_a_client_that_falls_silent_is_not_waited_for(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(ClientStalled, match=r"for 0\.02 s"):
        await read_body(client(*parts, then="silent"), 10, Patience(SOON_S, time.monotonic() + LONG_S))
    await asyncio.sleep(0)  # it was cancelled for that alone


async def test_a_deadline_ends_the_wait() -> None:
    with pytest.raises(DeadlineExceeded):
        await read_body(client(b"a", then="silent"), 10, Patience(LONG_S, time.monotonic() + SOON_S))
    with pytest.raises(DeadlineExceeded):
        await read_body(client(b"a", then="silent"), 10, Patience(LONG_S, time.monotonic() - LONG_S))


async def test_only_waits_count() -> None:
    patience = Patience(SOON_S)
    with patience:
        pass
    await asyncio.sleep(5 * SOON_S)
    with patience:
        await asyncio.sleep(0)
    with pytest.raises(ClientStalled):
        with patience:
            await asyncio.Event().wait()


async def test_who_is_cancelled_by_others_is_cancelled() -> None:
    task = asyncio.ensure_future(read_body(client(b"a", then="silent"), 10, Patience(LONG_S)))
    await asyncio.sleep(SOON_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a task does not tell how often it was cancelled")
async def test_who_is_cancelled_by_others_at_the_same_time_is_cancelled() -> None:
    own: list[Patience] = []

    async def wait() -> None:
        own.append(Patience(LONG_S))
        with own[0]:
            await asyncio.Event().wait()

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    own[0]._end(ClientStalled("in vain"))  # its timer, in the same turn of the loop
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    own[0].stop()


async def test_what_is_over_ends_nobody() -> None:
    patience = Patience(SOON_S)
    with patience:
        await asyncio.sleep(0)
    patience.stop()
    patience.stop()
    await asyncio.sleep(5 * SOON_S)


async def test_bodies_together_have_a_budget() -> None:
    budget = Budget(10)
    first, second = Claim(budget), Claim(budget)
    first.grow_to(6)
    assert await read_claimed(client(b"abc", b"def"), 10, first, None) == b"abcdef"
    assert budget.held_bytes == 6
    with pytest.raises(Overloaded, match="take 6 of max_bodies_bytes=10"):
        await read_claimed(client(b"abc", b"def"), 10, second, None)
    for _ in range(2):
        second.release()
        assert budget.held_bytes == 6
    first.release()
    assert await read_claimed(client(b"0123456789"), 10, second, None) == b"0123456789"


async def test_what_is_only_announced_takes_no_room() -> None:
    budget = Budget(10)
    for _ in range(40):
        Claim(budget).announce(10)
    honest = Claim(budget)
    honest.announce(10)
    assert await read_claimed(client(b"01234", b"56789"), 10, honest, None) == b"0123456789"
    with pytest.raises(Overloaded, match="take 10 of max_bodies_bytes=10"):
        Claim(budget).announce(1)


async def test_half_of_a_body_is_enough_to_be_sure_of_the_rest() -> None:
    budget = Budget(10)
    bodies = [Claim(budget) for _ in range(3)]
    for body in bodies:
        body.announce(8)
    bodies[0].grow_to(4)
    bodies[1].grow_to(1)
    assert budget.held_bytes == 8 + 2
    with pytest.raises(Overloaded, match="take 10 of max_bodies_bytes=10"):
        bodies[2].grow_to(1)
    with pytest.raises(Overloaded, match="take 8 of max_bodies_bytes=10"):
        bodies[1].grow_to(2)
    bodies[1].release()
    bodies[0].grow_to(8)
    bodies[0].release()
    assert budget.held_bytes == 0
