"""The DraftModels of a ReDrafter head: one greedy chain per sequence, or the prefix tree of several beams.

On CUDA it is the module's own `draft_chain`, captured by the engine in a graph. On CPU a small model is bound by the
number of calls, so what depends on a token alone is tabulated once for the whole vocabulary, and what depends on the
context alone is computed once per draft:

    legend   B batch   H hidden size   E exit_dim   V vocabulary   F first linear on [c ; s]: input_proj, else block 0
    term  (V, H)   W emb(y) + b            state at step 1:  silu(term[y]), since s_0 = 0
    head start     F_c c + f               per draft, added to F_s s at every step
    [F_s ; U] s    one product from a few rows on: F_s s is for this step's logits, U s for the next step's state

The numbers differ from `draft_chain` by rounding only, and no draft depends on batch mates. How many there are may: a
draft goes on while it is likely to hold as a whole. With q_k the drafter's own probability of its k-th token, a batch
of B stops after token k when the mean over its sequences of q_1 ... q_k is below `stop_below` * 2 B / (B + 1): what
came after would seldom be reached, and costs a draft and a row of verification for each. The bound rises with B because
the first rows of a forward are nearly free (they wait for the weights) and those of a batch cost arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omr.nn.argmax import argmax
from omr.nn.draft_tree import Tree, beam_search, pack, search
from omr.nn.eight_bit import Int8Linear, eight_bit
from omr.nn.linear import lay_out
from omr.nn.packed import FEW_ROWS, dense_add, dense_product
from omr.nn.redrafter import Redrafter

silu_, silu_out = torch.ops.aten.silu_.default, torch.ops.aten.silu.out
Product = Callable[[Tensor], Tensor]
Choose = Callable[[int, Tensor], Tensor]
History = Sequence[Sequence[int]] | None
TABLE_ELEMENTS = 2**25
"""Largest table kept, in elements (128 MiB of float32)."""


def draft_model(
    head: Redrafter,
    embedding: Tensor,
    num_draft_tok: int,
    *,
    num_beams: int = 1,
    in_eight_bit: bool = False,
    stop_below: float = 0.0,
) -> Chain | TabulatedChain:
    """The fastest proposer for this head on its device; with several beams a TreeDraftModel.

    `in_eight_bit` runs blocks and output matrix in 8 bits (omr.nn.eight_bit). `head` may be changed by this.
    `stop_below` ends drafts that are unlikely to hold, where the proposer can (TabulatedChain).
    """
    if embedding.device.type == "cpu" and embedding.numel() <= TABLE_ELEMENTS:
        tables = Tables(head, embedding, in_eight_bit=in_eight_bit)
        if num_beams == 1:
            return TabulatedChain(tables, num_draft_tok, stop_below)
        return TabulatedTree(tables, num_draft_tok, num_beams)
    if in_eight_bit:
        head.repack(eight_bit)
    elif embedding.device.type == "cpu":
        head.repack(RowsLinear)
    if num_beams == 1:
        return Chain(head, embedding, num_draft_tok)
    return BeamTree(head, embedding, num_draft_tok, num_beams)


class RowsLinear(nn.Module):
    """A dense layer that multiplies a few rows fast on CPU (omr.nn.packed)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.run = dense_product(lay_out(weight.detach()), bias, packed=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class Chain:
    """Static shapes, no host synchronisation: fit for a CUDA graph."""

    needs_hidden = True
    adaptive = False
    sampled = False

    def __init__(self, head: Redrafter, embedding: Tensor, num_draft_tok: int) -> None:
        self.head, self.embedding, self.num_draft_tok = head, embedding, num_draft_tok
        self.draft_tokens = head.draft_tokens

    def propose(self, hidden: Tensor | None, tokens: Tensor, history: History) -> Tensor:
        """See DraftModel."""
        return self.propose_sampled(hidden, tokens, history, None)

    @torch.inference_mode()
    def propose_sampled(self, hidden: Tensor | None, tokens: Tensor, history: History, choose: Choose | None) -> Tensor:
        """See SampledDraftModel."""
        assert hidden is not None, "ReDrafter reads the target's hidden state"
        return self.head.draft_chain(hidden, tokens, self.embedding, self.num_draft_tok, choose)


class BeamTree(Chain):
    """Beam search, its beams merged into one tree per sequence."""

    def __init__(self, head: Redrafter, embedding: Tensor, num_draft_tok: int, num_beams: int) -> None:
        super().__init__(head, embedding, num_draft_tok)
        self.num_beams = num_beams

    @torch.inference_mode()
    def propose_tree(self, hidden: Tensor, tokens: Tensor) -> Tree:
        """See TreeDraftModel."""
        length = 1 + self.num_draft_tok
        return tree_of(beam_search(self.head, hidden, tokens, self.embedding, self.num_beams, length).tokens)


def tree_of(beams: Tensor) -> Tree:
    """The beams (B, W, L) as trees: on CPU as wide as the largest of the batch, on CUDA always of one shape."""
    tree = pack(beams, 1 + beams.shape[1] * (beams.shape[2] - 1))
    return tree.cut(int(tree.sizes.max())) if beams.device.type == "cpu" else tree


class Tables:
    """The products of a head, with all that can be tabulated tabulated (see the module text)."""

    def __init__(self, head: Redrafter, embedding: Tensor, *, in_eight_bit: bool) -> None:
        self.hidden_size = h = head.config.hidden_size
        self.eight = in_eight_bit
        with torch.inference_mode():
            self.term = head.embed_term(embedding.to(next(head.parameters()).dtype))
            self.first_state = self.term
            self.recurs, self.projects = head.rnn_u is not None, head.input_proj is not None
            self.context_part: Product | None = None
            of_state = []
            if linears := head.linears:
                self.context_part = self._product(linears[0].weight[:, :h], linears[0].bias)
                of_state.append(linears[0].weight[:, h:])
            if head.rnn_u is not None:
                self.term = self.term + head.rnn_u.bias
                self.first_state = F.silu(self.term)
                of_state.append(head.rnn_u.weight)
            # For few rows, where a product that adds is as good as one over both.
            self.adds = len(of_state) == 2 and not in_eight_bit
            self.of_state: Product | None = None
            if of_state:
                weight = lay_out(torch.cat(of_state))  # [F_s ; U], or the one there is
                self.of_state = self._product(weight, None)
                if self.adds:
                    self.add_first, self.add_recurrent = (
                        dense_add(w, packed=False) for w in weight.tensor_split([len(weight) - h])
                    )
            self.blocks = [self._product(linear.weight, linear.bias) for linear in linears[1:]]
            parts = head.head.parts
            self.out = [self._product(part, None) for part in parts]
            self.draft_tokens = head.draft_tokens

    def _product(self, weight: Tensor, bias: Tensor | None) -> Product:
        """x -> x W^T + b"""
        if self.eight:
            run: Product = Int8Linear(weight, bias).rows
            return run
        weight = weight.detach()
        return dense_product(weight if weight.t().is_contiguous() else lay_out(weight.contiguous()), bias, packed=True)

    def start(self, context: Tensor) -> Tensor | None:
        """F_c c + f for contexts (R, H); None without a linear layer."""
        return None if self.context_part is None else self.context_part(context)

    def advance(
        self, x: Tensor, start: Tensor | None, newest: Tensor, carried: Tensor | None, *, first: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Bring the state half of x = [c ; s] (R, 2H) to the tokens `newest` (R,) int64.

        Their draft logits (R, D), and U s (R, H) for the next call's `carried`, or None to leave it to that call.
        """
        h = self.hidden_size
        state = x[:, h:]
        if first:
            state.copy_(self.first_state.index_select(0, newest))
        elif not self.recurs:
            state.add_(self.term.index_select(0, newest))
        elif carried is None:
            silu_out(self.add_recurrent(self.term.index_select(0, newest), state), out=state)
        else:
            silu_out(self.term.index_select(0, newest).add_(carried), out=state)
        y, carried = x, None
        if self.adds and start is not None and x.shape[0] < FEW_ROWS:
            y = self.add_first(start, state)
        elif self.of_state is not None:
            products = self.of_state(state)
            y = x if start is None else products[:, : start.shape[1]] + start
            carried = products[:, -h:] if self.recurs else None
        if start is not None and not self.projects:
            y = silu_(y).add_(x)
        for block in self.blocks:
            y = silu_(block(y)).add_(y)
        for product in self.out:
            y = product(y)
        return y, carried

    def tokens(self, rows: Tensor) -> Tensor:
        """Token ids of rows of the draft logits."""
        return rows if self.draft_tokens is None else self.draft_tokens.index_select(0, rows)


class TabulatedChain:
    """The same chain with few calls per draft."""

    needs_hidden = True
    adaptive = False
    sampled = False

    def __init__(self, tables: Tables, num_draft_tok: int, stop_below: float = 0.0) -> None:
        self.tables, self.num_draft_tok, self.stop_below = tables, num_draft_tok, stop_below
        self.draft_tokens = tables.draft_tokens

    def propose(self, hidden: Tensor | None, tokens: Tensor, history: History) -> Tensor:
        """See DraftModel. Fewer than `num_draft_tok` columns where the draft was stopped, one at least."""
        return self.propose_sampled(hidden, tokens, history, None)

    @torch.inference_mode()
    def propose_sampled(self, hidden: Tensor | None, tokens: Tensor, history: History, choose: Choose | None) -> Tensor:
        """See SampledDraftModel; never stopped early."""
        assert hidden is not None, "ReDrafter reads the target's hidden state"
        tables, last = self.tables, self.num_draft_tok - 1
        start = tables.start(hidden)
        x = torch.cat([hidden, hidden], dim=1)  # [c ; s]: every step writes s into it
        newest, carried, drafts = tokens, None, []
        holds, batch = [1.0] * len(tokens), len(tokens)
        enough = self.stop_below * 2 * batch * batch / (batch + 1)
        for k in range(self.num_draft_tok):
            y, carried = tables.advance(x, start, newest, carried, first=k == 0)
            if choose is not None:
                newest = choose(k, y)
            elif self.stop_below == 0 or k == last:
                newest = tables.tokens(argmax(y))
            else:
                chances, best = y.softmax(-1).max(-1)
                newest = tables.tokens(best)
                holds = [held * chance for held, chance in zip(holds, chances.tolist(), strict=True)]
            drafts.append(newest)
            if sum(holds) < enough:
                break
        return torch.stack(drafts, dim=1)


class TabulatedTree(TabulatedChain):
    """The tree of BeamTree with few calls per draft. Its `propose` gives the chain."""

    def __init__(self, tables: Tables, num_draft_tok: int, num_beams: int) -> None:
        super().__init__(tables, num_draft_tok)
        self.num_beams = num_beams

    @torch.inference_mode()
    def propose_tree(self, hidden: Tensor, tokens: Tensor) -> Tree:
        """See TreeDraftModel."""
        tables, batch = self.tables, len(tokens)
        start = tables.start(hidden)
        x = torch.cat([hidden, hidden], dim=1)  # [c ; s] of every beam

        carried: Tensor | None = None

        def step(parent: Tensor | None, newest: Tensor) -> Tensor:
            nonlocal x, start, carried
            if parent is not None:
                beams = len(x) // batch
                rows = (parent + torch.arange(0, len(x), beams)[:, None]).flatten()
                x = x.index_select(0, rows)
                carried = None if carried is None else carried.index_select(0, rows)
                if beams == 1 and start is not None:
                    start = start.index_select(0, rows)
            y, carried = tables.advance(x, start, newest.flatten(), carried, first=parent is None)
            return y.view(*newest.shape, -1)

        return tree_of(search(step, tokens, tables.draft_tokens, self.num_beams, 1 + self.num_draft_tok).tokens)
