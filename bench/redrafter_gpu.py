"""What a ReDrafter step costs on one GPU, in plain decoding steps of the same run: a 14B shape, random weights.

    python bench/redrafter_gpu.py [--shape 14b] [--batches 1,32,4,12] [--deadline-s 300] [--out results.json]
    python bench/redrafter_gpu.py --shape micro --device cpu --prompt 20 --steps 3       # does it run

Per precision of the base (bf16; the same weights rounded to FP8, one scale per tensor, bf16 lm_head) and batch:

    plain        one token a sequence
    verify 1x4   the newest token and 3 drafts from a table: the verification alone
    step 1x4     the whole step with a ReDrafter (rnn, 2 blocks, exit_dim 2H) and one of the HEADS
    step 4x4     the same with a tree of 4 beams and the 32k-word head in 8 bits
    draft        the proposal alone, replayed from a CUDA graph

Acceptance is near 0 with random weights; a step costs the same whatever is accepted. `ms` is wall time per step, host
work included; `graph_ms` the device's share of it. The speed-up at a published acceptance is computed: tokens a step
times plain / step. What no longer fits before the deadline is left out, most important first; the file is written after
every measurement. 30 GiB of device memory and 10 more while FP8 weights are made.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from engine_gpu import SHAPES, OneByOne, quantised, random_model, replay_ms

from omr.drafter import DraftModel
from omr.drafter._redrafter_chain import draft_model
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.redrafter import Redrafter, RedrafterConfig
from omr.nn.transformer import Transformer

DRAFTS = 3
HEADS: dict[str, tuple[dict[str, Any], bool]] = {
    "full bf16": ({}, False),
    "32k words fp8": ({"draft_vocab_size": 32768}, True),
    "base lm_head bf16": ({"head": "base"}, False),
}
"""Shape of the drafter, and whether blocks and output matrix are drafted with in 8 bits."""
BEAM_HEAD = "32k words fp8"
PUBLISHED = {"prefix": 3.315, "conditional": 2.931}
"""Tokens a step at the published rates 0.833, 0.770, 0.712, read as the chance that the first 1, 2, 3 drafts all hold
(1 + sum) or as that of each given the one before (1 + sum of products)."""
REFERENCE = {
    "plain on bf16": {1: 11.42, 4: 11.74, 12: 12.26, 32: 13.78},
    "plain on fp8": {1: 6.49, 4: 6.76, 12: 7.43, 32: 8.86},
    "verify 1x4 on bf16": {1: 11.58, 4: 11.66, 12: 12.71, 32: 15.01},
    "verify 1x4 on fp8": {1: 6.59, 4: 6.98, 12: 7.81, 32: 9.94},
    "draft full bf16": {1: 3.91, 4: 3.93, 12: 3.96, 32: 4.02},
    "draft 32k words fp8": {1: 0.82, 4: 0.83, 12: 0.85, 32: 0.85},
    "draft 4 beams": {1: 1.04, 4: 1.09, 12: 1.13, 32: 1.27},
}
"""Milliseconds of a bare CUDA-graph loop on an H100 80GB, context about 1k: no scheduler, no paging, no read-back."""


class Results:
    """Measurements by name and batch, printed and on disk as they come; nothing new is begun past the deadline."""

    def __init__(self, out: Path | None, deadline_s: float) -> None:
        self.out, self.start, self.deadline_s = out, time.monotonic(), deadline_s
        self.data: dict[str, Any] = {"skipped": [], "failed": {}, "ms": {}}

    def left(self) -> float:
        return self.deadline_s - (time.monotonic() - self.start)

    def measure(self, name: str, batch: int, needs_s: float, run: Callable[[], dict[str, float]]) -> None:
        label = f"{name}, batch {batch}"
        if self.left() < needs_s:
            self.data["skipped"].append(label)
            return
        began = time.monotonic()
        try:
            figures = run()
        except Exception as error:  # reported at the end by the exit status; the other figures are wanted all the same
            self.data["failed"][label] = f"{type(error).__name__}: {error}"
            print(f"{label}: {self.data['failed'][label]}", flush=True)
            return
        self.data["ms"].setdefault(name, {})[str(batch)] = figures
        took = time.monotonic() - began
        print(f"{label:36s} " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()) + f"  ({took:.1f} s)", flush=True)
        self.save()

    def save(self) -> None:
        self.data["seconds"] = time.monotonic() - self.start
        if self.out:
            self.out.write_text(json.dumps(self.data, indent=1))

    def ms(self, name: str, batch: int) -> float | None:
        found = self.data["ms"].get(name, {}).get(str(batch))
        return found and found["ms"]


def random_head(model: Transformer, shape: dict[str, Any], vocab_limit: int) -> Redrafter:
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    known = {"vocab_size": vocab, "hidden_size": hidden, "exit_dim": 2 * hidden, "num_draft_layers": 2, "rnn": True}
    shape = {k: min(v, vocab_limit) if k == "draft_vocab_size" else v for k, v in shape.items()}
    with model.device:
        head = Redrafter(RedrafterConfig(**{**known, **shape})).to(model.dtype).requires_grad_(False).eval()
        if head.config.draft_vocab_size:
            head.set_draft_tokens(torch.arange(head.config.draft_vocab_size))
    head.attach(model.lm_head.weight)
    return head


def wait(model: Transformer) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def step_cost(model: Transformer, draft: Any, prompts: list[list[int]], steps: int) -> dict[str, float]:
    """Milliseconds of a decode step of the engine, all prompts in one batch."""
    new = (1 + DRAFTS) * (steps + 4)
    context, batch = len(prompts[0]) + new, len(prompts)
    engine = Engine(
        model, max_batch_size=batch, kv_cache_tokens=batch * (context + 32), context_tokens=context, draft=draft,
        prefill_tokens=1 << 15, prefix_caching=False,
    )  # fmt: skip
    for i, prompt in enumerate(prompts):
        engine.add(Request(id=str(i), prompt_ids=prompt, max_tokens=new, ignore_eos=True))
    while engine.num_waiting or not engine.num_running or any(not s.decoding for s in engine.scheduler.running):
        engine.step()
    for _ in range(3):  # captures the graph
        engine.step()
    wait(model)
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    wait(model)
    result = {"ms": 1e3 * (time.perf_counter() - start) / steps}
    graphs = getattr(engine.runner, "_graphs", None)
    if graphs and draft is not None:
        result["accepted"] = engine.counts.accepted_tokens / max(engine.counts.drafts, 1)
    if graphs:
        result["graph_ms"] = replay_ms(next(reversed(graphs.values())))
    return result


@torch.inference_mode()
def draft_cost(model: Transformer, draft: Any, batch: int) -> dict[str, float]:
    """Milliseconds of one proposal for a batch: in a CUDA graph, by events; on CPU by the clock."""
    hidden = torch.randn(batch, model.config.hidden_size, device=model.device, dtype=model.dtype)
    tokens = torch.randint(0, model.config.vocab_size, (batch,), device=model.device)

    def run() -> None:
        if hasattr(draft, "propose_tree"):
            draft.propose_tree(hidden, tokens)
        else:
            draft.propose(hidden, tokens, None)

    if model.device.type != "cuda":
        run()
        start = time.perf_counter()
        run()
        return {"ms": 1e3 * (time.perf_counter() - start)}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return {"ms": replay_ms(graph, 40)}


def drafters(model: Transformer, vocab_limit: int) -> dict[str, DraftModel]:
    made: dict[str, DraftModel] = {}
    for name, (shape, eight) in HEADS.items():
        made[name] = draft_model(random_head(model, shape, vocab_limit), model.embed.weight, DRAFTS, in_eight_bit=eight)
    shape, eight = HEADS[BEAM_HEAD]
    head = random_head(model, shape, vocab_limit)
    made["4 beams"] = draft_model(head, model.embed.weight, DRAFTS, num_beams=4, in_eight_bit=eight)
    return made


def summary(results: Results, batches: list[int]) -> dict[str, Any]:
    """Ratios to the plain step of the same run, and the speed-up that they imply."""
    rows: dict[str, Any] = {}
    for name in results.data["ms"]:
        kind, _, precision = name.rpartition(" on ")
        if kind in ("plain", ""):
            continue
        for batch in batches:
            step, plain = results.ms(name, batch), results.ms(f"plain on {precision}", batch)
            if step and plain:
                row = rows.setdefault(name, {})[str(batch)] = {"ratio": step / plain}
                if kind.startswith("step 1x4"):
                    row |= {f"speedup, {k}": tokens * plain / step for k, tokens in PUBLISHED.items()}
    return rows


def _cell(value: float | None, beside: float | None, shown: str) -> str:
    return "-" if value is None else f"{value:.2f}" + (f" ({shown.format(beside)})" if beside else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="14b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", default="1,32,4,12", help="most important first")
    parser.add_argument("--prompt", type=int, default=896)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--deadline-s", type=float, default=600)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    results = Results(args.out, args.deadline_s)
    on_gpu = args.device == "cuda"
    results.data |= {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__, "shape": args.shape,
        "prompt": args.prompt, "steps": args.steps, "reference_ms": REFERENCE,
    }  # fmt: skip
    model = random_model(args.shape, args.device)
    vocab = model.config.vocab_size
    stream = torch.randint(0, vocab, (64 * args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [(stream[17 * i :] + stream)[: args.prompt] for i in range(max(batches))]
    made = drafters(model, vocab // 2)
    slack = 6.0 if on_gpu else 0.0  # the longest measurement

    def steps(name: str, precision: str, draft: Any, batch: int) -> None:
        run = lambda: step_cost(model, draft, prompts[:batch], args.steps)  # noqa: E731
        results.measure(f"{name} on {precision}", batch, slack, run)
        gc.collect()

    def one_precision(precision: str) -> None:
        for batch in batches:
            steps("plain", precision, None, batch)
            steps("verify 1x4", precision, OneByOne(model, DRAFTS), batch)
            for head in HEADS:
                steps(f"step 1x4, {head}", precision, made[head], batch)
            steps(f"step 4x4, {BEAM_HEAD}", precision, made["4 beams"], batch)

    for head, draft in made.items():
        for batch in batches:
            results.measure(f"draft {head}", batch, slack, lambda d=draft, b=batch: draft_cost(model, d, b))
    one_precision("bf16")
    if results.left() > slack:
        quantised(model, "fp8")
        one_precision("fp8")
    results.data["ratios"] = summary(results, batches)
    if on_gpu:
        results.data["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    results.save()
    print(f"\n{'ms (reference loop)':32s}" + "".join(f"{b:>16d}" for b in batches))
    for name in results.data["ms"]:
        cells = [_cell(results.ms(name, b), REFERENCE.get(name, {}).get(b), "{:.2f}") for b in batches]
        print(f"{name:32s}" + "".join(f"{c:>16s}" for c in cells))
    print("\nratio to the plain step of this run (speed-up, computed)")
    for name, row in results.data["ratios"].items():
        found = [row.get(str(b), {}) for b in batches]
        cells = [_cell(f.get("ratio"), f.get("speedup, prefix"), "{:.2f}x") for f in found]
        print(f"{name:32s}" + "".join(f"{c:>16s}" for c in cells))
    print(f"computed at {PUBLISHED['prefix']} tokens a step; skipped: {results.data['skipped'] or 'nothing'}")
    return 1 if results.data["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
