"""As much of a WebSocket client (RFC 6455) as it takes to hear what a local server says: text and binary messages."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import struct

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


class WebSocket:
    def __init__(self, host: str, port: int, path: str, timeout: float = 30.0) -> None:
        self._socket = socket.create_connection((host, port), timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline().decode()
        if " 101 " not in status:
            raise ConnectionError(f"{path}: the server answered {status.strip()!r}")
        while self._stream.readline() not in (b"\r\n", b""):
            pass
        self._socket.settimeout(None)

    def receive(self) -> str | bytes | None:
        """The next message, waited for; None when the server has closed."""
        message, kind = b"", TEXT
        while True:
            head = self._stream.read(2)
            if len(head) < 2:
                return None
            last, code, length = head[0] & 0x80, head[0] & 0x0F, head[1] & 0x7F  # a server never masks
            if length >= 126:
                length = int.from_bytes(self._stream.read(2 if length == 126 else 8), "big")
            payload = self._stream.read(length)
            if code == CLOSE:
                return None
            if code == PING:
                self._send(PONG, payload)
            if code not in (CONTINUATION, TEXT, BINARY):
                continue
            kind = code or kind
            message += payload
            if last:
                return message.decode() if kind == TEXT else message

    def send(self, text: str) -> None:
        self._send(TEXT, text.encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the server was faster
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a reader that waits in another thread
        self._socket.close()

    def _send(self, code: int, payload: bytes) -> None:
        """A client always masks."""
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else struct.pack(">BH", 0x80 | 126, size)
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(bytes([0x80 | code]) + length + mask + masked)
