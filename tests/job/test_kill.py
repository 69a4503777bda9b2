"""kill -9 at random moments of an evaluation: what had finished stays, nothing is made twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from omr.job._judging import JUDGEMENTS
from omr.job._selecting import SELECTIONS
from omr.samples import intact_rows

from .conftest import solve_sums, write_sums
from .fake_server import serving

ROOT = Path(__file__).parents[2]
DRIVER = """
import contextlib, sys
from pathlib import Path
from omr import pipeline, text
from omr.job import eval as job_eval
from omr.run import open_run
from omr.server import Endpoint
from tests.job.conftest import PlainTokenizer, config

url, folder, *overrides = sys.argv[1:]
job_eval.tokenizer_folder = lambda run: Path(folder)
text.load_tokenizer = lambda folder: PlainTokenizer()

@contextlib.contextmanager
def endpoint(run):
    yield Endpoint(base_url=url, model="fake", server=run.cfg.server)

pipeline.endpoint = endpoint
cfg = config(*overrides)
with open_run(cfg, Path(folder), overrides=overrides) as run:
    cfg.job.run(run)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_and_repeats_nothing(tmp_path: Path) -> None:
    rng, problems, planned = random.Random(4), 20, 4
    file = write_sums(tmp_path, problems)
    environment = os.environ | {"OMR_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seen: dict[tuple[str, int], str] = {}
    kills = 0
    with serving(solve_sums, delay_s=0.01) as server:
        for attempt in range(30):
            argv = [sys.executable, "-c", DRIVER, server.url, str(tmp_path / f"run{attempt}"), f"benchmark.path={file}"]
            argv += [f"job.num_generations={planned}", "job.max_concurrent_generations=3", "sampling.seed=1"]
            requests_before = len(server.requests)
            with (tmp_path / f"log{attempt}").open("wb") as log:
                child = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, cwd=tmp_path)
                deadline = time.monotonic() + 60
                wanted = len(seen) + rng.randint(1, 9)
                while child.poll() is None and time.monotonic() < deadline and attempt < 8:
                    done = [f for f in (tmp_path / "home").glob("artifacts/unfinished/*/samples.jsonl")]
                    if done and done[0].read_bytes().count(b"\n") >= wanted:
                        break
                    time.sleep(rng.random() * 0.02)
                if child.poll() is None and attempt < 8:
                    child.send_signal(signal.SIGKILL)
                    kills += 1
                assert child.wait(120) in (0, -9), (tmp_path / f"log{attempt}").read_text()
            left = list((tmp_path / "home").glob("artifacts/unfinished/*/samples.jsonl"))
            asked = [b for b in server.requests[requests_before:] if "```output" not in b["prompt"]]
            for text in seen.values():
                row = json.loads(text)
                again = [b for b in asked if row["problem"] in b["prompt"] and b["seed"] == row["random_seed"]]
                assert not again, f"{row['id']} sample {row['sample']} was finished before attempt {attempt}"
            if not left:
                break
            seen |= {(r["id"], r["sample"]): json.dumps(r) for r in intact_rows(left[0])}
    assert kills >= 5, "the run was over before it could be killed"
    final = {(r["id"], r["sample"]): r for r in intact_rows(tmp_path / f"run{attempt}" / "samples.jsonl", strict=True)}
    assert set(final) == {(f"s{i}", k) for i in range(problems) for k in range(planned)}
    for key, text in seen.items():
        before = json.loads(text)
        assert all(final[key][name] == value for name, value in before.items())
    metrics = json.loads((tmp_path / f"run{attempt}" / "metrics.json").read_text())["metrics"]
    assert metrics["accuracy/pass_at_1"] == 1 and metrics["accuracy/generations"] == problems * planned


def opinionated(body: dict[str, Any]) -> str:
    """Solves sums; chooses the first attempt; finds every two answers the same."""
    if "Judgment: N" in body["prompt"]:
        return "Both were checked with care. Judgment: 0"
    return "They agree.\nJudgement: Yes" if "Judgement: No" in body["prompt"] else solve_sums(body)


@pytest.mark.slow
def test_kill_9_between_comparisons_and_judgements_repeats_none(tmp_path: Path) -> None:
    rng, file = random.Random(5), write_sums(tmp_path, 8)
    environment = os.environ | {"OMR_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    names, kills = (SELECTIONS, JUDGEMENTS), 0
    kept: dict[str, set[str]] = {name: set() for name in names}
    with serving(opinionated, delay_s=0.005) as server:
        for attempt in range(20):
            argv = [sys.executable, "-c", DRIVER, server.url, str(tmp_path / f"run{attempt}"), f"benchmark.path={file}"]
            argv += ["job.num_generations=5", "sampling.seed=1", "job.select.method=genselect", "job.judge.when=always"]
            argv += ["job.select.max_concurrent=2", "job.judge.max_concurrent=2", "job.max_concurrent_problems=2"]
            with (tmp_path / f"log{attempt}").open("wb") as log:
                child = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, cwd=tmp_path)
                wanted = sum(map(len, kept.values())) + rng.randint(1, 12)
                while child.poll() is None and attempt < 6:
                    written = [
                        f.read_bytes() for n in names for f in (tmp_path / "home").glob(f"artifacts/unfinished/*/{n}")
                    ]
                    if sum(text.count(b"\n") for text in written) >= wanted:
                        child.send_signal(signal.SIGKILL)
                        kills += 1
                        break
                    time.sleep(rng.random() * 0.01)
                assert child.wait(120) in (0, -9), (tmp_path / f"log{attempt}").read_text()
            (folder, *_) = [*(tmp_path / "home").glob("artifacts/unfinished/*"), tmp_path / f"run{attempt}"]
            for name in names:
                now = {json.dumps(row) for row in intact_rows(folder / name)}
                assert kept[name] <= now, f"{name} lost or repeated what was on disk"
                kept[name] = now
            if folder == tmp_path / f"run{attempt}":
                break
    assert kills >= 3, "the run was over before it could be killed"
    picks, judged = ([json.loads(row) for row in kept[name]] for name in names)
    assert {(p["id"], p["round"]) for p in picks} == {(f"s{i}", k) for i in range(8) for k in range(4)} and len(
        picks
    ) == 32
    assert len({(j["id"], j["answer"]) for j in judged}) == len(judged) == 16
