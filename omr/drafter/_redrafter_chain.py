"""The DraftModels of a ReDrafter head: one greedy chain per sequence, or the prefix tree of several beams.

On CUDA it is the module's own `draft_chain`, captured by the engine in a graph. On CPU a small model is bound by the
number of calls, so what depends on a token alone is tabulated once for the whole vocabulary, and what depends on the
context alone is computed once per draft:

    legend   B batch   H hidden size   E exit_dim   V vocabulary   F first linear on [c ; s]: input_proj, else block 0
    term  (V, H)   W emb(y) + b            state at step 1:  silu(term[y]), since s_0 = 0
    head start     F_c c + f               per draft, added to F_s s at every step

The numbers differ from `draft_chain` by rounding only. Nothing here depends on batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omr.drafter import DraftModel
from omr.nn.draft_tree import Tree, beam_search, pack
from omr.nn.redrafter import Redrafter

TABLE_ELEMENTS = 2**25
"""Largest table kept, in elements (128 MiB of float32)."""


def draft_model(head: Redrafter, embedding: Tensor, num_draft_tok: int, num_beams: int = 1) -> DraftModel:
    """The fastest proposer for this head on its device; with several beams a TreeDraftModel."""
    if num_beams > 1:
        return BeamTree(head, embedding, num_draft_tok, num_beams)
    if embedding.device.type == "cpu" and embedding.numel() <= TABLE_ELEMENTS:
        return TabulatedChain(head, embedding, num_draft_tok)
    return Chain(head, embedding, num_draft_tok)


class Chain:
    """Static shapes, no host synchronisation: fit for a CUDA graph."""

    needs_hidden = True

    def __init__(self, head: Redrafter, embedding: Tensor, num_draft_tok: int) -> None:
        self.head, self.embedding, self.num_draft_tok = head, embedding, num_draft_tok

    @torch.inference_mode()
    def propose(self, hidden: Tensor | None, tokens: Tensor, history: Sequence[Sequence[int]] | None) -> Tensor:
        """See DraftModel."""
        assert hidden is not None, "ReDrafter reads the target's hidden state"
        return self.head.draft_chain(hidden, tokens, self.embedding, self.num_draft_tok)


class BeamTree(Chain):
    """Beam search, its beams merged into one tree per sequence."""

    def __init__(self, head: Redrafter, embedding: Tensor, num_draft_tok: int, num_beams: int) -> None:
        super().__init__(head, embedding, num_draft_tok)
        self.num_beams = num_beams

    @torch.inference_mode()
    def propose_tree(self, hidden: Tensor, tokens: Tensor) -> Tree:
        """See TreeDraftModel. On CPU the trees are as wide as the largest of the batch, on CUDA always of one shape."""
        length = 1 + self.num_draft_tok
        beams = beam_search(self.head, hidden, tokens, self.embedding, self.num_beams, length).tokens
        tree = pack(beams, 1 + self.num_beams * self.num_draft_tok)
        return tree.cut(int(tree.sizes.max())) if hidden.device.type == "cpu" else tree


class TabulatedChain:
    """The same chain with few calls per draft."""

    needs_hidden = True

    def __init__(self, head: Redrafter, embedding: Tensor, num_draft_tok: int) -> None:
        self.num_draft_tok = num_draft_tok
        self.hidden_size = h = head.config.hidden_size
        self.recurrent = head.rnn_u is not None
        with torch.inference_mode():
            self.term = head.embed_term(embedding.to(next(head.parameters()).dtype))
            if head.rnn_u is not None:
                self.term = self.term + head.rnn_u.bias
                self.state_weight = head.rnn_u.weight.T.contiguous()
            self.first_state = F.silu(self.term) if self.recurrent else self.term
            linears = head.linears
            self.projects = head.input_proj is not None
            self.first_context: Tensor | None = None
            if linears:
                self.first_bias = linears[0].bias.clone()
                self.first_context = linears[0].weight[:, :h].T.contiguous()
                self.first_inner = linears[0].weight[:, h:].T.contiguous()
            self.blocks = [(linear.weight.T.contiguous(), linear.bias.clone()) for linear in linears[1:]]
            self.out = head.head
            self.table = head.draft_tokens

    @torch.inference_mode()
    def propose(self, hidden: Tensor | None, tokens: Tensor, history: Sequence[Sequence[int]] | None) -> Tensor:
        """See DraftModel."""
        assert hidden is not None, "ReDrafter reads the target's hidden state"
        batch, h = hidden.shape
        drafts = torch.empty(batch, self.num_draft_tok, dtype=torch.int64)
        start = None
        if self.first_context is not None:
            start = torch.addmm(self.first_bias, hidden, self.first_context)
        x = hidden.new_empty(batch, 2 * h)
        x[:, :h] = hidden
        state, newest = self.first_state[tokens], tokens
        for k in range(self.num_draft_tok):
            if k:
                term = self.term[newest]
                state = F.silu(term.addmm_(state, self.state_weight)) if self.recurrent else state + term
            y = self._features(x, state, start)
            newest = self.out(y).argmax(-1)
            if self.table is not None:
                newest = self.table[newest]
            drafts[:, k] = newest
        return drafts

    def _features(self, x: Tensor, state: Tensor, start: Tensor | None) -> Tensor:
        if start is None:
            x[:, self.hidden_size :] = state
            y = x
        else:
            first = torch.addmm(start, state, self.first_inner)
            if self.projects:
                y = first
            else:
                x[:, self.hidden_size :] = state
                y = F.silu(first, inplace=True).add_(x)
        for weight, bias in self.blocks:
            y = F.silu(torch.addmm(bias, y, weight), inplace=True).add_(y)
        return y
