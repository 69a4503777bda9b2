"""Tokens per CPU-second on this machine: plain decoding against ReDrafter and prompt lookup, in one process.

    python bench/redrafter_cpu.py --model DIR --drafter DIR --problems FILE.jsonl [--batch 1 8] [--threads 1]

The prompts are problems in the model's own chat format, answered greedily without tools, `--rounds` times. All take a
step each in turn, in random order, so that whatever else the machine does meets all alike, and begin every round anew:
adaptive ones have everything to measure yet. The figure is the process's CPU time, not wall time; the ratio to plain
decoding in the same round is what to compare between machines. Tokens a step and the drafts they come of are of steps
that drafted. Output must be equal token for token, and the script fails if it is not.
`--past-end` ignores the end of the text: what the model then writes repeats itself more and more.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from adaptive_cost import race
from transformers import AutoTokenizer

from omr.drafter import Drafter
from omr.drafter.ngram import Ngram
from omr.drafter.none import NoDrafter
from omr.drafter.redrafter import Redrafter
from omr.drafter.suffix import Suffix
from omr.engine.engine import Engine
from omr.nn.loader import load
from omr.solve.prompt import PROMPTS, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--problems", type=Path, required=True, help="jsonl with a key `problem`")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--past-end", action="store_true")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", default=[""], help="rows whose name holds one of these")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    problems = [json.loads(line)["problem"] for line in args.problems.read_text().splitlines()[: args.count]]
    prompt = PROMPTS["generic/math"]
    prompts = [
        tokenizer(render(tokenizer, prompt.messages(p)), add_special_tokens=False)["input_ids"] for p in problems
    ]
    model = load(args.model, device="cpu")
    trained = json.loads((args.drafter / "config.json").read_text())["predict_n"]
    fixed = {"adaptive": False, "predict_n": trained}
    drafters: dict[str, Drafter] = {
        "plain": NoDrafter(),
        "redrafter": Redrafter(**fixed),
        "redrafter, whole drafts": Redrafter(**fixed, stop_below=0),
        "redrafter, adaptive": Redrafter(predict_n=trained),
        "ngram": Ngram(adaptive=False),
        "ngram, adaptive": Ngram(),
        "ngram, two tokens at least": Ngram(adaptive=False, min_ngram=2),
        "ngram, two tokens at least, adaptive": Ngram(min_ngram=2),
        "suffix": Suffix(adaptive=False),
        "suffix, adaptive": Suffix(),
    }
    drafters = {name: d for name, d in drafters.items() if name == "plain" or any(text in name for text in args.rows)}
    print(
        "| batch | drafter | tok per CPU-s | ratio to plain | tokens a step | drafts | drafted steps | decode share |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for batch in args.batch:
        shape = {"max_batch_size": batch, "kv_cache_tokens": batch * (args.max_tokens + 512), "prefix_caching": False}
        rates: dict[str, list[float]] = {name: [] for name in drafters}
        for round_ in range(args.rounds + 1):  # the first warms up
            # Loaded anew, because `suffix` remembers what it has seen.
            engines = {n: Engine(model, draft=d.load(args.drafter, model), **shape) for n, d in drafters.items()}
            laps = race(engines, prompts, args.max_tokens, ignore_eos=args.past_end)
            for name, lap in laps.items():
                if round_:
                    rates[name].append(sum(map(len, lap.tokens)) / lap.total_s)
        for name, engine in engines.items():
            ratio = statistics.median(a / b for a, b in zip(rates[name], rates["plain"], strict=True))
            counts, lap = engine.counts, laps[name]
            drafts = max(counts.drafts, 1)
            print(
                f"| {batch} | {name} | {statistics.median(rates[name]):.0f} | {ratio:.2f} | "
                f"{1 + counts.accepted_tokens / drafts:.2f} | {counts.draft_tokens / drafts:.2f} | "
                f"{counts.drafts / lap.steps:.0%} | {lap.decoding_s / lap.total_s:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
