"""Tokens per CPU-second on this machine: plain decoding against ReDrafter and prompt lookup, in one process.

    python bench/redrafter_cpu.py --model DIR --drafter DIR --problems FILE.jsonl [--batch 1 8] [--threads 1]

The prompts are problems in the model's own chat format, answered greedily without tools, `--rounds` times per drafter
in turn (plain, redrafter, ngram, plain, ...), so that a change of the machine's speed meets all three. The figure is
the process's CPU time, not wall time; the ratio to plain decoding in the same round is what to compare between
machines. Output must be equal token for token, and the script fails if it is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from omr.drafter.ngram import Ngram
from omr.drafter.redrafter import Redrafter
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.loader import load
from omr.solve.prompt import PROMPTS, render


def generate(engine: Engine, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], float, float]:
    """(tokens of each prompt, CPU seconds spent decoding, CPU seconds spent in all)."""
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, ids in enumerate(prompts):
        engine.add(Request(id=str(i), prompt_ids=ids, max_tokens=max_tokens))
    start, decoding = time.process_time(), 0.0
    while engine.num_unfinished:
        at = time.process_time()
        outputs = engine.step()
        if any(len(tokens[o.id]) for o in outputs):
            decoding += time.process_time() - at
        for output in outputs:
            tokens[output.id] += output.token_ids
    return list(tokens.values()), decoding, time.process_time() - start


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
    drafts = {
        "plain": None,
        "redrafter": Redrafter(adaptive=False, predict_n=trained).load(args.drafter, model),
        "redrafter, whole drafts": Redrafter(adaptive=False, predict_n=trained, stop_below=0).load(args.drafter, model),
        "redrafter, adaptive": Redrafter(predict_n=trained).load(args.drafter, model),
        "ngram": Ngram(adaptive=False).load(None, model),
        "ngram, adaptive": Ngram().load(None, model),
    }
    print("| batch | drafter | tok per CPU-s | ratio to plain | accepted length | drafted | decode share of CPU |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for batch in args.batch:
        rates: dict[str, list[float]] = {name: [] for name in drafts}
        lengths, drafted, shares, expected = {}, {}, {}, None
        for round_ in range(args.rounds + 1):  # the first warms up
            for name, draft in drafts.items():
                engine = Engine(
                    model, max_batch_size=batch, kv_cache_tokens=batch * 512, draft=draft, prefix_caching=False
                )
                tokens, decoding, total = generate(engine, prompts, args.max_tokens)
                assert expected in (None, tokens), f"{name} wrote other tokens than plain decoding"
                expected = tokens
                if round_:
                    rates[name].append(sum(map(len, tokens)) / total)
                shares[name] = decoding / total
                counts = engine.counts
                lengths[name] = 1 + counts.accepted_tokens / counts.drafts if counts.drafts else 1.0
                drafted[name] = counts.draft_tokens / counts.drafts if counts.drafts else 0.0
        for name in drafts:
            ratio = statistics.median(a / b for a, b in zip(rates[name], rates["plain"], strict=True))
            rate = statistics.median(rates[name])
            print(
                f"| {batch} | {name} | {rate:.0f} | {ratio:.2f} | {lengths[name]:.2f} | {drafted[name]:.2f} | "
                f"{shares[name]:.2f} |"
            )


if __name__ == "__main__":
    main()
