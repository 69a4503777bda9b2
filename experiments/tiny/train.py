"""Train the embedded model with several seeds at once on one GPU, then measure each. See README.md beside this file.

PYTHONPATH=. python experiments/tiny/train.py --tokenizer omr/assets/tiny --out /tmp/tiny
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from omr.corpus.encoded import encode_corpus
from omr.sft import Shape, write_fresh


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=600_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--corpus-seed", type=int, default=0)
    parser.add_argument("--intermediate", type=int, default=640)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit-s", type=float, default=400)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()

    def say(text: str) -> None:
        print(f"[{time.time() - started:6.1f} s] {text}", flush=True)

    text = args.out / "text.npz"
    made = encode_corpus(args.tokenizer, args.documents, seed=args.corpus_seed, workers=os.cpu_count() or 1)
    made.save(text)
    say(f"{len(made.lengths)} documents, {len(made.ids)} tokens, {int(made.is_target.sum())} with loss")

    children = []
    for seed in args.seeds:
        base = args.out / f"fresh{seed}"
        write_fresh(base, tokenizer_dir=args.tokenizer, shape=Shape(intermediate_size=args.intermediate), seed=seed)
        settings = [f"--set={item}" for item in [*args.set, f"seed={seed}"]]
        out = args.out / f"seed{seed}"
        argv = [sys.executable, "-m", "omr.sft", f"--base={base}", f"--text={text}", f"--out={out}"]
        argv += [f"--device={args.device}", *settings]
        log = (args.out / f"seed{seed}.log").open("w")
        children.append(subprocess.Popen(argv, stdout=log, stderr=log))
    try:
        for child in children:
            child.wait(timeout=max(1.0, args.limit_s - (time.time() - started)))
    finally:
        for child in children:
            child.kill()
    for seed in args.seeds:
        say(f"seed {seed}: " + (args.out / f"seed{seed}.log").read_text()[-300:].splitlines()[-1])

    evaluate = Path(__file__).with_name("evaluate.py")
    children = [
        subprocess.Popen([sys.executable, str(evaluate), str(args.out / f"seed{seed}"), f"--device={args.device}"])
        for seed in args.seeds
    ]
    for child in children:
        child.wait()
    for seed in args.seeds:
        summary = json.loads((args.out / f"seed{seed}" / "results.json").read_text())
        say(f"seed {seed}\n" + "\n".join(f"  {name}: {value}" for name, value in summary["summary"].items()))


if __name__ == "__main__":
    main()
