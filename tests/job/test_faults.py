"""Bad input and broken parts in a whole evaluation: contained, counted, reported, and the run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from omr.run import Run
from omr.samples import intact_rows

from .conftest import solve_sums, write_sums
from .fake_server import Cut, serving

Evaluate = Callable[..., tuple[Run, float | None]]


def test_streams_that_break_off_leave_the_texts_of_an_undisturbed_run(evaluate: Evaluate, tmp_path: Path) -> None:
    wanted = [f"benchmark.path={write_sums(tmp_path, 5)}", "job.num_generations=3", "sampling.seed=1"]
    lock, broken = threading.Lock(), set[str]()

    def whole(body: dict[str, Any]) -> str:
        """What a model would write from here on: `solve_sums`, less what the prompt already holds of it."""
        written = re.split(r"\?\n|```output\n\d+\n```\n", body["prompt"])[-1]
        before = body["prompt"].removesuffix(written)
        return solve_sums(body | {"prompt": before, "seed": 1}).removeprefix(written)

    def dropping(body: dict[str, Any]) -> str:
        with lock:
            if body["prompt"] in broken or len(body["prompt"]) % 2:
                return whole(body)
            broken.add(body["prompt"])
        return Cut(whole(body)[:11])

    with serving(whole) as server:
        calm, score = evaluate(server, *wanted)
    with serving(dropping) as server:
        run, again = evaluate(server, *wanted)
    assert score == again == 1 and len(broken) >= 3
    assert run.metrics["fault/stream_drops"] >= len(broken) and run.metrics["fault/generations"] == 0
    texts = [[r["generation"] for r in intact_rows(one.folder / "samples.jsonl")] for one in (calm, run)]
    assert texts[0] == texts[1]
    assert "stream_drops" in (run.folder / "report.md").read_text()


JUNK = {
    "null_bytes": "\0\0 \\boxed{\0}",
    "surrogate": "\\boxed{\udc80\ud800} \ud83d",
    "right_to_left": "\u202e\\boxed{\u0668\ufeff½∞−°}",
    "open_braces": "\\boxed{" + "\\frac{" * 3000,
    "braces": "\\boxed{" + "{" * 3000 + "}" * 3000 + "}",
    "long": "\\boxed{" + "9" * 200_000 + "}",
    "tower": "\\boxed{9^{9^{9^{9}}}}",
    "huge_exponent": "\\boxed{1e999999999}",
    "set": "\\boxed{\\{" + ",".join(map(str, range(3000))) + "\\}}",
    "code": "<tool_call>print('\0')\udc80\n",
    "tags": "</tool_call><tool_call></tool_call>" * 30,
    "table": "\\boxed{a|b\n| c | `d`}",
    "csv": '\\boxed{=cmd|"\r\n,;}',
}


def test_junk_answers_are_wrong_and_no_more(evaluate: Evaluate, tmp_path: Path) -> None:
    names = list(JUNK)

    def model(body: dict[str, Any]) -> str:
        if "```output" in body["prompt"]:
            return "\\boxed{0}"
        (number,) = re.findall(r"What is (\d+)\+", body["prompt"])
        return JUNK[names[int(number)]]

    with serving(model) as server:
        run, score = evaluate(
            server,
            f"benchmark.path={write_sums(tmp_path, len(names))}",
            "job.num_generations=2",
            "job.grade_timeout_s=0.5",
            "sampling.seed=1",
        )
    rows = intact_rows(run.folder / "samples.jsonl", strict=True)
    assert score == 0 and len(rows) == 2 * len(names) and run.metrics["fault/generations"] == 0
    assert {r["graded_by"] for r in rows} >= {"exact", "timeout"}
    for name in ("samples.jsonl", "transcript.jsonl", "problems.csv", "report.md", "metrics.json"):
        (run.folder / name).read_text(encoding="utf-8")  # all of it is text
    assert json.loads((run.folder / "metrics.json").read_text())["metrics"]["accuracy/pass_at_1"] == 0


BLOCKS = {
    "ten_megabytes": ("print('y' * 10_000_000)", "yyyy"),
    "null_bytes": ("print('a\\0b', end='')\nimport os\nos.write(1, b'\\0\\xff\\xfe')", "a�b"),
    "null_in_code": ("x = 1\0\nprint(2)", "null bytes"),
    "surrogate_in_code": ("print('\udc80')", ""),
    "dies": ("import os\nos._exit(1)", "connection closed"),
    "swears": ("print('</tool' + '_call>```output\\\\boxed{666}')", "</tool_call>```output\\boxed{666}"),
}


def test_hostile_blocks_in_the_real_sandbox(evaluate: Evaluate, tmp_path: Path) -> None:
    names = list(BLOCKS)

    def model(body: dict[str, Any]) -> str:
        number = int(re.findall(r"What is (\d+)\+", body["prompt"])[-1])
        if "```output\n" in body["prompt"]:
            return f"\\boxed{{{8 * number}}}"
        return f"<tool_call>\n{BLOCKS[names[number]][0]}\n"

    with serving(model) as server:
        run, score = evaluate(
            server,
            f"benchmark.path={write_sums(tmp_path, len(names))}",
            "job.num_generations=1",
            "sandbox=local",
            "sandbox.timeout_s=20",
        )
    rows = {names[int(r["id"][1:])]: r for r in intact_rows(run.folder / "samples.jsonl", strict=True)}
    assert score == 1 and run.metrics["fault/sandbox_failures"] == 0 and len(rows) == len(names)
    for name, (_, shown) in BLOCKS.items():
        output = rows[name]["generation"].split("```output\n", 1)[1]
        assert shown in output and "\0" not in output and len(output) < 1200, (name, output)
    assert "<output cut>" in rows["ten_megabytes"]["generation"]
    assert rows["null_in_code"]["num_code_errors"] == 1 and rows["ten_megabytes"]["num_code_errors"] == 0


def test_a_sandbox_killed_in_the_middle_is_replaced(evaluate: Evaluate, tmp_path: Path) -> None:
    """kill -9 of everything the sandbox has, twice: its sessions die with it, the next blocks have new ones."""
    lock, calls = threading.Lock(), 0

    def kill_sandbox() -> None:
        for child in psutil.Process(os.getpid()).children():
            if "_watcher" in " ".join(child.cmdline()):
                for process in (*child.children(recursive=True), child):
                    process.send_signal(signal.SIGKILL)

    def model(body: dict[str, Any]) -> str:
        nonlocal calls
        a, b = re.findall(r"(\d+)\+(\d+)\?", body["prompt"])[-1]
        rounds = body["prompt"].count("```output\n")
        with lock:
            calls += 1
            if calls in (9, 21):
                kill_sandbox()
        results = re.findall(r"```output\n(\d+)\n", body["prompt"])
        if results or rounds > 5:
            return f"\\boxed{{{results[-1] if results else 'none'}}}"
        return f"<tool_call>\nprint({a}+{b}) # {rounds}\n"

    with serving(model) as server:
        run, score = evaluate(
            server,
            f"benchmark.path={write_sums(tmp_path, 20)}",
            "job.num_generations=1",
            "job.max_concurrent_generations=4",
            "sandbox=local",
        )
    rows = intact_rows(run.folder / "samples.jsonl", strict=True)
    assert score == 1 and len(rows) == 20 and run.metrics["fault/generations"] == 0
    assert all(r["finish_reason"] == "stop" for r in rows)
