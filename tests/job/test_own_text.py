"""drafter.train.data=self: the base's own solutions as training text, kept, keyed, resumed and refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omr import pipeline
from omr.artifact import content
from omr.drafter._own_text import OwnText
from omr.errors import ConfigError, Failure, InputError
from omr.on_policy import document
from omr.run import Run, open_run
from omr.samples import SampleFile, intact_rows
from omr.sampling import Sampling
from omr.server import Endpoint
from omr.solve.prompt import CODE_TAGS
from omr.text import read_text

from .conftest import Calculator, PlainTokenizer, config, solve_sums, write_sums
from .fake_server import FakeServer, serving

ROOT = Path(__file__).parents[2]


class Tokenizer(PlainTokenizer):
    eos_token = "<|end|>"


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write(server, rows, "drafter.train.own.x=1", ...)` makes the text of a run and returns its artifact's folder."""
    monkeypatch.setenv("OMR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pipeline, "load_tokenizer", lambda folder: Tokenizer())
    numbers = iter(range(1000))

    def once(fake: FakeServer, rows: int, *overrides: str) -> Path:
        @contextlib.contextmanager
        def endpoint(run: Run) -> Iterator[Endpoint]:
            assert (run.cfg.drafter.option_name, run.cfg.quant.option_name) == ("none", "bf16")
            yield Endpoint(base_url=fake.url, model="fake", server=run.cfg.server)

        monkeypatch.setattr(pipeline, "endpoint", endpoint)
        cfg = config("job=train", "drafter=redrafter", "drafter.train.data=self", "quant=fp8", *overrides)
        with open_run(cfg, tmp_path / f"run{next(numbers)}", overrides=[]) as run:
            how = cfg.drafter.own_text()
            assert how is not None
            return pipeline.own_text(run, how, rows, pipeline.weights(run)).path.parent

    return once


def test_solutions_become_text_with_exact_spans(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [f"drafter.train.own.problems={write_sums(tmp_path, 6)}", "drafter.train.own.generations=2"]
    with serving(solve_sums) as server:
        made = write(server, 12, *wanted)
        rows = read_text(made / "text.parquet")
        assert len(rows) == 12 and [r.problem for r in rows[:3]] == ["What is 0+0?", "What is 0+0?", "What is 1+7?"]
        for row in rows:
            assert row.text.startswith("Solve the following math problem") and row.text.endswith("}.<|end|>")
            own = [piece for piece, target in row.pieces() if target]
            given = [piece for piece, target in row.pieces() if not target]
            assert own[0].startswith("I will add them.") and own[0].endswith("</tool_call>")
            assert own[1].startswith("The sum is") and own[1].endswith("<|end|>")
            assert given[1].startswith("\n```output\n") and given[1].endswith("```\n")
        assert {body["seed"] for body in server.requests if "```output" not in body["prompt"]} == {0, 1}
        assert {body["temperature"] for body in server.requests} == {0.7}
        assert len(intact_rows(made / "samples.jsonl", strict=True)) == 12
        asked = len(server.requests)
        assert write(server, 12, *wanted, "drafter.train.lr=0.5", "server.max_batch_size=3") == made
        assert len(server.requests) == asked, "the same text is not written twice"
        others = [
            ["drafter.train.own.sampling.temperature=0.9"],
            ["model.prompt=openmath/tir"],
            ["drafter.train.own.sampling.seed=7"],
            ["drafter.train.own.tools=false"],
        ]
        folders = {made, *(write(server, 12, *wanted, *other) for other in others)}
        assert len(folders) == 5
        with monkeypatch.context() as patched:
            patched.setattr(Calculator, "option_name", "none")  # a sandbox that runs nothing
            assert write(server, 12, *wanted) == write(server, 12, *wanted, "drafter.train.own.tools=false") != made
    with serving(lambda body: "It is \\boxed{1}.") as server:
        folders |= {write(server, 2), write(server, 2, "model.text.seed=3")}
        assert len(folders) == 7
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["metrics"]["rows"] == 12 and manifest["metrics"]["executions_per_generation"] == 1
    assert set(manifest["inputs"]) == {"weights", "problems"}


def test_a_killed_writing_asks_for_the_rest_only(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, append, count = [f"drafter.train.own.problems={write_sums(tmp_path, 8)}"], SampleFile.append, 0

    def dying(self: Any, row: dict[str, Any], events: list[Any]) -> None:
        nonlocal count
        append(self, row, events)
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    with serving(solve_sums) as server:
        monkeypatch.setattr(SampleFile, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            write(server, 8, *wanted)
        monkeypatch.setattr(SampleFile, "append", append)
        (kept,) = (tmp_path / "home" / "artifacts" / "own_text").glob(".*.resume")
        before = intact_rows(kept / "samples.jsonl")
        assert 3 <= len(before) < 8 and not (tmp_path / "home" / "artifacts" / "own_text" / kept.name[1:21]).exists()
        server.requests.clear()
        made = write(server, 8, *wanted)
        again = {row["problem"] for row in before}
        assert not [b for b in server.requests if any(problem in b["prompt"] for problem in again)]
    after = {row["id"]: row for row in intact_rows(made / "samples.jsonl", strict=True)}
    assert len(after) == 8 and all(after[row["id"]] == row for row in before) and not kept.exists()


def test_a_failing_server_loses_nothing(write: Write, tmp_path: Path) -> None:
    wanted = [f"drafter.train.own.problems={write_sums(tmp_path, 5)}"]

    def refuses_one(body: dict[str, Any]) -> str | int:
        return 400 if "3+21" in body["prompt"] else solve_sums(body)

    with serving(refuses_one) as server, pytest.raises(Failure, match=r"failed 1 of 5 solutions.*400.*asks for these"):
        write(server, 5, *wanted)
    with serving(solve_sums) as server:
        assert len(read_text(write(server, 5, *wanted) / "text.parquet")) == 5
        assert {b["prompt"].count("3+21?") for b in server.requests} == {1}


def test_what_cannot_be_written_is_refused_in_one_line(write: Write, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 5)
    with serving(solve_sums) as server:
        with pytest.raises(InputError, match=r"6 problems are needed for drafter\.train\.rows=6 .* has 5; lower"):
            write(server, 6, f"drafter.train.own.problems={file}")
        assert not server.requests
    with serving(lambda body: "") as server, pytest.raises((InputError, Failure)) as caught:
        write(server, 5, f"drafter.train.own.problems={file}")
    assert "\n" not in str(caught.value)
    for name, match in ((tmp_path / "no.jsonl", "does not exist"), ("gsm9k", r"takes one of .*gsm8k\.jsonl")):
        cfg = config("job=train", "drafter=redrafter", "drafter.train.data=self", f"drafter.train.own.problems={name}")
        with pytest.raises(InputError, match=f"drafter.train.own.problems=.*{match}"):
            pipeline.preflight(cfg)
    with pytest.raises(ConfigError, match=r"own\.generations must be >= 1"):
        OwnText(generations=0)
    with pytest.raises(ConfigError, match="one and the same text"):
        OwnText(generations=2, sampling=Sampling(temperature=0))


def test_the_server_that_writes_is_not_part_of_the_recipe() -> None:
    """So text may be written by a server that cannot run the drafter, and its knobs do not make another drafter."""
    cfg = config("job=train", "drafter=redrafter", "drafter.train.data=self", "server=vllm")
    assert cfg.server.option_name == "vllm"
    here = config("job=train", "drafter=redrafter", "drafter.train.data=self")
    assert content(cfg.drafter) == content(here.drafter) != content(config("drafter=redrafter").drafter)
    assert pipeline._writer(config("quant=fp8", "drafter=redrafter")).quant.option_name == "bf16"
    fitted = config("quant=fp8", "drafter=redrafter", "drafter.train.base=checkpoint")
    assert pipeline._writer(fitted).quant.option_name == "fp8", "a drafter for the quantised model learns its text"
    few = config("drafter=redrafter", "drafter.train.data=self", "drafter.train.own.max_concurrent_generations=1")
    assert content(few.drafter) == content(here.drafter)


def test_a_dropped_stream_leaves_the_text_as_it_was() -> None:
    """Where the events do not add up to the text, spans are found by the tags."""
    row = {"generation": "a<tool_call>\n1\n</tool_call>\n```output\n1\n```\nb", "finish_reason": "length"}
    made = document(
        row, [{"type": "text", "text": "a<tool_call>\n1\n</tool_c"}], "q", "Q: ", "E", CODE_TAGS["openmath"]
    )
    assert [p for p, own in made.pieces() if own] == ["a<tool_call>\n1\n</tool_call>", "b"]
    assert made.text == "Q: " + row["generation"]


DRIVER = """
import contextlib, sys
from pathlib import Path
from omr import pipeline
from omr.run import open_run
from omr.server import Endpoint
from tests.job.conftest import config
from tests.job.test_own_text import Tokenizer

url, folder, *overrides = sys.argv[1:]
pipeline.load_tokenizer = lambda folder: Tokenizer()

@contextlib.contextmanager
def endpoint(run):
    yield Endpoint(base_url=url, model="fake", server=run.cfg.server)

pipeline.endpoint = endpoint
cfg = config("job=train", "drafter=redrafter", "drafter.train.data=self", *overrides)
with open_run(cfg, Path(folder), overrides=overrides) as run:
    pipeline.own_text(run, cfg.drafter.own_text(), 40, pipeline.weights(run))
"""


@pytest.mark.slow
def test_kill_9_loses_no_solution_and_repeats_none(tmp_path: Path) -> None:
    file = write_sums(tmp_path, 40)
    environment = os.environ | {"OMR_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    store = tmp_path / "home" / "artifacts" / "own_text"
    seen: dict[str, str] = {}
    with serving(solve_sums, delay_s=0.02) as server:
        for attempt in range(4):
            argv = [sys.executable, "-c", DRIVER, server.url, str(tmp_path / f"run{attempt}")]
            argv += [f"drafter.train.own.problems={file}", "drafter.train.own.max_concurrent_generations=4"]
            asked_before = len(server.requests)
            child = subprocess.Popen(argv, env=environment, cwd=tmp_path)
            deadline = time.monotonic() + 120
            while child.poll() is None and time.monotonic() < deadline and attempt < 3:
                files = list(store.glob(".*.resume/samples.jsonl"))
                if files and files[0].read_bytes().count(b"\n") > len(seen) + 5:
                    child.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
            assert child.wait(120) == (-9 if attempt < 3 else 0)
            prompts = [b["prompt"] for b in server.requests[asked_before:]]
            assert not [p for p in prompts if any(json.loads(row)["problem"] in p for row in seen.values())]
            if attempt < 3:
                (kept,) = store.glob(".*.resume/samples.jsonl")
                seen |= {row["id"]: json.dumps(row) for row in intact_rows(kept)}
    (made,) = (p for p in store.iterdir() if not p.name.startswith("."))
    final = {row["id"]: json.dumps(row) for row in intact_rows(made / "samples.jsonl", strict=True)}
    assert len(final) == 40 and all(final[name] == text for name, text in seen.items()) and len(seen) > 15
