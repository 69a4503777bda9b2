"""The DraftModel of `draft_model`: a small model of the same vocabulary, run greedily a few tokens ahead.

It keeps a paged KV cache of its own. A sequence is known by the identity of its list of ids; what is cached for it is
compared with that list, so rejected drafts are computed again and accepted ones are not. A step is one forward over
what each sequence has gained since (ragged), then one per further draft (a token a sequence). When the cache is full
the sequences that were not drafted for longest are dropped; one that does not fit at all has no draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from omr.drafter import NO_DRAFT
from omr.errors import InputError
from omr.nn.argmax import argmax
from omr.nn.decoder import Decoder
from omr.nn.loader import load
from omr.nn.paged import NULL_BLOCK, KVCache, Padded, Part, Ragged
from omr.nn.transformer import Transformer

BLOCK_TOK = 16
History = Sequence[Sequence[int]] | None


@dataclass
class Lane:
    """One sequence: the tokens whose keys and values are cached, and the blocks that hold them."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    used: int = 0

    def slots(self, start: int, end: int) -> list[int]:
        return [self.blocks[p // BLOCK_TOK] * BLOCK_TOK + p % BLOCK_TOK for p in range(start, end)]


class SmallModelDraft:
    """See the module text."""

    needs_hidden = False
    adaptive = False
    sampled = False
    draft_tokens = None

    def __init__(self, folder: Path, base: Transformer, num_draft_tok: int, kv_cache_tokens: int) -> None:
        model = load(folder, device=str(base.device), dtype=base.dtype)
        if model.config.vocab_size != base.config.vocab_size:
            raise InputError(
                f"the draft model in {folder} has {model.config.vocab_size} tokens, the base has "
                f"{base.config.vocab_size}; a draft model must share the base's tokenizer"
            )
        self.num_draft_tok = num_draft_tok
        self.context = model.config.max_position_embeddings
        self.decoder = Decoder(model, self.context)
        blocks = -(-kv_cache_tokens // BLOCK_TOK)
        self.cache = KVCache(model.config, blocks + 1, BLOCK_TOK, self.decoder.device, self.decoder.dtype)
        self.free = list(range(blocks, NULL_BLOCK, -1))
        self.lanes: dict[int, Lane] = {}
        self.clock = 0

    def propose(self, hidden: Tensor | None, tokens: Tensor, history: History) -> Tensor:
        """See DraftModel. `history` ends with the newest token."""
        return self._draft(torch.full_like(tokens, NO_DRAFT), history, lambda step, logits, rows: argmax(logits))

    def propose_sampled(
        self, hidden: Tensor | None, tokens: Tensor, history: History, choose: Callable[..., Tensor]
    ) -> Tensor:
        """See SampledDraftModel. A sequence that does not fit drafts its newest token, repeated."""
        return self._draft(tokens, history, choose)

    @torch.inference_mode()
    def _draft(self, otherwise: Tensor, history: History, choose: Callable[..., Tensor]) -> Tensor:
        """Drafts (B, num_draft_tok) int64; of a sequence that does not fit its token of `otherwise` (B,)."""
        assert history is not None and len(history) == len(otherwise), "a draft model reads the history"
        self.clock += 1
        drafts = otherwise[:, None].repeat(1, self.num_draft_tok)
        fits = [(row, ids, lane) for row, ids in enumerate(history) if (lane := self._lane(ids)) is not None]
        if not fits:
            return drafts
        rows = self._ids([row for row, _, _ in fits])
        newest = choose(0, self._catch_up([(ids, lane) for _, ids, lane in fits]), rows)
        drafts[rows, 0] = newest
        for k in range(1, self.num_draft_tok):
            newest = choose(k, self._one_more([lane for _, _, lane in fits], newest), rows)
            drafts[rows, k] = newest
        return drafts

    def _lane(self, ids: Sequence[int]) -> Lane | None:
        """The lane of this sequence, cut to what still holds, with blocks for its tokens and drafts; None without."""
        lane = self.lanes.setdefault(id(ids), Lane())
        known = lane.tokens
        keep = min(len(known), len(ids) - 1)
        # Only drafts of the last step can be wrong, unless the list is another one at the same address.
        start = max(0, keep - 2 * self.num_draft_tok - 8)
        while keep > start and known[start:keep] != list(ids[start:keep]):
            keep -= 1
        if start and keep == start:
            keep = 0
        del known[keep:]
        length = len(ids) + self.num_draft_tok
        lane.used = self.clock
        missing = -(-length // BLOCK_TOK) - len(lane.blocks)
        while missing > len(self.free) and self._drop_oldest():
            pass
        if length > self.context or missing > len(self.free):
            self._drop(id(ids))
            return None
        lane.blocks += [self.free.pop() for _ in range(missing)]
        return lane

    def _drop_oldest(self) -> bool:
        idle = [key for key, lane in self.lanes.items() if lane.used < self.clock]
        if idle:
            self._drop(min(idle, key=lambda key: self.lanes[key].used))
        return bool(idle)

    def _drop(self, key: int) -> None:
        self.free += self.lanes.pop(key).blocks

    def _catch_up(self, sequences: list[tuple[Sequence[int], Lane]]) -> Tensor:
        """Cache what each sequence has gained; (B, V) the logits of the token that follows it."""
        tokens: list[int] = []
        positions: list[int] = []
        parts, last = [], []
        for ids, lane in sequences:
            done, end = len(lane.tokens), len(ids)
            parts.append(Part(length=end - done, slots=lane.slots(0, end)))
            tokens += ids[done:]
            positions += range(done, end)
            last.append(len(tokens) - 1)
            lane.tokens += ids[done:]
        hidden = self.decoder.forward(self._ids(tokens), self._ids(positions), Ragged(self.cache, parts))
        return self.decoder.logits(hidden.index_select(0, self._ids(last)))

    def _one_more(self, lanes: list[Lane], newest: Tensor) -> Tensor:
        """Cache one drafted token for each lane; (B, V) the logits of the next."""
        for lane, token in zip(lanes, newest.tolist(), strict=True):
            lane.tokens.append(token)
        at = [len(lane.tokens) - 1 for lane in lanes]
        width = max(at) // BLOCK_TOK + 1
        tables = [(lane.blocks + [NULL_BLOCK] * width)[:width] for lane in lanes]
        slots = [lane.slots(p, p + 1)[0] for lane, p in zip(lanes, at, strict=True)]
        positions = self._ids(at)
        batch = Padded(self.cache, self._ids(tables), positions[:, None], self._ids(slots), max(at))
        return self.decoder.logits(self.decoder.forward(newest, positions, batch))

    def _ids(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.cache.data.device)
