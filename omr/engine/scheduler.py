"""Which sequences run in the next step.

First come, first served. A step is either a prefill (whole prompts, or a chunk of one, up to a token budget) or a
decode of everything that runs. Prefill goes first, so that new requests join the batch at once, but not twice in a
row while others decode: a long queue of prompts then halves the speed of running requests instead of stopping them.
Where a prefill step has a price of its own (on CUDA it is launched kernel by kernel, decoding is one graph), prompts
that would be a small part of the batch are gathered for `patience` decode steps and prefilled together.

Blocks for a whole prompt are taken on admission, and for decoding as it grows. When none are free the youngest sequence
gives up its blocks and goes back to the head of the queue; prompt and output so far are prefilled again later. Its
tokens do not change: they depend on their logits, seed and position only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from omr.engine.blocks import ROOT, BlockPool
from omr.engine.request import Sequence


@dataclass(kw_only=True)
class Chunk:
    """Tokens num_computed .. num_computed + length of one sequence, to be prefilled."""

    seq: Sequence
    length: int

    @property
    def last(self) -> bool:
        """Whether it reaches the newest token, so that the step samples the next."""
        return self.seq.num_computed + self.length == len(self.seq.tokens)


@dataclass(kw_only=True)
class Prefill:
    chunks: list[Chunk]


@dataclass(kw_only=True)
class Decode:
    seqs: list[Sequence]


GROUP_SHARE = 8
"""Prompts are not kept waiting for company when they are one for every so many decoding sequences."""


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_size: int,
        prefill_tokens: int,
        num_draft_tok: int,
        prefix_caching: bool,
        patience: int = 1,
    ) -> None:
        self.pool = pool
        self.prefill_tokens = prefill_tokens
        self.num_draft_tok = num_draft_tok
        self.prefix_caching = prefix_caching
        self.patience = patience
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission."""
        self._rows = list(range(max_batch_size - 1, -1, -1))
        self._decodes = 0
        """Decode steps since the last prefill."""
        self._admissions = 0
        self.num_preempted = 0

    def schedule(self) -> Prefill | Decode | None:
        """The next step's work, with blocks for all of it; None when there is nothing to do."""
        decoding = [seq for seq in self.running if seq.decoding]
        if not decoding or self._prefill_is_due(len(decoding)):
            chunks = self._prefill_chunks()
            if chunks:
                self._decodes = 0
                return Prefill(chunks=chunks)
        self._decodes += 1
        self._grow(decoding)
        decoding = [seq for seq in decoding if seq.row >= 0]
        if decoding:
            return Decode(seqs=decoding)
        chunks = self._prefill_chunks()
        return Prefill(chunks=chunks) if chunks else None

    def _prefill_is_due(self, num_decoding: int) -> bool:
        """Whether decoding sequences should now wait for a prefill step, if there is anything to prefill."""
        if self._decodes == 0:
            return False
        begun = len(self.running) > num_decoding
        joining = min(len(self.waiting), len(self._rows))
        return begun or self._decodes >= self.patience or joining * GROUP_SHARE >= num_decoding

    def _prefill_chunks(self) -> list[Chunk]:
        budget, chunks = self.prefill_tokens, []
        for seq in self.running:
            if not seq.decoding and budget:
                chunks.append(Chunk(seq=seq, length=min(budget, len(seq.tokens) - seq.num_computed)))
                budget -= chunks[-1].length
        while self.waiting and self._rows and budget:
            seq = self.waiting[0]
            shared, names = self.pool.match(seq.tokens) if self.prefix_caching else ([], [])
            self.pool.share(shared)
            missing = self.pool.blocks_for(len(seq.tokens)) - len(shared)
            if missing > self.pool.num_free:
                self.pool.release(shared)
                break
            self.waiting.popleft()
            seq.blocks, seq.block_keys = shared + self.pool.take(missing), names
            seq.num_computed = len(shared) * self.pool.block_size
            seq.num_cached = min(seq.num_computed, seq.num_prompt)
            seq.row = self._rows.pop()
            self._admissions += 1
            seq.admission = self._admissions
            self.running.append(seq)
            chunks.append(Chunk(seq=seq, length=min(budget, len(seq.tokens) - seq.num_computed)))
            budget -= chunks[-1].length
        return chunks

    def _grow(self, decoding: list[Sequence]) -> None:
        """Blocks for every decoding sequence's newest token and drafts, preempting from the youngest."""
        for seq in decoding:
            if seq.row < 0:
                continue
            wanted = self.pool.blocks_for(min(len(seq.tokens) + self.num_draft_tok, seq.max_len)) - len(seq.blocks)
            while wanted > self.pool.num_free and seq.row >= 0:
                self._preempt(self.running[-1])
            if wanted > 0 and seq.row >= 0:
                seq.blocks += self.pool.take(wanted)

    def _preempt(self, seq: Sequence) -> None:
        self.release(seq)
        self.num_preempted += 1
        self.waiting.appendleft(seq)

    def release(self, seq: Sequence) -> None:
        """Take a running sequence out and free all it holds."""
        self.running.remove(seq)
        self._rows.append(seq.row)
        self.pool.release(seq.blocks)
        seq.blocks, seq.block_keys, seq.num_computed, seq.row, seq.decoding = [], [], 0, -1, False

    def computed(self, seq: Sequence, num_computed: int) -> None:
        """Record that keys and values of the first `num_computed` tokens are in the cache, and name full blocks."""
        seq.num_computed = num_computed
        size = self.pool.block_size
        while self.prefix_caching and (len(seq.block_keys) + 1) * size <= num_computed:
            index = len(seq.block_keys)
            before = seq.block_keys[-1] if index else ROOT
            seq.block_keys.append(
                self.pool.name(seq.blocks[index], before, seq.tokens[index * size : (index + 1) * size])
            )
