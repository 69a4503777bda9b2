"""Tool calls on the native server: prompts of conversations with tools, calls taken out of replies."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omr.server._tools import CallText, as_text, for_template, source_parameter, template_knows_tools
from omr.solve.tool_calls import PYTHON_TOOL, CallPieces

from .conftest import Live, ScriptedEngine
from .test_http import STEPS, events, post, script_of, serve

CHAT = "/v1/chat/completions"
ASKED = [{"role": "user", "content": "6*7?"}]
TWO = [PYTHON_TOOL, {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
RAW = "Let me compute. <tool_call>\nprint(6*7)\n</tool_call>\n```output\n41\n```\nso"
JSON_CALL = 'Hm. <tool_call>\n{"name": "python", "arguments": {"code": "print(6*7)"}}\n</tool_call>'


def source(call: dict[str, Any]) -> Any:
    return json.loads(call["function"]["arguments"])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("text", [RAW, JSON_CALL])
def test_a_call_is_taken_out_of_the_text_whole_and_streamed(tokenizer: Any, steps: str, text: str) -> None:
    ids = script_of(tokenizer, text)
    engine = ScriptedEngine(lambda request: ids, STEPS[steps])

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        asked = {"messages": ASKED, "tools": [PYTHON_TOOL], "parallel_tool_calls": False}
        [choice] = (await post(http, CHAT, **asked))["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", None)
        assert choice["message"]["content"] == text.split("<tool_call>")[0]
        [call] = choice["message"]["tool_calls"]
        assert call["type"] == "function" and call["function"]["name"] == "python"
        assert source(call) == {"code": "print(6*7)"}
        chunks = await events(http, CHAT, **asked)
        deltas = [c["delta"] for e in chunks for c in e["choices"]]
        assert "".join(d.get("content") or "" for d in deltas) == text.split("<tool_call>")[0]
        gathered = CallPieces()
        for delta in deltas:
            gathered.add(delta.get("tool_calls") or ())
        assert [c.code() for c in gathered.calls("x")] == ["print(6*7)"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    serve(engine, tokenizer, test)


def test_several_calls_no_call_and_a_call_cut_off(tokenizer: Any) -> None:
    replies = iter([JSON_CALL + JSON_CALL, "It is 42 <tool>.", "So <tool_call>\nprint(1", RAW])
    engine = ScriptedEngine(lambda request: script_of(tokenizer, next(replies)))

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        asked = {"messages": ASKED, "tools": [PYTHON_TOOL], "max_tokens": 400}
        [two] = (await post(http, CHAT, **asked))["choices"]
        assert len({c["id"] for c in two["message"]["tool_calls"]}) == 2 and two["finish_reason"] == "tool_calls"
        [none] = (await post(http, CHAT, **asked))["choices"]
        assert (
            none["message"] == {"role": "assistant", "content": "It is 42 <tool>."} and none["finish_reason"] == "stop"
        )
        [cut] = (await post(http, CHAT, **asked))["choices"]
        assert cut["message"]["content"] == "So <tool_call>\nprint(1" and cut["finish_reason"] == "stop"
        [silent] = (await post(http, CHAT, **asked, tool_choice="none"))["choices"]
        assert "tool_calls" not in silent["message"] and "<tool_call>" in silent["message"]["content"]

    serve(engine, tokenizer, test)


def test_a_conversation_goes_on_in_the_turn_of_its_call(tokenizer: Any) -> None:
    """The prompt after a tool result is the one that the text loop would send: the same prefix, the same cache."""
    engine = ScriptedEngine(lambda request: script_of(tokenizer, "so 42"))
    call = {"id": "c", "function": {"name": "python", "arguments": json.dumps({"code": "print(6*7)"})}}
    turns = [
        *ASKED,
        {"role": "assistant", "content": "Let me compute. ", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42\n"},
    ]

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        await post(http, CHAT, messages=turns, tools=[PYTHON_TOOL])
        later = [*turns, {"role": "assistant", "content": "so 42"}, {"role": "user", "content": "sure?"}]
        await post(http, CHAT, messages=later, tools=[PYTHON_TOOL])
        prompts = [tokenizer.backend_tokenizer.decode(r.prompt_ids, skip_special_tokens=False) for r in engine.requests]
        assert prompts[0] == (
            "<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\nLet me compute. <tool_call>\nprint(6*7)\n"
            "</tool_call>\n```output\n42\n```\n"
        )
        assert prompts[1] == prompts[0] + (
            "so 42<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
        )
        refused = await http.post(CHAT, json={"messages": ASKED, "tools": TWO})
        assert refused.status_code == 400 and "knows no tools" in refused.json()["error"]["message"]

    serve(engine, tokenizer, test)


def test_a_template_that_knows_tools_gets_them_and_arguments_as_objects(tokenizer: Any) -> None:
    seen: list[tuple[Any, Any]] = []

    class Template:
        chat_template = "{% for t in tools %}"
        backend_tokenizer = tokenizer.backend_tokenizer

        def apply_chat_template(self, messages: Any, *, tokenize: bool, tools: Any = None, **_: Any) -> str:
            seen.append((messages, tools))
            return "hello"

    call = {"id": "c", "function": {"name": "python", "arguments": '{"code": "1"}'}}
    turns = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    engine = ScriptedEngine(lambda request: script_of(tokenizer, "x"))

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        await post(http, CHAT, messages=turns, tools=TWO)
        await post(http, CHAT, messages=ASKED)

    serve(engine, Template(), test)
    assert seen[0][1] == TWO and seen[1] == (ASKED, None)
    assert seen[0][0][1]["tool_calls"][0]["function"]["arguments"] == {"code": "1"}
    assert for_template([{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}])
    assert template_knows_tools("{% if tools %}") and not template_knows_tools("{{ messages }}")


@pytest.mark.parametrize(
    "body",
    [
        {"tools": "python"},
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [PYTHON_TOOL], "tool_choice": "required"},
        {"tools": [PYTHON_TOOL], "parallel_tool_calls": "no"},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": "x"}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]},
        {
            "tools": [PYTHON_TOOL],
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"code": "\ud800"}'}}]}
            ],
        },
    ],
)
def test_bad_tools_get_400(tokenizer: Any, body: dict[str, Any]) -> None:
    engine = ScriptedEngine(lambda request: script_of(tokenizer))

    async def test(http: httpx.AsyncClient, server: Live) -> None:
        reply = await http.post(CHAT, content=json.dumps({"messages": ASKED, **body}).encode())
        assert reply.status_code == 400 and reply.json()["error"]["message"], reply.text

    serve(engine, tokenizer, test)


def test_only_one_tool_with_one_string_takes_source() -> None:
    assert source_parameter([PYTHON_TOOL]) == "code"
    assert source_parameter(TWO) is None and source_parameter([]) is None
    number = {"function": {"name": "f", "parameters": {"properties": {"n": {"type": "number"}}}}}
    assert source_parameter([number]) is None
    assert source_parameter([{"function": {"name": "f", "parameters": [1]}}]) is None


@given(st.text(alphabet='<>tool_cal/{}": \n', max_size=80), st.lists(st.integers(1, 7), max_size=20))
def test_text_and_calls_do_not_depend_on_the_pieces(text: str, sizes: list[int]) -> None:
    def split(pieces: list[str]) -> tuple[str, list[Any]]:
        parser, shown = CallText([PYTHON_TOOL]), ""
        for piece in pieces:
            shown += parser.push(piece)[0]
        rest, _ = parser.end(None)
        return shown + rest, [c["function"] for c in parser.calls]

    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    assert split([*pieces, text[at:]]) == split([text])


@given(st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda x: st.dictionaries(st.text(max_size=4), x)))
def test_arguments_of_any_shape_are_laid_out(arguments: Any) -> None:
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    ]
    (turn,), is_open = as_text(turns, "code")
    assert is_open and turn["content"].startswith("<tool_call>\n")
