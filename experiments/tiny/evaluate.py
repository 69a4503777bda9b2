"""Measure a small model on all held-out sets at once: one batch, all rows one position a step.

Prompts and tool outputs are fed as forced tokens, so rows need no common start and the cache no gaps. Code runs in
forked children with CPU and memory limits: fit for a throw-away machine, not for untrusted models (omr's sandbox is).

    PYTHONPATH=. python experiments/tiny/evaluate.py MODEL_FOLDER [--device cuda]     writes MODEL_FOLDER/results.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import select
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from omr.corpus.held_out import DEV_SETS, SETS, frozen, made
from omr.corpus.phrasing import INSTRUCTIONS
from omr.stats import wilson

MAX_CALLS = 4


@dataclass
class Row:
    set: str
    family: str
    wording: str
    problem: str
    expected: str
    prompt: list[int]
    temperature: float = 0.0
    tools: bool = True
    written: list[int] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    done: bool = False
    text: str = ""

    def correct(self) -> bool:
        return same(self.answer(), self.expected)

    def answer(self) -> str:
        found = re.findall(r"\\boxed\{([^{}]*)\}", self.text)
        return found[-1].strip() if found else ""


def same(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    try:
        return Fraction(ours) == Fraction(theirs)
    except (ValueError, ZeroDivisionError):
        return False


def execute(blocks: list[str]) -> str:
    """What the last block prints, after the others ran silently, in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        names: dict[str, Any] = {}
        out = io.StringIO()
        for block in blocks:
            out = io.StringIO()
            try:
                with contextlib.redirect_stdout(out):
                    exec(compile(block, "<cell>", "exec"), names)
            except BaseException as error:
                trace, line = error.__traceback__, 1
                while trace is not None:
                    line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<cell>" else line
                    trace = trace.tb_next
                out.write("Traceback (most recent call last):\n")
                out.write(f'  File "<cell>", line {line}, in <module>\n{type(error).__name__}: {error}\n')
        os.write(writing, out.getvalue()[:1000].encode())
        os._exit(0)
    os.close(writing)
    data = b""
    ends = time.monotonic() + 6
    while time.monotonic() < ends:
        ready, _, _ = select.select([reading], [], [], max(0.0, ends - time.monotonic()))
        if not ready:
            break
        piece = os.read(reading, 65536)
        if not piece:
            break
        data += piece
    os.close(reading)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    text = data.decode(errors="replace")
    return text if not text or text.endswith("\n") else text + "\n"


def rows_of(tokenizer: Any, every: int) -> list[Row]:
    rows: list[Row] = []

    def add(
        name: str, items: list[dict[str, str]], instruction: str = "generic/math", copies: int = 1, **how: Any
    ) -> None:
        for item in items:
            user = INSTRUCTIONS[instruction].replace("{problem}", item["problem"])
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for _ in range(copies):
                rows.append(
                    Row(name, item["family"], item["wording"], item["problem"], item["expected_answer"], ids, **how)
                )

    sets = {name: frozen(name) for name in SETS}
    for name in DEV_SETS:
        sets[name] = [
            {"family": e.family, "wording": e.wording, "problem": e.problem, "expected_answer": e.answer}
            for e in made(name)
        ]
    for name, items in sets.items():
        add(name, items)
    add("tiny_math T=0.7", sets["tiny_math"], copies=8, temperature=0.7)
    for name in ("tiny_math", "dev"):
        add(f"{name} no tools", sets[name], tools=False)
        add(f"{name} direct", sets[name], "tiny/direct", tools=False)
    return rows[::every]


def solve(model: Any, tokenizer: Any, rows: list[Row], device: str, longest: int, pool: Any) -> None:
    import numpy
    import torch
    from transformers import DynamicCache

    end, call = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</tool_call>"])
    forced = numpy.full((len(rows), longest + 1), -1, dtype=numpy.int64)
    for i, row in enumerate(rows):
        forced[i, : len(row.prompt)] = row.prompt
    hot = torch.tensor([max(row.temperature, 1e-6) for row in rows], device=device)[:, None]
    greedy = torch.tensor([row.temperature == 0 for row in rows], device=device)
    alive = numpy.ones(len(rows), dtype=bool)
    ends = numpy.array([len(row.prompt) for row in rows])
    buffer = numpy.zeros((len(rows), longest + 1), dtype=numpy.int64)
    buffer[:, 0] = forced[:, 0]
    cache = DynamicCache()
    torch.manual_seed(0)
    for at in range(longest):
        now = torch.from_numpy(buffer[:, at : at + 1]).to(device)
        logits = model(input_ids=now, past_key_values=cache, use_cache=True).logits[:, -1].float()
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-20, 1 - 1e-7)))
        picked = torch.where(greedy, logits.argmax(-1), (logits / hot + noise).argmax(-1)).cpu().numpy()
        given = forced[:, at + 1]
        buffer[:, at + 1] = numpy.where(given >= 0, given, picked)
        free = (given < 0) & alive
        for i in numpy.nonzero(free & (picked == end))[0]:
            alive[i] = False
            ends[i] = at + 1
        calls = [
            i for i in numpy.nonzero(free & (picked == call))[0] if rows[i].tools and len(rows[i].blocks) < MAX_CALLS
        ]
        for i in calls:
            text = tokenizer.decode(buffer[i, len(rows[i].prompt) : at + 2].tolist())
            rows[i].blocks.append(text.rsplit("<tool_call>", 1)[-1].removesuffix("</tool_call>").strip("\n"))
        for i, output in zip(calls, pool.map(execute, [rows[i].blocks for i in calls]), strict=True):
            block = tokenizer(f"\n```output\n{output}```\n", add_special_tokens=False)["input_ids"]
            room = longest - at - 1
            forced[i, at + 2 : at + 2 + len(block)] = block[:room]
        if not alive.any():
            break
    for i, row in enumerate(rows):
        row.done = not alive[i]
        stop = ends[i] if row.done else longest
        row.text = tokenizer.decode(buffer[i, len(row.prompt) : stop].tolist())


def summarise(rows: list[Row]) -> dict[str, Any]:
    by_set: dict[str, list[Row]] = {}
    for row in rows:
        by_set.setdefault(row.set, []).append(row)
    summary: dict[str, Any] = {}
    for name, some in by_set.items():
        right = sum(row.correct() for row in some)
        summary[name] = f"{100 * right / len(some):.1f} % of {len(some)} {wilson(right, len(some))}"
        if "T=0.7" in name:
            groups: dict[str, list[Row]] = {}
            for row in some:
                groups.setdefault(row.problem, []).append(row)
            votes = [Counter(r.answer() for r in g if r.answer()).most_common(1) for g in groups.values()]
            won = sum(bool(v) and same(v[0][0], g[0].expected) for v, g in zip(votes, groups.values(), strict=True))
            summary[f"{name} maj@8"] = f"{100 * won / len(groups):.1f} % of {len(groups)} {wilson(won, len(groups))}"
    dev = [row for row in rows if row.set in ("dev", "dev_wordings")]
    weak: dict[str, str] = {}
    for name in ("dev", "dev_wordings"):
        tally = Counter(row.family for row in dev if row.set == name and not row.correct())
        weak[name] = ", ".join(f"{family} {n}" for family, n in tally.most_common(40))
    greedy = [row for row in rows if row.set == "tiny_math"]
    return {
        "summary": summary,
        "weak_families_dev": weak,
        "mean_written_characters": sum(len(row.text) for row in greedy) / max(1, len(greedy)),
        "unfinished": sum(not row.done for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--longest", type=int, default=448)
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--every", type=int, default=1, help="take only every so many rows, for a quick look")
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        pool.map(execute, [["import fractions, decimal, math, itertools, datetime\nprint(1)"]] * args.workers)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
        rows = rows_of(tokenizer, args.every)
        started = time.time()
        with torch.inference_mode():
            solve(model, tokenizer, rows, args.device, args.longest, pool)
    results = summarise(rows)
    results["seconds"] = time.time() - started
    (args.model / "results.json").write_text(json.dumps(results, indent=1))
    with (args.model / "samples.jsonl").open("w") as file:
        for row in rows:
            kept = {"set": row.set, "family": row.family, "wording": row.wording, "problem": row.problem}
            file.write(
                json.dumps({**kept, "expected": row.expected, "correct": row.correct(), "text": row.text}) + "\n"
            )
    for name, value in results.items():
        print(name, json.dumps(value, indent=1), flush=True)


if __name__ == "__main__":
    main()
