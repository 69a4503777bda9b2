"""HTTP/1.1 to a server on this machine, in as few steps as it takes.

A stream of tokens is many small reads, and with a small model on a CPU a general HTTP client (which parses in Python,
or wraps every read in a task, a timer and a few objects) costs a tenth of what decoding does. A server that was started
here needs none of TLS, proxies, redirects, cookies and compression, so what is left is written out: a request in one
write, a reply handed on as its bytes arrive, connections used again. Whoever asked is woken once, when the reply is
over: waking a task for every piece costs more than reading the piece. Anything else goes through httpx (see client.py).

Failures are httpx's, so that its transports and this one are caught alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache
from typing import cast

import httpx

_MAX_HEAD_BYTES = 1 << 16


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

    async def request(
        self, method: str, path: str, headers: bytes, body: bytes, hear: Callable[[bytes], bool] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the reply. `headers` are whole lines.

        `hear` gets the body of a 200 instead, piece by piece as it arrives, in a callback of the event loop; True from
        it ends the request, as cancelling does: both close the connection. What `hear` raises is raised here. Raises
        httpx.TransportError.
        """
        connection = await self._take()
        try:
            return await connection.exchange(
                b"%s %s HTTP/1.1\r\n%s%scontent-length: %d\r\n\r\n%s"
                % (method.encode(), path.encode(), self._host_line, headers, len(body), body),
                hear,
            )
        finally:
            connection.release()

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


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._heard = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._reset(None)

    def _reset(self, hear: Callable[[bytes], bool] | None) -> None:
        self._hear = hear
        self._raw = b""
        """Received and not yet understood."""
        self._body: list[bytes] = []
        """Of it, what nobody has heard."""
        self._status = 0
        """0 until the head is here."""
        self._left: int | None = 0
        """Bytes to come of a body that is not chunked; None until the connection ends."""
        self._chunked = self._ended = self._enough = self._reusable = False

    # what the wire asks

    @property
    def usable(self) -> bool:
        return self._error is None and not self._transport.is_closing()

    async def exchange(self, request: bytes, hear: Callable[[bytes], bool] | None) -> tuple[int, bytes]:
        self._reset(hear)
        self._heard = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._wire._timeout_s, self._look_at_the_clock)
        self._transport.write(request)
        self._waiter = self._loop.create_future()
        self._wake()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._error is not None and not (self._ended or self._enough):
            raise self._error
        return self._status, b"".join(self._body)

    def release(self) -> None:
        """The request is done with: keep the connection if nothing of the reply is left on the way."""
        if self._ended and self._reusable and self.usable and not self._raw:
            self._wire._idle.append(self)
        else:
            self.abort()

    def abort(self) -> None:
        self._stop_clock()
        self._error = self._error or httpx.ReadError("the connection was closed")
        self._transport.abort()

    # what the event loop says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._wire._open.add(self)

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._raw = self._raw + data if self._raw else data
        try:
            try:
                self._understand()
            except ValueError as error:
                raise httpx.RemoteProtocolError(f"this is no HTTP: {error}") from None
            finally:
                self._hand_on()
        except Exception as error:  # of `hear` too: they are for whoever asked
            self._ended = False
            self._fail(error)
        self._wake()

    def _hand_on(self) -> None:
        if self._hear is not None and self._body and self._status == 200 and not self._enough and self._error is None:
            part = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body.clear()
            self._enough = self._hear(part)

    def eof_received(self) -> None:
        if self._status and self._left is None:
            self._ended = True
        self._fail(httpx.RemoteProtocolError("the server closed the connection before its reply was complete"))

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_clock()
        self._wire._open.discard(self)
        self._fail(httpx.ReadError(str(error or "the connection was lost")))

    def _look_at_the_clock(self) -> None:
        """One timer a connection, not one a read or a request."""
        due = self._heard + self._wire._timeout_s
        if self._waiter is None:
            self._timer = None
        elif self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._look_at_the_clock)
        else:
            self._timer = None
            self._fail(httpx.ReadTimeout(f"nothing came for {self._wire._timeout_s:g} s"))
            self._transport.abort()

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        """Wake whoever asked, if there is nothing more to wait for."""
        over = self._ended or self._enough or self._error is not None
        if over and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # HTTP

    def _understand(self) -> None:
        """Move what can be understood of `_raw` to `_body`. Raises ValueError."""
        if not self._status and not self._read_head():
            return
        if self._chunked:
            self._read_chunks()
        elif self._raw and not self._ended:
            data = self._raw if self._left is None else self._raw[: self._left]
            self._body.append(data)
            self._raw = self._raw[len(data) :]
            if self._left is not None:
                self._left -= len(data)
                self._ended = not self._left

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
        self._status = code
        return True

    def _read_chunks(self) -> None:
        """The whole chunks of `_raw`, and the trailer behind the last, which is empty."""
        raw, at = self._raw, 0
        while not self._ended:
            line = raw.find(b"\r\n", at)
            if line < 0:
                if len(raw) - at > _MAX_HEAD_BYTES:
                    raise ValueError("a chunk without a size")
                break
            size = int(raw[at:line].partition(b";")[0], 16)
            if size < 0:
                raise ValueError(f"a chunk of {size} bytes")
            if size == 0:
                end = raw.find(b"\r\n\r\n", line)
                if end < 0:
                    if len(raw) - line > _MAX_HEAD_BYTES:
                        raise ValueError("a trailer without end")
                    break
                at, self._ended = end + 4, True
            else:
                end = line + 2 + size
                if len(raw) < end + 2:
                    break
                self._body.append(raw[line + 2 : end])
                at = end + 2
        self._raw = raw[at:]


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
