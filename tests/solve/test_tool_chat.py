"""A generation through the chat API: tool calls run, results handed back, budgets and faults as in the text loop."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omr.errors import ContextOverflow, RequestError, StreamDropped
from omr.sampling import Sampling
from omr.sandbox import Outcome
from omr.solve.completer import round_seed
from omr.solve.limits import Limits
from omr.solve.prompt import tags_named
from omr.solve.tool_calls import PYTHON_TOOL, BadCall, CallPieces, ToolCall
from omr.solve.tool_chat import ToolChat

from .scripted import Reply, Request, SandboxDied, ScriptedClient, ScriptedSandbox

ASKED = [{"role": "user", "content": "6*7?"}]
ANSWER = Reply("So it is \\boxed{42}.")


def call(code: str, name: str = "python", id: str = "c1", index: int = 0) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps({"code": code})}
    return {"index": index, "id": id, "type": "function", "function": function}


def calls(*pieces: dict[str, Any], text: str = "Let me compute.", **more: Any) -> Reply:
    return Reply(text, finish_reason="tool_calls", calls=pieces, **more)


def generate(client: ScriptedClient, sandbox: ScriptedSandbox | None = None, **limits: Any) -> ToolChat:
    values: dict[str, Any] = {"max_tokens": 1000, "context_tokens": 4000} | limits
    chat = ToolChat(
        messages=ASKED,
        prompt_tokens=5,
        seed=11,
        sampling=Sampling(),
        limits=Limits(**values),
        tags=tags_named("openmath"),
        count_tokens=len,
    )
    asyncio.run(chat.run(client, sandbox))
    return chat


def done(stdout: str) -> Outcome:
    return Outcome(status="completed", stdout=stdout)


def test_a_call_is_run_and_its_result_goes_back_as_a_tool_message() -> None:
    client = ScriptedClient([calls(call("print(6*7)")), ANSWER])
    sandbox = ScriptedSandbox(lambda code: done("42\n"))
    got = generate(client, sandbox)
    assert (got.answer, got.finish_reason, got.code_runs, got.rounds) == ("42", "stop", 1, 2)
    assert sandbox.sessions[0].blocks == ["print(6*7)"] and sandbox.sessions[0].closed == 1
    first, second = client.requests
    assert first.messages == ASKED and first.tools == [PYTHON_TOOL] and first.tool_choice is None
    assert second.messages == [
        *ASKED,
        {
            "role": "assistant",
            "content": "Let me compute.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "python", "arguments": '{"code": "print(6*7)"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42\n"},
    ]
    assert (first.seed, second.seed) == (11, round_seed(11, 1))
    # The text is what the text loop would have written with the same tags.
    assert got.text == (
        "Let me compute.<tool_call>\nprint(6*7)\n</tool_call>\n```output\n42\n```\nSo it is \\boxed{42}."
    )
    assert [event["type"] for event in got.events] == ["text", "code", "output", "text"]
    assert got.events[0]["tool_calls"][0]["id"] == "c1"


def test_a_call_in_pieces_without_an_id_is_put_together() -> None:
    pieces = [
        {"index": 0, "function": {"name": "python", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"code": "pri'}},
        {"index": 0, "function": {"arguments": 'nt(1)"}'}},
    ]
    client = ScriptedClient([calls(*pieces), ANSWER])
    sandbox = ScriptedSandbox()
    generate(client, sandbox)
    assert sandbox.sessions[0].blocks == ["print(1)"]
    turn, result = client.requests[1].messages[-2:]
    assert turn["tool_calls"][0]["id"] == result["tool_call_id"] == "call_1_0"


@pytest.mark.parametrize(
    ("piece", "says"),
    [
        (call("1", name="search"), "There is no tool 'search'"),
        ({"index": 0, "id": "x", "function": {"name": "python", "arguments": "{not json"}}, "not JSON"),
        ({"index": 0, "id": "x", "function": {"name": "python", "arguments": '{"source": "1"}'}}, "under 'code'"),
        ({"index": 0, "id": "x", "function": {"name": "python", "arguments": "7"}}, "under 'code'"),
        ({"index": 0, "id": "x"}, "There is no tool ''"),
    ],
)
def test_a_call_that_cannot_be_carried_out_is_told_to_the_model(piece: dict[str, Any], says: str) -> None:
    client, sandbox = ScriptedClient([calls(piece), ANSWER]), ScriptedSandbox()
    got = generate(client, sandbox)
    assert says in client.requests[1].messages[-1]["content"] and says in got.text
    assert (got.code_runs, got.code_errors, got.answer, sandbox.sessions) == (1, 1, "42", [])


def test_source_alone_as_the_arguments_is_taken() -> None:
    assert ToolCall(name="python", arguments='"print(1)"').code() == "print(1)"
    with pytest.raises(BadCall):
        ToolCall(name="python", arguments="null").code()


def test_when_executions_run_out_the_model_may_write_and_a_further_call_ends_it() -> None:
    client = ScriptedClient([calls(call("1")), calls(call("2")), ANSWER])
    got = generate(client, ScriptedSandbox(), code_executions=2, remaining_notice=True)
    assert [r.tool_choice for r in client.requests] == [None, None, "none"]
    assert (got.finish_reason, got.answer, got.code_runs) == ("stop", "42", 2)
    assert "Remaining code executions: 1." in client.requests[1].messages[-1]["content"]
    assert "You have run out of code executions!" in client.requests[2].messages[-1]["content"]
    stubborn = ScriptedClient(lambda request: calls(call(str(len(request.messages)))))
    over = generate(stubborn, ScriptedSandbox(), code_executions=2)
    assert (over.finish_reason, over.code_runs, over.rounds) == ("code_limit", 2, 3)


def test_every_call_of_a_turn_gets_a_result_also_beyond_the_budget() -> None:
    both = calls(call("a", id="1", index=0), call("b", id="2", index=1))
    client, sandbox = ScriptedClient([both, ANSWER]), ScriptedSandbox()
    got = generate(client, sandbox, code_executions=1)
    results = client.requests[1].messages[-2:]
    assert [r["tool_call_id"] for r in results] == ["1", "2"]
    assert results[0]["content"] == "ran a\n" and results[1]["content"].startswith("Not run")
    assert got.code_runs == 1 and sandbox.sessions[0].blocks == ["a"]


def test_tokens_are_bounded_by_what_was_written_and_handed_back() -> None:
    client = ScriptedClient([calls(call("1"), prompt_tokens=300), Reply("x" * 4000, prompt_tokens=420)])
    got = generate(client, ScriptedSandbox(lambda code: done("1" * 100)), max_tokens=200)
    written = got.events[0]["tokens"]
    assert client.requests[1].max_tokens == 200 - written - got.tool_tokens and got.tool_tokens >= 100
    assert got.num_tokens + got.tool_tokens == 200 and got.finish_reason == "length"
    assert got.prompt_tokens == 300  # the server's count replaces ours
    tight = ScriptedClient([calls(call("1"), prompt_tokens=300), ANSWER])
    generate(tight, ScriptedSandbox(lambda code: done("1" * 100)), context_tokens=500)
    assert tight.requests[1].max_tokens == 500 - 300 - 5 - 100 - 16


def test_a_call_cut_off_by_the_budget_is_not_run() -> None:
    sandbox = ScriptedSandbox()
    got = generate(ScriptedClient([Reply("Hm.", finish_reason="length", calls=[call("1")])]), sandbox)
    assert (got.finish_reason, got.code_runs, sandbox.sessions) == ("length", 0, [])


def test_a_broken_turn_is_asked_again_from_its_start() -> None:
    client = ScriptedClient([Reply("Let me thi", error=StreamDropped("cut")), calls(call("1")), ANSWER])
    got = generate(client, ScriptedSandbox())
    assert (got.stream_drops, got.finish_reason, got.answer) == (1, "stop", "42")
    assert client.requests[1].messages == ASKED and got.text.startswith("Let me compute.")
    assert client.requests[0].seed != client.requests[1].seed
    dead = generate(ScriptedClient(lambda request: Reply("", error=StreamDropped("gone"))))
    assert (dead.finish_reason, dead.error, dead.rounds) == ("error", "gone", 3)
    refused = generate(ScriptedClient(lambda request: Reply(error=RequestError("no tools here", 400))))
    assert (refused.finish_reason, refused.error, refused.rounds) == ("error", "no tools here", 1)
    full = generate(ScriptedClient([Reply(error=ContextOverflow("maximum context length", 400))]))
    assert full.finish_reason == "length" and full.error is None


def test_without_a_sandbox_no_tool_is_offered() -> None:
    client = ScriptedClient([ANSWER])
    got = generate(client, None)
    assert client.requests[0].tools == [] and got.answer == "42" and got.finish_reason == "stop"
    none_left = ScriptedClient([ANSWER])
    generate(none_left, ScriptedSandbox(), code_executions=0)
    assert none_left.requests[0].tools == []


def test_it_stops_at_its_answer_and_at_a_loop() -> None:
    boxed = ScriptedClient([Reply("\\boxed{42} and now let me check " + "x" * 400)])
    got = generate(boxed, ScriptedSandbox(), stop_at_boxed=True)
    assert got.finish_reason == "boxed" and len(got.text) < 40 and boxed.requests[0].closed
    same = generate(ScriptedClient(lambda request: calls(call("print(0)"))), ScriptedSandbox(lambda code: done("0\n")))
    assert (same.finish_reason, same.code_runs) == ("repetition", 3)


def test_thinking_is_kept_in_the_transcript_and_not_sent_back() -> None:
    client = ScriptedClient([calls(call("1"), reasoning="six times seven"), ANSWER])
    got = generate(client, ScriptedSandbox())
    assert got.events[0]["reasoning"] == "six times seven" and "six times" not in got.text
    assert "reasoning" not in client.requests[1].messages[1]


def test_a_dead_sandbox_is_told_and_the_next_call_gets_a_new_session() -> None:
    outcomes: list[Outcome | Exception] = [SandboxDied("the worker is gone"), done("7\n")]
    client = ScriptedClient([calls(call("1")), calls(call("2")), ANSWER])
    sandbox = ScriptedSandbox(lambda code: outcomes.pop(0))
    got = generate(client, sandbox)
    assert (got.sandbox_failures, got.code_errors, len(sandbox.sessions)) == (1, 1, 2)
    assert "interpreter is gone" in client.requests[1].messages[-1]["content"]


def test_cancel_closes_the_stream_and_the_session() -> None:
    client = ScriptedClient([calls(call("1")), Reply("thinking ...", hang=True)])
    sandbox = ScriptedSandbox()
    chat = ToolChat(
        messages=ASKED,
        prompt_tokens=1,
        seed=0,
        sampling=Sampling(),
        limits=Limits(max_tokens=100, context_tokens=1000),
        tags=tags_named("openmath"),
        count_tokens=len,
    )

    async def go() -> None:
        task = asyncio.create_task(chat.run(client, sandbox))
        while len(client.requests) < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert chat.finish_reason == "cancelled" and client.requests[1].closed and sandbox.sessions[0].closed == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["index", "id", "function"]), inner),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=6))
def test_pieces_of_any_shape_are_survived(pieces: list[Any]) -> None:
    gathered = CallPieces()
    gathered.add(pieces)
    for one in gathered.calls("p"):
        assert one.id and json.dumps(one.message()).encode()
        one.message()["function"]["arguments"].encode()  # no lone surrogate
        with pytest.raises(BadCall):
            one.code()


def test_turns_accumulate_oldest_first() -> None:
    def script(request: Request) -> Reply:
        results = [m["content"] for m in request.messages if m["role"] == "tool"]
        return calls(call(f"step{len(results)}")) if len(results) < 3 else Reply("\\boxed{" + "".join(results) + "}")

    got = generate(ScriptedClient(script), ScriptedSandbox(lambda code: done(code[-1])))
    assert got.answer == "012" and got.code_runs == 3
