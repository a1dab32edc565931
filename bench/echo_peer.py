"""The answering process of `bench.bench_tls`: gives back what it is sent by channels over TCP, until its input ends.

A line of JSON on its standard input says the secret and, for TLS, the certificate; its first line of output is its
address.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

from engine.seam.channel import Channel, ChannelListener
from engine.seam.messages import AS_CONFIGURED, PYTHON, Call, Message, Reply
from engine_wire import Acceptor, Poller, connect, listen_tcp, tcp_address
from engine_wire.tls import TLS

SECRET = b"the secret of the benchmarks"


class Echo:
    """Answers what it hears."""

    def received(self, channel: Channel, message: Message) -> None:
        assert isinstance(message, Call)
        channel.send(Reply(message.id, 0, b"", message.payload))

    def lost(self, channel: Channel, reason: str) -> None:
        pass


class EchoPeer:
    """The asking side, and owner of the answering process."""

    def __init__(self, tls: TLS | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.echo_peer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        said = None if tls is None else [tls.certificate, tls.key, tls.authority]
        self._process.stdin.write(json.dumps(said) + "\n")
        self._process.stdin.flush()
        self._poller = Poller()
        self._answers = 0
        self._size = 0
        address = self._process.stdout.readline().strip()
        self._channel = connect(address, self, on_loop=False, poller=self._poller, secret=SECRET, tls=tls)
        self._channel.drive(lambda: self._channel.opened, 10)

    def call(self, payload: bytes) -> None:
        """One round trip."""
        wanted = self._answers + 1
        self._channel.send(Call(wanted, PYTHON, "", None, "", b"", payload, AS_CONFIGURED))
        while self._answers < wanted:  # the poller may have the channel for a moment
            self._channel.drive(lambda: self._answers == wanted, None)
        assert self._size == len(payload)

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
        assert isinstance(message, Reply)
        self._size = len(message.payload)
        self._answers += 1

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`."""
        raise ConnectionError(reason)

    def close(self) -> None:
        """End the answering process."""
        self._channel.close()
        self._poller.close()
        self._process.communicate()


def main() -> None:
    said: Any = json.loads(sys.stdin.readline())
    loop = asyncio.new_event_loop()
    listening = listen_tcp("127.0.0.1")
    print(tcp_address(listening), flush=True)
    echo: ChannelListener = Echo()
    acceptor = Acceptor([listening], lambda channel: echo, loop, secret=SECRET, tls=said and TLS(*said))
    loop.add_reader(sys.stdin, loop.stop)
    loop.run_forever()
    acceptor.close()


if __name__ == "__main__":
    main()
