"""A whole evaluation against a fake server: everything but the server, the sandbox and the tokenizer is real."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from omr import pipeline, text
from omr.compose import plan
from omr.config import Config
from omr.job import eval as job_eval
from omr.run import Run, open_run
from omr.sandbox import Outcome, Sandbox
from omr.server import Endpoint

from .fake_server import FakeServer


class PlainTokenizer:
    """A token is four characters; no chat template."""

    chat_template = None
    bos_token = ""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * ((len(text) + 3) // 4)}


@dataclass(kw_only=True)
class Calculator(Sandbox):
    """Evaluates `print(EXPRESSION)` of digits and operators; anything else is an error."""

    option_group, option_name = "sandbox", "calculator"

    @contextlib.contextmanager
    def launch(self, log_dir: Path) -> Iterator[Any]:
        yield self

    tier = "process"

    def session(self) -> Calculator:
        return self

    async def execute(self, code: str, timeout_s: float | None = None) -> Outcome:
        match = re.fullmatch(r"print\(([0-9+*-]+)\)", code)
        if not match:
            return Outcome(status="error", stdout=f"SyntaxError: {code}\n")
        return Outcome(status="completed", stdout=f"{eval(match[1])}\n", seconds=0.001)

    async def close(self) -> None:
        """It holds nothing."""


def solve_sums(body: dict[str, Any]) -> str:
    """The model: calls the tool, then boxes what came back; a seed divisible by 5 makes it slip by one."""
    prompt = body["prompt"]
    if "```output\n" not in prompt:
        a, b = re.findall(r"(\d+)\+(\d+)\?", prompt)[-1]
        slip = "+1" if body["seed"] % 5 == 0 else ""
        return f"I will add them. <tool_call>\nprint({a}+{b}{slip})\n"
    result = re.findall(r"```output\n(\d+)\n", prompt)[-1]
    return f"The sum is \\boxed{{{result}}}."


def chat_sums(body: dict[str, Any]) -> str | dict[str, Any]:
    """The same model behind a chat API with a tool."""
    question, results = body["messages"][0]["content"], [m for m in body["messages"] if m["role"] == "tool"]
    if not results:
        a, b = re.findall(r"(\d+)\+(\d+)\?", question)[-1]
        return {"code": f"print({a}+{b}{'+1' if body['seed'] % 5 == 0 else ''})"}
    return f"The sum is \\boxed{{{results[-1]['content'].strip()}}}."


def write_sums(folder: Path, count: int, *, answers: bool = True) -> Path:
    file = folder / "sums.jsonl"
    rows = [{"id": f"s{i}", "problem": f"What is {i}+{7 * i}?", "level": i % 3} for i in range(count)]
    if answers:
        rows = [row | {"expected_answer": f"0{8 * i}"} for i, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Run, float | None]]:
    """`evaluate(server, "job.x=1", ...)` runs job=eval and returns the run and its score."""
    monkeypatch.setenv("OMR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(job_eval, "tokenizer_folder", lambda run: tmp_path)
    monkeypatch.setattr(text, "load_tokenizer", lambda folder: PlainTokenizer())
    numbers = iter(range(1000))

    def run_once(fake: FakeServer, *overrides: str) -> tuple[Run, float | None]:
        cfg = config(*overrides)

        @contextlib.contextmanager
        def endpoint(run: Run) -> Iterator[Endpoint]:
            yield Endpoint(base_url=fake.url, model="fake", server=run.cfg.server, pid=fake.pid)

        monkeypatch.setattr(pipeline, "endpoint", endpoint)
        with open_run(cfg, tmp_path / f"run{next(numbers)}", overrides=list(overrides)) as run:
            return run, cfg.job.run(run)

    return run_once


def config(*overrides: str) -> Config:
    made = plan(["tracking_uri=null", "device=cpu", *overrides], multirun=False)
    assert not made.refused, made.refused
    cfg = made.cells[0].cfg
    if not any(override.startswith("sandbox=") for override in overrides):
        cfg.sandbox = Calculator()
    return cfg
