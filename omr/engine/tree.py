"""Decoding with a drafter that proposes a tree: one forward verifies all nodes, the accepted path enters the cache.

    nodes  0 newest token, known     every node sees the sequence so far, its ancestors and itself (tree mask), and has
           1..N-1 drafts             position = sequence length - 1 + depth

At each node the target draws its own token, with the uniform of that token's position; the walk from the root goes on
while the drawn token is a child. So the step yields the tokens that plain decoding would draw, whatever was proposed.

The cache holds paths, not trees: keys and values of the nodes stay beside the cache during the forward, and those of
the accepted path alone are then written to the slots of their positions, for all layers in one copy. Rejected nodes
leave nothing behind and need no slots.

Shapes: B sequences, N nodes, L cached tokens of the longest, Hq, Hkv heads, D head_dim.
"""

from __future__ import annotations

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
    everything before its root; L is the greatest of them.
    """

    def __init__(
        self, cache: KVCache, tables: torch.Tensor, cached: torch.Tensor, longest: int, sees: torch.Tensor
    ) -> None:
        self.pages = cache
        self.cache = self  # the decoder stores keys and values here, not in the pages
        self.slots = sees.new_empty(0, dtype=torch.int64)
        self.batch, self.nodes = sees.shape[:2]
        self.total = longest
        self.blocks = tables.flatten()
        self.new: list[torch.Tensor] = []
        """Keys and values of the nodes, (B * N, 2 * Hkv * D) per layer."""
        before = torch.arange(self.total, device=sees.device) < cached[:, None]  # (B, L)
        seen = torch.cat([before[:, None].expand(-1, self.nodes, -1), sees], dim=-1)  # (B, N, L + N)
        mask = torch.zeros(seen.shape, dtype=cache.data.dtype, device=sees.device).masked_fill_(~seen, float("-inf"))
        self.mask = stacked(mask[:, None], cache.num_heads // cache.num_kv_heads)

    def store(self, layer: int, slots: torch.Tensor, qkv: torch.Tensor) -> None:
        """Hold the nodes' keys and values until the walk has chosen among them."""
        assert layer == len(self.new), (layer, len(self.new))
        self.new.append(qkv[:, self.pages.num_heads * self.pages.head_dim :])

    def attend(self, layer: int, qkv: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """qkv (B * N, (Hq + 2 Hkv) * D), rotated and stored -> (B * N, Hq * D); in E4M3 over `scale` if given."""
        cache, batch, total = self.pages, self.batch, self.total
        seen = cache.blocks[layer].index_select(0, self.blocks).view(batch, -1, cache.width)[:, : total + self.nodes]
        seen[:, total:] = self.new[layer].view(batch, self.nodes, -1)
        out = attend(qkv, seen, self.mask, cache)
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
        positions = cached[:, None] + tree.depths
        batch = TreeBatch(self.cache, self._ids(tables), cached, max(starts), tree.sees)
        hidden = self.decoder.forward(tree.tokens.flatten(), positions.flatten(), batch)
        raw = self.decoder.logits(hidden)  # (B * N, V)
        logits = raw
        if any(seq.request.penalised for seq in seqs):
            logits = self._penalised_nodes(seqs, raw, tree)
        drawn_at = sampler.draw(logits, self._law(seqs, nodes), positions.flatten() + 1).view(-1, nodes)
        paths, drawn_at = walk(tree, drawn_at), drawn_at.tolist()
        drawn, kept, slots, last = [], [], [], []
        for index, seq in enumerate(seqs):
            path = paths[index] if seq.request.speculate else [0]
            tokens = [drawn_at[index][node] for node in path]
            count = seq.request.logprobs
            logprobs: list[TokenLogprob] | None = None
            if count is not None:
                logprobs = [
                    sampler.logprobs_of(raw[index * nodes + node], token, count)
                    for node, token in zip(path, tokens, strict=True)
                ]
            room = path[: seq.max_len - starts[index]]  # positions past the request's end have no slot
            kept += [index * nodes + node for node in room]
            slots += self._slots(seq, starts[index], starts[index] + len(room))
            last.append(index * nodes + path[-1])
            drafted = self.tree_draft.num_draft_tok if seq.request.speculate else 0
            drawn.append(Drawn(seq=seq, tokens=tokens, logprobs=logprobs, drafted=drafted))
        batch.keep(self._ids(kept), self._ids(slots))
        self.hidden[rows] = hidden.index_select(0, self._ids(last))
        return drawn

    def _penalised_nodes(self, seqs: list[Sequence], logits: torch.Tensor, tree: Tree) -> torch.Tensor:
        """Logits of every node after the penalties for the tokens on its own path."""
        logits = logits.clone()
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        nodes = len(tokens[0])
        for index, seq in enumerate(seqs):
            if not seq.request.penalised:
                continue
            prompt, output = seq.tokens[: seq.num_prompt], seq.tokens[seq.num_prompt :]
            drafted: list[list[int]] = []
            for node in range(nodes):
                parent = parents[index][node]
                drafted.append(drafted[parent] + [tokens[index][node]] if node and parent >= 0 else [])
                row = index * nodes + node
                logits[row] = sampler.penalise(logits[row], seq.request, prompt, output + drafted[node])
        return logits
