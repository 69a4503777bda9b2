"""What `drafter.adaptive` costs where drafts are useless: CPU time per token beside plain decoding.

    python bench/adaptive_cost.py [--model DIR] [--batch 1 8] [--rounds 7] [--threads 1]

The drafter is a ReDrafter head of the default shape with random weights, so that nothing is accepted; the text is the
model's own, greedy. Each round runs plain decoding, adaptive and fixed drafting in turn, each with a new engine that
has everything to measure yet; the figure is the median over rounds of the ratio of CPU seconds to plain decoding's.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch

from omr.drafter._redrafter_chain import draft_model
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.loader import load
from omr.nn.redrafter import Redrafter, RedrafterConfig
from omr.source import ASSETS


def cpu_seconds(engine: Engine, count: int, max_tokens: int) -> tuple[float, list[list[int]]]:
    rng, vocab = random.Random(0), engine.vocab_size
    tokens: dict[str, list[int]] = {}
    for i in range(count):
        prompt = [rng.randrange(vocab) for _ in range(24)]
        request = Request(id=str(i), prompt_ids=prompt, max_tokens=max_tokens, temperature=1.0, seed=i, ignore_eos=True)
        engine.add(request)
        tokens[request.id] = []
    start = time.process_time()
    while engine.num_unfinished:
        for output in engine.step():
            tokens[output.id] += output.token_ids
    return time.process_time() - start, list(tokens.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load(args.model, device="cpu")
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    config = RedrafterConfig(
        vocab_size=vocab, hidden_size=hidden, exit_dim=2 * hidden, num_draft_layers=2, rnn=True, predict_n=3
    )
    draft = draft_model(Redrafter(config).requires_grad_(False).eval(), model.embed.weight, 3)
    print("| batch | drafting | CPU time over plain | drafted steps | accepted |")
    print("| --- | --- | --- | --- | --- |")
    for batch in args.batch:
        ratios: dict[str, list[float]] = {"adaptive": [], "fixed": []}
        shown = {}
        for round_ in range(args.rounds + 1):  # the first warms up
            seconds, expected = cpu_seconds(
                Engine(model, max_batch_size=batch, kv_cache_tokens=batch * 512), 2 * batch, args.max_tokens
            )
            for name, values in ratios.items():
                draft.adaptive = name == "adaptive"
                engine = Engine(model, max_batch_size=batch, kv_cache_tokens=batch * 512, draft=draft)
                taken, tokens = cpu_seconds(engine, 2 * batch, args.max_tokens)
                assert tokens == expected, "the drafter changed the output"
                if round_:
                    values.append(taken / seconds)
                counts = engine.counts
                shown[name] = (counts.drafts / sum(map(len, tokens)), counts.accepted_tokens)
        for name, values in ratios.items():
            drafted, accepted = shown[name]
            print(f"| {batch} | {name} | {statistics.median(values):.3f} | {drafted:.1%} | {accepted} |")


if __name__ == "__main__":
    main()
