"""The matrix products of one forward for a few rows of x, by every way torch has on this CPU.

    python bench/few_rows.py [--rows 1 4 16 40] [--repeats 15] [--threads 1]

The weights are those of the base in bench/redrafter_step.py (8 layers and the output matrix, 118 MB, more than a
cache holds). Each repeat runs all ways in turn; CPU milliseconds, median. Two lines stand above: what the core does in
float32 on one large product, and how fast it reads memory. They bound a forward of few rows: its arithmetic at the one,
its bytes at the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from omr.nn.packed import pack

SHAPES = [(1536, 512), (512, 512), (2752, 512), (512, 1376)] * 8 + [(8192, 512)]  # (N, K)
LARGE = 1024
Way = tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor, Any], torch.Tensor]]


def spent_ms(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def ways(rows: int) -> dict[str, Way]:
    """By name: how a weight (N, K) is kept, and (x, kept) -> x W^T."""
    onednn = torch.ops.mkldnn._linear_pointwise
    found: dict[str, Way] = {
        "oneDNN, re-ordered": (pack, lambda x, w: onednn(x, w, None, "none", [], "")),
        "F.linear": (torch.clone, F.linear),
        "mm, by columns": (lambda w: w.t().contiguous(), torch.mm),
        "mm, W x^T": (torch.clone, lambda x, w: torch.mm(w, x.t())),
    }
    if torch.backends.mkl.is_available():
        mkl = torch.ops.mkl
        found["MKL, re-ordered"] = (
            lambda w: (mkl._mkl_reorder_linear_weight(w, rows), w),
            lambda x, both: mkl._mkl_linear(x, *both, None, rows),
        )
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 40])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES]
    numbers = sum(w.numel() for w in weights)
    square, long = torch.randn(LARGE, LARGE), torch.randn(numbers)
    ready, onednn = pack(square), torch.ops.mkldnn._linear_pointwise
    best = min(spent_ms(lambda: onednn(square, ready, None, "none", [], "")) for _ in range(args.repeats))
    flops = 2 * LARGE**3 / best / 1e6
    read = min(spent_ms(long.sum) for _ in range(args.repeats))
    print(f"{flops:.0f} GFLOP/s on a product of {LARGE} x {LARGE}; {4 * numbers / read / 1e6:.1f} GB/s read by a sum")
    print("| rows | arithmetic, ms | bytes, ms | " + " | ".join(ways(1)) + " |")
    print("| --- " * (3 + len(ways(1))) + "|")
    for rows in args.rows:
        inputs = [torch.randn(rows, columns) for _, columns in SHAPES]
        kept = {name: ([keep(w) for w in weights], run) for name, (keep, run) in ways(rows).items()}
        times: dict[str, list[float]] = {name: [] for name in kept}
        for _ in range(args.repeats):
            for name, (matrices, run) in kept.items():
                pairs = list(zip(inputs, matrices, strict=True))
                times[name].append(spent_ms(lambda run=run, pairs=pairs: [run(x, w) for x, w in pairs]))
        medians = " | ".join(f"{statistics.median(taken[1:]):.1f}" for taken in times.values())
        print(f"| {rows} | {2e-6 * rows * numbers / flops:.1f} | {read:.1f} | {medians} |")


if __name__ == "__main__":
    main()
