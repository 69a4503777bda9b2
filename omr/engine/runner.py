"""Runs a step on the model: builds its tensors, calls the decoder, draws tokens, drafts and verifies.

This is the form that works on every device, one torch call after the other. `omr.engine.graphs` replays the decode step
as a CUDA graph and falls back to this one for requests with penalties or log-probabilities.

Speculation. The drafter proposes n tokens after each sequence's newest. One forward over newest + drafts gives logits
at 1 + n positions; the sampler draws the target's own token at each; drafts are followed while they agree. So a step
adds the agreed drafts and the first token drawn off their path, exactly the tokens that plain decoding would draw.
Keys and values of rejected drafts stay in the cache past the sequence's computed length and are written over when
their positions come.

Shapes: B sequences, Q = 1 + n tokens each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from omr.drafter import DraftModel
from omr.engine import sampler
from omr.engine.request import Sequence, TokenLogprob
from omr.engine.sampled import SampledDrafts
from omr.engine.scheduler import Chunk
from omr.nn.decoder import Decoder
from omr.nn.paged import NULL_BLOCK, KVCache, Padded, Part, Ragged


@dataclass(kw_only=True)
class Drawn:
    """What a step drew for one sequence."""

    seq: Sequence
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    drafted: int = 0
    """Draft tokens verified for it."""


class Runner:
    def __init__(self, decoder: Decoder, cache: KVCache, *, max_batch_size: int, draft: DraftModel | None) -> None:
        self.decoder, self.cache, self.draft = decoder, cache, draft
        self.device = decoder.device
        self.vocab_size = decoder.config.vocab_size
        self.speculate = True
        """False decodes the next steps plainly. Tokens are the same either way."""
        # Final-norm state at the position that predicted each row's newest token; the drafter starts from it.
        self.hidden = torch.zeros(max_batch_size, decoder.config.hidden_size, dtype=decoder.dtype, device=self.device)
        self._late: tuple[list[int], torch.Tensor] | None = None
        """Rows and states of the last plain step, put into `hidden` by `_settle` when somebody is about to use it."""
        self._laws: dict[int, tuple[list[int], sampler.Law]] = {}

    def warm_up(self) -> None:
        """Nothing to do here."""

    @torch.inference_mode()
    def prefill(self, chunks: list[Chunk]) -> list[Drawn]:
        """Compute the chunks' keys and values; a first token for every sequence whose prefill is now complete."""
        tokens: list[int] = []
        positions: list[int] = []
        parts, done, rows = [], [], []
        for chunk in chunks:
            seq, start = chunk.seq, chunk.seq.num_computed
            end = start + chunk.length
            parts.append(Part(length=chunk.length, slots=self._slots(seq, 0, end)))
            tokens += seq.tokens[start:end]
            positions += range(start, end)
            if chunk.last:
                done.append(seq)
                rows.append(len(tokens) - 1)
        hidden = self.decoder.forward(self._ids(tokens), self._ids(positions), Ragged(self.cache, parts))
        if not done:
            return []
        last = hidden.index_select(0, self._ids(rows))
        self._settle()
        self.hidden[self._ids([seq.row for seq in done])] = last
        drawn = self._draw(done, last, 1, None)
        return [Drawn(seq=seq, tokens=row[0], logprobs=row[1]) for seq, row in zip(done, drawn, strict=True)]

    @torch.inference_mode()
    def decode(self, seqs: list[Sequence]) -> list[Drawn]:
        """One step of decoding sequences: one new token each, or more where drafts agree."""
        newest = [seq.tokens[-1] for seq in seqs]
        drafts, sampled = self._propose(seqs, self._ids(newest)) if self._speculates(seqs) else (None, None)
        new = 1 if drafts is None else 1 + drafts.shape[1]
        drafted = None if drafts is None else drafts.tolist()
        starts = [len(seq.tokens) - 1 for seq in seqs]
        longest = max(starts) + new - 1
        size = self.cache.block_size
        width = longest // size + 1
        positions = [p for start in starts for p in range(start, start + new)]
        tables = [(seq.blocks + [NULL_BLOCK] * (width - len(seq.blocks)))[:width] for seq in seqs]
        slots = [tables[row // new][p // size] * size + p % size for row, p in enumerate(positions)]
        tokens = newest if drafted is None else [t for n, row in zip(newest, drafted, strict=True) for t in (n, *row)]
        rows = len(positions)
        # One tensor for all four: making one costs as much as a product of a small model.
        ids = self._ids(tokens + positions + slots + [block for table in tables for block in table])
        tokens_, positions_, slots_, tables_ = ids.split([rows, rows, rows, len(seqs) * width])
        batch = Padded(self.cache, tables_.view(-1, width), positions_.view(-1, new), slots_, longest)
        hidden = self.decoder.forward(tokens_, positions_, batch)
        drawn, last = [], []
        for index, (row, logprobs) in enumerate(self._draw(seqs, hidden, new, drafted, sampled)):
            seq = seqs[index]
            count = 0 if drafts is None or not seq.request.speculate else new - 1
            drawn.append(Drawn(seq=seq, tokens=row, logprobs=logprobs, drafted=count))
            last.append(index * new + len(row) - 1)
        if self.draft is not None and self.draft.needs_hidden:
            states = hidden if new == 1 else hidden.index_select(0, self._ids(last))
            self._late = [seq.row for seq in seqs], states
        return drawn

    def _settle(self) -> None:
        """Bring `hidden` up to date. Whoever reads it, or writes rows that may have changed hands, calls this first."""
        if self._late is not None:
            rows, states = self._late
            self._late = None
            self.hidden.index_copy_(0, self._ids(rows), states)

    def _speculates(self, seqs: list[Sequence]) -> bool:
        return self.draft is not None and self.speculate and any(seq.request.speculate for seq in seqs)

    def _propose(self, seqs: list[Sequence], newest: torch.Tensor) -> tuple[torch.Tensor, SampledDrafts | None]:
        """Drafts (B, n) int64, and what verifies them if they were drawn from the drafter's law."""
        draft, hidden, history = self.draft, None, None
        if draft.needs_hidden:
            rows = [seq.row for seq in seqs]
            if self._late is not None and self._late[0] == rows:
                hidden = self._late[1]  # the last step's states, which nobody else needs
            else:
                self._settle()
                hidden = self.hidden.index_select(0, self._ids(rows))
        else:
            history = [seq.tokens for seq in seqs]
        if not self._samples_drafts(seqs):
            return draft.propose(hidden, newest, history), None
        starts = self._ids([len(seq.tokens) for seq in seqs])
        follow = torch.tensor([seq.request.speculate for seq in seqs], device=self.device)
        law = self._law(seqs, 1)
        sampled = SampledDrafts(law, starts, follow, draft.num_draft_tok, self.vocab_size, draft.draft_tokens)
        return draft.propose_sampled(hidden, newest, history, sampled.choose), sampled

    def _samples_drafts(self, seqs: list[Sequence]) -> bool:
        return getattr(self.draft, "sampled", False) and any(seq.request.temperature > 0 for seq in seqs)

    def _draw(
        self,
        seqs: list[Sequence],
        hidden: torch.Tensor,
        new: int,
        drafted: list[list[int]] | None,
        sampled: SampledDrafts | None = None,
    ) -> list[tuple[list[int], list[TokenLogprob] | None]]:
        """For each sequence the drawn tokens, cut after the first off its draft, and their log-probabilities."""
        raw = logits = self.decoder.logits(hidden)  # (B * Q, V)
        if any(seq.request.penalised for seq in seqs):
            logits = self._penalised(seqs, logits, new, drafted)
        law = self._law(seqs, new)
        positions = None
        if not law.all_greedy:
            positions = self._ids([len(seq.tokens) + i for seq in seqs for i in range(new)])
        draw = sampler.draw if sampled is None else sampled.verify
        tokens = draw(logits, law, positions).view(-1, new).tolist()
        result = []
        for index, (seq, row) in enumerate(zip(seqs, tokens, strict=True)):
            agreed = 0
            if drafted is not None and seq.request.speculate:
                while agreed < new - 1 and row[agreed] == drafted[index][agreed]:
                    agreed += 1
            row = row[: agreed + 1]
            count = seq.request.logprobs
            logprobs = None
            if count is not None:
                logprobs = [sampler.logprobs_of(raw[index * new + i], token, count) for i, token in enumerate(row)]
            result.append((row, logprobs))
        return result

    def _penalised(
        self, seqs: list[Sequence], logits: torch.Tensor, new: int, drafted: list[list[int]] | None
    ) -> torch.Tensor:
        logits = logits.clone()
        for index, seq in enumerate(seqs):
            if not seq.request.penalised:
                continue
            prompt, output = seq.tokens[: seq.num_prompt], seq.tokens[seq.num_prompt :]
            for i in range(new):
                before = output + (drafted[index][:i] if drafted else [])
                row = index * new + i
                logits[row] = sampler.penalise(logits[row], seq.request, prompt, before)
        return logits

    def _law(self, seqs: list[Sequence], new: int) -> sampler.Law:
        """The batch's Law, built again only when its members change."""
        members = [seq.admission for seq in seqs]
        known = self._laws.get(new)
        if known is None or known[0] != members:
            known = self._laws[new] = (members, sampler.Law.of(seqs, new, self.vocab_size, self.device))
        return known[1]

    def _slots(self, seq: Sequence, start: int, end: int) -> list[int]:
        size = self.cache.block_size
        return [seq.blocks[p // size] * size + p % size for p in range(start, end)]

    def _ids(self, values: Seq[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
