"""Control messages: four bytes of length, then JSON. Never pickle, never read out of program output.

Both ends check the length before reading on, so a session can neither make its owner allocate nor confuse it: whatever
is not a JSON object below the limit is `BadFrame`, and the session is dropped.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any

FROM_SESSION = 64 * 1024
"""Longest message accepted from a session, in bytes."""
TO_SESSION = 64 * 1024 * 1024
"""Longest message accepted by a session."""
_HEADER = struct.Struct(">I")


class BadFrame(Exception):
    """The peer sent something that is not a message."""


def pack(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return _HEADER.pack(len(body)) + body


class Splitter:
    """Bytes in, messages out."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Messages completed by `data`. Raises BadFrame."""
        self._data += data
        messages = []
        while len(self._data) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._data)
            if length > self._limit:
                raise BadFrame(f"a message of {length} bytes")
            end = _HEADER.size + length
            if len(self._data) < end:
                break
            messages.append(_decode(self._data[_HEADER.size : end]))
            self._data = self._data[end:]
        return messages


def read(fd: int, limit: int = TO_SESSION) -> dict[str, Any] | None:
    """The next message on a blocking descriptor; None at its end. Raises BadFrame."""
    header = _read_exactly(fd, _HEADER.size)
    if header is None:
        return None
    (length,) = _HEADER.unpack(header)
    if length > limit:
        raise BadFrame(f"a message of {length} bytes")
    body = _read_exactly(fd, length)
    return None if body is None else _decode(body)


def write(fd: int, message: dict[str, Any]) -> None:
    data = memoryview(pack(message))
    while data:
        data = data[os.write(fd, data) :]


def _decode(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadFrame(str(error)[:100]) from None
    if not isinstance(message, dict):
        raise BadFrame(f"a {type(message).__name__}, not an object")
    return message


def _read_exactly(fd: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
