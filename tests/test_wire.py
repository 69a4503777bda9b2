"""The client over real sockets: connections used again, broken in every way, closed by cancelling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from omr.chunks import Chunk
from omr.client import Client, Completion
from omr.errors import RequestError, StreamDropped
from omr.sampling import Sampling
from omr.server import Endpoint, Server

Talk = Callable[["Wire"], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def event(text: str = "", **extra: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": None, **extra}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


END = event("", finish_reason="stop") + b"data: [DONE]\n\n"


class Wire:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def request(self) -> dict[str, Any]:
        """The next request's headers, in lower case, and its body under "body"."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers: dict[str, Any] = {"line": head[0]}
        for line in head[1:]:
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return headers | {"body": json.loads(body) if body else None}

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@asynccontextmanager
async def serving(talk: Talk) -> AsyncIterator[tuple[Client, list[Wire]]]:
    wires: list[Wire] = []
    talks: list[asyncio.Task[None]] = []

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wires.append(Wire(reader, writer))
        try:
            await talk(wires[-1])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.append(asyncio.create_task(on_connect(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with Client(Endpoint(base_url=url, model="m", server=Server()), pause_s=0.001, timeout_s=0.5) as client:
            yield client, wires
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
    finally:
        server.close()


def complete(talk: Talk, times: int = 1) -> tuple[list[Completion], list[Wire]]:
    async def main() -> tuple[list[Completion], list[Wire]]:
        async with serving(talk) as (client, wires):
            return [await client.stream_completion("hi", Sampling()).read() for _ in range(times)], wires

    return asyncio.run(main())


def test_a_connection_is_used_again_and_requests_are_plain() -> None:
    heads: list[dict[str, Any]] = []

    async def talk(wire: Wire) -> None:
        while True:
            heads.append(await wire.request())
            await wire.send(CHUNKED)
            for part in (event("it "), event("is ") + event("7"), END):
                await wire.chunk(part)
            await wire.send(b"0\r\n\r\n")

    got, wires = complete(talk, times=3)
    assert [c.text for c in got] == ["it is 7"] * 3 and len(wires) == 1
    assert heads[0]["line"] == "POST /v1/completions HTTP/1.1" and heads[0]["body"]["prompt"] == "hi"
    assert heads[0]["authorization"] == "Bearer EMPTY" and heads[0]["content-type"] == "application/json"
    assert heads[0]["accept-encoding"] == "identity" and heads[0]["host"].startswith("127.0.0.1:")


def test_a_connection_closed_between_requests_is_replaced() -> None:
    async def talk(wire: Wire) -> None:
        await wire.request()
        body = event("x") + END
        await wire.send(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)  # says nothing of closing

    got, wires = complete(talk, times=3)
    assert [c.text for c in got] == ["x"] * 3 and len(wires) >= 3


FRAMES = {
    "chunked": lambda body: (
        CHUNKED + b"".join(b"%X;x=1\r\n%s\r\n" % (len(p), p) for p in (body[:7], body[7:])) + b"0\r\nt: 1\r\n\r\n"
    ),
    "length": lambda body: HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body,
    "until it closes": lambda body: HEAD + b"connection: close\r\n\r\n" + body,
    "after an interim reply": lambda body: (
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    ),
    "old": lambda body: b"HTTP/1.0 200 OK\r\n\r\n" + body,
}


@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize("frame", FRAMES)
def test_replies_of_every_shape_in_pieces_of_any_size(frame: str, size: int) -> None:
    async def talk(wire: Wire) -> None:
        while True:
            await wire.request()
            data = FRAMES[frame](event("é") + END)
            for i in range(0, len(data), size):
                await wire.send(data[i : i + size])
                await asyncio.sleep(0)
            if frame in ("until it closes", "old"):
                return

    got, wires = complete(talk, times=2)
    assert [c.text for c in got] == ["é"] * 2
    assert len(wires) == (2 if frame in ("until it closes", "old") else 1)


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        CHUNKED + b"zz\r\n",
        HEAD + b"content-length: x\r\n\r\n",
        b"x" * 70_000,
    ],
    ids=["no_http", "no_status", "no_size", "no_length", "no_end"],
)
def test_what_is_no_http_is_a_failed_request(reply: bytes) -> None:
    async def talk(wire: Wire) -> None:
        await wire.request()
        await wire.send(reply)
        await asyncio.sleep(5)

    with pytest.raises(RequestError, match="no HTTP"):
        complete(talk)


@pytest.mark.parametrize("how", ["reset", "chunked", "length", "silence"])
def test_a_stream_broken_on_the_wire_is_dropped(how: str) -> None:
    async def talk(wire: Wire) -> None:
        await wire.request()
        await wire.send(HEAD + b"content-length: 100000\r\n\r\n" if how == "length" else CHUNKED)
        await (wire.send if how == "length" else wire.chunk)(event("half"))
        if how == "silence":
            await asyncio.sleep(30)
        if how == "reset":
            wire.writer.transport.abort()

    with pytest.raises(StreamDropped, match="broke"):
        complete(talk)


def test_before_the_first_token_it_is_sent_again_then_given_up() -> None:
    async def hang_up(wire: Wire) -> None:
        await wire.request()
        tries.append(wire)
        if len(tries) > 2 and patient:
            await wire.send(HEAD + b"connection: close\r\n\r\n" + event("x") + END)

    tries: list[Wire] = []
    patient = True
    assert complete(hang_up)[0][0].text == "x" and len(tries) == 3
    tries, patient = [], False
    with pytest.raises(RequestError, match=r"RemoteProtocolError|ReadError"):
        complete(hang_up)
    assert len(tries) == 4


def test_nobody_listens() -> None:
    async def main() -> None:
        async with serving(lambda wire: asyncio.sleep(0)) as (client, _):
            url = client.endpoint.base_url
        async with Client(Endpoint(base_url=url, model="m", server=Server()), pause_s=0.001) as late:
            with pytest.raises(RequestError, match="ConnectError"):
                await late.stream_completion("hi", Sampling()).read()
            with pytest.raises(RequestError, match="ConnectError"):
                await late.metrics()

    asyncio.run(main())


def test_a_refusal_carries_its_status_and_the_connection_lives() -> None:
    async def talk(wire: Wire) -> None:
        await wire.request()
        body = b'{"error": {"message": "no such model"}}'
        await wire.send(b"HTTP/1.1 404 Not Found\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await wire.request()
        await wire.send(HEAD + b"connection: close\r\n\r\n" + event("x") + END)

    async def main() -> None:
        async with serving(talk) as (client, wires):
            with pytest.raises(RequestError, match="404: no such model") as caught:
                await client.stream_completion("hi", Sampling()).read()
            assert caught.value.status == 404
            assert (await client.stream_completion("hi", Sampling()).read()).text == "x" and len(wires) == 1

    asyncio.run(main())


class Odd(Exception):
    pass


@pytest.mark.parametrize("how", ["enough", "cancel", "raise"])
def test_giving_up_a_stream_closes_its_connection_at_once(how: str) -> None:
    async def main() -> None:
        heard, left = asyncio.Event(), asyncio.Event()

        async def talk(wire: Wire) -> None:
            await wire.request()
            await wire.send(CHUNKED)
            await wire.chunk(event("on and on"))
            assert await wire.reader.read() == b""  # the end of the client's side
            left.set()

        def take(chunk: Chunk) -> bool:
            assert chunk.text == "on and on"
            heard.set()
            if how == "raise":
                raise Odd
            return how == "enough"

        async with serving(talk) as (client, _):
            task = asyncio.create_task(client.stream_completion("hi", Sampling()).each(take))
            await heard.wait()
            if how == "enough":
                await task
            else:
                if how == "cancel":
                    task.cancel()
                with pytest.raises(asyncio.CancelledError if how == "cancel" else Odd):
                    await task
            async with asyncio.timeout(0.3):
                await left.wait()

    asyncio.run(main())


def test_enough_in_the_last_event_keeps_the_connection() -> None:
    async def talk(wire: Wire) -> None:
        while True:
            await wire.request()
            body = event("x", finish_reason="stop") + b"data: [DONE]\n\n"
            await wire.send(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)

    async def main() -> None:
        async with serving(talk) as (client, wires):
            for _ in range(3):
                await client.stream_completion("hi", Sampling()).each(lambda chunk: True)
            assert len(wires) == 1

    asyncio.run(main())
