"""How a token is drawn from logits.

A token is a function of (logits, seed, position): the uniform behind it is a hash of the request's seed and the
position the token will have, not the next number of a stream. So a request's text does not depend on its batch mates,
on being preempted, or on how many tokens a step verifies; and a speculative step, which draws at several positions at
once, draws the very tokens that plain decoding would.

The law: penalties on the logits, division by temperature, softmax, then the filters min-p, top-k, top-p in that order
(top-p on what top-k left, renormalised), each as a floor under the probabilities, so that tokens exactly as likely as
the last one kept are kept too and no order among equals is ever needed. The draw inverts the cumulative sum, in
float64, in vocabulary order.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from omr.engine.request import Request, Sequence, TokenLogprob
from omr.nn.argmax import argmax

SPLIT_TOP = 256
"""Top-p on CPU looks at this many likeliest tokens before it sorts a whole row."""


def uniform(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Float64 in [0, 1) for int64 seed and position of one shape: two splitmix64 finalisers (Steele 2014)."""
    x = seed * -7046029254386353131 + position * -4417276706812531889
    for _ in range(2):
        x = (x ^ _shift(x, 30)) * -4658895280553007687
        x = (x ^ _shift(x, 27)) * -7723592293110705685
        x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass
class Law:
    """Sampling parameters of R rows as columns (R, 1), built once per change of the batch."""

    temperature: torch.Tensor
    """1 where greedy."""
    greedy: torch.Tensor
    """(R,) bool."""
    top_k: torch.Tensor
    """V where off."""
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    """(R,) int64."""
    all_greedy: bool
    any_greedy: bool
    any_min_p: bool
    max_top_k: int
    """0 when no row has top-k."""
    all_top_k: bool
    any_top_p: bool

    @classmethod
    def of(cls, seqs: Seq[Sequence], repeat: int, vocab_size: int, device: torch.device) -> Law:
        """The law of each sequence's request, each `repeat` rows long."""
        requests = [seq.request for seq in seqs for _ in range(repeat)]

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        sampled = [r for r in requests if r.temperature > 0]
        return cls(
            temperature=column([r.temperature or 1.0 for r in requests]),
            greedy=torch.tensor([r.temperature == 0 for r in requests], device=device),
            top_k=column([min(r.top_k or vocab_size, vocab_size) for r in requests], torch.int64),
            top_p=column([r.top_p for r in requests]),
            min_p=column([r.min_p for r in requests]),
            seed=torch.tensor([seq.seed for seq in seqs for _ in range(repeat)], dtype=torch.int64, device=device),
            all_greedy=not sampled,
            any_greedy=len(sampled) < len(requests),
            any_min_p=any(r.min_p > 0 for r in sampled),
            max_top_k=min(max((r.top_k for r in sampled), default=0), vocab_size),
            all_top_k=all(r.top_k > 0 for r in sampled),
            any_top_p=any(r.top_p < 1 for r in sampled),
        )

    def take(self, rows: torch.Tensor) -> Law:
        """The law of some of its rows, (n,) int64, for the same batch."""
        if self.all_greedy:
            return self
        columns = {name: values[rows] for name, values in vars(self).items() if isinstance(values, torch.Tensor)}
        return replace(self, **columns)


def draw(logits: torch.Tensor, law: Law, positions: torch.Tensor) -> torch.Tensor:
    """Tokens (R,) int64 for positions (R,) int64, from logits (R, V) float32."""
    if law.all_greedy:
        return argmax(logits)
    tokens = invert(filtered((logits / law.temperature).softmax(-1), law), uniform(law.seed, positions))
    return torch.where(law.greedy, argmax(logits), tokens) if law.any_greedy else tokens


def invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Tokens (R,) int64 where the share u (R,) float64 of the sum of weights (R, V) >= 0 is reached."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, cumulative[:, -1:] * u[:, None], right=True)[:, 0]
    # The last index is for logits that are not numbers: a token out of range would take the whole batch down.
    return torch.minimum(tokens, _last_positive(cumulative)).clamp_(max=weights.shape[-1] - 1)


def _last_positive(cumulative: torch.Tensor) -> torch.Tensor:
    """Index of the last token with probability: the first at which the sum is complete."""
    return torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]


def filtered(probs: torch.Tensor, law: Law) -> torch.Tensor:
    """probs (R, V) with everything below each row's floor set to 0 (not renormalised)."""
    floor = None
    if law.any_min_p:
        floor = law.min_p * probs.amax(-1, keepdim=True)
        probs = torch.where(probs >= floor, probs, 0.0)
    if law.max_top_k or law.any_top_p:
        probs = torch.where(probs >= _rank_floor(probs, law), probs, 0.0)
    return probs


def _rank_floor(probs: torch.Tensor, law: Law) -> torch.Tensor:
    """The least probability (R, 1) that top-k and then top-p keep."""
    vocab = probs.shape[-1]
    if law.all_top_k and law.max_top_k and not law.any_greedy:
        width = law.max_top_k
    elif probs.is_cuda:
        width = vocab
    else:
        width = min(SPLIT_TOP, vocab)
    while True:
        ranked = probs.topk(width, dim=-1).values if width < vocab else probs.sort(-1, descending=True).values
        mass = ranked.cumsum(-1, dtype=torch.float64)
        last = (law.top_k - 1).clamp(max=width - 1)
        k_floor = ranked.gather(-1, last)
        if law.max_top_k == 0:
            k_floor, whole = torch.zeros_like(k_floor), probs.sum(-1, keepdim=True, dtype=torch.float64)
        else:
            # Ties of the k-th are kept, so the mass that top-p divides by counts them.
            k_floor = torch.where(law.top_k < vocab, k_floor, 0.0)
            whole = torch.where(probs >= k_floor, probs, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
        if not law.any_top_p:
            if width == vocab or bool((law.top_k <= width).logical_or(law.top_k >= vocab).all()):
                return k_floor
        else:
            wanted = law.top_p.double() * whole
            kept = (mass - ranked < wanted).sum(-1, keepdim=True)  # the first always is
            enough = (mass[:, -1:] >= wanted) | (law.top_p >= 1)
            if width == vocab or bool((enough & ((law.top_k <= width) | (law.top_k >= vocab))).all()):
                p_floor = torch.where(law.top_p < 1, ranked.gather(-1, kept.clamp(1, width) - 1), 0.0)
                return torch.maximum(k_floor, p_floor)
        width = vocab


def penalise(logits: torch.Tensor, request: Request, prompt: Seq[int], output: Seq[int]) -> torch.Tensor:
    """One row of logits (V,) after the request's penalties, given the tokens before it."""
    logits = logits.clone()
    counts = torch.bincount(
        torch.tensor(list(output), dtype=torch.int64, device=logits.device), minlength=logits.shape[0]
    )
    if request.repetition_penalty != 1:
        seen = counts > 0
        seen[torch.tensor(list(prompt), device=logits.device)] = True
        pressed = torch.where(logits > 0, logits / request.repetition_penalty, logits * request.repetition_penalty)
        logits = torch.where(seen, pressed, logits)
    return logits - counts * request.frequency_penalty - (counts > 0) * request.presence_penalty


def logprobs_of(logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """The log-probability of `token` and of the `count` likeliest, under softmax of logits (V,) float32."""
    scores = logits.log_softmax(-1)
    best = scores.topk(min(count, scores.shape[0]))
    return TokenLogprob(
        token_id=token,
        logprob=float(scores[token]),
        top=list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
    )
