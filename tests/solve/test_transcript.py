"""The loop of one generation against a scripted server and sandbox."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from omr.errors import ConfigError, ContextOverflow, RequestError, StreamDropped
from omr.sampling import Sampling
from omr.sandbox import Outcome
from omr.solve.completer import round_seed
from omr.solve.limits import Limits
from omr.solve.prompt import CODE_TAGS, tags_named
from omr.solve.repetition import is_loop
from omr.solve.transcript import Transcript

from .scripted import Reply, Request, SandboxDied, ScriptedClient, ScriptedSandbox, ScriptedSession

TAGS = tags_named("openmath")
CALL = "Let me compute. <tool_call>\nprint(6*7)\n"
ANSWER = "So it is \\boxed{42}."


def done(stdout: str) -> Outcome:
    return Outcome(status="completed", stdout=stdout)


def generate(
    client: ScriptedClient, sandbox: ScriptedSandbox | None = None, *, tags: Any = TAGS, **limits: Any
) -> Transcript:
    values: dict[str, Any] = {"max_tokens": 1000, "context_tokens": 4000} | limits
    transcript = Transcript(
        prompt="<problem>",
        prompt_tokens=5,
        seed=11,
        sampling=Sampling(),
        limits=Limits(**values),
        tags=tags,
        count_tokens=len,
    )
    asyncio.run(transcript.run(client, sandbox))
    return transcript


@pytest.mark.parametrize("how", ["hidden", "named", "token", "shown", "overshot"])
def test_a_call_is_run_however_the_engine_reports_its_stop(how: str) -> None:
    first = {
        "hidden": Reply(CALL),
        "named": Reply(CALL, stop_reason="</tool_call>"),
        "token": Reply(CALL, stop_reason=151658),
        "shown": Reply(CALL + "</tool_call>"),
        "overshot": Reply(CALL + "</tool_call>\n```output\n41\n```\nit is 41", finish_reason="length"),
    }[how]
    client = ScriptedClient([first, Reply(ANSWER)])
    sandbox = ScriptedSandbox(lambda code: done("42\n"))
    got = generate(client, sandbox)
    assert got.text == CALL + "</tool_call>\n```output\n42\n```\n" + ANSWER
    assert (got.answer, got.finish_reason, got.code_runs) == ("42", "stop", 1)
    assert sandbox.sessions[0].blocks == ["print(6*7)"] and sandbox.sessions[0].closed == 1
    # The second request continues the first one's text: the engine can reuse its KV cache.
    assert client.requests[1].prompt == "<problem>" + got.text.removesuffix(ANSWER)
    assert [event["type"] for event in got.events] == ["text", "code", "output", "text"]
    assert "".join(e["text"] for e in got.events if e["type"] in ("text", "output")) == got.text


@pytest.mark.parametrize("name", sorted(CODE_TAGS))
def test_every_dialect_of_code_is_run(name: str) -> None:
    tags = CODE_TAGS[name]
    client = ScriptedClient([Reply(f"Hm. {tags.begin}print(6*7)\n"), Reply(ANSWER)])
    sandbox = ScriptedSandbox(lambda code: done("42\n"))
    got = generate(client, sandbox, tags=tags)
    assert client.requests[0].stop == [tags.end] and sandbox.sessions[0].blocks == ["print(6*7)"]
    block = tags.output_block("completed", "42\n", "")
    assert got.text == f"Hm. {tags.begin}print(6*7)\n{tags.end}{block}{ANSWER}"
    assert (got.answer, got.finish_reason, got.code_runs) == ("42", "stop", 1)


def test_every_event_is_recorded_with_its_tokens_and_times() -> None:
    client = ScriptedClient([Reply(CALL, stop_reason="</tool_call>"), Reply(ANSWER)])
    got = generate(client, ScriptedSandbox(lambda code: done("42\n")))
    wrote, ran, output, ended = got.events
    assert wrote["tokens"] + ended["tokens"] == got.num_tokens and output["tokens"] == got.tool_tokens
    assert (wrote["stop_reason"], wrote["finish_reason"], ended["finish_reason"]) == ("</tool_call>", "stop", "stop")
    assert (ran["code"], ran["status"], ran["stdout"], ran["stderr"]) == ("\nprint(6*7)\n", "completed", "42\n", "")
    times = [wrote["sent_s"], wrote["first_token_s"], wrote["end_s"], ran["at_s"], ran["end_s"], ended["sent_s"]]
    assert times == sorted(times) and got.seconds >= ended["end_s"] - 1e-3
    assert [wrote["seed"], ended["seed"]] == [11, round_seed(11, 1)]


def test_two_calls_share_a_session_and_an_error_is_handed_back() -> None:
    outcomes = [Outcome(status="error", stdout="NameError: x\n"), done("7\n")]
    client = ScriptedClient([Reply(CALL), Reply("Again. <tool_call>\ny = 7\n"), Reply("\\boxed{7}")])
    sandbox = ScriptedSandbox(lambda code: outcomes.pop(0))
    got = generate(client, sandbox)
    assert len(sandbox.sessions) == 1 and sandbox.sessions[0].blocks == ["print(6*7)", "y = 7"]
    assert "```output\nNameError: x\n```\n" in got.text
    assert (got.code_runs, got.code_errors, got.code_timeouts, got.answer) == (2, 1, 0, "7")


def test_without_a_call_there_is_one_request_and_no_session() -> None:
    sandbox = ScriptedSandbox()
    got = generate(ScriptedClient([Reply(ANSWER)]), sandbox)
    assert (got.rounds, got.finish_reason, sandbox.sessions) == (1, "stop", [])
    assert got.ttft_s is not None and got.ttft_s >= 0 and len(got.tpot_s) == 1


@pytest.mark.parametrize("limits", [{"code_executions": 0}, {"tags": None}])
def test_plain_reasoning_asks_for_no_stop_and_runs_nothing(limits: dict[str, Any]) -> None:
    client, sandbox = ScriptedClient([Reply(CALL + "</tool_call> " + ANSWER)]), ScriptedSandbox()
    got = generate(client, sandbox, **limits)
    assert client.requests[0].stop == [] and sandbox.sessions == [] and got.finish_reason == "stop"


def test_a_block_left_open_at_the_token_budget_is_not_run() -> None:
    sandbox = ScriptedSandbox()
    got = generate(ScriptedClient([Reply(CALL * 3)]), sandbox, max_tokens=8)
    assert (got.finish_reason, got.num_tokens, got.code_runs, got.truncated) == ("length", 8, 0, True)


def test_tool_output_counts_towards_the_token_budget() -> None:
    client = ScriptedClient([Reply(CALL), Reply("x" * 4000)])
    got = generate(client, ScriptedSandbox(lambda code: done("1" * 100)), max_tokens=150)
    assert got.tool_tokens == len("\n```output\n" + "1" * 100 + "\n```\n")
    assert client.requests[1].max_tokens == 150 - got.events[0]["tokens"] - got.tool_tokens
    assert got.num_tokens + got.tool_tokens == 150 and got.finish_reason == "length"


def test_the_context_bounds_a_generation_too() -> None:
    got = generate(ScriptedClient([Reply("x" * 4000)]), context_tokens=25)
    assert got.prompt_tokens + got.num_tokens == 25 and got.finish_reason == "length"


def test_a_call_beyond_the_last_execution_ends_the_generation() -> None:
    client = ScriptedClient(lambda request: Reply(CALL + str(len(request.prompt))))
    got = generate(client, ScriptedSandbox(), code_executions=2, remaining_notice=True)
    assert (got.finish_reason, got.code_runs, got.rounds) == ("code_limit", 2, 3)
    assert got.text.count("Remaining code executions: 1.") == 1
    assert got.text.count("You have run out of code executions!") == 1


def test_a_stray_end_tag_is_passed_over() -> None:
    tags = tags_named("qwen")
    client = ScriptedClient([Reply("As text:\n```latex\nx\n", stop_reason="```\n"), Reply(ANSWER)])
    got = generate(client, ScriptedSandbox(), tags=tags)
    assert got.code_runs == 0 and got.answer == "42" and "```latex\nx\n```\nSo" in got.text


@pytest.mark.parametrize("output", ["y" * 10_000_000, "a\0b", "bad \udc80 surrogate"])
def test_output_is_cut_and_made_printable(output: str) -> None:
    client = ScriptedClient([Reply(CALL), Reply(ANSWER)])
    got = generate(client, ScriptedSandbox(lambda code: done(output)))
    block = next(e["text"] for e in got.events if e["type"] == "output")
    assert len(block) < 1050 and "\0" not in block and block.encode()
    assert ("<output cut>" in block) == (len(output) > 1000)


def test_a_dead_sandbox_is_told_to_the_model_and_the_next_block_gets_a_new_session() -> None:
    outcomes: list[Outcome | Exception] = [SandboxDied("the worker is gone"), done("7\n")]
    client = ScriptedClient([Reply(CALL), Reply(CALL), Reply("\\boxed{7}")])
    sandbox = ScriptedSandbox(lambda code: outcomes.pop(0))
    got = generate(client, sandbox)
    assert (got.finish_reason, got.sandbox_failures, got.code_errors) == ("stop", 1, 1)
    assert len(sandbox.sessions) == 2 and all(s.closed == 1 for s in sandbox.sessions)
    assert "interpreter is gone" in got.text and "```output\n7\n" in got.text


def test_a_dropped_stream_goes_on_from_the_text_so_far() -> None:
    client = ScriptedClient([Reply(CALL + "</tool", error=StreamDropped("cut")), Reply("</tool_call>"), Reply(ANSWER)])
    got = generate(client, ScriptedSandbox(lambda code: done("42\n")))
    assert (got.stream_drops, got.finish_reason, got.error, got.code_runs) == (1, "stop", None, 1)
    assert client.requests[1].prompt == "<problem>" + CALL  # half a tag is taken back: no server would match the rest


def test_a_server_that_only_drops_streams_is_given_up() -> None:
    client = ScriptedClient(lambda request: Reply("", error=StreamDropped("gone")))
    got = generate(client)
    assert (got.finish_reason, got.error, len(client.requests)) == ("error", "gone", 3)
    refused = generate(ScriptedClient(lambda request: Reply(error=RequestError("bad request", 400))))
    assert (refused.finish_reason, refused.rounds) == ("error", 1)
    assert refused.row()["error"] == "bad request"


def test_overflow_is_a_length_and_a_bad_parameter_is_the_users() -> None:
    full = generate(ScriptedClient([Reply(error=ContextOverflow("maximum context length", 400))]))
    assert full.finish_reason == "length" and full.error is None
    with pytest.raises(ConfigError):
        generate(ScriptedClient([Reply(error=ConfigError("no min_p here"))]))


def test_cancel_mid_generation_closes_the_stream_and_the_session() -> None:
    client = ScriptedClient([Reply(CALL), Reply("thinking ...", hang=True)])
    sandbox = ScriptedSandbox()
    transcript = Transcript(
        prompt="p",
        prompt_tokens=1,
        seed=0,
        sampling=Sampling(),
        limits=Limits(max_tokens=100, context_tokens=1000),
        tags=TAGS,
        count_tokens=len,
    )

    async def go() -> None:
        task = asyncio.create_task(transcript.run(client, sandbox))
        while "thinking ..." not in "".join(e.get("text", "") for e in transcript.events) and not task.done():
            await asyncio.sleep(0.01)
            if len(client.requests) == 2:
                await asyncio.sleep(0.05)
                break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert transcript.finish_reason == "cancelled" and transcript.num_tokens > 0
    assert client.requests[1].closed and sandbox.sessions[0].closed == 1
    assert transcript.text.endswith("thinking ...")  # what it had is kept


def test_seconds_run_out() -> None:
    client = ScriptedClient([Reply("slow", hang=True)])
    got = generate(client, seconds=0.05)
    assert got.finish_reason == "time" and got.truncated and client.requests[0].closed and got.seconds < 2


def test_seconds_run_out_while_code_runs() -> None:
    class Slow(ScriptedSession):
        async def execute(self, code: str, timeout_s: float | None = None) -> Outcome:
            await asyncio.sleep(60)
            raise AssertionError

    sandbox = ScriptedSandbox()
    sandbox.session = lambda: sandbox.sessions.append(Slow(sandbox.run)) or sandbox.sessions[-1]  # type: ignore
    got = generate(ScriptedClient([Reply(CALL)]), sandbox, seconds=0.05)
    assert (got.finish_reason, got.code_runs, got.truncated) == ("time", 0, True)
    assert sandbox.sessions[0].closed == 1 and got.text.endswith("</tool_call>")  # the block stays unanswered


def test_it_stops_at_its_answer_but_not_inside_code() -> None:
    text = "<tool_call>\nprint('\\boxed{1}')\n</tool_call>"
    client = ScriptedClient([Reply(text), Reply("It is \\boxed{\\frac{1}{2}}. Let me check " + "x" * 400)])
    got = generate(client, ScriptedSandbox(lambda code: done("1\n")), stop_at_boxed=True)
    assert (got.finish_reason, got.answer, got.code_runs) == ("boxed", "\\frac{1}{2}", 1)
    assert len(got.text) < 200 and client.requests[1].closed


def test_repetition_ends_a_generation() -> None:
    looping = generate(ScriptedClient([Reply("First. " + "and again " * 900)]), max_tokens=4000)
    assert looping.finish_reason == "repetition" and len(looping.text) < 4000
    client = ScriptedClient(lambda request: Reply(CALL))
    same = generate(client, ScriptedSandbox(lambda code: done("0\n")))
    assert (same.finish_reason, same.code_runs) == ("repetition", 3)
    assert generate(client, ScriptedSandbox(), stop_on_repetition=False).code_runs == 8


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("ab" * 2000, True),
        ("a" * 2000, True),
        ("x" * 1999, False),
        ("".join(f"{i} " for i in range(2000)), False),
        ("word " * 399 + "other", False),
        (("y" * 300 + "z") * 30, False),  # fewer than 20 periods fit
    ],
)
def test_what_counts_as_a_loop(text: str, loops: bool) -> None:
    assert is_loop(text) is loops


def test_rounds_draw_with_different_seeds_and_the_first_with_its_own() -> None:
    assert round_seed(5, 0) == 5
    seeds = {round_seed(s, r) for s in range(64) for r in range(20)}
    assert len(seeds) == 64 * 20
    client = ScriptedClient([Reply(CALL), Reply(ANSWER)])
    generate(client, ScriptedSandbox())
    assert [r.seed for r in client.requests] == [11, round_seed(11, 1)]


def test_llama_tags_and_unknown_request_fields() -> None:
    tags = tags_named("llama3")

    def script(request: Request) -> Reply:
        return Reply("<|python_tag|>1+1") if "ipython" not in request.prompt else Reply("\\boxed{2}")

    got = generate(ScriptedClient(script), ScriptedSandbox(lambda code: done("2\n")), tags=tags)
    assert "<|eom_id|><|start_header_id|>ipython<|end_header_id|>\n\ncompleted\n[stdout]\n2\n[/stdout]" in got.text
    assert got.answer == "2"
