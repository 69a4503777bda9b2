"""The native engine on CPU beside transformers' generate: same weights, same prompts, same process, turns taken.

    python bench/engine_cpu.py [--model FOLDER] [--batches 1,4,12] [--new 128] [--threads 1] [--dtype bfloat16]

Both decode greedily in the same dtype to `--new` tokens whatever they say, prompts cut to one length (transformers
would pad). A figure is the best of the repeats; the ratio is the median of the ratios within a repeat. The machine's
state matters less to ratios and to tokens per CPU-second than to tokens per second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from omr.engine.engine import Engine  # noqa: E402
from omr.engine.request import Request  # noqa: E402
from omr.nn.loader import load  # noqa: E402

PROBLEMS = (
    "Sam has 37 boxes with 12 pens each and gives away 58 pens. How many pens are left?",
    "Find the sum of all multiples of 7 between 100 and 500.",
    "What is the greatest common divisor of 1071 and 462?",
    "A rectangle is 14 cm by 23 cm. What is its perimeter in centimetres?",
)


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """Tokens per second and per CPU-second."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def engine_run(engine: Engine, prompts: list[list[int]], new: int) -> int:
    for index, prompt in enumerate(prompts):
        engine.add(Request(id=str(index), prompt_ids=prompt, max_tokens=new, ignore_eos=True))
    tokens = 0
    while engine.num_unfinished:
        tokens += sum(len(output.token_ids) for output in engine.step())
    return tokens


def peer_run(model: Any, prompts: list[list[int]], new: int) -> int:
    ids = torch.tensor(prompts)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
    )
    return out.numel() - ids.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "omr" / "assets" / "tiny")
    parser.add_argument("--batches", default="1,4,12")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--engine-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = load(args.model, device="cpu", dtype=getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in PROBLEMS
    ]
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    length = min(map(len, encoded))
    theirs = None
    if not args.engine_only:
        theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    shape = f"prompt {length} tokens, {args.new} new tokens, {args.dtype}"
    print(f"torch {torch.__version__}, {args.threads} thread(s), {shape}")
    for batch in (int(b) for b in args.batches.split(",")):
        prompts = [encoded[i % len(encoded)][-length:] for i in range(batch)]
        tokens = batch * (length + args.new + 32)
        engine = Engine(ours, max_batch_size=batch, kv_cache_tokens=tokens, prefix_caching=False)
        mine, peer = [], []
        for repeat in range(args.repeats + 1):
            a = timed(lambda: engine_run(engine, prompts, args.new))  # noqa: B023 - called at once
            b = timed(lambda: peer_run(theirs, prompts, args.new)) if theirs else (1.0, 1.0)  # noqa: B023
            if repeat:
                mine.append(a)
                peer.append(b)
        line = f"batch {batch:3d}  engine {max(mine)[0]:7.0f} tok/s, {max(m[1] for m in mine):7.0f} per CPU-second"
        if theirs:
            ratio = statistics.median(m[1] / p[1] for m, p in zip(mine, peer, strict=True))
            line += f"; transformers {max(peer)[0]:7.0f}, {max(p[1] for p in peer):7.0f}; ratio {ratio:.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
