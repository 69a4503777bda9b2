"""Decoding with a drafter that proposes a tree: one forward verifies all nodes, the accepted path enters the cache.

    nodes  0 newest token, known     every node sees the sequence so far, its ancestors and itself (tree mask), and has
           1..N-1 drafts             position = sequence length - 1 + depth

At each node the target draws its own token, with the uniform of that token's position; the walk from the root goes on
while the drawn token is a child. So the step yields the tokens that plain decoding would draw, whatever was proposed.

The cache holds paths, not trees: keys and values of the nodes stay beside the cache during the forward, and those of
the accepted path alone are then written to the slots of their positions, for all layers in one copy. Rejected nodes
leave nothing behind and need no slots.

Trees of a batch differ in size. On CPU, where a row of the forward costs arithmetic, the real nodes are laid end to end
and only attention sees the trees side by side, the smaller ones filled up; on CUDA every tree has the same N rows.

Shapes: B sequences, N nodes of the largest tree, T rows of the forward (the real nodes), L cached tokens of the longest
sequence, Hq, Hkv heads, D head_dim.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch

from omr.drafter import TreeDraftModel
from omr.engine import sampler
from omr.engine.request import Sequence, TokenLogprob
from omr.engine.runner import Drawn, Runner
from omr.nn.decoder import Decoder
from omr.nn.draft_tree import Tree, walk
from omr.nn.linear import to_e4m3
from omr.nn.paged import NULL_BLOCK, KVCache, attend, stacked


class TreeBatch:
    """What the nodes attend to: the cached tokens before the root, then each other as `sees` (B, N, N) says.

    `tables` (B, blocks) int64, with room for L + N tokens, `cached` (B,) int64 tokens of each sequence in the cache:
    everything before its root; L is the greatest of them. `sizes` are the nodes of each tree that have a row.
    """

    def __init__(
        self,
        cache: KVCache,
        tables: torch.Tensor,
        cached: torch.Tensor,
        longest: int,
        sees: torch.Tensor,
        sizes: list[int],
    ) -> None:
        self.pages = cache
        self.cache = self  # the decoder stores keys and values here, not in the pages
        self.slots = sees.new_empty(0, dtype=torch.int64)
        self.batch, self.nodes = sees.shape[:2]
        self.total = longest
        self.blocks = tables.flatten()
        self.firsts = [0, *accumulate(sizes)]
        """Row of each tree's root."""
        self.real: torch.Tensor | None = None
        """(T,) int64, which of the B * N nodes have a row; None when all have."""
        if self.firsts[-1] < self.batch * self.nodes:
            nodes = torch.arange(self.nodes, device=sees.device)
            ends = torch.tensor(sizes, device=sees.device)[:, None]
            self.real = (nodes < ends).flatten().nonzero()[:, 0]
            # The row of every node, its tree's root for those that have none.
            roots = torch.tensor(self.firsts[:-1], device=sees.device)[:, None]
            self.fill = (roots + torch.where(nodes < ends, nodes, 0)).flatten()
        self.new: list[torch.Tensor] = []
        """Keys and values of the nodes, (T, 2 * Hkv * D) per layer."""
        before = torch.arange(self.total, device=sees.device) < cached[:, None]  # (B, L)
        seen = torch.cat([before[:, None].expand(-1, self.nodes, -1), sees], dim=-1)  # (B, N, L + N)
        mask = torch.zeros(seen.shape, dtype=cache.data.dtype, device=sees.device).masked_fill_(~seen, float("-inf"))
        self.mask = stacked(mask[:, None], cache.num_heads // cache.num_kv_heads)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """(B, N) -> (T,)"""
        return values.flatten() if self.real is None else values.flatten().index_select(0, self.real)

    def store(self, layer: int, slots: torch.Tensor, qkv: torch.Tensor) -> None:
        """Hold the nodes' keys and values until the walk has chosen among them."""
        assert layer == len(self.new), (layer, len(self.new))
        self.new.append(qkv[:, self.pages.first_key :])

    def attend(self, layer: int, qkv: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """qkv (T, (Hq + 2 Hkv) * D), rotated and stored -> (T, Hq * D); in E4M3 over `scale` if given."""
        cache, batch, total = self.pages, self.batch, self.total
        if self.real is not None:
            qkv = qkv.index_select(0, self.fill)
        seen = cache.blocks[layer].index_select(0, self.blocks).view(batch, -1, cache.width)[:, : total + self.nodes]
        seen[:, total:] = qkv[:, cache.first_key :].view(batch, self.nodes, -1)
        out = attend(qkv, seen, self.mask, cache)
        if self.real is not None:
            out = out.index_select(0, self.real)
        return out if scale is None else to_e4m3(out, scale)

    def keep(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Write the nodes `rows` (P,) int64 into the cache at `slots` (P,) int64, all layers at once."""
        self.pages.data.index_copy_(1, slots, torch.stack([new.index_select(0, rows) for new in self.new]))


class TreeRunner(Runner):
    """Runner whose decode step verifies a tree; prefill is the ordinary one."""

    def __init__(self, decoder: Decoder, cache: KVCache, *, max_batch_size: int, draft: TreeDraftModel) -> None:
        super().__init__(decoder, cache, max_batch_size=max_batch_size, draft=draft)
        self.tree_draft = draft

    @torch.inference_mode()
    def decode(self, seqs: list[Sequence]) -> list[Drawn]:
        if not self._speculates(seqs):
            return super().decode(seqs)
        self._settle()
        rows = self._ids([seq.row for seq in seqs])
        newest = self._ids([seq.tokens[-1] for seq in seqs])
        tree = self.tree_draft.propose_tree(self.hidden.index_select(0, rows), newest)
        nodes = tree.tokens.shape[1]
        starts = [len(seq.tokens) - 1 for seq in seqs]
        width = -(-(max(starts) + nodes) // self.cache.block_size)
        tables = [(seq.blocks + [NULL_BLOCK] * width)[:width] for seq in seqs]
        cached = self._ids(starts)
        sizes = tree.sizes.tolist() if self.device.type == "cpu" else [nodes] * len(seqs)
        batch = TreeBatch(self.cache, self._ids(tables), cached, max(starts), tree.sees, sizes)
        positions = batch.rows(cached[:, None] + tree.depths)
        hidden = self.decoder.forward(batch.rows(tree.tokens), positions, batch)
        raw = self.decoder.logits(hidden)  # (T, V)
        logits = raw
        if any(seq.request.penalised for seq in seqs):
            logits = self._penalised_nodes(seqs, raw, tree, batch.firsts)
        law = self._law(seqs, nodes)
        at_rows = sampler.draw(logits, law if batch.real is None else law.take(batch.real), positions + 1).tolist()
        drawn_at = [at_rows[first:end] for first, end in pairwise(batch.firsts)]
        paths = walk(tree, drawn_at)
        drawn, kept, slots, last = [], [], [], []
        for index, seq in enumerate(seqs):
            path = paths[index] if seq.request.speculate else [0]
            tokens = [drawn_at[index][node] for node in path]
            count, first = seq.request.logprobs, batch.firsts[index]
            logprobs: list[TokenLogprob] | None = None
            if count is not None:
                logprobs = [
                    sampler.logprobs_of(raw[first + node], token, count)
                    for node, token in zip(path, tokens, strict=True)
                ]
            room = path[: seq.max_len - starts[index]]  # positions past the request's end have no slot
            kept += [first + node for node in room]
            slots += self._slots(seq, starts[index], starts[index] + len(room))
            last.append(first + path[-1])
            drafted = self.tree_draft.num_draft_tok if seq.request.speculate else 0
            drawn.append(Drawn(seq=seq, tokens=tokens, logprobs=logprobs, drafted=drafted))
        batch.keep(self._ids(kept), self._ids(slots))
        self.hidden[rows] = hidden.index_select(0, self._ids(last))
        return drawn

    def _penalised_nodes(
        self, seqs: list[Sequence], logits: torch.Tensor, tree: Tree, firsts: list[int]
    ) -> torch.Tensor:
        """Logits of every node after the penalties for the tokens on its own path."""
        logits = logits.clone()
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        for index, seq in enumerate(seqs):
            if not seq.request.penalised:
                continue
            prompt, output = seq.tokens[: seq.num_prompt], seq.tokens[seq.num_prompt :]
            drafted: list[list[int]] = []
            for node in range(firsts[index + 1] - firsts[index]):
                parent = parents[index][node]
                drafted.append(drafted[parent] + [tokens[index][node]] if node and parent >= 0 else [])
                row = firsts[index] + node
                logits[row] = sampler.penalise(logits[row], seq.request, prompt, output + drafted[node])
        return logits
