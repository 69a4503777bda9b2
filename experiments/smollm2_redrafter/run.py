"""A ReDrafter for SmolLM2-135M, trained on what it says itself: acceptance and speed on GSM8K prompts, in one go.

    python experiments/smollm2_redrafter/run.py --model FOLDER --train-problems gsm8k_train.jsonl --out OUT

FOLDER holds the weights as a Hugging Face folder (`python -m omr model=smollm2_135m job=build` names it);
gsm8k_train.jsonl[.gz] has a key `problem` or `question` a line (grade-school-math's train.jsonl, MIT). On a GPU, or
with --device cpu and small sizes to see that it runs. The order is: solve the training problems with the
native engine, train the head on those solutions with omr's trainer, then on the 500 GSM8K test problems shipped with
omr measure its accuracy, acceptance, speed and agreement with plain decoding. Every stage writes OUT/results.json; what
no longer fits before --deadline-s is left out.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from transformers import AutoTokenizer
from writing import Written, divergences, write

from omr.drafter._documents import Document
from omr.drafter._ranks import Ranks
from omr.drafter._redrafter_fit import new_head
from omr.drafter._training import Training
from omr.drafter.ngram import Ngram
from omr.drafter.redrafter import Redrafter, Train
from omr.nn.loader import load
from omr.solve.prompt import PROMPTS, render

BENCHMARK = Path(__file__).parents[2] / "omr" / "assets" / "benchmarks" / "gsm8k.jsonl"
GAP_BOUND = 0.7
"""Most by which the base's float32 logits may prefer one token to the other where a bfloat16 text parts from plain
decoding: six standard deviations of the error of such a gap in bfloat16 (0.115 on GSM8K text)."""
SPEED_PROMPTS = {1: 8, 4: 24, 12: 72, 32: 192}
"""Prompts answered per batch size: a second or two each."""
AGREEMENT_TEXTS = 200


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.monotonic()
        self.results: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "seconds": {},
            "skipped": [],
            "failed": {},
        }
        args.out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.args.deadline_s - (time.monotonic() - self.start)

    def stage(self, name: str, needs_s: float, run: Callable[[], Any]) -> Any:
        """Run a stage and keep what it returns, if there is time; one that fails is reported and ends in None."""
        if self.left() < needs_s:
            self.results["skipped"].append(name)
            return None
        began, value = time.monotonic(), None
        try:
            value = run()
        except Exception:  # the exit status and the file say so; later stages are wanted all the same
            self.results["failed"][name] = traceback.format_exc()
            print(f"--- {name} FAILED\n{traceback.format_exc()}", flush=True)
        if isinstance(value, dict):
            self.results[name] = value
        took = self.results["seconds"][name] = time.monotonic() - began
        print(f"--- {name} ({took:.1f} s, {self.left():.0f} s left) {_short(value)}", flush=True)
        self.save()
        gc.collect()
        return value

    def save(self) -> None:
        (self.args.out / "results.json").write_text(json.dumps(self.results, indent=1))


def _short(value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    flat = {k: v for k, v in value.items() if isinstance(v, int | float)}
    return "  ".join(f"{k} {v:.4g}" for k, v in flat.items())


def read_problems(path: Path, limit: int) -> list[str]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in raw.decode().split("\n") if line.strip()]
    return [row.get("problem") or row["question"] for row in rows][:limit]


class Subject:
    """The base, its tokenizer, and the GSM8K prompts it is measured on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = load(args.model, device=args.device)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.train_prompts = self.encode(read_problems(args.train_problems, args.max_train))
        self.prompts = self.encode(read_problems(BENCHMARK, args.max_eval))
        self.plain: dict[int, list[int]] = {}
        self._float32: Any = None

    def encode(self, problems: list[str]) -> list[list[int]]:
        prompt = PROMPTS["generic/math"]
        texts = [render(self.tokenizer, prompt.messages(p)) for p in problems]
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def write(self, prompts: list[list[int]], batch: int, **knobs: Any) -> Written:
        return write(self.model, prompts, batch=batch, max_tokens=self.args.new, **knobs)

    def folder(self, name: str) -> Path:
        """Where the trained head of that name is kept."""
        return self.args.scratch / name

    def redrafter(self, name: str = "drafter", **knobs: Any) -> Any:
        return Redrafter(**{"adaptive": False, **knobs}).load(self.folder(name), self.model)

    def float32(self) -> Any:
        """The same weights, computed in float32."""
        if self._float32 is None:
            self._float32 = load(self.args.model, device=self.args.device, dtype=torch.float32)
        return self._float32

    def document(self, prompt: list[int], written: list[int]) -> Document:
        return Document.of(prompt + written, [False] * len(prompt) + [True] * len(written), 3)

    # stages

    def solve_training(self) -> list[Document]:
        """Solutions of the training problems, as many as the clock allows: greedy ones, then ones drawn at random.

        A batch is written to its end before the next begins, so that a batch that was cut off is the last.
        """
        got, size, count = Written(), self.args.generate_batch, len(self.train_prompts)
        for number in range(self.args.passes):
            for start in range(0, count, size):
                left = self.args.generate_s - got.seconds
                if left > 0:
                    knobs = {"temperature": self.args.temperature if number else 0.0, "seed": number}
                    batch = self.write(self.train_prompts[start : start + size], size, deadline_s=left, **knobs)
                    got.add(batch, number * count + start)
        self.solved = {
            "problems": count,
            "solutions": len(got.tokens),
            "greedy": sum(i < count for i in got.tokens),
            "mean_tokens": sum(map(len, got.tokens.values())) / max(len(got.tokens), 1),
            "cut_at_limit": sum(len(t) == self.args.new for t in got.tokens.values()),
            **got.figures(),
        }
        documents = [self.document(self.train_prompts[i % count], t) for i, t in sorted(got.tokens.items())]
        return [d for d in documents if d.counts[0]]

    def solve_benchmark(self) -> dict[str, float]:
        got = self.write(self.prompts, self.args.generate_batch)
        self.plain = got.tokens
        return got.figures()

    def train(self, documents: list[Document], name: str = "drafter", **knobs: Any) -> dict[str, Any]:
        """omr's trainer with its defaults, but for batch and epochs and what `knobs` say of the head."""
        held_out = [self.document(self.prompts[i], t) for i, t in sorted(self.plain.items())]
        held_out = [d for d in held_out if d.counts[0]]
        option = Redrafter(
            train=Train(
                batch_rows=self.args.batch_rows,
                forward_tok=1 << 15 if self.args.device == "cuda" else 1 << 13,
                epochs=self.args.epochs,
            ),
            **knobs,
        )
        with Ranks.join(self.args.device) as ranks:
            head, _ = new_head(option, self.model, documents)
            training = Training(option, self.model, head, documents, held_out, ranks)
            metrics = training.run(Path(tempfile.mkdtemp()), {})
        curve = training.progress.curve
        folder = self.folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        head.save(folder)
        tokens = sum(len(d.ids) for d in documents) * option.train.epochs
        return {
            "epochs": option.train.epochs, "documents": len(documents), "train_tokens": tokens,
            "batch_rows": option.train.batch_rows, **metrics, "config": asdict(head.config), "curve": curve,
        }  # fmt: skip

    def accept(self, name: str = "drafter", **knobs: Any) -> dict[str, Any]:
        """All prompts with drafts: acceptance, and where the text parts from plain decoding's."""
        got = self.write(self.prompts, 64, draft=self.redrafter(name, **knobs))
        self.drafted = got.tokens
        return got.figures()

    def agree(self) -> dict[str, Any]:
        few = {i: self.plain[i] for i in sorted(self.plain)[:AGREEMENT_TEXTS]}
        found = divergences(self.float32(), self.prompts, few, self.drafted)
        gaps = sorted(d["gap"] for d in found)
        return {
            "texts": len(few),
            "identical": len(few) - len(found),
            "bound": GAP_BOUND,
            "within_bound": sum(g <= GAP_BOUND for g in gaps),
            "largest_gap": gaps[-1] if gaps else 0.0,
            "median_gap": gaps[len(gaps) // 2] if gaps else 0.0,
            "largest_gap_in_steps": max((d["gap"] / d["step"] for d in found), default=0.0),
            "divergences": found,
        }

    def float32_agrees(self) -> dict[str, Any]:
        """In float32 the two must be equal token for token."""
        prompts = self.prompts[:32]
        model = self.float32()
        draft = Redrafter(adaptive=False).load(self.folder("drafter"), model)
        texts = [write(model, prompts, batch=8, max_tokens=96, draft=d).tokens for d in (None, draft)]
        same = sum(texts[0][i] == texts[1][i] for i in range(len(prompts)))
        return {"texts": len(prompts), "identical": same}

    def drafters(self) -> dict[str, Callable[[], Any]]:
        return {
            "none": lambda: None,
            "redrafter": self.redrafter,
            "redrafter, 4 beams": lambda: self.redrafter(num_beams=4),
            "redrafter, adaptive": lambda: self.redrafter(adaptive=True),
            "ngram": lambda: Ngram(adaptive=False).load(None, self.model),
        }

    def speeds(
        self, batch: int, made: dict[str, Callable[[], Any]], temperature: float = 0.0
    ) -> dict[str, dict[str, float]]:
        """Figures by drafter, all of them run in turn; of each the round with the median tok/s."""
        prompts = self.prompts[: SPEED_PROMPTS.get(batch, 8 * batch)]
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in made}
        self.write(prompts[:batch], batch)  # kernels that prompts of such sizes need are loaded
        for _ in range(self.args.rounds):
            for name, figures in rounds.items():
                done = self.write(prompts, batch, draft=made[name](), temperature=temperature, warm=True)
                figures.append(done.figures())
        return {
            name: sorted(figures, key=lambda f: f["tok_s"])[len(figures) // 2]
            | {"tok_s_rounds": [f["tok_s"] for f in figures]}
            for name, figures in rounds.items()
        }


def parser(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train-problems", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/smollm2_redrafter"), help="the head is written here")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deadline-s", type=float, default=600)
    parser.add_argument("--generate-s", type=float, default=60)
    parser.add_argument("--generate-batch", type=int, default=512)
    parser.add_argument("--batch-rows", type=int, default=4)
    parser.add_argument("--passes", type=int, default=2, help="solutions of each training problem, time permitting")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the passes after the first")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of every speed; the median counts")
    parser.add_argument("--max-train", type=int, default=1 << 30)
    parser.add_argument("--max-eval", type=int, default=500)
    parser.add_argument("--new", type=int, default=256, help="most tokens of a solution")
    parser.add_argument("--batches", default="1,12,32,4", help="most important first; empty: no speeds")
    return parser


def begin(args: argparse.Namespace) -> tuple[Study, Subject, list[Document]] | None:
    """Load the base and let it solve the problems, those to train on and those to measure on. None if that failed."""
    study = Study(args)
    subject = study.stage("load", 0, lambda: Subject(args))
    documents = subject and study.stage("solve training problems", 0, subject.solve_training)
    if not documents or study.stage("solve benchmark", 0, subject.solve_benchmark) is None:
        return None
    study.results["training problems"] = subject.solved
    return study, subject, documents


def end(study: Study, drafters: Sequence[str]) -> int:
    """The last of the results, the table of speeds, and the exit status."""
    if study.args.device == "cuda":
        study.results["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    study.results["seconds"]["all"] = time.monotonic() - study.start
    study.save()
    table(study.results, batch_sizes(study.args), drafters)
    return 1 if study.results["failed"] else 0


def batch_sizes(args: argparse.Namespace) -> list[int]:
    return [int(b) for b in args.batches.split(",") if b]


def main() -> int:
    args = parser(__doc__).parse_args()
    begun = begin(args)
    if begun is None:
        return 1
    study, subject, documents = begun
    if study.stage("train", 0, lambda: subject.train(documents)) is None:
        return 1
    if args.device == "cuda":
        torch.cuda.empty_cache()
    study.stage("acceptance", 5, subject.accept)

    drafters = subject.drafters()
    for batch in batch_sizes(args):
        study.stage(f"batch {batch}", 20, lambda b=batch: subject.speeds(b, drafters))
    study.stage("agreement", 6, subject.agree)
    study.stage("agreement in float32", 5, subject.float32_agrees)
    two = {name: drafters[name] for name in ("none", "redrafter")}
    for batch in (32, 1) if args.batches else ():
        study.stage(f"batch {batch}, T 0.7", 10, lambda b=batch: subject.speeds(b, two, 0.7))
    return end(study, list(drafters))


def table(results: dict[str, Any], batches: list[int], drafters: Sequence[str]) -> None:
    """tok/s of the whole run (decode steps alone), accepted length."""
    print(f"{'tok/s, ratio, tau':24s}" + "".join(f"{'batch ' + str(b):>24s}" for b in batches))
    for drafter in drafters:
        cells = []
        for batch in batches:
            got, plain = (results.get(f"batch {batch}", {}).get(d) for d in (drafter, "none"))
            if not got or not plain:
                cells.append("-")
                continue
            tau = f", {got['tau']:.2f}" if "tau" in got else ""
            cells.append(f"{got['tok_s']:.0f}, {got['tok_s'] / plain['tok_s']:.2f}x{tau}")
        print(f"{drafter:24s}" + "".join(f"{c:>24s}" for c in cells))
    print("skipped:", results["skipped"] or "nothing", " failed:", sorted(results["failed"]) or "nothing")


if __name__ == "__main__":
    sys.exit(main())
