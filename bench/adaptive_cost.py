"""What `drafter.adaptive` costs where drafts are useless: CPU time per token beside plain decoding.

    python bench/adaptive_cost.py [--model DIR] [--batch 1 8] [--rounds 7] [--threads 1]

The drafter is a ReDrafter head of the default shape with random weights, so that nothing is accepted; the text is the
model's own, greedy. Plain, adaptive and fixed drafting take a step each in turn, so that whatever else the machine does
meets all three alike; every round begins with new engines that have everything to measure yet. The figure is the median
over rounds of the ratio of CPU seconds to plain decoding's, all steps counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from omr.drafter._redrafter_chain import draft_model
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.loader import load
from omr.nn.redrafter import Redrafter, RedrafterConfig
from omr.source import ASSETS


@dataclass
class Lap:
    """What one engine did in a race."""

    tokens: list[list[int]]
    decoding_s: float = 0.0
    """CPU seconds of decode steps ..."""
    total_s: float = 0.0
    """... and of all steps."""
    steps: int = 0
    """Of all sequences, prefill not counted."""


def race(engines: dict[str, Engine], prompts: list[list[int]], max_tokens: int, **knobs: bool) -> dict[str, Lap]:
    """All engines answer the prompts, a step each in turn, in random order. Fails if their texts differ."""
    laps = {name: Lap(tokens=[[] for _ in prompts]) for name in engines}
    for engine in engines.values():
        for i, prompt in enumerate(prompts):
            engine.add(Request(id=str(i), prompt_ids=prompt, max_tokens=max_tokens, **knobs))
    rng, order = random.Random(0), list(engines)
    while any(engine.num_unfinished for engine in engines.values()):
        rng.shuffle(order)  # a step is some per cent faster after one of its own kind
        for name in order:
            lap, start = laps[name], time.process_time()
            outputs = engines[name].step()
            took = time.process_time() - start
            lap.total_s += took
            begun = [output for output in outputs if lap.tokens[int(output.id)]]
            lap.decoding_s += took * bool(begun)
            lap.steps += len(begun)
            for output in outputs:
                lap.tokens[int(output.id)] += output.token_ids
    expected = next(iter(laps.values())).tokens
    assert all(lap.tokens == expected for lap in laps.values()), "a drafter changed the output"
    return laps


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
    head = Redrafter(config).requires_grad_(False).eval()
    drafts = {name: draft_model(head, model.embed.weight, 3) for name in ("adaptive", "fixed")}
    drafts["adaptive"].adaptive = True
    rng = random.Random(0)
    print("| batch | drafting | CPU time over plain | drafted steps | accepted |")
    print("| --- | --- | --- | --- | --- |")
    for batch in args.batch:
        ratios: dict[str, list[float]] = {name: [] for name in drafts}
        prompts = [[rng.randrange(vocab) for _ in range(24)] for _ in range(2 * batch)]
        for round_ in range(args.rounds + 1):  # the first warms up
            engines = {
                name: Engine(model, max_batch_size=batch, kv_cache_tokens=batch * 512, draft=drafts.get(name))
                for name in ("plain", *drafts)
            }
            laps = race(engines, prompts, args.max_tokens, ignore_eos=True)
            for name, values in ratios.items():
                if round_:
                    values.append(laps[name].total_s / laps["plain"].total_s)
        for name, values in ratios.items():
            counts = engines[name].counts
            share = f"{counts.drafts / laps[name].steps:.1%}"
            print(
                f"| {batch} | {name} | {statistics.median(values):.3f} | {share} | {counts.accepted_tokens} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
