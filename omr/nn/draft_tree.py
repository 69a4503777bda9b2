"""Beam search with a ReDrafter head, and beams packed into a prefix tree for one verification pass.

    legend   B batch   W beams   L tokens per beam: the newest token y_0, then L - 1 drafts   N nodes
             V, H, D as in omr.nn.redrafter

Beam search is Apple's: draft logits minus their maximum, all but the 50 best masked, cumulative log-probability, the
top W of W * V per step, no length penalty, no end-of-text handling. The first step expands one beam only.

Beams share prefixes, and a shared prefix is verified once. Packing keeps of every beam what no earlier beam has:

    beams   7 1 2 3        nodes    0  1  2  3  4  5          example of one row; node 0 is always y_0
            7 1 2 4        token    7  1  2  3  4  5
            7 5 1 1        parent  -1  0  1  2  2  0  ...
                           depth    0  1  2  3  3  1

A node's parent comes before it, so a node list is also a valid order to write into the KV cache. Verification is exact
for any tree that was built without looking at the target's randomness: at each node the target draws its own token, and
the walk goes on while that token is a child (the naive tree sampling of SpecInfer, arXiv 2305.09781). So the drafter's
probabilities are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omr.nn.redrafter import Redrafter

KEPT_LOGITS = 50
"""Tokens that one step of the beam search can choose from, as in the reference."""


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) draft logits -> log-probabilities and ids of the KEPT_LOGITS best, in order, among themselves.

    The reference masks the other logits with -50000 and normalises over all D, which differs by rounding, and by
    ties with the last one kept; here nothing of size D is computed after the selection.
    """
    best = logits.float().topk(min(KEPT_LOGITS, logits.shape[-1]), dim=-1)
    return best.values.log_softmax(-1), best.indices


@dataclass
class Beams:
    tokens: Tensor  # (B, W, L) int64
    log_prob: Tensor  # (B, W) float32, descending
    token_log_probs: Tensor  # (B, W, L - 1) float32


def beam_search(
    drafter: Redrafter, context: Tensor, tokens: Tensor, embedding: Tensor, width: int, length: int
) -> Beams:
    """(B, H) context, (B,) newest tokens, (V, H) embedding table -> the `width` best beams of `length` tokens."""
    state = drafter.first_state(context)[:, None]

    def step(parent: Tensor | None, newest: Tensor) -> Tensor:
        nonlocal state
        if parent is not None:
            state = state.gather(1, parent[:, :, None].expand(-1, -1, state.shape[-1]))
        state = drafter.advance(state, drafter.embed_term(F.embedding(newest, embedding).to(state.dtype)))
        return drafter.logits(context[:, None].expand(-1, newest.shape[1], -1), state)

    return search(step, tokens, drafter.draft_tokens, width, length)


def search(
    step: Callable[[Tensor | None, Tensor], Tensor],
    tokens: Tensor,
    draft_tokens: Tensor | None,
    width: int,
    length: int,
) -> Beams:
    """The `width` best beams of `length` tokens from (B,) newest tokens.

    `step(parent, newest)` makes the states of (B, beams) new tokens from those of the last step's beams `parent` (B,
    beams), None at first, and returns their logits (B, beams, D); `draft_tokens` (D,) int64 are the tokens of these,
    None when D is V. Static shapes, no host synchronisation. Scores are taken over each beam's KEPT_LOGITS best tokens,
    never over all of W * V: nothing outside them can win while width <= KEPT_LOGITS.
    """
    assert 1 <= width <= KEPT_LOGITS, f"beam search keeps {KEPT_LOGITS} tokens a step, got {width} beams"
    newest, parent = tokens[:, None], None
    scores = torch.zeros(len(tokens), 1, device=tokens.device)
    taken: list[tuple[Tensor, Tensor, Tensor]] = []  # of each step: parent, token and its log-probability, (B, W) each
    for _ in range(length - 1):
        values, indices = best_tokens(step(parent, newest))
        values, indices = values[..., :width], indices[..., :width]  # (B, beams, width)
        scores, index = (scores[:, :, None] + values).flatten(1).topk(width, dim=-1)
        parent = index // values.shape[-1]
        newest = indices.flatten(1).gather(1, index)
        if draft_tokens is not None:
            newest = draft_tokens[newest]
        taken.append((parent, newest, values.flatten(1).gather(1, index)))
    beams, log_probs = [], []
    at = torch.arange(width, device=tokens.device).expand(len(tokens), -1)
    for parent, token, log_prob in reversed(taken):
        beams.append(token.gather(1, at))
        log_probs.append(log_prob.gather(1, at))
        at = parent.gather(1, at)
    first = tokens[:, None].expand(-1, width)
    if not taken:
        return Beams(first[..., None], scores, scores.new_zeros(len(tokens), width, 0))
    return Beams(torch.stack([first, *beams[::-1]], -1), scores, torch.stack(log_probs[::-1], -1))


@dataclass
class Tree:
    """Prefix trees of a batch. Columns at or past `sizes[b]` are filler: token and parent of node 0, seen by nobody."""

    tokens: Tensor  # (B, N) int64
    parents: Tensor  # (B, N) int64, -1 at the root
    depths: Tensor  # (B, N) int64
    sees: Tensor  # (B, N, N) bool: a node sees itself and its ancestors
    sizes: Tensor  # (B,) int64
    unpacker: Tensor  # (B, W, L) int64: tokens[unpacker] == beams

    def cut(self, nodes: int) -> Tree:
        """The first `nodes` columns, which must hold every real node."""
        return Tree(
            self.tokens[:, :nodes],
            self.parents[:, :nodes],
            self.depths[:, :nodes],
            self.sees[:, :nodes, :nodes],
            self.sizes,
            self.unpacker,
        )


def pack(beams: Tensor, max_nodes: int | None = None) -> Tree:
    """Merge equal prefixes of beams (B, W, L). `max_nodes` bounds the nodes; W * L by default, always enough.

    Nodes are taken beam by beam, so with a bound the last beams lose their tails first; `unpacker` then is -1 there.
    Static shapes, no host synchronisation.
    """
    batch, width, length = beams.shape
    device = beams.device
    n = max_nodes if max_nodes is not None else width * length
    same = (beams[:, :, None] == beams[:, None]).cummin(-1).values  # (B, W, W, L): equal up to and including l
    owner = same.to(torch.uint8).argmax(2)  # (B, W, L): lowest beam with the same prefix
    beam = torch.arange(width, device=device)[:, None]
    own = owner == beam
    rank = own.flatten(1).cumsum(1).view(batch, width, length) - 1  # node number where own
    node = rank.gather(1, owner)  # (B, W, L): node of every beam token
    sizes = (rank[:, -1, -1] + 1).clamp(max=n)
    kept = own & (node < n)
    slot = torch.where(kept, node, n).flatten(1)  # what is not kept goes to a column that is cut off

    def scatter(values: Tensor, filler: Tensor) -> Tensor:
        out = filler.expand(batch, n + 1).clone()
        return out.scatter_(1, slot, values.expand(batch, width, length).flatten(1))[:, :n]

    above = F.pad(node[:, :, :-1], (1, 0), value=-1)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    tokens = scatter(beams, beams[:, 0, :1])
    parents = scatter(above, zero)
    depths = scatter(torch.arange(length, device=device), zero + 1)
    # A node (w, l) sees node[w, 0 .. l]: one row per beam token, then scattered to its node.
    ancestors = F.one_hot(node.clamp(max=n), n + 1).cumsum(2).bool()  # (B, W, L, n + 1)
    sees = torch.zeros(batch, n + 1, n + 1, dtype=torch.bool, device=device)
    sees.scatter_(1, slot[:, :, None].expand(-1, -1, n + 1), ancestors.flatten(1, 2))
    sees = sees[:, :n, :n] | torch.eye(n, dtype=torch.bool, device=device)
    return Tree(tokens, parents, depths, sees, sizes, torch.where(node < n, node, -1))


def walk(tree: Tree, drawn: Sequence[Sequence[int]]) -> list[list[int]]:
    """The nodes that the target's own draws, one for each node of each row, lead through from the root.

    The tokens of the step are `drawn` at these nodes: their number is accepted drafts + 1.
    """
    paths = []
    columns = (tree.tokens.tolist(), tree.parents.tolist(), tree.sizes.tolist(), drawn)
    for tokens, parents, size, wanted in zip(*columns, strict=True):
        path = [0]
        for node in range(1, size):  # a node comes after its parent, so one pass meets the whole path
            if parents[node] == path[-1] and tokens[node] == wanted[path[-1]]:
                path.append(node)
        paths.append(path)
    return paths


def follow(tree: Tree, drawn: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """`walk` in tensors, without host synchronisation, for trees of at most `depth` drafts below the root.

    Returns the nodes of each path, (B, depth + 1) int64, its last one repeated to the end, and the number of drafts
    accepted, (B,) int64.
    """
    batch, nodes = drawn.shape
    real = torch.arange(nodes, device=drawn.device) < tree.sizes[:, None]
    at = torch.zeros(batch, 1, dtype=torch.int64, device=drawn.device)
    path, accepted = [at], torch.zeros_like(at)
    for _ in range(depth):
        child = (tree.parents == at) & (tree.tokens == drawn.gather(1, at)) & real
        found, node = child.to(torch.uint8).max(1, keepdim=True)
        at = torch.where(found > 0, node, at)
        accepted += found
        path.append(at)
    return torch.cat(path, 1), accepted[:, 0]
