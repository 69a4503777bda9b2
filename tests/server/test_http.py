"""The native server's HTTP behaviour on a real socket, with an engine that plays scripts."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest

from omr.engine.request import Request
from omr.server import SpecCounts, _prometheus
from omr.server._http import bind

from .conftest import EOS, Live, ScriptedEngine, live

SAY = "the answer is 7</tool_call> and more STOP here."


def script_of(tokenizer: Any, text: str = SAY, *, eos: bool = True) -> list[int]:
    return [*tokenizer.backend_tokenizer.encode(text).ids, *([EOS] if eos else [])]


def serve(
    engine: ScriptedEngine,
    tokenizer: Any,
    test: Callable[[httpx.AsyncClient, Live], Awaitable[None]],
    **options: Any,
) -> None:
    async def main() -> None:
        async with live(engine, tokenizer, **options) as server, httpx.AsyncClient(base_url=server.url) as http:
            if "load" not in options:
                await server.thread.ready.wait()
            await test(http, server)

    asyncio.run(asyncio.wait_for(main(), 60))


async def post(http: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> Any:
    reply = await http.post(path, json={"prompt": "hello", "max_tokens": 100, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def events(http: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    body = {"prompt": "hello", "max_tokens": 100, "stream": True, **body}
    async with http.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        assert reply.headers["content-type"].startswith("text/event-stream")
        data = [line[6:] async for line in reply.aiter_lines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(d) for d in data[:-1]]


def joined(chunks: Sequence[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for e in chunks for c in e["choices"] if c["index"] == index)


STEPS = {
    "one": lambda request, done: 1,
    "four": lambda request, done: 4,
    "mixed": lambda request, done: 1 + (done * 7 + 3) % 5,
    "all": lambda request, done: 1000,
}


@pytest.mark.parametrize("steps", STEPS)
def test_text_usage_and_stream_do_not_depend_on_tokens_per_step(tokenizer: Any, steps: str) -> None:
    text = "naïve 数学 </tool_call> ok"
    ids = script_of(tokenizer, text)
    engine = ScriptedEngine(lambda request: ids, STEPS[steps])

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        reply = await post(http)
        [choice] = reply["choices"]
        assert choice["text"] == text
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        prompt = tokenizer.backend_tokenizer.encode("hello").ids
        usage = reply["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(ids))
        assert usage["total_tokens"] == len(prompt) + len(ids)
        chunks = await events(http, stream_options={"include_usage": True, "continuous_usage_stats": True})
        assert joined(chunks) == text
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == usage
        counts = [c["usage"]["completion_tokens"] for c in chunks[:-1]]
        assert counts == sorted(counts) and counts[-1] == len(ids)
        assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
        assert "\ufffd" not in json.dumps(chunks, ensure_ascii=False)

    serve(engine, tokenizer, test)


def test_an_interval_joins_events_but_delays_neither_the_first_nor_the_last(tokenizer: Any) -> None:
    ids = script_of(tokenizer, SAY + " a long tail" * 20)
    engine = ScriptedEngine(lambda request: ids, STEPS["one"], pause_s=0.001)

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        usage = {"include_usage": True, "continuous_usage_stats": True}
        each = await events(http, stream_options=usage)
        few = await events(http, stream_options={**usage, "interval_s": 10})
        assert joined(few) == joined(each) and len(each) > 10
        # the first token alone, all others with the end, and the usage
        assert [len(e["choices"]) for e in few] == [1, 1, 0]
        counts = [e["usage"]["completion_tokens"] for e in few]
        assert counts[0] < 10 and counts[1] == counts[2] == each[-1]["usage"]["completion_tokens"]

    serve(engine, tokenizer, test)


@pytest.mark.parametrize("steps", STEPS)
def test_a_stop_string_ends_text_and_engine_work_and_never_leaks(tokenizer: Any, steps: str) -> None:
    ids = script_of(tokenizer, SAY + " a long tail" * 20)
    engine = ScriptedEngine(lambda request: ids, STEPS[steps], pause_s=0.003)

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        stops: list[str | list[str]] = ["</tool_call>", "wer i", ["zzz", "STOP"]]
        for stop in stops:
            cut = SAY.index(stop if isinstance(stop, str) else stop[1])
            kept = SAY[:cut]
            reply = await post(http, stop=stop)
            [choice] = reply["choices"]
            assert (choice["text"], choice["finish_reason"]) == (kept, "stop")
            assert choice["stop_reason"] == (stop if isinstance(stop, str) else "STOP")
            chunks = await events(http, stop=stop, return_token_ids=True)
            assert joined(chunks) == kept
            # counted and reported: tokens up to the one that completes the stop string, however many were drafted
            tokens = [t for e in chunks for c in e["choices"] for t in c["token_ids"]]
            assert tokens == ids[: len(tokens)] and len(tokens) == reply["usage"]["completion_tokens"]
            whole = tokenizer.backend_tokenizer.decode(tokens)
            shorter = tokenizer.backend_tokenizer.decode(tokens[:-1])
            assert choice["stop_reason"] in whole and choice["stop_reason"] not in shorter
            included = await post(http, stop=stop, include_stop_str_in_output=True)
            assert included["choices"][0]["text"] == kept + choice["stop_reason"]
        await settle(lambda: engine.num_running == 0)
        assert len(engine.aborted) == (0 if steps == "all" else 9)

    serve(engine, tokenizer, test)


async def settle(done: Callable[[], bool]) -> None:
    for _ in range(2000):
        if done():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("did not settle")


def test_choices_seeds_prompts_and_token_ids(tokenizer: Any) -> None:
    def script(request: Request) -> list[int]:
        return script_of(tokenizer, f"seed {request.seed} of {len(request.prompt_ids)}")

    engine = ScriptedEngine(script)

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        prompts = ["hello", "hello you"]
        lengths = [len(tokenizer.backend_tokenizer.encode(p).ids) for p in prompts]
        want = [f"seed {5 + j} of {length}" for length in lengths for j in range(3)]
        reply = await post(http, prompt=prompts, n=3, seed=5)
        assert [c["text"] for c in reply["choices"]] == want
        assert [c["index"] for c in reply["choices"]] == list(range(6))
        chunks = await events(http, prompt=prompts, n=3, seed=5)
        assert [joined(chunks, i) for i in range(6)] == want
        ids = tokenizer.backend_tokenizer.encode("hello").ids
        by_ids = await post(http, prompt=ids, seed=5, return_token_ids=True)
        assert by_ids["choices"][0]["text"] == want[0]
        assert by_ids["choices"][0]["prompt_token_ids"] == ids
        assert by_ids["choices"][0]["token_ids"] == script_of(tokenizer, want[0])
        both = await post(http, prompt=[ids, ids + ids], seed=5)
        assert len(both["choices"]) == 2
        await post(http, seed=None)
        await post(http)
        assert len({r.seed for r in engine.requests[-2:]}) == 2
        assert all(r.max_tokens == 100 for r in engine.requests)

    serve(engine, tokenizer, test)


def test_sampling_fields_reach_the_engine(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda request: script_of(tokenizer))
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.4,
        "seed": -3,
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
        "logprobs": 2,
        "speculate": False,
    }

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        await post(
            http, **fields, an_unknown_field=[1], logit_bias=None, best_of=1, spaces_between_special_tokens=False
        )
        [request] = engine.requests
        got = {k: getattr(request, k) for k in fields}
        assert got == {**fields, "seed": 2**63 - 3}
        await post(http, top_k=-1)
        assert engine.requests[-1].top_k == 0 and engine.requests[-1].speculate is True
        assert (engine.requests[-1].temperature, engine.requests[-1].top_p) == (1.0, 1.0)

    serve(engine, tokenizer, test)


def test_ends_echo_and_special_tokens(tokenizer: Any) -> None:
    ids = [*script_of(tokenizer, "a b", eos=False), EOS, *script_of(tokenizer, " c", eos=False), 0, 5]
    engine = ScriptedEngine(lambda request: ids)

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        def end(reply: Any) -> tuple[Any, ...]:
            [choice] = reply["choices"]
            return choice["text"], choice["finish_reason"], choice["stop_reason"], reply["usage"]["completion_tokens"]

        assert end(await post(http)) == ("a b", "stop", None, ids.index(EOS) + 1)
        assert end(await post(http, include_stop_str_in_output=True, skip_special_tokens=False))[0] == "a b<|im_end|>"
        assert end(await post(http, ignore_eos=True, stop_token_ids=[0]))[:3] == ("a b c", "stop", 0)
        assert end(await post(http, max_tokens=2))[1:] == ("length", None, 2)
        assert end(await post(http, ignore_eos=True, skip_special_tokens=False))[0].startswith("a b<|im_end|> c<|endof")
        assert end(await post(http, echo=True, max_tokens=1)) == ("hello" + "a", "length", None, 1)
        assert end(await post(http, echo=True, max_tokens=0)) == ("hello", "length", None, 0)
        assert joined(await events(http, echo=True)) == "helloa b"
        assert joined(await events(http, echo=True, max_tokens=0)) == "hello"

    serve(engine, tokenizer, test)


@pytest.mark.parametrize("steps", ["one", "four"])
def test_logprobs_of_completions(tokenizer: Any, steps: str) -> None:
    ids = script_of(tokenizer, "sum of 数 is", eos=False)
    engine = ScriptedEngine(lambda request: ids, STEPS[steps])

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        tables = [(await post(http, logprobs=2))["choices"][0]["logprobs"]]
        merged: dict[str, list[Any]] = {}
        for event in await events(http, logprobs=2):
            for key, values in event["choices"][0]["logprobs"].items():
                merged.setdefault(key, []).extend(values)
        for table in [*tables, merged]:
            assert len(table["tokens"]) == len(ids)
            assert table["token_logprobs"] == [-0.25] * len(ids)
            assert all(t[token] == -0.25 for t, token in zip(table["top_logprobs"], table["tokens"], strict=True))
            assert all(len(t) == 3 for t in table["top_logprobs"])
        plain = (await post(http))["choices"][0]
        assert plain["logprobs"] is None
        offsets = tables[0]["text_offset"]
        assert offsets[0] == 0 and offsets == sorted(offsets)

    serve(engine, tokenizer, test)


def test_chat(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda request: script_of(tokenizer, "it is 7"), STEPS["mixed"])
    messages = [{"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "is it?"}]}]

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        chat = "/v1/chat/completions"
        reply = await post(http, chat, messages=messages)
        assert reply["object"] == "chat.completion"
        assert reply["choices"][0]["message"] == {"role": "assistant", "content": "it is 7"}
        prompt = "<|im_start|>user\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.backend_tokenizer.decode(engine.requests[0].prompt_ids, skip_special_tokens=False) == prompt
        chunks = await events(http, chat, messages=messages, n=2)
        deltas = [[c["delta"] for e in chunks for c in e["choices"] if c["index"] == i] for i in range(2)]
        for one in deltas:
            assert one[0] == {"role": "assistant", "content": ""}
            assert "".join(d.get("content", "") for d in one) == "it is 7"
        table = (await post(http, chat, messages=messages, logprobs=True, top_logprobs=1))["choices"][0]["logprobs"]
        assert bytes(b for t in table["content"] for b in t["bytes"]).decode() == "it is 7<|im_end|>"
        assert all(len(t["top_logprobs"]) == 1 for t in table["content"])
        stopped = await post(http, chat, messages=messages, stop=["is"])
        assert stopped["choices"][0]["message"]["content"] == "it "
        # without max_tokens the rest of the context may be used
        body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
        assert (await http.post(chat, json=body)).status_code == 200
        assert engine.requests[-1].max_tokens == 512 - len(engine.requests[-1].prompt_ids)
        assert not tokenizer.backend_tokenizer.decode(
            engine.requests[-1].prompt_ids, skip_special_tokens=False
        ).endswith("assistant\n")
        rude = await http.post(chat, json={"messages": [{"role": "rude", "content": "x"}]})
        assert rude.status_code == 400 and "no rude messages" in rude.json()["error"]["message"]

    serve(engine, tokenizer, test)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": []}, "presence_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", None]}, "stop"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"prompt": ["a"] * 600, "n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": 1, "echo": True}, "echo"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"speculate": "no"}, "speculate"),
    ({"suffix": "x"}, "suffix"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"model": 5}, "model"),
    ({"best_of": 4}, "best_of"),
]
BAD_CHAT: list[dict[str, Any]] = [
    {},
    {"messages": []},
    {"messages": "hi"},
    {"messages": [{"content": "x"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    {"messages": [{"role": "user", "content": "\udfff"}]},
    {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
    {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
    {"messages": [{"role": "user", "content": "x"}], "logprobs": 5},
    {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": []},
    {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    {
        "messages": [{"role": "user", "content": "x"}],
        "continue_final_message": True,
        "add_generation_prompt": True,
    },
]
BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"prompt": NaN}',
    b'{"prompt": "a", "n": Infinity}',
]


def test_bad_bodies_get_400_naming_the_field(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda request: script_of(tokenizer))

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        async def refused(path: str, content: bytes) -> dict[str, Any]:
            reply = await http.post(path, content=content)
            assert reply.status_code == 400, (content[:100], reply.text)
            error: dict[str, Any] = reply.json()["error"]
            assert error["code"] == 400 and error["message"] and "Traceback" not in error["message"]
            return error

        for body, param in BAD:
            content = json.dumps({"prompt": "hello", **body}).encode()
            assert (await refused("/v1/completions", content))["param"] == param, body
        for body in BAD_CHAT:
            await refused("/v1/chat/completions", json.dumps(body).encode())
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            for raw in BROKEN:
                await refused(path, raw)
        assert engine.requests == []
        for path, status in (("/nowhere", 404), ("/v1/completions", 405)):
            reply = await http.get(path)
            assert reply.status_code == status and reply.json()["error"]["code"] == status
        unknown = await http.post("/v1/completions", json={"prompt": "a", "model": "gpt"})
        assert unknown.status_code == 404 and "gpt" in unknown.json()["error"]["message"]
        assert (await http.put("/")).status_code == 404  # what NeMo-Skills' wait loop sends

    serve(engine, tokenizer, test)


def test_no_body_makes_a_server_error(tokenizer: Any) -> None:
    """Random JSON in every known field: an answer or a 400, never a 500."""
    engine = ScriptedEngine(lambda request: script_of(tokenizer, "x"))
    rng = random.Random(11)
    values: list[Any] = [None, True, False, 0, 1, -1, 3, 0.5, 1e308, -(10**30), "", "a", "\u0000", [], [1], ["a"]]
    values += [{}, {"a": 1}, [[1]], [["a"]], [None], {"type": "text"}, [{"role": "user", "content": "x"}], "é" * 50]
    keys = ["prompt", "messages", *KNOWN_FIELDS.split()]

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        seen = set()
        for _ in range(300):
            body = {k: rng.choice(values) for k in rng.sample(keys, rng.randrange(1, 5))}
            body = {"prompt": "a", "messages": [{"role": "user", "content": "x"}], **body}
            path = rng.choice(["/v1/completions", "/v1/chat/completions", "/tokenize"])
            reply = await http.post(path, json=body)
            assert reply.status_code in (200, 400, 404), (path, body, reply.text)
            seen.add(reply.status_code)
        assert {200, 400} <= seen

    serve(engine, tokenizer, test)


KNOWN_FIELDS = (
    "model n max_tokens temperature top_p top_k min_p repetition_penalty frequency_penalty presence_penalty seed stop "
    "stop_token_ids include_stop_str_in_output ignore_eos skip_special_tokens logprobs stream stream_options echo "
    "return_token_ids add_special_tokens best_of suffix tools tool_choice top_logprobs max_completion_tokens "
    "response_format chat_template_kwargs add_generation_prompt continue_final_message"
)


def test_context_overflow_says_what_clients_look_for(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda request: script_of(tokenizer))

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        ids = [5] * 60
        fits = await http.post("/v1/completions", json={"prompt": ids, "max_tokens": 4})
        assert fits.status_code == 200
        for body in ({"prompt": ids, "max_tokens": 5}, {"prompt": ids + ids}, {"prompt": [5] * 64}):
            reply = await http.post("/v1/completions", json=body)
            message = reply.json()["error"]["message"]
            assert reply.status_code == 400
            assert "maximum context length is 64 tokens" in message
            assert f"request has {len(body['prompt'])} input tokens" in message

    serve(engine, tokenizer, test, context_tokens=64)


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_aborts_in_the_engine(tokenizer: Any, stream: bool) -> None:
    ids = script_of(tokenizer, "word " * 200)
    engine = ScriptedEngine(lambda request: ids, pause_s=0.002)

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        body = {"prompt": "hello", "max_tokens": 400, "n": 3, "stream": stream}

        async def call() -> None:
            async with http.stream("POST", "/v1/completions", json=body) as reply:
                async for _ in reply.aiter_bytes():
                    break

        task = asyncio.create_task(call())
        await settle(lambda: len(engine.requests) == 3)
        if not stream:
            task.cancel()
        await asyncio.wait([task])
        await settle(lambda: len(engine.aborted) == 3)
        assert engine.num_running == 0 and server.thread.num_open == 0
        steps = engine.num_steps
        await asyncio.sleep(0.02)
        assert engine.num_steps <= steps + 1  # an idle engine does not step
        page = (await http.get("/metrics")).text
        assert 'omr:request_success_total{model_name="tiny",finished_reason="abort"} 3' in page

    serve(engine, tokenizer, test)


def test_an_engine_that_dies_fails_what_runs_and_turns_health_to_500(
    tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(lambda request: script_of(tokenizer, "word " * 50), pause_s=0.02, die_at=12)

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        async def lines() -> list[str]:
            body = {"prompt": "a", "max_tokens": 90, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as reply:
                assert reply.status_code == 200
                return [line async for line in reply.aiter_lines() if line]

        whole, streamed = await asyncio.gather(
            http.post("/v1/completions", json={"prompt": "a", "max_tokens": 90}), lines()
        )
        assert "the cache caught fire" in json.loads(streamed[-1][6:])["error"]["message"]
        assert "[DONE]" not in "".join(streamed) and len(streamed) > 2
        assert whole.status_code == 500 and "the cache caught fire" in whole.json()["error"]["message"]
        assert (await http.get("/health")).status_code == 500
        later = await http.post("/v1/completions", json={"prompt": "a"})
        assert later.status_code == 500 and "Traceback" not in later.text

    serve(engine, tokenizer, test)
    assert "MemoryError: the cache caught fire" in capsys.readouterr().err  # the traceback is for the log


def test_a_request_the_engine_refuses_hurts_no_other(tokenizer: Any) -> None:
    engine = ScriptedEngine(
        lambda request: script_of(tokenizer, "fine"),
        refuse=lambda request: "too long for the cache" if request.max_tokens == 99 else None,
    )

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        for stream in (False, True):
            body = {"prompt": "a", "max_tokens": 99, "stream": stream}
            bad, good = await asyncio.gather(http.post("/v1/completions", json=body), post(http))
            assert bad.status_code == 400 and "too long for the cache" in bad.text
            assert good["choices"][0]["text"] == "fine"
        assert server.thread.num_open == 0

    serve(engine, tokenizer, test)


def test_health_while_loading_and_requests_before_ready(tokenizer: Any) -> None:
    gate = threading.Event()
    engine = ScriptedEngine(lambda request: script_of(tokenizer))

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        assert (await http.get("/health")).status_code == 503
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 503
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        assert (await http.get("/metrics")).status_code == 200
        gate.set()
        await server.thread.ready.wait()
        assert (await http.get("/health")).status_code == 200
        await post(http)

    serve(engine, tokenizer, test, load=lambda: gate.wait(10))


def test_stopping_ends_open_requests_at_once(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda request: script_of(tokenizer, "word " * 200), pause_s=0.005)

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        whole = asyncio.create_task(post(http, max_tokens=400))
        streamed = asyncio.create_task(events(http, max_tokens=400))
        await settle(lambda: engine.num_running == 2 and engine.num_steps > 3)
        server.service.stop()
        assert (await whole)["choices"][0]["finish_reason"] == "abort"
        assert (await streamed)[-1]["choices"][0]["finish_reason"] == "abort"
        assert (await http.get("/health")).status_code == 503
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 503

    serve(engine, tokenizer, test)


def test_metrics_page_adds_up(tokenizer: Any) -> None:
    ids = script_of(tokenizer, "the sum is 12")
    counts = SpecCounts(drafts=10, draft_tokens=30, accepted_tokens=12, accepted_per_pos=[7, 4, 1])
    engine = ScriptedEngine(lambda request: ids, counts=counts)

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        for _ in range(3):
            await post(http)
        await post(http, stop="sum")
        page = (await http.get("/metrics")).text
        values = {s.name: s.value for s in _prometheus.read(page) if "le" not in s.labels}
        prompt = len(tokenizer.backend_tokenizer.encode("hello").ids)
        assert values["omr:prompt_tokens_total"] == 4 * prompt
        assert 3 * len(ids) < values["omr:generation_tokens_total"] < 4 * len(ids)
        assert values["omr:time_to_first_token_seconds_count"] == 4
        assert values["omr:e2e_request_latency_seconds_count"] == 4
        assert values["omr:kv_cache_usage_perc"] == 0.25
        assert _prometheus.spec_counts(page, "omr:spec_decode_num_") == counts

    serve(engine, tokenizer, test)


def test_a_response_in_two_writes_does_not_wait_for_an_acknowledgement(tokenizer: Any) -> None:
    with bind("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP
    engine = ScriptedEngine(lambda request: script_of(tokenizer, "x"))

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        start = time.perf_counter()
        for _ in range(20):
            await post(http)
        assert time.perf_counter() - start < 20 * 0.04

    serve(engine, tokenizer, test)


def test_tokenize_and_back(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda request: [])

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        text = "naïve <tool_call> 数学"
        tokens = (await http.post("/tokenize", json={"prompt": text})).json()
        assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 512
        back = await http.post("/detokenize", json={"tokens": tokens["tokens"]})
        assert back.json() == {"prompt": text}
        assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
        chat = await http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]})
        ids = chat.json()["tokens"]
        assert tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False).endswith("assistant\n")
        assert (await http.post("/tokenize", json={"prompt": 5})).status_code == 400
        assert (await http.post("/detokenize", json={"tokens": "x"})).status_code == 400

    serve(engine, tokenizer, test)


def test_text_that_waits_is_sent_when_the_interval_is_over_though_no_step_comes(tokenizer: Any) -> None:
    ids = script_of(tokenizer, "one two three four")
    engine = ScriptedEngine(lambda request: ids)
    engine.before_step = lambda: time.sleep(3) if engine.num_steps == 3 else None
    before = tokenizer.decode(ids[:3])

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        body = {"prompt": "a", "max_tokens": 400, "stream": True, "stream_options": {"interval_s": 0.1}}
        start, early = time.perf_counter(), ""
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {") and time.perf_counter() - start < 2.5:
                    early += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
        assert before and early == before, "what the three steps before the silence wrote"

    serve(engine, tokenizer, test)


def test_open_streams_share_the_interval(tokenizer: Any) -> None:
    ids = script_of(tokenizer, "word " * 120)
    engine = ScriptedEngine(lambda request: ids, STEPS["one"], pause_s=0.005)

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        async def times() -> list[float]:
            body = {"prompt": "a", "max_tokens": 400, "stream": True, "stream_options": {"interval_s": 0.02}}
            async with http.stream("POST", "/v1/completions", json=body) as reply:
                return [time.perf_counter() async for line in reply.aiter_lines() if line.startswith("data: {")]

        alone = await times()
        together = await asyncio.gather(*(times() for _ in range(8)))
        lasted = max(t[-1] for t in together) - min(t[0] for t in together)
        assert len(alone) > 5
        for one in together:  # the first, one each 8 x 0.02 s, and the end
            assert 3 <= len(one) <= 3 + lasted / 0.12

    serve(engine, tokenizer, test)


def test_sixteen_streams_at_once_stay_apart(tokenizer: Any) -> None:
    def script(request: Request) -> list[int]:
        return script_of(tokenizer, f"<{request.seed}>" * 30)

    engine = ScriptedEngine(script, STEPS["mixed"])

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        streams = await asyncio.gather(*(events(http, seed=s, max_tokens=400) for s in range(16)))
        for seed, chunks in enumerate(streams):
            assert joined(chunks) == f"<{seed}>" * 30
        assert server.thread.num_open == 0

    serve(engine, tokenizer, test)
