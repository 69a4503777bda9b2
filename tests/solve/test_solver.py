"""A problem's generations: kept as they finish, stopped by policy, cancelled to the ground."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from omr.errors import Failure, StreamDropped
from omr.sampling import Sampling
from omr.sandbox import Outcome
from omr.solve.limits import Limits
from omr.solve.prompt import tags_named
from omr.solve.solver import Solved, Solver, Task
from omr.solve.transcript import Transcript
from omr.solve.vote import Ballot, StopPolicy, TimeBank

from .scripted import Reply, Request, ScriptedClient, ScriptedSandbox

Kept = list[tuple[str, int, Transcript]]


def solver(client: ScriptedClient, kept: Kept, policy: StopPolicy, **more: Any) -> Solver:
    values: dict[str, Any] = {
        "sandbox": ScriptedSandbox(),
        "sampling": Sampling(seed=100),
        "limits": Limits(max_tokens=1000, context_tokens=4000),
        "tags": tags_named("openmath"),
        "bank": TimeBank(budget_s=None),
        "count_tokens": len,
        "max_concurrent": 4,
        "keep": lambda *finished: kept.append(finished),
    }
    return Solver(client=client, policy=policy, **(values | more))


def solve(
    client: ScriptedClient, policy: StopPolicy, done: tuple[Ballot, ...] = (), **more: Any
) -> tuple[Solved, Kept]:
    kept: Kept = []

    async def go() -> Solved:
        before = asyncio.all_tasks()
        solved = await solver(client, kept, policy, **more).solve(
            Task(id="p", prompt="<p>", prompt_tokens=3, done=done)
        )
        assert asyncio.all_tasks() == before, "no task outlives its problem"
        return solved

    return asyncio.run(go()), kept


def by_seed(answers: Callable[[int], str]) -> ScriptedClient:
    return ScriptedClient(lambda request: Reply(f"\\boxed{{{answers(request.seed - 100)}}}"))


def test_all_generations_are_kept_and_drawn_with_their_own_seeds() -> None:
    client = by_seed(lambda sample: "7" if sample < 3 else "8")
    solved, kept = solve(client, StopPolicy(planned=5))
    assert sorted(sample for _, sample, _ in kept) == [0, 1, 2, 3, 4]
    assert sorted(t.seed for _, _, t in kept) == [100, 101, 102, 103, 104]
    assert (solved.vote.answer, solved.vote.votes, solved.stopped) == ("7", 3, None)
    assert (solved.cancelled, solved.not_started, solved.saved_tok) == (0, 0, 0)


def test_no_more_than_the_slots_run_at_once() -> None:
    running, most = 0, 0

    def script(request: Request) -> Reply:
        nonlocal running, most
        running += 1
        most = max(most, running)
        return Reply("\\boxed{1}", delay_s=0.002)

    def keep(*_: Any) -> None:
        nonlocal running
        running -= 1

    solve(ScriptedClient(script), StopPolicy(planned=9), max_concurrent=3, keep=keep)
    assert most == 3


def test_first_k_cancels_the_rest_on_the_server() -> None:
    client = ScriptedClient(lambda r: Reply("\\boxed{7}") if r.seed < 102 else Reply("still at it", hang=True))
    solved, kept = solve(client, StopPolicy(planned=4, stop_after=2))
    assert len(kept) == 2 and solved.stopped == "first 2 of 4"
    assert [r.closed for r in client.requests] == [False, False, True, True]
    assert (solved.cancelled, solved.not_started, solved.spent_tok) == (2, 0, 2 * len("still at it"[::4]))


def test_a_decided_vote_starts_no_more_and_counts_what_it_saved() -> None:
    client = by_seed(lambda sample: "7")
    solved, kept = solve(client, StopPolicy(planned=16, when_decided=True), max_concurrent=1)
    assert len(kept) == 8 and solved.stopped == "decided after 8 of 16"
    assert (solved.cancelled, solved.not_started, solved.spent_tok) == (0, 8, 0)
    assert solved.saved_tok == 8 * kept[0][2].num_tokens


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_agreement_begins_no_generation_that_it_would_cancel(slots: int) -> None:
    client = by_seed(lambda sample: "7")
    solved, kept = solve(client, StopPolicy(planned=16, agreement=0.9, agreement_after=4), max_concurrent=slots)
    assert len(kept) == 4 and solved.cancelled == 0 and len(client.requests) == 4


def test_what_an_earlier_run_finished_is_not_asked_again() -> None:
    done = (Ballot(sample=1, answer="7"), Ballot(sample=3, answer="7"))
    client = by_seed(lambda sample: "8")
    solved, _ = solve(client, StopPolicy(planned=4), done)
    assert sorted(r.seed for r in client.requests) == [100, 102] and len(solved.ballots) == 4
    assert solved.vote.tied and solved.vote.answer == "8"  # sample 0 is the lowest of the tied
    untouched = by_seed(lambda sample: "8")
    again, _ = solve(untouched, StopPolicy(planned=4, stop_after=2), done)
    assert untouched.requests == [] and again.vote.answer == "7" and again.stopped == "first 2 of 4"


def test_the_time_budget_ends_a_problem_with_what_it_has() -> None:
    client = ScriptedClient(lambda r: Reply("\\boxed{7}") if r.seed == 100 else Reply("long", hang=True))
    sandbox = ScriptedSandbox()
    solved, kept = solve(client, StopPolicy(planned=3), bank=TimeBank(budget_s=0.2), sandbox=sandbox)
    assert solved.stopped == "time after 1 of 3" and solved.vote.answer == "7" and solved.cancelled == 2
    assert [r.closed for r in client.requests] == [False, True, True] and len(kept) == 1


def test_past_the_deadline_nothing_begins() -> None:
    client = by_seed(lambda sample: "7")
    solved, kept = solve(client, StopPolicy(planned=3), bank=TimeBank(budget_s=None, deadline_at=0.0))
    assert kept == [] and solved.vote.answer is None and solved.stopped == "time after 0 of 3"
    assert solved.cancelled + solved.not_started == 3


def test_a_failing_server_is_survived_until_nothing_else_comes() -> None:
    one_bad = ScriptedClient(
        lambda r: Reply(error=StreamDropped("gone")) if r.seed == 100 and len(r.prompt) == 3 else Reply("\\boxed{7}")
    )
    solved, kept = solve(one_bad, StopPolicy(planned=3))
    errors = [t.error for _, _, t in kept if t.finish_reason == "error"]
    assert errors in ([], ["gone"]) and solved.vote.answer == "7"  # its retry draws with another seed
    dead = ScriptedClient(lambda r: Reply(error=StreamDropped("gone")))
    with pytest.raises(Failure, match="generations in a row; the last with: gone"):
        solve(dead, StopPolicy(planned=6), max_failures=3)


def test_a_sandbox_that_loses_every_session_ends_the_run() -> None:
    calls = lambda r: Reply("<tool_call>\n1\n</tool_call>" if len(r.prompt) == 3 else "\\boxed{7}")  # noqa: E731
    broken = ScriptedSandbox(lambda code: Outcome(status="error", stderr="connection closed\n", state_lost=True))
    with pytest.raises(Failure, match="every session of 32 generations in a row died"):
        solve(ScriptedClient(calls), StopPolicy(planned=40), sandbox=broken)
    seen: list[str] = []

    def crashes_now_and_then(code: str) -> Outcome:
        seen.append(code)
        lost = len(seen) % 8 != 0
        return Outcome(status="error" if lost else "completed", state_lost=lost)

    solved, kept = solve(ScriptedClient(calls), StopPolicy(planned=40), sandbox=ScriptedSandbox(crashes_now_and_then))
    assert len(kept) == 40 and solved.vote.answer == "7"


def test_cancelling_a_problem_leaves_nothing_running() -> None:
    client, sandbox, kept = ScriptedClient(lambda r: Reply("...", hang=True)), ScriptedSandbox(), Kept()

    async def go() -> None:
        task = asyncio.create_task(
            solver(client, kept, StopPolicy(planned=4), sandbox=sandbox).solve(
                Task(id="p", prompt="p", prompt_tokens=1)
            )
        )
        while len(client.requests) < 4:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(go())
    assert all(r.closed for r in client.requests) and kept == []
