"""omr ask and omr regrade."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omr import pipeline
from omr.cli import ask, compare, regrade
from omr.errors import ConfigError, Failure, InputError
from omr.run import Run
from omr.samples import intact_rows, write_rows
from omr.server import Endpoint

from .conftest import solve_sums, write_sums
from .fake_server import FakeServer, serving

Evaluate = Callable[..., tuple[Run, float | None]]
PLAIN = ["sandbox=none", "device=cpu", "sampling.seed=1"]


@pytest.fixture
def asked(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeServer], None]:
    """Points the pipeline at a fake server, and away from weights (`evaluate` takes care of the tokenizer)."""
    monkeypatch.setattr(pipeline, "preflight", lambda cfg: None)

    def at(fake: FakeServer) -> None:
        @contextlib.contextmanager
        def endpoint(run: Run) -> Iterator[Endpoint]:
            yield Endpoint(base_url=fake.url, model="fake", server=run.cfg.server)

        monkeypatch.setattr(pipeline, "endpoint", endpoint)

    return at


def test_ask_streams_a_generation_and_prints_the_vote(
    asked: Callable[[FakeServer], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def model(body: dict[str, int]) -> str:
        return "It is \\boxed{5}." if body["seed"] == 4 else "Two and two. \\boxed{4}."

    with serving(model) as server:
        asked(server)
        assert ask.main(["What is 2+2?", *PLAIN, "job.num_generations=4"]) == 0
        assert all("What is 2+2?" in body["prompt"] for body in server.requests)
    out = capsys.readouterr().out
    assert out.startswith("Two and two. \\boxed{4}.") and out.endswith("maj@4: 3 of 4 votes\n4\n")
    assert "generation 3: 5 (4 tokens, 0 executions, stop)" in out


def test_ask_answers_with_what_was_selected(
    asked: Callable[[FakeServer], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def model(body: dict[str, Any]) -> str:
        if "Judgment: N" in body["prompt"]:  # it finds the answer that the fewest gave
            return f"Judgment: {re.findall(r'Attempt ([0-9]):[^:]*boxed.5', body['prompt'])[0]}"
        return "It is \\boxed{5}." if body["seed"] == 4 else "Two and two. \\boxed{4}."

    with serving(model) as server:
        asked(server)
        genselect = ["job.select.method=genselect", "job.select.comparisons=3"]
        assert ask.main(["What is 2+2?", *PLAIN, *genselect, "job.num_generations=4"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("maj@4: 3 of 4 votes\ngenselect: 3 of 3 comparisons\n5\n")


def test_ask_refuses_what_it_cannot_do(asked: Callable[[FakeServer], None]) -> None:
    with pytest.raises(InputError, match="empty"):
        ask.main(["  "])
    with pytest.raises(ConfigError, match="job=eval, got job=build"):
        ask.main(["1+1?", "job=build"])
    with serving(lambda body: "no idea") as server:
        asked(server)
        with pytest.raises(Failure, match="none of 2 generations gave an answer"):
            ask.main(["1+1?", *PLAIN, "job.num_generations=2"])


def test_regrade_finds_changed_answers_and_keeps_the_rest(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sums(tmp_path, 4)
    with serving(solve_sums) as server:
        run, score = evaluate(server, f"benchmark.path={file}", "job.num_generations=3", "sampling.seed=1")
    assert regrade.main([str(run.folder)]) == 0
    assert "0 verdicts changed" in capsys.readouterr().out
    again = json.loads((run.folder / "regraded" / "metrics.json").read_text())
    first = json.loads((run.folder / "metrics.json").read_text())
    of_the_run = {k for k in first["metrics"].keys() - again["metrics"].keys() if k.startswith(("accept/", "stage/"))}
    assert again["metrics"] == {k: v for k, v in first["metrics"].items() if k not in of_the_run} and score == 1
    rows = intact_rows(run.folder / "samples.jsonl")
    for row in rows[:3]:
        row["expected_answer"] = "999"
    rows[0]["generation"] = "\\boxed{" + "9" * 100_000 + "}"
    write_rows(run.folder / "samples.jsonl", rows)
    (run.folder / "problems.csv").unlink()
    assert regrade.main([str(run.folder), "--out", str(tmp_path / "new"), "--vote", "length"]) == 0
    out = capsys.readouterr().out
    assert "3 verdicts changed" in out and "pass@1 75.0 %, vote 75.0 %" in out
    assert "... (100002 characters) is wrong for '999'" in out and max(map(len, out.splitlines())) < 300


def test_compare_pairs_two_runs_and_names_its_margin(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sums(tmp_path, 12)
    runs = {}
    with serving(solve_sums) as server:
        for name, seed in (("good", 1), ("same", 2), ("bad", 5)):  # a seed of 5 slips on every problem
            run, _ = evaluate(server, f"benchmark.path={file}", "job.num_generations=1", f"sampling.seed={seed}")
            tags = {"omr.folder": str(run.folder), "choice.quant": "bf16"}
            params = {"sampling.seed": str(seed)}
            runs[name] = {"id": name, "name": name, "status": "FINISHED", "tags": tags, "params": params}
            runs[name]["metrics"] = run.metrics
    monkeypatch.setattr(compare, "get_run", lambda uri, name, home: runs[name])
    assert compare.main(["good", "bad", "--margin", "5"]) == 0
    out = capsys.readouterr().out
    assert "paired on 12 problems, B - A: -100.0 points of pass@1 [-100.0, -75.0]" in out
    assert f"votes right only in A: 12, only in B: 0; exact McNemar p = {2 / 2**12:.3g}" in out
    assert "verdict: B is worse than A by more than 5 points" in out and "sampling.seed: 1 | 5" in out
    assert compare.main(["good", "same"]) == 0
    assert "too few problems to tell: a margin of 2 points was asked for, and 12 problems" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="above 0 and below 100; got -2"):
        compare.main(["good", "bad", "--margin", "-2"])
    runs["gone"] = {**runs["good"], "tags": {"omr.folder": str(tmp_path / "gone")}}
    with pytest.raises(ConfigError, match="cannot be paired"):
        compare.main(["good", "gone"])


def test_regrade_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no samples\.jsonl"):
        regrade.main([str(tmp_path)])
    (tmp_path / "samples.jsonl").write_text('{"id": "a", "sample": 0}\n')
    with pytest.raises(InputError, match="row 1 has no 'generation'"):
        regrade.main([str(tmp_path)])
    (tmp_path / "samples.jsonl").write_text('{"id": "a"\n{"id": "b"}\n')
    with pytest.raises(InputError, match="line 1 is damaged"):
        regrade.main([str(tmp_path)])
