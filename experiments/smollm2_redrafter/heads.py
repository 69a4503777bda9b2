"""Which head drafts best for SmolLM2-135M? The study of run.py with every kind of head on the same text.

    python experiments/smollm2_redrafter/heads.py --model FOLDER --train-problems gsm8k_train.jsonl --out OUT --epochs 1

Arguments and order as there: the base solves the training problems, each head of HEADS is trained on those solutions,
and SERVED, which are heads and ways to draft with them, answer the GSM8K test problems in turns with plain decoding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from run import batch_sizes, begin, end, parser

from omr.drafter.redrafter import Head

HEADS: dict[str, dict[str, Any]] = {
    "full": {},
    "base": {"head": Head.base},
    "words": {"draft_vocab_size": 8192},
    "low_rank": {"head": Head.low_rank, "head_rank": 192},
    "narrow": {"exit_dim": 192},
}
"""The kinds of docs/drafters.md, the last three sized to a sixth of the full output matrix (49,152 x 1,152)."""
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in HEADS},
    "full, 8 bits": ("full", {"eight_bit": True}),
    "full, 4 beams": ("full", {"num_beams": 4}),
    "words, 4 beams": ("words", {"num_beams": 4}),
}


def main() -> int:
    args = parser(__doc__).parse_args()
    begun = begin(args)
    if begun is None:
        return 1
    study, subject, documents = begun
    for name, knobs in HEADS.items():
        study.stage(f"train {name}", 50, lambda n=name, k=knobs: subject.train(documents, n, **k))
    if args.device == "cuda":
        torch.cuda.empty_cache()
    made: dict[str, Callable[[], Any]] = {"none": lambda: None}
    for name, (head, knobs) in SERVED.items():
        if f"train {head}" in study.results:
            study.stage(f"acceptance {name}", 5, lambda h=head, k=knobs: subject.accept(h, **k))
            made[name] = lambda h=head, k=knobs: subject.redrafter(h, **k)
    for batch in batch_sizes(args):
        study.stage(f"batch {batch}", 20, lambda b=batch: subject.speeds(b, made))
    return end(study, list(made))


if __name__ == "__main__":
    sys.exit(main())
