"""Kill a run with SIGKILL at seeded random moments of every stage, run the same command again, compare with an
undisturbed run.

    python bench/kill_anywhere.py                       # 24 kills, six in each stage
    python bench/kill_anywhere.py --kills 4 --seed 7

Each round has a home of its own, started from nothing. A stage is known by what the run prints: building the
checkpoint, training the drafter, starting the server, generating. The kill comes a random share of that stage's own
duration (taken from the undisturbed run) after it began. Afterwards there must be
  - no process of the dead run left,
  - the second run finished, with the same greedy answers, generation for generation, as the undisturbed run,
  - every artifact whole (digests) and, for the checkpoint and the drafter, the same bytes as the undisturbed run's,
  - the dead run marked KILLED in the tracking database.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

STAGES = {
    "build": "checkpoint {}: building",
    "train": "drafter {}: building",
    "serve": "drafter {}: ",  # the drafter is there: the server starts next
    "eval": "serves ",
}
COMMAND = [
    "+experiment=fp8_redrafter",
    "sampling=greedy",
    "job.num_generations=1",
    "drafter.train.rows=240",
    "quant.calib_samples=32",
    "benchmark.limit=40",
    "study=kill",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="further overrides of the command that is killed")
    args = parser.parse_args()
    command = [sys.executable, "-m", "omr", *COMMAND, *args.overrides]
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="omr-kill-") as scratch:
        reference = Path(scratch) / "reference"
        durations = undisturbed(command, reference)
        print("undisturbed stages, seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in durations.items()), flush=True)
        failures = 0
        for at in range(args.kills):
            stage = list(STAGES)[at % len(STAGES)]
            after = rng.random() * durations[stage]
            problems = one_round(command, Path(scratch) / f"round{at}", stage, after, reference)
            failures += bool(problems)
            print(f"kill {at:2d} in {stage} +{after:5.2f} s: {'; '.join(problems) or 'ok'}", flush=True)
    print(f"{args.kills - failures} of {args.kills} rounds clean")
    return 1 if failures else 0


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"OMR_HOME": str(home), "PYTHONUNBUFFERED": "1"}


def undisturbed(command: list[str], home: Path) -> dict[str, float]:
    """Run to the end; seconds that each stage takes."""
    began: dict[str, float] = {}
    with start(command, home) as child:
        for line in lines(child):
            for stage, mark in STAGES.items():
                if stage not in began and seen(mark, line):
                    began[stage] = time.monotonic()
            if "drafter" in line and "building" not in line:
                began["serve"] = time.monotonic()
        ended = time.monotonic()
    assert child.returncode == 0, f"the undisturbed run failed with {child.returncode}"
    took = json.loads(next(home.glob("multirun/*/*/0/summary.json")).read_text())["metrics"]
    return {
        "build": took["stage/checkpoint_s"],
        "train": took["stage/drafter_s"],
        "serve": took["stage/server_start_s"],
        "eval": ended - began["eval"],
    }


def one_round(command: list[str], home: Path, stage: str, after: float, reference: Path) -> list[str]:
    """Kill once, run again, and say what is wrong with the result."""
    problems = []
    with start(command, home) as child:
        for line in lines(child):
            if seen(STAGES[stage], line) and not (stage == "serve" and "building" in line):
                break
        if stage == "serve":
            wait_until(lambda: any("omr.server" in name(p) for p in family(child.pid)), 30)
        threading.Thread(target=child.stderr.read, daemon=True).start()  # keep the pipe empty
        time.sleep(after)
        relatives = family(child.pid)
        child.send_signal(signal.SIGKILL)
        child.wait()
    if not wait_until(lambda: not any(is_alive(p) for p in relatives), 10):
        problems.append(f"orphans: {[name(p)[:80] for p in relatives if is_alive(p)]}")
        for process in relatives:
            if is_alive(process):
                process.kill()
    again = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False)
    if again.returncode != 0:
        return [*problems, f"second run exited with {again.returncode}: {again.stderr.strip().splitlines()[-1:]}"]
    if answers(home) != answers(reference):
        problems.append("other answers than the undisturbed run")
    if (mine := weights(home)) != (known := weights(reference)):
        problems.append(f"other artifacts: {sorted(set(mine.items()) ^ set(known.items()))}")
    verify = [sys.executable, "-m", "omr", "artifacts", "verify"]
    if subprocess.run(verify, env=environment(home), capture_output=True, check=False).returncode != 0:
        problems.append("an artifact is not whole")
    if sorted(statuses(home)) not in (["FINISHED", "KILLED"], ["FINISHED", "FINISHED"], ["FINISHED"]):
        problems.append(f"statuses {statuses(home)}")
    return problems


def start(command: list[str], home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def lines(child: subprocess.Popen[str]):
    """Lines as they come. Not `yield from`: leaving early would close the pipe under the child."""
    assert child.stderr is not None
    yield from iter(child.stderr.readline, "")


def seen(mark: str, line: str) -> bool:
    return all(part in line for part in mark.split("{}"))


def family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def answers(home: Path) -> list[tuple[str, str]]:
    """(problem id, text) of every generation of the newest run: greedy, so it must not depend on the kill."""
    newest = max(home.glob("multirun/*/*/0/samples.jsonl"), key=lambda p: p.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    assert len(rows) == len({(r["id"], r.get("generation_index", 0)) for r in rows}), "a generation is there twice"
    return sorted((row["id"], row["generation"]) for row in rows)


def weights(home: Path) -> dict[str, str]:
    """Digest of every safetensors file in the store, by kind, key and name."""
    found = {}
    for manifest in home.glob("artifacts/*/*/manifest.json"):
        for name, file in json.loads(manifest.read_text())["files"].items():
            if name.endswith(".safetensors"):
                found[f"{manifest.parent.parent.name}/{manifest.parent.name}/{name}"] = file["sha256"]
    return found


def statuses(home: Path) -> list[str]:
    out = subprocess.run(
        [sys.executable, "-m", "omr", "ls", "kill"], env=environment(home), capture_output=True, text=True, check=True
    )
    return [word for line in out.stdout.splitlines() for word in line.split() if word.isupper() and len(word) > 5]


if __name__ == "__main__":
    sys.exit(main())
