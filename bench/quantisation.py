"""What each quantised format costs: bytes, weight error, loss and divergence on text that calibration did not see.

    python bench/quantisation.py --model FOLDER --text FILE.jsonl.gz [--problem-key problem --solution-key solution]
    python bench/quantisation.py --model FOLDER --text FILE.jsonl.gz --schemes fp8 int8_wo --device cuda

The first `--calib` rows of the file calibrate FP8, the `--rows` rows after the 150th are measured. Loss is the mean
negative log likelihood of the tokens that the model itself writes (solution and end of turn), divergence is
KL(source, quantised) on the same tokens, both with activations rounded as the format says.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from omr.dataset import load_tokenizer, read_rows, write_text
from omr.model import TextSource
from omr.nn.loader import load
from omr.quant import Quantiser
from omr.quant.fp8 import Fp8, Granularity, Range
from omr.quant.int4 import Clip, Int4
from omr.quant.int8_wo import Int8Wo
from omr.text import encode_text, iter_text

MEASURED_FROM = 150


def schemes(calib: int) -> dict[str, Quantiser]:
    return {
        "fp8": Fp8(calib_samples=calib),
        "fp8_channel": Fp8(calib_samples=calib, granularity=Granularity.channel),
        "fp8_percentile": Fp8(calib_samples=calib, range=Range.percentile),
        "int8_wo": Int8Wo(),
        "int4": Int4(),
        "int4_mse": Int4(clip=Clip.mse),
    }


@torch.inference_mode()
def log_probabilities(folder: Path, rows: list[tuple[list[int], list[bool]]], device: str) -> list[torch.Tensor]:
    """For each row the log probabilities (n, vocabulary) before each of its n target tokens, float32 on CPU."""
    model = load(folder, device=device)
    found = []
    for ids, is_target in rows:
        logits = model.lm_head(model.hidden_states(torch.tensor([ids], device=device)))[0, :-1].float()
        found.append(logits.log_softmax(-1)[torch.tensor(is_target[1:], device=device)].cpu())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--problem-key", default="problem")
    parser.add_argument("--solution-key", default="solution")
    parser.add_argument("--prompt", default="generic/math")
    parser.add_argument("--calib", type=int, default=24)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--schemes", nargs="*", default=list(schemes(1)))
    args = parser.parse_args()

    wanted = MEASURED_FROM + args.rows
    source = TextSource(path=args.text, problem_key=args.problem_key, solution_key=args.solution_key)
    tokenizer = load_tokenizer(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.parquet"
        write_text(
            read_rows(source, wanted),
            tokenizer_dir=args.model,
            prompt=args.prompt,
            code_tags="openmath",
            out=text,
            min_rows=wanted,
        )
        rows = [encode_text(row, tokenizer) for row in islice(iter_text(text), MEASURED_FROM, wanted)]
        targets = [torch.tensor([t for t, mine in zip(ids[1:], own[1:], strict=True) if mine]) for ids, own in rows]
        count = sum(len(t) for t in targets)
        reference = log_probabilities(args.model, rows, args.device)
        print(f"| {count} tokens | bytes | weight error | loss | divergence |\n| --- | --- | --- | --- | --- |")

        def report(name: str, size: float, error: str, found: list[torch.Tensor]) -> None:
            loss = -sum(float(p.gather(1, t[:, None]).sum()) for p, t in zip(found, targets, strict=True)) / count
            kl = sum(float((r.exp() * (r - p)).sum()) for r, p in zip(reference, found, strict=True)) / count
            print(f"| {name} | {size / 1e6:.0f} MB | {error} | {loss:.3f} | {kl:.3f} |", flush=True)

        bytes_before = sum(f.stat().st_size for f in args.model.glob("*.safetensors"))
        report("source", bytes_before, "", reference)
        for name, option in schemes(args.calib).items():
            if name in args.schemes:
                out = Path(scratch) / name
                out.mkdir()
                metrics = option.quantise(args.model, out, text, args.device)
                error = f"{metrics['rel_error_mean']:.1%}"
                report(name, metrics["bytes_after"], error, log_probabilities(out, rows, args.device))


if __name__ == "__main__":
    main()
