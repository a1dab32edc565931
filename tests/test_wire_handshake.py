"""The handshake without any I/O: who knows the secret gets through, and nobody else, whatever they send."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine_wire import handshake
from engine_wire.handshake import ClientHandshake, Handshake, HandshakeError, ServerHandshake
from engine_wire.protocol import GREETING, PROTOCOL_VERSION

SECRET = bytes(range(32))
OTHER = bytes(32)
HELLO_BYTES = 14 + 32
ANSWER_BYTES = 14 + 32 + 32
PROOF_BYTES = 32


def pair(client_secret: bytes = SECRET, server_secret: bytes = SECRET) -> tuple[ClientHandshake, ServerHandshake]:
    return ClientHandshake(client_secret), ServerHandshake(server_secret)


def give(side: Handshake, data: bytes) -> bytes | None:
    """Feed bytes as a socket would, one read after the other; returns its answers, or None once it has refused."""
    answer = b""
    while data and side.wanted:
        piece, data = data[: side.wanted], data[side.wanted :]
        try:
            answer += side.feed(piece)
        except HandshakeError:
            assert side.wanted == 0
            assert not side.complete
            return None
    return answer


def flips(data: bytes) -> Iterator[bytes]:
    """The data with one byte changed, for every byte."""
    for position in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            yield data[:position] + bytes([data[position] ^ change]) + data[position + 1 :]


# -- those who belong together -----------------------------------------------------------------------------------------


def test_who_knows_the_secret_gets_through() -> None:
    client, server = pair()
    assert (client.wanted, server.wanted) == (ANSWER_BYTES, HELLO_BYTES)
    answer = server.feed(client.hello)
    assert (len(client.hello), len(answer), server.wanted) == (HELLO_BYTES, ANSWER_BYTES, PROOF_BYTES)
    assert not server.complete
    proof = client.feed(answer)
    assert (client.complete, client.wanted, len(proof)) == (True, 0, PROOF_BYTES)
    assert server.feed(proof) == b""
    assert (server.complete, server.wanted) == (True, 0)


def test_one_byte_at_a_time() -> None:
    client, server = pair()
    answer = b"".join(server.feed(bytes([byte])) for byte in client.hello)
    proof = b"".join(client.feed(bytes([byte])) for byte in answer)
    assert client.complete
    for byte in proof:
        assert not server.complete
        assert server.feed(bytes([byte])) == b""
    assert server.complete


def test_every_handshake_is_another_one() -> None:
    one, other = ServerHandshake(SECRET), ServerHandshake(SECRET)
    hello = ClientHandshake(SECRET).hello
    assert one.feed(hello) != other.feed(hello)
    assert ClientHandshake(SECRET).hello != hello


def test_the_secret_does_not_travel() -> None:
    client, server = pair()
    answer = server.feed(client.hello)
    assert SECRET not in client.hello + answer + client.feed(answer)


def test_no_side_takes_more_than_it_wants() -> None:
    client, server = pair()
    for side in (client, server):
        with pytest.raises(ValueError, match="of which it wants"):
            side.feed(bytes(side.wanted + 1))
    client.feed(server.feed(client.hello))
    with pytest.raises(ValueError, match=r"^1 bytes, of which it wants 0$"):
        client.feed(b"x")  # what follows belongs to the messages


@pytest.mark.parametrize("side", [ClientHandshake, ServerHandshake])
def test_a_secret_must_be_worth_its_name(side: type[ClientHandshake | ServerHandshake]) -> None:
    for secret in (b"", b"x" * 15):
        with pytest.raises(ValueError, match="at least 16 random bytes"):
            side(secret)
    side(b"x" * 16)


# -- those who do not --------------------------------------------------------------------------------------------------


def test_a_client_finds_out_a_server_with_another_secret() -> None:
    client, server = pair(server_secret=OTHER)
    with pytest.raises(HandshakeError, match=r"^its secret is another one$"):
        client.feed(server.feed(client.hello))
    assert not client.complete


def test_a_server_finds_out_a_client_with_another_secret() -> None:
    client, server = pair(client_secret=OTHER)
    answer = server.feed(client.hello)
    forged = client._proof(b"engine/join\0", client._nonce, answer[14:46])
    with pytest.raises(HandshakeError, match=r"^its secret is another one$"):
        server.feed(forged)
    assert not server.complete


def test_every_truncation_waits() -> None:
    client, server = pair()
    answer = server.feed(client.hello)
    proof = client.feed(answer)
    for end in range(HELLO_BYTES):
        fresh = ServerHandshake(SECRET)
        assert give(fresh, client.hello[:end]) == b""
        assert (fresh.complete, fresh.wanted) == (False, HELLO_BYTES - end)
    for end in range(ANSWER_BYTES):
        fresh_client = ClientHandshake(SECRET)
        assert give(fresh_client, ServerHandshake(SECRET).feed(fresh_client.hello)[:end]) == b""
        assert (fresh_client.complete, fresh_client.wanted) == (False, ANSWER_BYTES - end)
    server.feed(proof[:-1])
    assert (server.complete, server.wanted) == (False, 1)


def test_no_change_of_the_clients_greeting_gets_through() -> None:
    client = ClientHandshake(SECRET)
    for hello in flips(client.hello):
        server = ServerHandshake(SECRET)
        answer = give(server, hello)
        if answer is not None:  # another number: the answer is to something the client never said
            assert hello[:14] == client.hello[:14]
            other = ClientHandshake(SECRET)
            other.hello, other._nonce = client.hello, client._nonce
            assert give(other, answer) is None
        assert not server.complete


def test_no_change_of_the_servers_answer_gets_through() -> None:
    client, server = pair()
    answer = server.feed(client.hello)
    for changed in flips(answer):
        other = ClientHandshake(SECRET)
        other._nonce = client._nonce
        assert give(other, changed) is None
        assert not other.complete


def test_no_change_of_the_clients_proof_gets_through() -> None:
    client, server = pair()
    proof = client.feed(server.feed(client.hello))
    for changed in flips(proof):
        other = ServerHandshake(SECRET)
        other._nonce = server._nonce
        other.feed(client.hello)
        assert give(other, changed) is None
        assert not other.complete


def test_proofs_are_good_for_once() -> None:
    client, server = pair()
    answer = server.feed(client.hello)
    proof = client.feed(answer)
    later = ServerHandshake(SECRET)
    assert later.feed(client.hello)  # the greeting of another day
    assert give(later, proof) is None
    assert give(ClientHandshake(SECRET), answer) is None


def test_nobody_proves_anything_to_himself() -> None:
    client, server = pair()
    assert give(client, client.hello) is None
    answer = server.feed(client.hello)
    assert give(server, answer[-PROOF_BYTES:]) is None
    # A server's own greeting, sent back by a client that waits for it to answer itself.
    assert give(ServerHandshake(SECRET), answer) is None


def test_a_greeting_that_is_made_of_the_clients_own_numbers() -> None:
    client = ClientHandshake(SECRET)
    own = client._proof(b"engine/join\0", client._nonce, client._nonce)
    assert give(client, b"engine/host\0" + client.hello[12:] + own) is None


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n", "it speaks another protocol", id="http"),
        pytest.param(bytes(46), "it speaks another protocol", id="zeros"),
        pytest.param(b"\xff" * 46, "it speaks another protocol", id="huge length"),
        pytest.param(GREETING, "it speaks without a secret", id="no secret"),
        pytest.param(b"engine/joint", "it speaks another protocol", id="almost"),
    ],
)
@pytest.mark.parametrize("side", [ClientHandshake, ServerHandshake])
def test_garbage_is_refused_at_the_first_wrong_byte(
    side: type[ClientHandshake | ServerHandshake], opening: bytes, reason: str
) -> None:
    fresh = side(SECRET)
    right = fresh._peer_magic
    first_wrong = next(at for at, byte in enumerate(opening) if not right.startswith(opening[: at + 1]))
    for byte in opening[:first_wrong]:
        assert fresh.feed(bytes([byte])) == b""
    with pytest.raises(HandshakeError, match=f"^{reason}$" if first_wrong == 0 else "^it speaks another protocol$"):
        fresh.feed(opening[first_wrong : first_wrong + 1])
    assert fresh.wanted == 0


def test_versions_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    later = (PROTOCOL_VERSION + 1).to_bytes(2, "little")
    monkeypatch.setattr(handshake, "_VERSION", later)
    hello = ClientHandshake(SECRET).hello
    monkeypatch.undo()
    with pytest.raises(HandshakeError, match=rf"^it speaks version {PROTOCOL_VERSION + 1}, this side 1$"):
        ServerHandshake(SECRET).feed(hello)
    server = ServerHandshake(SECRET)
    server.feed(hello[:12])
    with pytest.raises(HandshakeError, match="another version of the protocol"):
        server.feed(hello[12:13])


def test_the_version_is_part_of_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing both greetings under way does not make two versions meet."""
    client, server = pair()
    answer = server.feed(client.hello)
    monkeypatch.setattr(handshake, "_VERSION", b"\x02\x00")
    assert give(client, answer[:12] + b"\x02\x00" + answer[14:]) is None
