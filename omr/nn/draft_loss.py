"""The training loss of a drafter, without ever holding (positions x tokens x V) logits.

    legend   B rows   T tokens   P draft positions (predict_n)   C contexts kept   N_i targets of position i
             N sum of N_i   H hidden size   D draft vocabulary   R inner size of the head

Draft position i (from 0) at context t reads the base's hidden state t and the embeddings of tokens t+1 .. t+1+i, and
its target is token t+i+2. The loss is the sum over i of the mean cross-entropy over the targets of position i, with the
mean taken over a whole optimiser step (all micro-batches, all ranks), not over each micro-batch: a row with few targets
does not weigh as much as a full one, and a position without targets adds 0, not NaN.

    ids a b c d e, P = 2, drafts from (context; tokens):   i=0:  (0; b) -> c    (1; c) -> d    (2; d) -> e
                                                           i=1:  (0; b c) -> d  (1; c d) -> e

The big product and its gradient are formed together, chunk by chunk (as in "cut" and fused linear cross-entropies), so
peak memory is one chunk of logits; only contexts that have a target are computed at all. The rank of the target is
counted in the same pass and gives the accuracies of every k. A tie counts for the lower token id, as in argmax.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omr.nn.redrafter import Redrafter

TOP_K = 5
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**29}
"""Logits held at once, per device type: 2 MiB (the CPU's cache), and on CUDA 1 GiB of bfloat16; a smaller chunk there
spends its time on adding up the matrix's gradient."""


def target_mask(is_target: Tensor, lengths: Tensor, predict_n: int, *, contiguous: bool = True) -> Tensor:
    """(B, T) bool, (B,) int64 -> (P, B, T) bool: whether position i has a target at context t.

    Padding (t >= length) never is a target. `contiguous` asks that tokens t+1 .. t+i+2 are all targets: when serving, a
    draft follows a token that the model wrote and stops where a tool's output begins. Without it a target counts by its
    own mark alone, as in the reference.
    """
    t = is_target.shape[1]
    real = torch.arange(t, device=is_target.device) < lengths[:, None]
    ok = is_target & real
    ahead = [F.pad(ok[:, k:], (0, k)) for k in range(min(predict_n + 2, t))]  # ahead[k][b, t] = ok[b, t + k]
    ahead += [torch.zeros_like(ok)] * (predict_n + 2 - len(ahead))
    masks, run = [], ahead[1]
    for i in range(predict_n):
        run = run & ahead[i + 2] if contiguous else ahead[i + 2]
        masks.append(run)
    return torch.stack(masks)


@dataclass
class Targets:
    """One micro-batch cut down to what is trained on."""

    context: Tensor  # (C,) int64 into the flattened (B*T): contexts with a target at any position
    at: list[Tensor]  # P x (N_i,) int64 into `context`
    tokens: Tensor  # (N,) int64 target ids, positions one after the other
    counts: list[int]  # N_i

    @classmethod
    def of(cls, input_ids: Tensor, mask: Tensor) -> Targets:
        """(B, T) int64 ids and the (P, B, T) mask of `target_mask`. Ids may sit on the CPU: this needs the host."""
        p = len(mask)
        flat = mask.reshape(p, -1)
        context = flat.any(0).nonzero()[:, 0]
        kept = flat[:, context]
        at = [kept[i].nonzero()[:, 0] for i in range(p)]
        ids = input_ids.reshape(-1)
        tokens = torch.cat([ids[context[at[i]] + i + 2] for i in range(p)])
        return cls(context, at, tokens, [len(a) for a in at])

    def to(self, device: torch.device | str) -> Targets:
        return Targets(
            self.context.to(device, non_blocking=True),
            [a.to(device, non_blocking=True) for a in self.at],
            self.tokens.to(device, non_blocking=True),
            self.counts,
        )


@dataclass
class DraftLoss:
    """What one micro-batch gives. `total` carries the gradient; the rest is detached."""

    total: Tensor  # () sum over positions of (sum of losses / normaliser)
    losses: list[
        Tensor
    ]  # P x (N_i,) cross-entropy in nats against the tokens of the text; 0 where it cannot be drafted
    ranks: list[Tensor] | None  # P x (N_i,) int64 how many tokens the drafter prefers to the target
    drafted: list[Tensor]  # P x (N_i,) bool: the target is in the draft vocabulary


def draft_states(drafter: Redrafter, embedded: Tensor, context: Tensor, predict_n: int) -> list[Tensor]:
    """Teacher-forced states: (B*T, H) embeddings of the text, (C,) contexts -> P x (C, H)."""
    term = drafter.embed_term(embedded)
    last = len(embedded) - 1
    state, states = torch.zeros_like(term[context]), []
    for i in range(predict_n):
        state = drafter.advance(state, term[(context + 1 + i).clamp(max=last)])
        states.append(state)
    return states


def draft_loss(
    drafter: Redrafter,
    hidden: Tensor,
    embedded: Tensor,
    targets: Targets,
    normalisers: list[int],
    *,
    want_ranks: bool,
    distil: float = 0.0,
    base_matrix: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> DraftLoss:
    """Loss of one micro-batch, divided by `normalisers` (targets of each position in the whole optimiser step).

    `hidden` (B, T, H) and `embedded` (B, T, H) are the base's, without gradient. `distil` in [0, 1] mixes the target
    one-hot with the base's own distribution, computed from `hidden` and the base's (V, H) `base_matrix`.
    `product_dtype` is the dtype of the products with the big matrix (default: that of the weights).
    """
    assert distil == 0 or base_matrix is not None, "distillation needs the base's output matrix"
    h = hidden.shape[-1]
    flat_hidden = hidden.reshape(-1, h)
    states = draft_states(drafter, embedded.reshape(-1, h), targets.context, len(targets.at))
    context = flat_hidden[targets.context].to(states[0].dtype)
    x = torch.cat([context[at] for at in targets.at])
    s = torch.cat([state[at] for state, at in zip(states, targets.at, strict=True)])
    z = drafter.head.project(drafter.features(x, s))
    words, drafted = targets.tokens, torch.ones_like(targets.tokens, dtype=torch.bool)
    table = drafter.draft_tokens
    if table is not None:
        drafted = drafter.t2d[words]
        words = torch.searchsorted(table, words).clamp(max=len(table) - 1)
    weights = (
        torch.cat(
            [
                torch.full((n,), 1.0 / max(norm, 1), device=z.device)
                for n, norm in zip(targets.counts, normalisers, strict=True)
            ]
        )
        * drafted
    )
    teacher = None
    if distil:
        last = len(flat_hidden) - 1
        predicts = torch.cat([(targets.context[at] + i + 1).clamp(max=last) for i, at in enumerate(targets.at)])
        teacher = (flat_hidden[predicts], base_matrix if table is None else base_matrix[table], distil)
    total, losses, ranks = linear_cross_entropy(
        z, drafter.head.matrix, words, weights, want_ranks=want_ranks, teacher=teacher, dtype=product_dtype, chunk=chunk
    )
    losses = losses * drafted
    if want_ranks:
        ranks = torch.where(drafted, ranks, drafter.config.vocab_size)
    return DraftLoss(
        total,
        list(losses.split(targets.counts)),
        list(ranks.split(targets.counts)) if want_ranks else None,
        list(drafted.split(targets.counts)),
    )


def linear_cross_entropy(
    z: Tensor,
    matrix: Tensor,
    words: Tensor,
    weights: Tensor,
    *,
    want_ranks: bool = False,
    teacher: tuple[Tensor, Tensor, float] | None = None,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of `z` (N, R) @ `matrix` (D, R).T against `words` (N,), in chunks of rows.

    Returns (sum of weights * loss with gradient to z and matrix, (N,) plain losses, (N,) int64 ranks or empty).
    `teacher` = (base hidden (N, H), base matrix (D, H), share a): the target becomes (1 - a) one-hot + a softmax(base).
    """
    if chunk is None:
        chunk = max(16, CHUNK_ELEMENTS.get(z.device.type, 2**29) // len(matrix))
    total, losses, ranks = _LinearCrossEntropy.apply(z, matrix, words, weights, want_ranks, teacher, dtype, chunk)
    return total, losses, ranks


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, matrix, words, weights, want_ranks, teacher, dtype, chunk):
        dtype = dtype or matrix.dtype
        need_z, need_m = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        cast_matrix = matrix.to(dtype)
        grad_z = torch.empty_like(z) if need_z else None
        grad_m = torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device) if need_m else None
        losses = torch.empty(len(z), dtype=torch.float32, device=z.device)
        ranks = torch.empty(len(z) if want_ranks else 0, dtype=torch.int64, device=z.device)
        total = torch.zeros((), dtype=torch.float32, device=z.device)
        fused = _fused(z.device) if teacher is None else None
        for start in range(0, len(z), chunk):
            rows = slice(start, start + chunk)
            zc, word, weight = z[rows].to(dtype), words[rows, None], weights[rows, None]
            logits = zc @ cast_matrix.T
            if fused is not None:
                rank = ranks[rows] if want_ranks else None
                fused(logits, words[rows], losses[rows], rank, gradient=need_z or need_m)
                total += (losses[rows] * weights[rows]).sum()  # not a product, which autocast would round
                grad = logits
            else:
                if want_ranks:
                    ranks[rows] = _ranks(logits, word)
                grad, soft = _cross_entropy(logits, word, losses[rows], teacher and (*teacher, rows))
                total += (soft * weights[rows]).sum()
            # The gradient is without the row's weight, which is cheaper on the thin side here.
            if need_z:
                grad_z[rows] = (grad @ cast_matrix) * weight
            if need_m:
                _add_product(grad_m, grad.T, (zc * weight).to(dtype))
        ctx.save_for_backward(grad_z, None if grad_m is None else grad_m.to(matrix.dtype))
        ctx.mark_non_differentiable(losses, ranks)
        return total, losses, ranks

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_z, grad_m = ctx.saved_tensors
        return (
            None if grad_z is None else grad_z * grad_total,
            None if grad_m is None else grad_m.mul_(grad_total),
            *([None] * 6),
        )


def _fused(device: torch.device) -> Any:
    """The kernel that does a chunk's softmax in one pass over the logits; None where there is no Triton."""
    if device.type != "cuda" or not importlib.util.find_spec("triton"):
        return None
    from omr.nn.loss_kernel import cross_entropy_

    return cross_entropy_


def _ranks(logits: Tensor, word: Tensor) -> Tensor:
    """How many words are preferred to `word` (N, 1) in each row of logits (N, D): (N,)."""
    at_target = logits.gather(1, word)
    better = logits > at_target
    better |= (logits == at_target) & (torch.arange(logits.shape[1], device=logits.device) < word)
    return better.sum(-1)


def _cross_entropy(
    logits: Tensor, word: Tensor, losses: Tensor, teacher: tuple[Tensor, Tensor, float, slice] | None
) -> tuple[Tensor, Tensor]:
    """Fill losses (N,); returns the gradient (N, D), in the logits' place, and the (N,) losses to be minimised."""
    log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
    losses.copy_(-log_q.gather(1, word)[:, 0])
    mixed, share, p = losses, 0.0, None
    if teacher is not None:
        hidden, base, share, rows = teacher
        p = torch.softmax(hidden[rows].to(base.dtype) @ base.T, -1, dtype=torch.float32)
        mixed = (1 - share) * losses - share * (p * log_q).sum(-1)
    grad = log_q.exp_()
    if p is not None:
        grad.sub_(p, alpha=share)
    grad.scatter_add_(1, word, torch.full_like(word, share - 1.0, dtype=torch.float32))
    return (grad if logits.dtype == torch.float32 else logits.copy_(grad)), mixed


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total float32 += a @ b; where it can be, in one pass and without rounding the product."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
