"""The reference of the handle benchmarks: two processes, one Unix socket, pickle each way and nothing else.

Run as a script it is the answering process: `pingpong.py FD`. It ends when the asking side closes.
"""

from __future__ import annotations

import pickle
import socket
import struct
import subprocess
import sys
from typing import Any

_LENGTH = struct.Struct("!I")


def send(sock: socket.socket, message: Any) -> None:
    """Send one pickled, length-prefixed message."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive(sock: socket.socket) -> Any:
    """Receive one message; a small one arrives with a single system call.

    Raises:
        EOFError: the other side closed.
    """
    data = sock.recv(65536)
    while len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        more = sock.recv(65536)
        if not more:
            raise EOFError("the other side closed the socket")
        data += more
    return pickle.loads(memoryview(data)[_LENGTH.size :])


class PingPong:
    """The asking side, and owner of the answering process."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        if self.call(1) != 1:
            raise RuntimeError("the answering process gave a wrong answer")

    def call(self, argument: Any) -> Any:
        """One round trip."""
        send(self._sock, argument)
        return receive(self._sock)

    def close(self) -> None:
        """End the answering process."""
        self._sock.close()
        self._process.wait(10)


def _answer(sock: socket.socket) -> None:
    try:
        while True:
            send(sock, receive(sock))
    except (EOFError, ConnectionError):
        pass


if __name__ == "__main__":
    _answer(socket.socket(fileno=int(sys.argv[1])))
