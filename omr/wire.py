"""HTTP/1.1 to a server on this machine, in as few steps as it takes.

A stream of tokens is many small reads, and with a small model on a CPU a general HTTP client (which parses in Python,
or wraps every read in a task, a timer and a few objects) costs a tenth of what decoding does. A server that was started
here needs none of TLS, proxies, redirects, cookies and compression, so what is left is written out: a request in one
write, a reply read as its bytes arrive, connections used again. Anything else goes through httpx (see client.py).

Failures are httpx's, so that its transports and this one are caught alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import cast

import httpx

_MAX_HEAD_BYTES = 1 << 16
_MAX_HELD_BYTES = 1 << 20
"""Of a body that nobody reads, before the connection is read no further."""


class Wire:
    """Connections to one host and port. Belongs to one event loop."""

    def __init__(self, host: str, port: int, *, timeout_s: float, connect_timeout_s: float = 10.0) -> None:
        """`timeout_s` is the longest silence on a connection that waits for its server."""
        self._host, self._port = host, port
        self._timeout_s, self._connect_timeout_s = timeout_s, connect_timeout_s
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        name = f"[{host}]" if ":" in host else host
        self._host_line = f"host: {name}:{port}\r\n".encode()

    async def request(self, method: str, path: str, headers: bytes, body: bytes) -> WireReply:
        """The reply's head; its body is read by iterating. `headers` are whole lines. Raises httpx.TransportError."""
        connection = await self._take()
        try:
            connection.send(
                b"%s %s HTTP/1.1\r\n%s%scontent-length: %d\r\n\r\n%s"
                % (method.encode(), path.encode(), self._host_line, headers, len(body), body)
            )
            await connection.head()
        except BaseException:
            connection.abort()
            raise
        return WireReply(connection)

    async def _take(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self), self._host, self._port
                )
        except TimeoutError:
            raise httpx.ConnectTimeout(f"no connection within {self._connect_timeout_s:g} s") from None
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return connection

    async def aclose(self) -> None:
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # aborted transports close their sockets in the next turn of the loop


class WireReply:
    """A reply whose head is here. Iterate over the pieces of its body; close it when done."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self.status_code = connection.status

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        part = await self._connection.part()
        if not part:
            raise StopAsyncIteration
        return part

    async def aread(self) -> bytes:
        return b"".join([part async for part in self])

    async def aclose(self) -> None:
        """Closes the connection too, unless the body was read to its end."""
        self._connection.release()


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._heard = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._error: httpx.TransportError | None = None
        self._reset()

    def _reset(self) -> None:
        self._raw = b""
        """Received and not yet understood."""
        self._body: list[bytes] = []
        self._held = 0
        self.status = 0
        """0 until the head is here."""
        self._left: int | None = 0
        """Bytes to come of this chunk, or of the body; None until the connection ends."""
        self._chunked = self._in_trailer = self._ended = self._reusable = self._paused = False

    # what the wire asks

    @property
    def usable(self) -> bool:
        return self._error is None and not self._transport.is_closing()

    def send(self, data: bytes) -> None:
        self._reset()
        self._heard = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._wire._timeout_s, self._look_at_the_clock)
        self._transport.write(data)

    async def head(self) -> None:
        while not self.status:
            await self._more()

    async def part(self) -> bytes:
        """What has come of the body; b"" at its end."""
        while not self._body:
            if self._ended:
                return b""
            await self._more()
        part = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._held = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return part

    def release(self) -> None:
        """The reply is done with: keep the connection if nothing of it is left on the way."""
        if self._ended and self._reusable and self.usable and not self._raw:
            self._wire._idle.append(self)
        else:
            self.abort()

    def abort(self) -> None:
        self._stop_clock()
        self._error = self._error or httpx.ReadError("the connection was closed")
        self._transport.abort()

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # what the event loop says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._wire._open.add(self)

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._raw = self._raw + data if self._raw else data
        try:
            self._understand()
        except ValueError as error:
            self._fail(httpx.RemoteProtocolError(f"this is no HTTP: {error}"))
        if self._held > _MAX_HELD_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        if self.status and self._left is None:
            self._ended = True
        self._fail(httpx.RemoteProtocolError("the server closed the connection before its reply was complete"))

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_clock()
        self._wire._open.discard(self)
        self._fail(httpx.ReadError(str(error or "the connection was lost")))

    def _look_at_the_clock(self) -> None:
        """One timer a connection, not one a read or a request."""
        due = self._heard + self._wire._timeout_s
        if self._ended:
            self._timer = None
        elif self._loop.time() < due or self._paused:
            due = max(due, self._loop.time() + 0.001)
            self._timer = self._loop.call_at(due, self._look_at_the_clock)
        else:
            self._timer = None
            self._fail(httpx.ReadTimeout(f"nothing came for {self._wire._timeout_s:g} s"))
            self._transport.abort()

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fail(self, error: httpx.TransportError) -> None:
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # HTTP

    def _understand(self) -> None:
        """Move what can be understood of `_raw` to `_body`. Raises ValueError."""
        if not self.status and not self._read_head():
            return
        while not self._ended:
            if self._chunked and self._left == 0:
                if not self._read_chunk_head():
                    return
                continue
            data = self._raw if self._left is None else self._raw[: self._left]
            if data:
                self._body.append(data)
                self._held += len(data)
                self._raw = self._raw[len(data) :]
            if self._left is None:
                return
            self._left -= len(data)
            if self._left:
                return
            self._ended = not self._chunked

    def _read_head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if not found:
            if len(self._raw) > _MAX_HEAD_BYTES:
                raise ValueError(f"a head of more than {_MAX_HEAD_BYTES} bytes")
            return False
        code, self._reusable, self._chunked, self._left = _parse_head(head)
        self._raw = rest
        if 100 <= code < 200:  # an interim reply: the one that counts follows
            return self._read_head()
        self._ended = code in (204, 304) or (not self._chunked and self._left == 0)
        self.status = code
        return True

    def _read_chunk_head(self) -> bool:
        """The size of the next chunk, behind the end of the last one; or the trailer, at the end of all."""
        if self._in_trailer:
            line, found, rest = self._raw.partition(b"\r\n")
            if found:
                self._raw, self._ended = rest, not line
            return bool(found)
        raw = self._raw.removeprefix(b"\r\n")  # of the chunk before
        line, found, rest = raw.partition(b"\r\n")
        if not found:
            if len(raw) > _MAX_HEAD_BYTES:
                raise ValueError("a chunk without a size")
            return False
        self._left = int(line.partition(b";")[0], 16)
        self._in_trailer = self._left == 0
        self._raw = rest
        return True


@lru_cache(maxsize=16)
def _parse_head(head: bytes) -> tuple[int, bool, bool, int | None]:
    """(status, whether the connection can be used again, whether the body is chunked, its length if known).

    Remembered, as a server's heads differ in little but their date. Raises ValueError.
    """
    first, *lines = head.split(b"\r\n")
    version, _, status = first.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise ValueError(f"{first[:40]!r}")
    headers = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip().lower()
    connection = headers.get(b"connection", b"")
    reusable = connection != b"close" and (version == b"HTTP/1.1" or connection == b"keep-alive")
    chunked = headers.get(b"transfer-encoding") == b"chunked"
    length = headers.get(b"content-length")
    return int(status[:3]), reusable, chunked, 0 if chunked else int(length) if length is not None else None
