"""Generation with omr's engine for the study: timed, cut off by a clock, and compared token by token."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.transformer import Transformer
from omr.server import SpecCounts


@dataclass
class Written:
    """What a run of the engine gave. Seconds are wall time, host work included; counts are of the drafts."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    """By prompt number, those that came to their end: an end-of-text token or the limit."""
    seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    all_tokens: int = 0
    counts: SpecCounts | None = None

    def add(self, other: Written, start: int) -> None:
        """Take in a later run, whose prompt 0 is number `start` here."""
        self.tokens |= {start + i: tokens for i, tokens in other.tokens.items()}
        for name in ("seconds", "decode_seconds", "decode_tokens", "decode_steps", "all_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, float]:
        result = {
            "tok_s": self.all_tokens / self.seconds,
            "decode_tok_s": self.decode_tokens / self.decode_seconds,
            "ms_step": 1e3 * self.decode_seconds / self.decode_steps,
            "tokens": float(self.all_tokens),
        }
        return result | acceptance(self.counts) if self.counts and self.counts.drafts else result


def acceptance(counts: SpecCounts) -> dict[str, float]:
    """Mean accepted length 1 + accepted / drafts, and the share of drafts whose first i tokens were all accepted."""
    shares = [n / counts.drafts for n in counts.accepted_per_pos]
    result = {"drafts": float(counts.drafts), "tau": 1 + counts.accepted_tokens / counts.drafts}
    before = 1.0
    for i, share in enumerate(shares):
        result |= {f"accepted_{i}": share, f"accepted_{i}_given_before": share / before if before else 0.0}
        before = share
    return result


def write(
    model: Transformer,
    prompts: list[list[int]],
    *,
    batch: int,
    max_tokens: int,
    draft: Any = None,
    temperature: float = 0.0,
    seed: int = 0,
    deadline_s: float = math.inf,
    warm: bool = False,
) -> Written:
    """Answer all prompts, `batch` at a time, or as many as are finished after `deadline_s` seconds.

    `warm` captures the graphs of every batch size before the clock starts; else they are captured on the way.
    """
    longest = max(map(len, prompts))
    context = longest + max_tokens
    engine = Engine(
        model,
        max_batch_size=batch,
        kv_cache_tokens=batch * (context + 32),
        context_tokens=context,
        draft=draft,
        prefill_tokens=1 << 15,
    )
    if warm:
        engine.warm_up()
    for i, ids in enumerate(prompts):
        engine.add(
            Request(id=str(i), prompt_ids=ids, max_tokens=max_tokens, temperature=temperature, seed=(seed << 32) + i)
        )
    going: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    result = Written(counts=engine.counts if draft is not None else None)
    start = time.perf_counter()
    while engine.num_unfinished and (result.seconds < deadline_s):
        before = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        if any(going[o.id] for o in outputs):  # a prefill step gives first tokens only
            result.decode_seconds += now - before
            result.decode_tokens += sum(len(o.token_ids) for o in outputs)
            result.decode_steps += 1
        for output in outputs:
            going[output.id] += output.token_ids
            result.all_tokens += len(output.token_ids)
            if output.finish_reason:
                result.tokens[int(output.id)] = going[output.id]
        result.seconds = now - start
    return result


@torch.inference_mode()
def divergences(
    model: Transformer, prompts: list[list[int]], plain: dict[int, list[int]], other: dict[int, list[int]]
) -> list[dict[str, float]]:
    """Where two greedy texts part first, and by how much `model`'s own logits prefer one token to the other there.

    `model` computes prompt and common text anew, in one forward without cache; give it in float32, so that the gap
    is not itself a matter of rounding. `step` is the distance between neighbouring bfloat16 numbers at that logit.
    """
    found = []
    for i in sorted(plain.keys() & other.keys()):
        ours, theirs = plain[i], other[i]
        at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is None:
            assert ours == theirs, f"text {i} is the beginning of the other: {len(ours)} and {len(theirs)} tokens"
            continue
        ids = torch.tensor([prompts[i] + ours[:at]], device=model.device)
        logits = model.lm_head(model.hidden_states(ids)[0, -1]).float()
        pair = logits[[ours[at], theirs[at]]].tolist()
        found.append(
            {
                "text": i,
                "at": at,
                "gap": abs(pair[0] - pair[1]),
                "below_best": float(logits.max()) - min(pair),
                "step": 2.0 ** (math.floor(math.log2(max(abs(pair[0]), 1e-6))) - 7),
            }
        )
    return found
