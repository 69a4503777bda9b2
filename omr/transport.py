"""httpx's requests over aiohttp's connections.

httpx parses HTTP in Python, and a stream of tokens is many small reads: with a small model on a CPU the client then
costs a tenth of what decoding does. aiohttp's parser is compiled. Only the wire is aiohttp's: requests, replies and
errors stay httpx's, so code and tests may put any other httpx transport in its place.

Proxies and certificates are those of httpx: the environment's proxies, but never for the loopback; certifi's
authorities unless SSL_CERT_FILE names others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import httpx
from yarl import URL

_READ_BYTES = 1 << 16
_FAILURES = (aiohttp.ClientError, OSError)


class Transport(httpx.AsyncBaseTransport):
    """Connections that are opened when needed and used again. Belongs to one event loop."""

    def __init__(self, base_url: httpx.URL, *, timeout_s: float, connect_timeout_s: float = 10.0) -> None:
        """For requests to `base_url`. `timeout_s` is the longest silence on a connection."""
        self._secure = base_url.scheme == "https"
        self._trust_env = base_url.host not in ("127.0.0.1", "::1", "localhost")  # no proxy may see the loopback
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        certified = httpx.create_ssl_context(trust_env=self._trust_env) if self._secure else True
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0, ssl=certified),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
            trust_env=self._trust_env,
            auto_decompress=False,  # httpx does it, if anything was compressed at all
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=_READ_BYTES,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The reply's head; its body comes as `stream` is read. Raises httpx.TransportError."""
        if self._session is None:
            self._session = self._open()
        try:
            reply = await self._session.request(
                request.method,
                URL(str(request.url), encoded=True),
                headers={name: value for name, value in request.headers.items() if name != "host"},
                data=await request.aread() or None,
                allow_redirects=False,
            )
        except _FAILURES as error:
            raise _as_httpx(error) from error
        return httpx.Response(reply.status, headers=list(reply.raw_headers), stream=_Body(reply))

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


class _Body(httpx.AsyncByteStream):
    """What the server sends, as it comes. Closing it before its end closes the connection."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self._reply = reply

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            part = await self._reply.content.readany()
        except _FAILURES as error:
            raise _as_httpx(error) from error
        if not part:
            raise StopAsyncIteration
        return part

    async def aclose(self) -> None:
        self._reply.close()


def _as_httpx(error: Exception) -> httpx.TransportError:
    """What httpx calls the same failure."""
    kind = next((theirs for ours, theirs in _KINDS.items() if isinstance(error, ours)), httpx.ReadError)
    return kind(str(error))


_KINDS: dict[type[Exception], type[httpx.TransportError]] = {  # the first that fits
    aiohttp.ConnectionTimeoutError: httpx.ConnectTimeout,
    TimeoutError: httpx.ReadTimeout,
    aiohttp.ClientConnectorError: httpx.ConnectError,
    aiohttp.InvalidURL: httpx.UnsupportedProtocol,
    aiohttp.ServerDisconnectedError: httpx.RemoteProtocolError,
    aiohttp.ClientPayloadError: httpx.RemoteProtocolError,
    aiohttp.ClientResponseError: httpx.RemoteProtocolError,
}
