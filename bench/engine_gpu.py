"""The native engine on one CUDA GPU: decode speed beside transformers, kernel against kernel, and greedy agreement.

    python bench/engine_gpu.py --model FOLDER [--fp8 FOLDER] [--int8 FOLDER] [--out results.json]
    python bench/engine_gpu.py --shape 14b                 # random weights of that shape, engine only
    python bench/engine_gpu.py --gguf FILE --save FOLDER   # write a GGUF's weights as a Hugging Face folder, then stop
    python bench/engine_gpu.py --model FOLDER --quantise FP8_FOLDER   # calibrate and write an FP8 checkpoint, then stop

Decoding is timed from the first decode step to the last, host work included, after a run that captures; prompts are
slices of one English text, answers run to `--new` tokens whatever they say. transformers generates from the same
prompts, its prefill left out by subtracting a one-token call. Needs torch, triton, safetensors, transformers (for
--model), numpy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.config import DecoderConfig
from omr.nn.linear import Fp8Linear, Int8Linear
from omr.nn.loader import _Uninitialised, load
from omr.nn.transformer import Transformer

SHAPES = {
    "135m": (576, 30, 9, 3, 64, 1536, 49152, True),
    "14b": (5120, 48, 40, 8, 128, 13824, 152064, False),
    "micro": (64, 2, 4, 2, 16, 96, 512, False),
}
"""Hidden, layers, heads, key heads, head size, inner size, vocabulary, tied."""
PROBLEMS = [
    "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many did she sell in all?",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?",
    "Find all primes p such that p squared plus 2 is prime as well, and prove that there are no others.",
    "James writes a 3-page letter to 2 different friends twice a week. How many pages does he write a year?",
    "A train leaves at noon at 60 miles an hour; another follows at one o'clock at 75. When does it catch up?",
    "What is the remainder when 7 to the power of 100 is divided by 13? Show each step of the computation.",
    "Mark planted yellow, purple and green flowers: ten yellow, 80% more purple, and a quarter as many green.",
    "How many positive divisors does 360 have, and what is the sum of those which are odd numbers?",
]


def shape_config(name: str) -> DecoderConfig:
    hidden, layers, heads, keys, dim, inner, vocab, tied = SHAPES[name]
    return DecoderConfig(
        model_type="llama", vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=dim, rms_norm_eps=1e-5,
        max_position_embeddings=8192, tie_word_embeddings=tied, qkv_bias=False, o_bias=False, mlp_bias=False,
        qk_norm=False,
    )  # fmt: skip


def random_model(name: str, device: str = "cuda") -> Transformer:
    torch.manual_seed(0)
    with torch.device("meta"), _Uninitialised():
        model = Transformer(shape_config(name)).to(torch.bfloat16 if device == "cuda" else torch.float32)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    model.tie()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def random_drafter(model: Transformer, num_draft_tok: int) -> Any:
    """An untrained ReDrafter of the usual size: nothing is accepted, so it shows the cost of a step."""
    from omr.drafter._redrafter_chain import Chain
    from omr.nn.redrafter import Redrafter, RedrafterConfig

    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    config = RedrafterConfig(
        vocab_size=vocab, hidden_size=hidden, exit_dim=2 * hidden, num_draft_layers=2, rnn=True, predict_n=3
    )
    head = Redrafter(config).to(device=model.device, dtype=model.dtype).requires_grad_(False)
    return Chain(head, model.embed.weight, num_draft_tok)


def quantised(model: Transformer, kind: str) -> Transformer:
    """The model with its layers' weights rounded in place to `fp8` (scales 1) or `int8`: right in shape and speed."""
    for name, linear in list(model.named_modules()):
        if name.endswith("_proj"):
            parent, _, leaf = name.rpartition(".")
            weight, dtype = linear.weight.detach(), model.dtype
            one = torch.ones(1, device=weight.device)
            if kind == "fp8":
                other: torch.nn.Module = Fp8Linear(weight.to(torch.float8_e4m3fn), one, one, None, dtype)
            else:
                scale = weight.abs().amax(1, keepdim=True) / 127
                other = Int8Linear((weight / scale).round().to(torch.int8), scale, None, dtype)
            setattr(model.get_submodule(parent), leaf, other)
    return model


class OneByOne:
    """Drafts chosen by a table from token to token, made of a text: costs nothing, shows the verify step alone."""

    needs_hidden = True

    def __init__(self, model: Transformer, num_draft_tok: int) -> None:
        self.num_draft_tok = num_draft_tok
        self.table = torch.arange(model.config.vocab_size, device=model.device).roll(1)

    def propose(self, hidden: torch.Tensor, tokens: torch.Tensor, history: None) -> torch.Tensor:
        drafts = []
        for _ in range(self.num_draft_tok):
            tokens = self.table[tokens]
            drafts.append(tokens)
        return torch.stack(drafts, 1)


def decode_speed(model: Transformer, prompts: list[list[int]], new: int, draft: Any = None, **knobs: Any) -> dict:
    """Tokens per second and milliseconds per step over the decode steps of one batch, host work included."""
    context = len(prompts[0]) + new + 8
    engine = Engine(
        model, max_batch_size=len(prompts), kv_cache_tokens=len(prompts) * (context + 32), context_tokens=context,
        prefill_tokens=1 << 15, draft=draft, prefix_caching=False,
    )  # fmt: skip

    def run() -> tuple[float, float, int, int]:
        for index, prompt in enumerate(prompts):
            engine.add(Request(id=str(index), prompt_ids=prompt, max_tokens=new, ignore_eos=True, seed=index, **knobs))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        while any(not seq.decoding for seq in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        torch.cuda.synchronize()
        first = time.perf_counter()
        tokens = steps = 0
        while engine.num_unfinished:
            tokens += sum(len(output.token_ids) for output in engine.step())
            steps += 1
        torch.cuda.synchronize()
        return time.perf_counter() - first, first - begin, tokens, steps

    run()  # captures the graphs
    seconds, prefill, tokens, steps = min(run() for _ in range(2))
    result = {"tok_s": tokens / seconds, "ms_step": 1e3 * seconds / steps, "prefill_ms": 1e3 * prefill}
    graph = next(reversed(engine.runner._graphs.values()))
    return result | {"graph_ms": replay_ms(graph), "accepted": engine.counts.accepted_tokens}


def replay_ms(graph: torch.cuda.CUDAGraph, count: int = 20) -> float:
    """Median milliseconds of a replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(count):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[count // 2]


def transformers_speed(model: Any, prompts: list[list[int]], new: int) -> dict:
    ids = torch.tensor(prompts, device="cuda")

    def generate(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    generate(4)
    once = min(generate(1) for _ in range(2))
    seconds = generate(new) - once
    return {"tok_s": len(prompts) * (new - 1) / seconds, "ms_step": 1e3 * seconds / (new - 1)}


def agreement(ours: Transformer, theirs: Any, prompts: list[list[int]], new: int) -> dict:
    """Greedy text of both; at the first difference, how far apart transformers' own logits hold the two tokens."""
    engine = Engine(ours, max_batch_size=len(prompts), kv_cache_tokens=len(prompts) * 1024, context_tokens=1024)
    texts: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        engine.add(Request(id=str(index), prompt_ids=prompt, max_tokens=new, ignore_eos=True))
        texts[str(index)] = []
    while engine.num_unfinished:
        for output in engine.step():
            texts[output.id] += output.token_ids
    same, differences = 0, []
    for index, prompt in enumerate(prompts):
        mine = texts[str(index)]
        ids = torch.tensor([prompt], device="cuda")
        got = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
        )[0, len(prompt) :].tolist()  # fmt: skip
        at = next((i for i, (a, b) in enumerate(zip(mine, got, strict=False)) if a != b), None)
        if at is None:
            same += 1
            continue
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + got[:at]], device="cuda")).logits[0, -1].float()
        gap = float(logits[got[at]] - logits[mine[at]])
        differences.append({"prompt": index, "at": at, "logit_gap": gap, "logit": float(logits[got[at]])})
    return {"identical": same, "of": len(prompts), "differences": differences}


def quantise(src: Path, out: Path, device: str) -> None:
    """FP8 by omr's own quantiser, calibrated on the model's answers to PROBLEMS."""
    import pyarrow
    import pyarrow.parquet

    from omr.quant.fp8 import Fp8

    rows = [{"problem": p, "text": " ".join([p, *PROBLEMS]), "spans": [[0, len(p)]]} for p in PROBLEMS]
    path = out.parent / "calibration.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    out.mkdir()
    print(Fp8(calib_samples=len(rows), calib_tokens=512).quantise(src, out, path, device))


def save_gguf(path: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "fp8", "int8", "gguf", "save", "quantise", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--batches", default="1,4,12,32")
    parser.add_argument("--prompt", type=int, default=896)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--peer-new", type=int, default=48)
    args = parser.parse_args()
    if args.gguf:
        return save_gguf(args.gguf, args.save)
    if args.quantise:
        return quantise(args.model, args.quantise, "cuda")
    batches = [int(b) for b in args.batches.split(",")]
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "prompt": args.prompt,
        "new": args.new,
    }

    def show(name: str, batch: int, figures: dict) -> None:
        results[f"{name}, batch {batch}"] = figures
        print(f"{name:28s} batch {batch:3d}  " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)

    if args.shape:
        ours = random_model(args.shape)
        vocab = ours.config.vocab_size
        stream = torch.randint(0, vocab, (64 * args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        ours = load(args.model, device="cuda")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        stream = tokenizer(" ".join(PROBLEMS * 20)).input_ids
    prompts = [(stream[17 * i :] + stream)[: args.prompt] for i in range(max(batches))]

    def measure(name: str, model: Transformer) -> None:
        for batch in batches:
            show(f"engine {name}", batch, decode_speed(model, prompts[:batch], args.new))
        for batch in sorted({batches[0], batches[-1]}):
            few = prompts[:batch]
            show(f"{name}, verify 1x4", batch, decode_speed(model, few, 64, draft=OneByOne(model, 3)))
            show(f"{name}, redrafter 1x4", batch, decode_speed(model, few, 64, draft=random_drafter(model, 3)))
            show(f"{name}, T 0.7", batch, decode_speed(model, few, 64, temperature=0.7))
            show(f"{name}, T 0.7 top-p 0.95", batch, decode_speed(model, few, 64, temperature=0.7, top_p=0.95))

    measure("bf16", ours)
    if args.shape:
        measure("fp8", quantised(ours, "fp8"))
        del ours
        measure("int8", quantised(random_model(args.shape), "int8"))
    for name in ("fp8", "int8"):
        if getattr(args, name):
            measure(name, load(getattr(args, name), device="cuda"))
    if args.model:
        theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).cuda().eval()
        for batch in batches:
            show("transformers bf16", batch, transformers_speed(theirs, prompts[:batch], args.peer_new))
        chats = [tokenizer(f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n").input_ids for p in PROBLEMS]
        results["agreement"] = agreement(ours, theirs, chats, 128)
        print("greedy agreement with transformers:", json.dumps(results["agreement"]))
    results["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
