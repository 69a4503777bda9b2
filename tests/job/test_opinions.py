"""Selection, judge, few-shot and the chat API inside job=eval; job=judge over a finished run."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omr.cli import regrade
from omr.errors import ConfigError, Failure, InputError, RequestError
from omr.job._examples import FewShot
from omr.job._judging import JUDGEMENTS, Judge, When
from omr.job._ledger import Ledger
from omr.job._selecting import SELECTIONS, Select
from omr.job.judge import JudgeRun
from omr.run import Run, fingerprint
from omr.samples import held, intact_rows

from .conftest import chat_sums, config, solve_sums, write_sums
from .fake_server import serving

Evaluate = Callable[..., tuple[Run, float | None]]
GENSELECT = ["job.select.method=genselect", "job.num_generations=5", "sampling.seed=4"]  # seeds 4 to 8: one slips


def is_comparison(body: dict[str, Any]) -> bool:
    return "Judgment: N" in body.get("prompt", "")


def sharp(body: dict[str, Any]) -> str:
    """Solves sums, and in a comparison finds the attempt whose sum is right."""
    if not is_comparison(body):
        return solve_sums(body)
    a, b = re.findall(r"(\d+)\+(\d+)\?", body["prompt"])[-1]
    attempts = re.findall(r"Attempt (\d+):\n(.*?)\\boxed\{(\d+)\}", body["prompt"], re.DOTALL)
    return f"Let me see. Judgment: {next(i for i, _, said in attempts if int(said) == int(a) + int(b))}"


def contrary(body: dict[str, Any]) -> str:
    """Chooses the attempt that is wrong."""
    if not is_comparison(body):
        return solve_sums(body)
    a, b = re.findall(r"(\d+)\+(\d+)\?", body["prompt"])[-1]
    attempts = re.findall(r"Attempt (\d+):\n(.*?)\\boxed\{(\d+)\}", body["prompt"], re.DOTALL)
    return f"Judgment: {next(i for i, _, said in attempts if int(said) != int(a) + int(b))}"


def problems(run: Run) -> list[dict[str, str]]:
    with (run.folder / "problems.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_genselect_compares_where_generations_disagree(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 3)
    with serving(contrary) as server:
        run, score = evaluate(server, f"benchmark.path={file}", *GENSELECT)
        asked = [b for b in server.requests if is_comparison(b)]
    assert score == pytest.approx(0.8) and run.metrics["accuracy/maj"] == 1
    assert run.metrics["accuracy/select"] == 0 and run.metrics["select/changed"] == 3
    assert run.metrics["select/comparisons"] == 12 == len(asked) and run.metrics["select/problems"] == 3
    assert run.metrics["select/output_tok"] > 0 and run.metrics["select/prompt_tok"] == 7 * 12
    assert len({(b["prompt"].split("Problem:")[1][:40], b["seed"]) for b in asked}) == 12
    assert all(b["max_tokens"] == 512 and "stop" not in b for b in asked)
    table = problems(run)
    assert [(r["selected_right"], r["vote_right"], r["picks"]) for r in table] == [("0", "1", "4/4")] * 3
    report = (run.folder / "report.md").read_text()
    assert "| selected (GenSelect) | 0.0 |" in report and "- selection: genselect, 4 comparisons" in report
    rows = intact_rows(run.folder / SELECTIONS, strict=True)
    assert {r["id"] for r in rows} == {"s0", "s1", "s2"} and all(
        r["chosen"] == 1 and r["of"] == [*range(5)] for r in rows
    )
    with serving(sharp) as server:
        right, _ = evaluate(server, f"benchmark.path={file}", *GENSELECT, "job.select.comparisons=2", "rerun=true")
    assert right.metrics["accuracy/select"] == 1 and right.metrics["select/changed"] == 0


def test_where_all_agree_nothing_is_compared_and_an_unreadable_choice_leaves_the_vote(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    file = write_sums(tmp_path, 2)
    with serving(solve_sums) as server:
        run, _ = evaluate(
            server, f"benchmark.path={file}", "job.select.method=genselect", "job.num_generations=3", "sampling.seed=1"
        )
        assert not any(is_comparison(b) for b in server.requests)
    assert run.metrics["select/comparisons"] == 0 and run.metrics["accuracy/select"] == 1
    with serving(lambda b: "I cannot tell." if is_comparison(b) else solve_sums(b)) as server:
        vague, _ = evaluate(server, f"benchmark.path={file}", *GENSELECT)
    assert vague.metrics["select/unreadable"] == 8 and vague.metrics["accuracy/select"] == 1
    assert [r["picks"] for r in problems(vague)] == ["0/0", "0/0"]


def test_comparisons_have_their_own_clock(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 1)

    def slow(body: dict[str, Any]) -> str:
        if is_comparison(body):
            import time

            time.sleep(3)
        return sharp(body)

    with serving(slow) as server:
        run, _ = evaluate(server, f"benchmark.path={file}", *GENSELECT, "job.select.timeout_s=0.3")
    assert run.metrics["select/comparisons"] == 0 and run.metrics["accuracy/select"] == 1  # the vote stands


class Killed(BaseException):
    """Stands for kill -9."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    append, count = Ledger.append, 0

    def die(self: Ledger, row: dict[str, Any]) -> None:
        nonlocal count
        append(self, row)
        count += 1
        if count == after:
            with self._file.open("ab") as out:
                out.write(b'{"id": "s0", "round": 3, "of": [0')
            raise Killed

    monkeypatch.setattr(Ledger, "append", die)


def test_a_killed_selection_goes_on_with_what_is_missing(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [f"benchmark.path={write_sums(tmp_path, 3)}", *GENSELECT]
    with serving(sharp) as server:
        with monkeypatch.context() as patch:
            dying(patch, after=5)
            with pytest.raises(Killed):
                evaluate(server, *wanted)
        (leftover,) = (tmp_path / "home" / "artifacts" / "unfinished").iterdir()
        before = intact_rows(leftover / SELECTIONS)
        samples = len(intact_rows(leftover / "samples.jsonl"))
    with serving(sharp) as server:  # a new one: the first may still be hearing of requests that were under way
        run, _ = evaluate(server, *wanted)
    asked = [b for b in server.requests if is_comparison(b)]
    after = intact_rows(run.folder / SELECTIONS, strict=True)
    assert len(before) >= 5 and len(asked) == 12 - len(before) and len(after) == 12
    assert all(row in after for row in before) and run.metrics["accuracy/select"] == 1
    assert len([b for b in server.requests if not is_comparison(b) and "```output" not in b["prompt"]]) == 15 - samples


# The judge. Answers are words: the symbolic grader refuses another word without any algebra, a judge knows better.


def write_words(folder: Path, count: int = 4) -> Path:
    file = folder / "words.jsonl"
    rows = [{"id": f"w{i}", "problem": f"Word {i}?", "expected_answer": "red"} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def is_judgement(body: dict[str, Any]) -> bool:
    return "Judgement: No" in (body.get("prompt") or body["messages"][-1]["content"])


def asked_text(body: dict[str, Any]) -> str:
    return str(body.get("prompt") or body["messages"][-1]["content"])


def spells(body: dict[str, Any]) -> str:
    """Answers `crimson`, or `green` with an odd seed; as a judge, takes crimson for red."""
    if is_judgement(body):
        predicted = asked_text(body).split("Student's answer:\n")[1]
        same = "crimson" in predicted
        return f"They {'agree' if same else 'differ'}.\nJudgement: {'Yes' if same else 'No'}"
    return "\\boxed{green}" if body["seed"] % 2 else "\\boxed{\\text{crimson}}"


JUDGED = ["sandbox=none", "sampling.seed=0", "job.num_generations=4"]


def test_the_judge_accepts_what_the_grader_could_not(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_words(tmp_path)
    with serving(spells) as server:
        run, score = evaluate(server, f"benchmark.path={file}", *JUDGED, "job.judge.when=fallback")
        asked = [b for b in server.requests if is_judgement(b)]
    assert score == 0.5 and run.metrics["accuracy/symbolic_pass_at_1"] == 0
    assert len(asked) == 8 == run.metrics["judge/questions"]  # two different answers a problem, four generations
    assert all(b["temperature"] == 0 and b["max_tokens"] == 512 for b in asked)
    assert run.metrics["judge/made_right"] == 8 and run.metrics["judge/made_wrong"] == 0
    assert run.metrics["judge/output_tok"] > 0 and run.metrics["judge/time_s"] > 0
    row = intact_rows(run.folder / "samples.jsonl")[0]
    assert (row["symbolic_correct"], row["judge_correct"]) == (False, True) and row["judgement"].endswith("Yes")
    told = intact_rows(run.folder / JUDGEMENTS, strict=True)
    assert {(r["when"], r["model"], r["verdict"]) for r in told} == {
        ("fallback", "fake", True),
        ("fallback", "fake", False),
    }
    assert "Judge: 8 answers judged" in (run.folder / "report.md").read_text()
    assert regrade.main([str(run.folder)]) == 0
    again = json.loads((run.folder / "regraded" / "metrics.json").read_text())["metrics"]
    assert again["accuracy/pass_at_1"] == 0.5 and again["judge/questions"] == 8


def test_plain_numbers_are_not_put_to_a_fallback_judge(evaluate: Evaluate, tmp_path: Path) -> None:
    with serving(solve_sums) as server:
        run, _ = evaluate(
            server, f"benchmark.path={write_sums(tmp_path, 3)}", "job.judge.when=fallback", "sampling.seed=4"
        )
        assert not any(is_judgement(b) for b in server.requests)
    assert "judge/questions" not in run.metrics and not (run.folder / JUDGEMENTS).exists()


def test_a_judge_that_always_speaks_overrules_the_grader_and_an_unreadable_one_does_not(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    file = write_sums(tmp_path, 2)
    wanted = [f"benchmark.path={file}", "job.judge.when=always", "job.num_generations=2", "sampling.seed=1"]
    with serving(lambda b: "Judgement: No" if is_judgement(b) else solve_sums(b)) as server:
        run, score = evaluate(server, *wanted)
    assert score == 0 and run.metrics["accuracy/symbolic_pass_at_1"] == 1 and run.metrics["judge/made_wrong"] == 4
    assert run.metrics["judge/questions"] == 2  # both generations of a problem give one answer
    with serving(lambda b: "Hm." if is_judgement(b) else solve_sums(b)) as server:
        run, score = evaluate(server, *wanted)
    assert score == 1 and run.metrics["judge/unreadable"] == 2


def test_another_server_judges_through_its_chat_api(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_words(tmp_path)
    with serving(spells) as solver, serving(spells, model="wise") as judge:
        run, score = evaluate(
            solver, f"benchmark.path={file}", *JUDGED, "job.judge.when=fallback", f"job.judge.url={judge.url}/v1"
        )
        assert not any(is_judgement(b) for b in solver.requests)
    assert score == 0.5 and len(judge.requests) == 8
    assert judge.requests[0]["model"] == "wise" and judge.requests[0]["messages"][0]["role"] == "user"
    assert {r["model"] for r in intact_rows(run.folder / JUDGEMENTS)} == {"wise"}
    with serving(spells) as solver, pytest.raises(RequestError, match="does not answer"):
        evaluate(
            solver, f"benchmark.path={file}", *JUDGED, "job.judge.when=fallback", "job.judge.url=http://127.0.0.1:9"
        )
    assert not solver.requests  # a judge that is not there is found out before anything is generated


def test_a_killed_judge_goes_on_and_no_answer_is_judged_twice(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [f"benchmark.path={write_words(tmp_path)}", *JUDGED, "job.judge.when=fallback"]
    with serving(spells) as server:
        with monkeypatch.context() as patch:
            dying(patch, after=3)
            with pytest.raises(Killed):
                evaluate(server, *wanted)
        run, score = evaluate(server, *wanted)
    questions = [asked_text(b) for b in server.requests if is_judgement(b)]
    told = intact_rows(run.folder / JUDGEMENTS, strict=True)
    assert score == 0.5 and len(told) == 8
    # Those in flight at the kill may be asked again; those on disk never are.
    assert len(questions) <= 8 + 8 and len({(r["id"], r["answer"]) for r in told}) == 8


def test_a_judge_that_fails_is_counted_and_a_dead_one_ends_the_run(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_words(tmp_path)
    wanted = [f"benchmark.path={file}", *JUDGED, "job.judge.when=fallback"]
    with serving(lambda b: 400 if is_judgement(b) and "Word 0" in asked_text(b) else spells(b)) as server:
        run, score = evaluate(server, *wanted)
    assert score == pytest.approx(3 / 8) and run.metrics["judge/failed"] == 2
    with (
        serving(lambda b: 400 if is_judgement(b) else spells(b)) as server,
        pytest.raises(Failure, match="the judge failed 8 questions in a row"),
    ):
        evaluate(server, *wanted)
    with serving(spells) as server:
        _, score = evaluate(server, *wanted)
        assert all(is_judgement(b) for b in server.requests), "the generations were on disk"
    assert score == 0.5


def test_job_judge_judges_a_finished_run_with_the_composed_server(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_words(tmp_path)
    with serving(spells) as server:
        run, score = evaluate(server, f"benchmark.path={file}", *JUDGED, "job.vote=length")
        assert score == 0
        server.requests.clear()
        wanted = ["job=judge", f"job.folder={run.folder}", "model.name=wise"]
        with monkeypatch.context() as patch:
            dying(patch, after=3)
            with pytest.raises(Killed):
                evaluate(server, *wanted)
        on_disk = len(intact_rows(next((tmp_path / "home/artifacts/unfinished").iterdir()) / JUDGEMENTS))
        server.requests.clear()
        judged, score = evaluate(server, *wanted)
        assert all(is_judgement(b) for b in server.requests) and len(server.requests) == 8 - on_disk
    assert score == 0.5 and judged.metrics["accuracy/symbolic_pass_at_1"] == 0
    assert not any(name.startswith(("throughput/", "latency/")) for name in judged.metrics)
    told = json.loads((judged.folder / "metrics.json").read_text())
    assert told["judge"] == "fallback, wise bf16 on native" and told["judged from"] == str(run.folder)
    assert told["vote weight"] == "length"
    rows = intact_rows(judged.folder / "samples.jsonl")
    assert len(rows) == 16 and sum(r["judge_correct"] for r in rows) == 8
    assert not (tmp_path / "home/artifacts/unfinished").exists() or not any(
        (tmp_path / "home/artifacts/unfinished").iterdir()
    )


def test_job_judge_refuses_what_it_cannot_do(evaluate: Evaluate, tmp_path: Path) -> None:
    cfg = config("job=judge")
    with pytest.raises(ConfigError, match=r"job=judge needs job\.folder"):
        cfg.job.preflight(cfg)
    cfg = config("job=judge", f"job.folder={tmp_path}")
    with pytest.raises(InputError, match=r"holds no samples\.jsonl"):
        cfg.job.preflight(cfg)
    with pytest.raises(ConfigError, match="asks the composed server"):
        JudgeRun(judge=Judge(when=When.always, url="http://x"))
    with pytest.raises(ConfigError, match="judges nothing"):
        JudgeRun(judge=Judge())
    with serving(solve_sums) as server:
        run, _ = evaluate(server, f"benchmark.path={write_sums(tmp_path, 1, answers=False)}", "job.num_generations=1")
        with pytest.raises(InputError, match="no expected answers"):
            evaluate(server, "job=judge", f"job.folder={run.folder}")


def test_one_process_has_a_folder(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(Failure, match="another run of the same config"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_a_ledger_keeps_whole_rows_only(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    ledger = Ledger(file, ("id", "round"))
    assert not file.exists() and ledger.rows == []
    ledger.append({"id": "a", "round": 0, "n": 1})
    ledger.append({"id": "a", "round": 0, "n": 2})
    ledger.append({"id": "b", "round": 0, "error": "gone"})
    with file.open("ab") as out:
        out.write(b'{"id": "c", "round": [1]}\n{"id": "d"}\n{"id": "e", "rou')
    again = Ledger(file, ("id", "round"))
    assert again.rows == [{"id": "a", "round": 0, "n": 2}] and again.get("b", 0) is None
    assert intact_rows(file, strict=True) == again.rows


# The chat API and few-shot examples.


def test_tools_through_the_chat_api(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 3)
    wanted = [f"benchmark.path={file}", "job.num_generations=5", "sampling.seed=1"]
    with serving(chat_sums) as server:
        run, score = evaluate(server, *wanted, "job.api=chat")
        assert all("messages" in b and b["tools"][0]["function"]["name"] == "python" for b in server.requests)
        assert len(server.requests) == 30
    assert score == pytest.approx(0.8) and run.metrics["tool/executions_per_generation"] == 1
    row = intact_rows(run.folder / "samples.jsonl")[1]
    assert row["generation"] == "<tool_call>\nprint(0+0)\n</tool_call>\n```output\n0\n```\nThe sum is \\boxed{0}."
    events = intact_rows(run.folder / "transcript.jsonl")[0]["events"]
    assert [e["type"] for e in events] == ["text", "code", "output", "text"]
    assert json.loads((run.folder / "metrics.json").read_text())["api"] == "chat"
    with serving(lambda b: "I guess \\boxed{0}.") as server:
        evaluate(server, *wanted, "job.api=chat", "job.tools=false")
        assert all("tools" not in b for b in server.requests)


def test_tools_through_a_remote_openai_endpoint(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 2)
    with serving(chat_sums) as server:
        _, score = evaluate(
            server,
            f"benchmark.path={file}",
            "job=eval_chat",
            "server=openai",
            f"server.url={server.url}",
            "server.api_key_env=null",
            "job.num_generations=2",
            "sampling.seed=1",
        )
        body = server.requests[0]
    assert score == 1 and "skip_special_tokens" not in body and "max_completion_tokens" in body
    assert body["parallel_tool_calls"] is False


def test_selection_and_judge_speak_through_the_chat_api_too(evaluate: Evaluate, tmp_path: Path) -> None:
    def model(body: dict[str, Any]) -> str | dict[str, Any]:
        text = body["messages"][-1]["content"]
        return "Judgment: 0" if "Judgment: N" in text else "Judgement: Yes" if is_judgement(body) else chat_sums(body)

    wanted = [f"benchmark.path={write_sums(tmp_path, 1)}", *GENSELECT, "job.api=chat", "job.judge.when=always"]
    with serving(model) as server:
        run, score = evaluate(server, *wanted)
    assert run.metrics["select/comparisons"] == 4 and score == 1 and run.metrics["judge/questions"] == 2


def test_few_shot_examples_are_shown_but_never_the_problem_itself(evaluate: Evaluate, tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    rows = [{"problem": f"What is {i}+{7 * i}?", "solution": f"\\boxed{{{8 * i}}}"} for i in range(3)]
    examples.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with serving(lambda b: "\\boxed{0}") as server:
        evaluate(
            server,
            f"benchmark.path={write_sums(tmp_path, 2)}",
            f"job.few_shot.source={examples}",
            "job.few_shot.count=3",
            "job.num_generations=1",
            "job.tools=false",
        )
        first, second = sorted((b["prompt"] for b in server.requests), key=lambda p: "What is 1+7?\n" not in p[-20:])[
            ::-1
        ]
    assert first.count("Solution:\n") == 2 and first.endswith("Here is the problem you need to solve:\nWhat is 0+0?\n")
    assert second.count("What is 1+7?") == 1 and "What is 0+0?" in second


def test_the_shipped_examples_are_right() -> None:
    pairs = FewShot(source="word_problems", count=8).load()
    assert len(pairs) == 8 and all(solution.count("\\boxed{") == 1 for _, solution in pairs)
    for _, solution in pairs:  # every equation that is spelled out holds
        for left, right in re.findall(r"(?:^|[a-z.,] )([0-9][0-9 .+*/-]*[0-9]) = (\d+)", solution):
            assert eval(left) == int(right), (left, right)


def test_examples_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nor one of those shipped: word_problems"):
        FewShot(source="word_problem").load()
    with pytest.raises(ConfigError, match=r"few_shot\.count must be >= 1"):
        FewShot(count=0)
    file = tmp_path / "e.jsonl"
    file.write_text('{"problem": "1?", "solution": "1"}\n{"problem": "2?"}\n')
    with pytest.raises(InputError, match="line 2: an example needs"):
        FewShot(source=str(file)).load()
    file.write_text('{"problem": "1?", "solution": "1"}\n\n')
    with pytest.raises(InputError, match=r"has 1 examples, job\.few_shot\.count=4"):
        FewShot(source=str(file)).load()
    file.write_text("not json\n")
    with pytest.raises(InputError, match="line 1: not JSON"):
        FewShot(source=str(file)).load()
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        FewShot(source=str(file)).load()
    cfg = config("job=eval_few_shot", "model.prompt=openmath/tir")
    with pytest.raises(ConfigError, match=r"model\.prompt=openmath/tir has no place"):
        cfg.job.preflight(cfg)


def test_edited_examples_are_another_experiment(tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    file.write_text('{"problem": "1?", "solution": "1"}\n')
    overrides = [f"job.few_shot.source={file}", "job.few_shot.count=1"]
    before = fingerprint(config(*overrides))
    file.write_text('{"problem": "1?", "solution": "one"}\n')
    assert fingerprint(config(*overrides)) != before


@pytest.mark.parametrize(
    ("cls", "values", "says"),
    [
        (Select, {"comparisons": 0}, r"job\.select\.comparisons must be >= 1, got 0"),
        (Select, {"candidates": 1}, r"job\.select\.candidates must be >= 2"),
        (Select, {"timeout_s": 0.0}, r"job\.select\.timeout_s must be > 0"),
        (Select, {"temperature": -1.0}, r"job\.select\.temperature must be >= 0"),
        (Select, {"prompt": "x"}, r"job\.select\.prompt has no choice 'x'"),
        (Judge, {"max_tokens": 0}, r"job\.judge\.max_tokens must be >= 1"),
        (Judge, {"url": "host:1"}, r"job\.judge\.url must be http"),
        (Judge, {"model": "x"}, r"need job\.judge\.url"),
        (Judge, {"prompt": "judge/maths"}, "did you mean judge/math"),
    ],
)
def test_impossible_settings_are_refused(cls: Any, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cls(**values)


def test_settings_that_do_not_fit_together_are_refused() -> None:
    cfg = config("job=eval_genselect", "job.select.max_tokens=4000")
    with pytest.raises(ConfigError, match=r"job\.select\.max_tokens=4000 leaves no room"):
        cfg.job.preflight(cfg)
    cfg = config("job.judge.when=always", "job.judge.url=http://x", "job.judge.api_key_env=NO_SUCH_KEY_HERE")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY_HERE"):
        cfg.job.preflight(cfg)
