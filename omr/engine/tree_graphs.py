"""Beam trees on CUDA: drafting, verification of the tree and the walk through it in one graph replay a step.

The step is that of omr.engine.tree in tensors of fixed shape: every tree has as many nodes as its beams could need, the
walk is done on the device, and the step yields the tokens along each path and the number of drafts on it, as a step
with chains does. The nodes' keys and values live in memory of the graph; those of the path are copied into the cache.

Requests with penalties or log-probabilities run without a graph, and there the drafter proposes a chain.
"""

from __future__ import annotations

import torch

from omr.engine import sampler
from omr.engine.graphs import GraphRunner
from omr.nn import kernels
from omr.nn.draft_tree import follow
from omr.nn.paged import KVCache


class TreeGrid:
    """What the nodes attend to: the cached tokens before the root, then each other as `sees` (B, N, N) says.

    `tables` (B, W) int32, `starts` (B,) int64 position of the root.
    """

    def __init__(self, cache: KVCache, tables: torch.Tensor, starts: torch.Tensor, sees: torch.Tensor) -> None:
        self.pages, self.tables, self.starts, self.sees = cache, tables, starts, sees
        batch, self.nodes = sees.shape[:2]
        self.cache = self  # the decoder stores keys and values here, not in the pages
        self.slots = torch.arange(batch * self.nodes, device=starts.device)
        self.data = cache.data.new_empty(len(cache.layers), batch * self.nodes, cache.width)
        self.layers = list(self.data)

    def attend(self, layer: int, qkv: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """qkv (B * N, (Hq + 2 Hkv) * D), rotated and stored -> (B * N, Hq * D); in E4M3 over `scale` if given."""
        pages = self.pages
        return kernels.paged_attention(
            qkv,
            pages.layers[layer],
            self.tables,
            self.starts,
            self.nodes,
            pages.num_heads,
            pages.num_kv_heads,
            pages.block_size,
            scale,
            tree=(self.layers[layer], self.sees),
        )

    def keep(self, path: torch.Tensor, accepted: torch.Tensor) -> None:
        """Write the root and the `accepted` (B,) nodes after it on each path (B, depth + 1) into the cache.

        What lies past them goes to the null block, as do positions past a sequence's last block.
        """
        size = self.pages.block_size
        steps = torch.arange(path.shape[1], device=path.device)
        positions = self.starts[:, None] + steps
        slots = self.tables.gather(1, positions // size) * size + positions % size
        slots = torch.where(steps <= accepted[:, None], slots, 0).flatten()
        rows = (torch.arange(len(path), device=path.device)[:, None] * self.nodes + path).flatten()
        self.pages.data.index_copy_(1, slots, self.data.index_select(1, rows))


class TreeGraphRunner(GraphRunner):
    def _step(self, bucket: int, kind: str, new: int) -> None:
        if new == 1:
            return super()._step(bucket, kind, new)
        inputs = self.inputs
        newest, starts = inputs.newest[0, :bucket], inputs.newest[1, :bucket]
        row = inputs.row[:bucket]
        tree = self.draft.propose_tree(self.hidden.index_select(0, row), newest)
        nodes = tree.tokens.shape[1]
        positions = (starts[:, None] + tree.depths).flatten()
        batch = TreeGrid(self.cache, inputs.tables[:bucket], starts, tree.sees)
        hidden = self.decoder.forward(tree.tokens.flatten(), positions, batch)
        logits = self.decoder.logits(hidden)
        drawn = sampler.draw(logits, self._law_of(bucket, kind, nodes), positions + 1).view(bucket, nodes)
        path, accepted = follow(tree, drawn, new - 1)
        accepted = accepted * inputs.follow[:bucket]
        batch.keep(path, accepted)
        self.drawn[:bucket, :new] = drawn.gather(1, path)
        self.drawn[:bucket, -1] = accepted
        last = path.gather(1, accepted[:, None]) + torch.arange(bucket, device=self.device)[:, None] * nodes
        self.hidden.index_copy_(0, row, hidden.index_select(0, last[:, 0]))
        return None
