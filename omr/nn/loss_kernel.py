"""Cross-entropy of rows of logits in one Triton kernel: loss, rank of the target, and the gradient in the logits'
place.

Torch takes six passes over (rows, V) numbers for it, most of them in float32. Here it is two over the logits as they
are: one for maximum and sum (online softmax), one that writes softmax - one-hot where it read. The second finds a row
of the usual vocabularies still in the GPU's L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, word_ptr, loss_ptr, rank_ptr, width,
    RANK: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * width
    word = tl.load(word_ptr + row)
    raw = tl.load(logits + word)
    at = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        column = start + at
        inside = column < width
        x = tl.load(logits + column, mask=inside, other=float("-inf"))
        if RANK:
            before += ((x > raw) | ((x == raw) & (column < word))).to(tl.int32)
        x = x.to(tl.float32)
        now = tl.maximum(best, x)
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(best - shift) + tl.exp(x - shift)
        best = now
    top = tl.max(best, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(best - top), 0))
    tl.store(loss_ptr + row, log_sum - raw.to(tl.float32))
    if RANK:
        tl.store(rank_ptr + row, tl.sum(before, 0).to(tl.int64))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit was read above by all threads
        for start in range(0, width, BLOCK):
            column = start + at
            inside = column < width
            x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - log_sum) - tl.where(column == word, 1.0, 0.0)
            tl.store(logits + column, p.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_(
    logits: torch.Tensor, words: torch.Tensor, losses: torch.Tensor, ranks: torch.Tensor | None, *, gradient: bool
) -> None:
    """logits (N, V) contiguous become their own gradient, softmax - one-hot of words (N,) int64, if `gradient`.

    losses (N,) float32 in nats and ranks (N,) int64, the words that are likelier (or as likely, of a lower id), are
    written. A row that holds NaN gets the loss NaN.
    """
    rows, width = logits.shape
    _cross_entropy_kernel[(rows,)](
        logits, words, losses, words if ranks is None else ranks, width, RANK=ranks is not None, GRADIENT=gradient,
        BLOCK=4096, num_warps=8,
    )  # fmt: skip
