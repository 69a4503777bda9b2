"""The client against scripted replies: what it sends, how it counts, what it makes of every way to fail."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import pytest

from omr.chunks import Chunk
from omr.client import Client, Completion
from omr.errors import ContextOverflow, Failure, RequestError, StreamDropped
from omr.sampling import Sampling
from omr.server import Endpoint, Server


def sse(*events: Any, done: bool = True) -> list[bytes]:
    data = [e if isinstance(e, str) else json.dumps(e) for e in events] + (["[DONE]"] if done else [])
    return [f"data: {d}\n\n".encode() for d in data]


def choice(text: str = "", **extra: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None, **extra}]}


class Body(httpx.AsyncByteStream):
    """A response body in given parts, that may break, and knows whether it was closed."""

    def __init__(self, parts: Sequence[bytes], fail: Exception | None = None) -> None:
        self.parts, self.fail, self.closed = parts, fail, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part
            await asyncio.sleep(0)
        if self.fail:
            raise self.fail

    async def aclose(self) -> None:
        self.closed = True


Reply = Callable[[httpx.Request], httpx.Response] | httpx.Response | Exception


class Replies:
    """A transport that gives prepared replies in turn."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, httpx.Response) else reply(request)

    @property
    def body(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.requests[-1].content)
        return data


def ok(*parts: bytes, fail: Exception | None = None) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Body(parts, fail))


def endpoint(server: Server | None = None) -> Endpoint:
    return Endpoint(base_url="http://127.0.0.1:9", model="tiny", server=server or Server(), api_key="secret")


def client(replies: Replies, server: Server | None = None) -> Client:
    return Client(endpoint(server), transport=httpx.MockTransport(replies), pause_s=0.001)


def run(
    replies: Replies, *, chat: bool = False, sampling: Sampling | None = None, **options: Any
) -> tuple[list[Chunk], Any]:
    """All chunks of one stream, and the stream."""

    async def main() -> tuple[list[Chunk], Any]:
        async with client(replies) as one:
            sampling_ = sampling or Sampling()
            stream = (
                one.stream_chat([{"role": "user", "content": "hi"}], sampling_, **options)
                if chat
                else one.stream_completion("hi", sampling_, **options)
            )
            chunks: list[Chunk] = []
            await stream.each(chunks.append)
            return chunks, stream

    return asyncio.run(main())


def usage(written: int, prompt: int = 5) -> dict[str, Any]:
    return {"completion_tokens": written, "prompt_tokens": prompt}


def test_what_is_sent() -> None:
    replies = Replies(ok(*sse(choice("x", finish_reason="stop"))))
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, max_tokens=99, seed=4)
    run(replies, sampling=sampling, stop=["</tool_call>"], max_tokens=12, seed=8)
    assert replies.requests[0].url == "http://127.0.0.1:9/v1/completions"
    assert replies.requests[0].headers["authorization"] == "Bearer secret"
    assert replies.body == {
        "model": "tiny",
        "prompt": "hi",
        "max_tokens": 12,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 8,
        "stop": ["</tool_call>"],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "skip_special_tokens": False,
    }
    replies = Replies(ok(*sse(choice("x", finish_reason="stop"))))
    run(replies)  # neutral parameters are left out: some servers refuse the field itself
    assert not {"top_k", "min_p", "repetition_penalty", "stop"} & set(replies.body)
    assert (replies.body["max_tokens"], replies.body["seed"]) == (512, 0)


def test_the_server_option_has_the_last_word_on_the_body() -> None:
    class Plain(Server):
        def request_body(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
            return {"prompt": body["prompt"], "chat": chat}

    replies = Replies(ok(*sse(choice("x", finish_reason="stop"))))

    async def main() -> None:
        async with client(replies, Plain()) as one:
            await one.stream_completion([1, 2], Sampling()).read()

    asyncio.run(main())
    assert replies.body == {"prompt": [1, 2], "chat": False}


COUNTED = {
    "continuous usage": (
        [
            {**choice("ab"), "usage": usage(2)},
            {**choice("c"), "usage": usage(6)},
            {**choice("", finish_reason="stop"), "usage": usage(7)},
            {"choices": [], "usage": usage(7)},
        ],
        [2, 4, 1],
    ),
    "token ids": ([choice("ab", token_ids=[1, 2]), choice("c", token_ids=[3], finish_reason="stop")], [2, 1]),
    "usage at the end": (
        [choice("ab"), choice("c", finish_reason="stop"), {"choices": [], "usage": usage(9)}],
        [0, 0, 9],
    ),
    "nothing": ([choice("ab"), choice("c"), choice("", finish_reason="stop")], [0, 0, 0, 2]),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_tokens_are_counted_by_what_the_server_reports(kind: str) -> None:
    events, want = COUNTED[kind]
    chunks, stream = run(Replies(ok(*sse(*events))))
    assert [c.num_tokens for c in chunks] == want
    assert "".join(c.text for c in chunks) == "abc"
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["stop"]
    assert stream.num_prompt_tokens == (5 if "usage" in kind else 0)
    assert stream.sent <= stream.first <= chunks[-1].time
    assert [c.time for c in chunks] == sorted(c.time for c in chunks)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_events_may_be_split_anywhere(size: int) -> None:
    text = b": keep-alive\r\n\r\nevent: x\r\n" + b"".join(sse(choice("naïve 数"), choice("!", finish_reason="length")))
    text = text.replace(b"data: ", b"data:", 1)
    chunks, _ = run(Replies(ok(*(text[i : i + size] for i in range(0, len(text), size)))))
    assert [(c.text, c.finish_reason) for c in chunks][:2] == [("naïve 数", None), ("!", "length")]


@pytest.mark.parametrize("key", ["stop_reason", "matched_stop"])
def test_stop_reason_under_both_its_names(key: str) -> None:
    chunks, _ = run(Replies(ok(*sse(choice("x", finish_reason="stop", **{key: "</tool_call>"})))))
    assert chunks[0].stop_reason == "</tool_call>"


def test_chat_deltas() -> None:
    def delta(**message: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": message, "finish_reason": None}]}

    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    replies = Replies(ok(*sse(delta(role="assistant", content=""), delta(content="it is "), delta(content="7"), end)))
    chunks, _ = run(replies, chat=True)
    assert "".join(c.text for c in chunks) == "it is 7"
    assert replies.requests[0].url.path == "/v1/chat/completions"
    assert replies.body["messages"] == [{"role": "user", "content": "hi"}]


def test_tool_calls_and_thinking_come_beside_the_text() -> None:
    tool = {"type": "function", "function": {"name": "python", "parameters": {}}}
    call = {"index": 0, "id": "c", "function": {"name": "python", "arguments": "{}"}}

    def delta(reason: str | None = None, **message: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": message, "finish_reason": reason}]}

    events = [delta(reasoning_content="hm"), delta(reasoning="so"), delta(tool_calls=[call]), delta("tool_calls")]
    replies = Replies(ok(*sse(*events)))
    chunks, stream = run(replies, chat=True, tools=[tool], tool_choice="none")
    assert [c.reasoning for c in chunks][:2] == ["hm", "so"]
    assert [c.tool_calls for c in chunks if c.tool_calls] == [[call]]
    assert chunks[3].finish_reason == "tool_calls" and sum(c.num_tokens for c in chunks) == 3
    assert stream.first == chunks[0].time
    assert replies.body["tools"] == [tool] and replies.body["tool_choice"] == "none"
    assert replies.body["parallel_tool_calls"] is False
    junk = Replies(ok(*sse(delta(tool_calls="none", reasoning=7, content="x"), delta("stop"))))
    assert [c.text for c in run(junk, chat=True)[0] if c.text] == ["x"] and "tools" not in junk.body


def test_read_gives_one_value() -> None:
    async def main() -> Completion:
        async with client(Replies(ok(*sse(*COUNTED["continuous usage"][0])))) as one:
            return await one.stream_completion("hi", Sampling()).read()

    got = asyncio.run(main())
    assert (got.text, got.num_tokens, got.num_prompt_tokens, got.finish_reason) == ("abc", 7, 5, "stop")
    assert got.sent <= got.first <= got.end


FINE = sse(choice("x", finish_reason="stop"))


@pytest.mark.parametrize(
    "failures",
    [
        [httpx.ConnectError("refused")],
        [httpx.ReadError("reset"), httpx.RemoteProtocolError("gone"), httpx.ConnectTimeout("slow")],
        [httpx.Response(503), httpx.Response(429)],
        [ok(fail=httpx.ReadError("reset before the first event"))],
    ],
)
def test_failures_before_the_first_token_are_tried_again(failures: list[Reply]) -> None:
    replies = Replies(*failures, ok(*FINE))
    chunks, _ = run(replies)
    assert chunks[0].text == "x" and len(replies.requests) == len(failures) + 1


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.Response(502, text="bad gateway")])
def test_but_not_for_ever(failure: Any) -> None:
    replies = Replies(*[failure] * 9)
    with pytest.raises(RequestError, match=r"refused|bad gateway"):
        run(replies)
    assert len(replies.requests) == 4


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ({"fail": httpx.ReadError("reset")}, "reset"),
        ({"fail": httpx.RemoteProtocolError("incomplete chunked read")}, "incomplete"),
        ({}, "without a finish reason"),
    ],
)
def test_a_stream_that_breaks_off_is_a_countable_failure_and_not_repeated(ending: Any, message: str) -> None:
    replies = Replies(ok(*sse(choice("half"), done=False), **ending), ok(*FINE))
    seen = []

    async def main() -> None:
        async with client(replies) as one:
            await one.stream_completion("hi", Sampling()).each(lambda chunk: seen.append(chunk.text))

    with pytest.raises(StreamDropped, match=message) as caught:
        asyncio.run(main())
    assert isinstance(caught.value, Failure) and seen == ["half"] and len(replies.requests) == 1


@pytest.mark.parametrize("event", ['{"error": {"message": "engine died"}}', '{"error": "engine died"}', "{", "[1]"])
def test_an_error_event_breaks_the_stream(event: str) -> None:
    parts = sse(choice("half"), event, done=False)
    for body in (parts, [b"".join(parts)], [b"".join(parts), b"data: x\n\n"]):
        seen = []

        async def main(body: list[bytes] = body, seen: list[str] = seen) -> None:
            async with client(Replies(ok(*body))) as one:
                await one.stream_completion("hi", Sampling()).each(lambda chunk: seen.append(chunk.text))

        with pytest.raises(StreamDropped, match=r"engine died|no JSON|no object"):
            asyncio.run(main())
        assert seen == ["half"]


OVERFLOWS = [
    "This model's maximum context length is 2048 tokens and your request has 1990 input tokens",
    "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
    "max_tokens must be at least 1, got -3.",
]


@pytest.mark.parametrize("message", OVERFLOWS)
def test_context_overflow_is_told_from_other_refusals(message: str) -> None:
    for body in ({"error": {"message": message, "code": 400}}, {"message": message}, {"error": message}, message):
        with pytest.raises(ContextOverflow, match=re.escape(message)) as caught:
            run(Replies(httpx.Response(400, text=body if isinstance(body, str) else json.dumps(body))))
        assert caught.value.status == 400


def test_other_refusals_are_not_repeated() -> None:
    replies = Replies(httpx.Response(400, json={"error": {"message": "temperature must be >= 0\nand finite"}}))
    with pytest.raises(RequestError, match="400: temperature must be >= 0 and finite") as caught:
        run(replies)
    assert not isinstance(caught.value, ContextOverflow)
    with pytest.raises(RequestError, match="maximum context"):
        run(Replies(httpx.Response(500, text="maximum context length is a string in a traceback")))


def test_having_had_enough_closes_the_connection() -> None:
    body = Body(sse(choice("a"), choice("b"), choice("c", finish_reason="stop")))

    async def main() -> None:
        async with client(Replies(httpx.Response(200, stream=body))) as one:
            seen = []
            await one.stream_completion("hi", Sampling()).each(lambda chunk: seen.append(chunk.text) or True)
            assert seen == ["a"] and body.closed

    asyncio.run(main())


def test_metrics_and_models() -> None:
    async def main() -> None:
        page, cards = httpx.Response(200, text="a 1\n"), httpx.Response(200, json={"data": [{"id": "tiny"}]})
        replies = Replies(page, cards, httpx.Response(500, text="no"), httpx.ConnectError("refused"))
        async with client(replies) as one:
            assert await one.metrics() == "a 1\n"
            assert replies.requests[0].url.path == "/metrics"
            assert await one.models() == ["tiny"]
            for _ in range(2):
                with pytest.raises(RequestError):
                    await one.metrics()

    asyncio.run(main())
