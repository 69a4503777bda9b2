"""What a ReDrafter step costs on this CPU, in plain decoding steps, on random weights.

    python bench/redrafter_step.py [--batch 1 4] [--repeats 7] [--threads 1] [--heads "full head" "2048 words"]
    PYTHONPATH=ml-recurrent-drafter python bench/redrafter_step.py --apple       # beside Apple's loop, same weights

The models are those of the reference measurement of Apple's package (8 layers, H 512, V 8192, 33.7 M parameters;
drafter with rnn, 2 layers, E 1024, 11.0 M; prompt 64, greedy, one thread), where a 1x4 step took 2.2 to 2.8
autoregressive steps and a 4x4 step 3.2 to 4.6. Acceptance is near 0 with random weights; a step costs the same whatever
is accepted. Every repeat runs all variants, each step in turn with one of plain decoding; a figure is the median over
repeats of the ratio of medians of CPU time per step. The step is taken apart in plain steps: its products, its
attention (keys gathered, scores, values), its drafts, and the rest.

Two floors stand beside it. The byte floor counts each weight read once per product: base once, drafter once per drafted
token. The product floor is the verification's bare matrix products, for as many rows as the step had, timed in the same
turns: what is left of a step without attention, drafts and all the rest. Where a batch verifies many rows it is
arithmetic that binds, and no draft head, however small, brings a step below it.

`--apple` runs that package (github.com/apple/ml-recurrent-drafter, with the transformers 4.45.2 it was written for) in
the same process on the same base and drafter weights, in turn with ours; its ratio is to its own autoregressive loop.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from omr.drafter import DraftModel
from omr.drafter._redrafter_chain import draft_model
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.config import DecoderConfig
from omr.nn.decoder import Batch, Decoder
from omr.nn.redrafter import Redrafter, RedrafterConfig
from omr.nn.transformer import Transformer

H, V, LAYERS, PROMPT, DRAFTS = 512, 8192, 8, 64, 3
PARTS = ("products", "attention", "drafts", "rest")
SHAPES: dict[str, dict[str, object]] = {
    "full head": {},
    "2048 words": {"draft_vocab_size": 2048},
    "low rank 128": {"head": "low_rank", "head_rank": 128},
    "base's lm_head": {"head": "base"},
}


def base() -> Transformer:
    config = DecoderConfig(
        model_type="llama", vocab_size=V, hidden_size=H, intermediate_size=1376, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-6, max_position_embeddings=512,
        tie_word_embeddings=False, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False,
    )  # fmt: skip
    return Transformer(config).requires_grad_(False).eval()


def head(model: Transformer, shape: dict[str, object]) -> Redrafter:
    known = {"vocab_size": V, "hidden_size": H, "exit_dim": 2 * H, "num_draft_layers": 2, "rnn": True}
    made = Redrafter(RedrafterConfig(**{**known, **shape})).requires_grad_(False).eval()
    if made.config.draft_vocab_size:
        made.set_draft_tokens(torch.arange(made.config.draft_vocab_size))
    made.attach(model.lm_head.weight)
    return made


def read_bytes(made: Redrafter, beams: int, *, eight: bool) -> int:
    """Bytes of weights that one draft step reads; the recurrence stays in float32 (one chain tabulates W emb)."""
    h = made.config.hidden_size
    recurrence = 4 * h * h * (1 if beams == 1 else 2)
    rest = sum(w.numel() for w in (*(linear.weight for linear in made.linears), *made.head.parts))
    return recurrence + rest * (1 if eight else 4)


@dataclass
class Step:
    """Medians over steps."""

    ms: float
    rows: int
    parts: dict[str, float]
    """CPU milliseconds of PARTS."""


class Decoding:
    """`batch` sequences past their prompts, decoded a step at a time; what is timed of a step is wrapped in a clock."""

    def __init__(self, model: Transformer, draft: DraftModel | None, batch: int) -> None:
        self.engine = Engine(
            model, max_batch_size=batch, kv_cache_tokens=batch * 512, draft=draft, prefix_caching=False
        )
        for i in range(batch):
            self.engine.add(Request(id=str(i), prompt_ids=list(range(i, i + PROMPT)), max_tokens=400, ignore_eos=True))
        while not self.engine.num_running or self.engine.num_waiting or not self._all_decode():
            self.engine.step()
        self.spent: dict[str, float] = {}
        self.times: list[float] = []
        self.rows: list[int] = []
        self.parts: dict[str, list[float]] = {part: [] for part in PARTS}
        decoder = self.engine.runner.decoder
        self.forward, decoder.forward = decoder.forward, self._forward
        self._time("products", decoder, "run_head")
        for layer in decoder.layers:
            self._time("products", layer, "run_qkv", "add_o", "run_gate_up", "add_down")
        self.draft, self.propose = draft, "propose_tree" if hasattr(draft, "propose_tree") else "propose"
        if draft is not None:
            self._time("drafts", draft, self.propose)

    def _all_decode(self) -> bool:
        return all(seq.decoding for seq in self.engine.scheduler.running)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        self.rows.append(len(tokens))
        self._time("attention", batch, "attend")
        return self.forward(tokens, positions, batch)

    def _time(self, part: str, owner: object, *names: str) -> None:
        for name in names:
            run = getattr(owner, name)

            def timed(*args: object, run: Callable[..., object] = run, **knobs: object) -> object:
                start = time.process_time()
                result = run(*args, **knobs)
                self.spent[part] += time.process_time() - start
                return result

            setattr(owner, name, timed)

    def step(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        start = time.process_time()
        self.engine.step()
        self.times.append(time.process_time() - start)
        self.spent["rest"] = self.times[-1] - sum(self.spent.values())
        for part, seconds in self.spent.items():
            self.parts[part].append(seconds)

    def end(self) -> Step:
        """Medians of all steps but the first; the drafter is as it was."""
        if self.draft is not None:
            delattr(self.draft, self.propose)  # the class's own again
        median = {part: statistics.median(seconds[1:]) * 1e3 for part, seconds in self.parts.items()}
        return Step(statistics.median(self.times[1:]) * 1e3, statistics.median_low(self.rows), median)


def steps(model: Transformer, draft: DraftModel, batch: int, count: int) -> tuple[Step, Step]:
    """Plain decoding and decoding with `draft`, step after step in turn."""
    both = Decoding(model, None, batch), Decoding(model, draft, batch)
    for _ in range(count):
        for decoding in both:
            decoding.step()
    plain, drafted = (decoding.end() for decoding in both)
    return plain, drafted


@torch.inference_mode()
def products_ms(decoder: Decoder, rows: int, steps: int) -> float:
    """Median CPU milliseconds of the matrix products of one forward of `rows` tokens, logits included."""
    hidden, inner = torch.randn(rows, H), torch.randn(rows, decoder.layers[0].down.in_features)
    times = []
    for _ in range(steps):
        start = time.process_time()
        for layer in decoder.layers:
            layer.run_qkv(hidden)
            layer.add_o(hidden, hidden)
            layer.run_gate_up(hidden)
            layer.add_down(hidden, inner)
        decoder.run_head(hidden)
        times.append(time.process_time() - start)
    return statistics.median(times[1:]) * 1e3


class Apple:
    """Apple's package on the weights of `model` and of a full `drafter`."""

    def __init__(self, model: Transformer, drafter: Redrafter) -> None:
        from recurrent_drafting import configuration_drafter, modeling_drafter, modeling_llama, recurrent_drafting
        from transformers import LlamaConfig

        c, d = model.config, drafter.config
        config = LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps,
            max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=False,
        )  # fmt: skip
        llm = modeling_llama.LlamaForCausalLM(config).eval()
        ours = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in model.state_dict().items()}
        missing = llm.load_state_dict(ours, strict=False).missing_keys
        assert not [name for name in missing if name.endswith("weight")], missing
        head = modeling_drafter.Drafter(
            configuration_drafter.DrafterConfig(
                vocab_size=d.vocab_size, hidden_size=d.hidden_size, exit_dim=d.exit_dim,
                num_draft_layers=d.num_draft_layers, rnn=d.rnn,
            )
        ).eval()  # fmt: skip
        head.load_state_dict(drafter.state_dict())
        self.model = recurrent_drafting.RecurrentDrafting(llm, head)

    def step_ms(self, beams: int, batch: int, steps: int) -> float:
        """Median CPU milliseconds of a step; `beams` 0 is the autoregressive loop."""
        from recurrent_drafting import autoregressive, modeling_drafter, recurrent_drafting, stats

        ids = torch.tensor([list(range(1 + i, 1 + i + PROMPT)) for i in range(batch)])
        special = recurrent_drafting.SpecialTokens(0, V + 1)  # an end of text that never comes
        if beams:
            going = self.model.generate(
                stats.Ledger(), ids, 400, modeling_drafter.BeamShape(beams, 1 + DRAFTS),
                recurrent_drafting.SamplingArgs(1.0, True), special,
            )  # fmt: skip
        else:
            going = autoregressive.generate(self.model, ids, 400, special)
        next(going)
        times = []
        for _ in range(steps):
            start = time.process_time()
            next(going)
            times.append(time.process_time() - start)
        return statistics.median(times[1:]) * 1e3


def in_plain_steps(times: list[float], plain: list[Step]) -> float:
    """Median over repeats of milliseconds over those of the plain step beside them."""
    return statistics.median(ms / base.ms for ms, base in zip(times, plain, strict=True))


def row(name: str, batch: int, runs: list[Step], plain: list[Step]) -> str:
    """A line of the table as far as the rows verified."""
    parts = " | ".join(f"{in_plain_steps([run.parts[part] for run in runs], plain):.2f}" for part in PARTS)
    ms, rows = statistics.median(run.ms for run in runs), statistics.median_low([run.rows for run in runs])
    return f"| {name} | {batch} | {ms:.2f} | {in_plain_steps([run.ms for run in runs], plain):.2f} | {parts} | {rows}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--apple", action="store_true", help="measure Apple's package in turn")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = base()
    base_bytes = 4 * (sum(p.numel() for p in model.parameters()) - V * H)  # the embedding is read by rows
    variants: dict[tuple[str, str], DraftModel] = {}
    floors: dict[tuple[str, str], float] = {}
    apple = Apple(model, head(model, {})) if args.apple else None
    for name in args.heads:
        for eight in (False, True):
            for beams in (1, 4):
                made = head(model, SHAPES[name])
                key = (f"{name}, {'int8' if eight else 'float32'}", f"{beams}x{1 + DRAFTS}")
                floors[key] = 1 + DRAFTS * read_bytes(made, beams, eight=eight) / base_bytes
                variants[key] = draft_model(made, model.embed.weight, DRAFTS, num_beams=beams, in_eight_bit=eight)
    decoder = Decoder(model, 1)
    parts = " | ".join(PARTS)
    print(f"| head | beams | batch | step, ms | ratio to plain | {parts} | rows | product floor | byte floor |")
    print("| --- " * 12 + "|")
    for batch in args.batch:
        plain: dict[tuple[str, str], list[Step]] = {key: [] for key in variants}
        taken: dict[tuple[str, str], list[Step]] = {key: [] for key in variants}
        bare: dict[tuple[str, str], list[float]] = {key: [] for key in variants}
        theirs: dict[int, list[float]] = {beams: [] for beams in (0, 1, 4)}
        for _ in range(args.repeats):
            for beams, times in theirs.items():
                if apple:
                    times.append(apple.step_ms(beams, batch, args.steps))
            for key, draft in variants.items():
                alone, drafted = steps(model, draft, batch, args.steps)
                plain[key].append(alone)
                taken[key].append(drafted)
                bare[key].append(products_ms(decoder, drafted.rows, args.steps))
        every = [run for runs in plain.values() for run in runs]
        print(row("none | -", batch, every, every) + " | | 1.00 |")
        for key, runs in taken.items():
            floor = in_plain_steps(bare[key], plain[key])
            print(row(" | ".join(key), batch, runs, plain[key]) + f" | {floor:.2f} | {floors[key]:.2f} |")
        for beams, times in theirs.items() if apple else ():
            ratio = statistics.median(a / b for a, b in zip(times, theirs[0], strict=True))
            name = f"{beams}x{1 + DRAFTS}" if beams else "autoregressive"
            print(f"| Apple's package | {name} | {batch} | {statistics.median(times):.2f} | {ratio:.2f} {'| ' * 8}|")


if __name__ == "__main__":
    main()
