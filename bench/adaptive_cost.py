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
from pathlib import Path

import torch

from omr.drafter._redrafter_chain import draft_model
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.loader import load
from omr.nn.redrafter import Redrafter, RedrafterConfig
from omr.source import ASSETS


def race(engines: dict[str, Engine], count: int, max_tokens: int) -> dict[str, float]:
    """CPU seconds of each engine for the same requests. Fails if their texts differ."""
    rng, vocab = random.Random(0), next(iter(engines.values())).vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(24)] for _ in range(count)]
    tokens: dict[str, list[list[int]]] = {name: [[] for _ in prompts] for name in engines}
    seconds = dict.fromkeys(engines, 0.0)
    for engine in engines.values():
        for i, prompt in enumerate(prompts):
            engine.add(Request(id=str(i), prompt_ids=prompt, max_tokens=max_tokens, ignore_eos=True))
    while any(engine.num_unfinished for engine in engines.values()):
        for name, engine in engines.items():
            start = time.process_time()
            outputs = engine.step()
            seconds[name] += time.process_time() - start
            for output in outputs:
                tokens[name][int(output.id)] += output.token_ids
    assert all(texts == tokens["plain"] for texts in tokens.values()), "the drafter changed the output"
    return seconds


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
    print("| batch | drafting | CPU time over plain | drafted steps | accepted |")
    print("| --- | --- | --- | --- | --- |")
    for batch in args.batch:
        ratios: dict[str, list[float]] = {name: [] for name in drafts}
        for round_ in range(args.rounds + 1):  # the first warms up
            engines = {
                name: Engine(model, max_batch_size=batch, kv_cache_tokens=batch * 512, draft=drafts.get(name))
                for name in ("plain", *drafts)
            }
            seconds = race(engines, 2 * batch, args.max_tokens)
            for name, values in ratios.items():
                if round_:
                    values.append(seconds[name] / seconds["plain"])
        for name, values in ratios.items():
            counts, written = engines[name].counts, 2 * batch * args.max_tokens
            share = f"{counts.drafts / written:.1%}"
            print(
                f"| {batch} | {name} | {statistics.median(values):.3f} | {share} | {counts.accepted_tokens} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
