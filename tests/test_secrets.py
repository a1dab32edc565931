"""What an engine's parties prove themselves with is shown nowhere: in no log, no repr and no traceback."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import hmac
import logging
import pickle
import socket
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.errors import InvalidArgument
from engine.testing.fakes import FakeListener
from engine_ray.calling.connector import RayConnector
from engine_ray.calling.courier import _OwnConnector
from engine_ray.link.registry import Entry
from engine_ray.link.surroundings import Surroundings
from engine_ray.working.order import Order
from engine_wire import Acceptor, AsyncServiceLoop, BlockingServiceLoop, SocketChannel, Undriven
from engine_wire.handshake import ClientHandshake, HandshakeError, ServerHandshake
from engine_wire.lobby import Lobby
from engine_wire.opening import Opening
from engine_wire.secret import Secret, SecretText
from engine_wire.tls import TLS, identity_of, make_tls

MARK = b"this-is-the-engines-secret-of-32"
SECRET = Secret(MARK)


def shown_anywhere(text: str) -> bool:
    return MARK.decode() in text or MARK.hex() in text or repr(MARK) in text


# -- the values themselves -------------------------------------------------------------------------------------------


def test_a_secret_is_used_like_bytes_and_shows_nothing() -> None:
    assert SECRET == MARK and hash(SECRET) == hash(MARK) and len(SECRET) == 32
    assert hmac.digest(SECRET, b"x", "sha256") == hmac.digest(MARK, b"x", "sha256")
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", f"{SECRET!r}", "%s %r" % (SECRET, [SECRET]), ascii(SECRET)):  # noqa: UP031
        assert not shown_anywhere(shown)
    for same in (copy.copy(SECRET), copy.deepcopy(SECRET), pickle.loads(pickle.dumps(SECRET))):
        assert type(same) is Secret and same == MARK


def test_a_secret_text_is_written_and_not_shown() -> None:
    text = SecretText(MARK.decode())
    assert "".join([text]) == text == MARK.decode()
    assert not shown_anywhere(repr([text]))
    assert type(pickle.loads(pickle.dumps(text))) is SecretText


# -- whoever holds one -----------------------------------------------------------------------------------------------


class Service:
    """As much of one as its loop asks for before it runs."""

    event_loop = None


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def holders() -> Iterator[list[Any]]:
    """One of each that is given the secret."""
    with contextlib.ExitStack() as stack:
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        acceptor = Acceptor([stack.enter_context(listening())], lambda _: FakeListener(), loop, secret=SECRET)
        stack.callback(acceptor.close)
        near, far = socket.socketpair()
        stack.enter_context(far)
        opening = Opening(near, "address", False, ClientHandshake(SECRET))
        channel = SocketChannel(near, FakeListener(), Undriven(), greet=False, opening=opening)
        stack.callback(channel.close)
        blocking = BlockingServiceLoop([stack.enter_context(listening())], Service(), secret=SECRET)  # type: ignore[arg-type]
        stack.callback(blocking._close)
        yield [
            Order("e", "w", "name", "m:f", b"", "address", SECRET, None, False, Surroundings.here()),
            Entry(SECRET, "job", "address"),
            ClientHandshake(SECRET),
            ServerHandshake(SECRET),
            Lobby(SECRET, lambda _: None, acceptor),
            acceptor,
            channel,
            blocking,
            AsyncServiceLoop([], Service(), secret=SECRET),  # type: ignore[arg-type]
            RayConnector("address", SECRET),
            _OwnConnector("address", SECRET, None, lambda: None),
        ]


def reachable(roots: list[Any]) -> Iterator[Any]:
    """All objects that these hold, and those hold, but for modules, types and code."""
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(
            one, (types.ModuleType, type, types.FrameType, types.CodeType, threading.Thread)
        ):
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, types.FunctionType):
            waiting += one.__closure__ or ()
        else:
            waiting += gc.get_referents(one)


def test_nobody_who_holds_it_shows_it(holders: list[Any]) -> None:
    for holder in holders:
        found = [one for one in reachable([holder]) if isinstance(one, (bytes, bytearray)) and MARK in one]
        assert found and {type(one) for one in found} == {Secret}, f"{type(holder).__name__} keeps it as something else"
        for one in reachable([holder]):
            with contextlib.suppress(Exception):  # some cannot be shown yet
                assert not shown_anywhere(repr(one)), type(one)
        assert not shown_anywhere(repr(vars(holder) if hasattr(holder, "__dict__") else holder))


# -- failures --------------------------------------------------------------------------------------------------------


def told_with_locals(kind: type[BaseException], fails: Callable[[], object]) -> str:
    """The traceback of a failure, as those show it that show all they can."""
    try:
        fails()
    except kind as error:
        told = traceback.TracebackException.from_exception(error, capture_locals=True)
        return "".join(told.format())
    raise AssertionError("it did not fail")


def a_client_meets_a_stranger() -> None:
    client = ClientHandshake(SECRET)
    client.feed(ServerHandshake(bytes(32)).feed(client.hello))


def a_server_meets_a_stranger() -> None:
    server = ServerHandshake(SECRET)
    server.feed(ClientHandshake(bytes(32)).hello)
    server.feed(bytes(32))


@pytest.mark.parametrize("meeting", [a_client_meets_a_stranger, a_server_meets_a_stranger])
def test_a_handshake_that_fails_tells_nothing_of_it(meeting: Callable[[], None]) -> None:
    told = told_with_locals(HandshakeError, meeting)
    assert "its secret is another one" in told
    assert not shown_anywhere(told)


def test_a_secret_that_is_too_short_is_not_shown_either() -> None:
    told = told_with_locals(ValueError, lambda: ServerHandshake(Secret(SECRET[:8])))
    assert "secret = <secret>" in told
    assert "this-is-" not in told


async def connect_as_stranger(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(ClientHandshake(bytes(32)).hello)
    await reader.readexactly(14 + 32 + 32)
    writer.write(bytes(32))
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()


def test_strangers_at_the_door_are_logged_without_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        sock = socket.create_server(("127.0.0.1", 0))
        acceptor = Acceptor([sock], lambda _: FakeListener(), loop, secret=SECRET)
        try:
            await asyncio.wait_for(connect_as_stranger(sock.getsockname()[1]), 10)
        finally:
            acceptor.close()

    asyncio.run(main())
    assert "could not prove" in caplog.text
    assert not any(shown_anywhere(f"{record.getMessage()} {vars(record)!r}") for record in caplog.records)


# -- keys of certificates --------------------------------------------------------------------------------------------


def key_lines(tls: TLS) -> list[str]:
    return [line for line in str.__str__(tls.key).splitlines() if "-----" not in line]


def test_a_key_is_not_shown(tmp_path: Any) -> None:
    pytest.importorskip("cryptography")
    tls = make_tls()
    identity = identity_of(tls)
    (tmp_path / "key.pem").write_text(tls.key)
    wrong = [
        TLS(certificate="-----BEGIN CERTIFICATE-----\n!", key=tls.key, authority=tls.authority),
        TLS(certificate=tls.certificate, key=str(tmp_path / "key.pem"), authority="-----BEGIN nothing"),
    ]
    shown = [repr(tls), repr(vars(tls)), repr(identity), repr(vars(identity)), repr(pickle.loads(pickle.dumps(tls)))]
    shown += [told_with_locals(InvalidArgument, functools.partial(identity_of, one)) for one in wrong]
    lines = key_lines(tls)
    assert lines and not any(line in text for line in lines for text in shown)
