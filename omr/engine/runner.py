"""Runs a step on the model: builds its tensors, calls the decoder, draws tokens, drafts and verifies.

This is the form that works on every device, one torch call after the other. `omr.engine.graphs` replays the decode step
as a CUDA graph and falls back to this one for requests with penalties or log-probabilities.

Speculation. The drafter proposes n tokens after each sequence's newest. One forward over newest + drafts gives logits
at 1 + n positions; the sampler draws the target's own token at each; drafts are followed while they agree. So a step
adds the agreed drafts and the first token drawn off their path, exactly the tokens that plain decoding would draw.
Keys and values of rejected drafts stay in the cache past the sequence's computed length and are written over when
their positions come. A step for which the drafter has nothing to propose is a plain one.

Shapes: B sequences, Q = 1 + n tokens each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from omr.drafter import NO_DRAFT, DraftModel
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
    """Draft tokens that were proposed for it and verified."""


def chains(seqs: list[Sequence], drafts: torch.Tensor) -> tuple[list[list[int]], list[int]]:
    """A drafter's proposal (B, n): B rows of token ids to verify, and how many of each were proposed for it.

    The rows are as long as the longest chain that may be followed, so empty when there is none. What fills up the
    others is some token: it takes part in the forward and nothing looks at what comes of it.
    """
    rows = drafts.tolist()
    found = [
        sum(token != NO_DRAFT for token in row) if seq.request.speculate else 0
        for seq, row in zip(seqs, rows, strict=True)
    ]
    longest = max(found)
    return [[max(token, 0) for token in row[:longest]] for row in rows], found


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
        drawn = self._draw(done, last, [[] for _ in done], [0] * len(done))
        return [Drawn(seq=seq, tokens=row[0], logprobs=row[1]) for seq, row in zip(done, drawn, strict=True)]

    @torch.inference_mode()
    def decode(self, seqs: list[Sequence]) -> list[Drawn]:
        """One step of decoding sequences: one new token each, or more where drafts agree."""
        newest = [seq.tokens[-1] for seq in seqs]
        drafted, found, sampled = [[] for _ in seqs], [0] * len(seqs), None
        if self._speculates(seqs):
            drafts, sampled = self._propose(seqs, self._ids(newest))
            drafted, found = chains(seqs, drafts)
        new = 1 + len(drafted[0])
        starts = [len(seq.tokens) - 1 for seq in seqs]
        longest = max(starts) + new - 1
        size = self.cache.block_size
        width = longest // size + 1
        positions = [p for start in starts for p in range(start, start + new)]
        tables = [(seq.blocks + [NULL_BLOCK] * (width - len(seq.blocks)))[:width] for seq in seqs]
        slots = [tables[row // new][p // size] * size + p % size for row, p in enumerate(positions)]
        tokens = newest if new == 1 else [t for n, row in zip(newest, drafted, strict=True) for t in (n, *row)]
        rows = len(positions)
        # One tensor for all four: making one costs as much as a product of a small model.
        ids = self._ids(tokens + positions + slots + [block for table in tables for block in table])
        tokens_, positions_, slots_, tables_ = ids.split([rows, rows, rows, len(seqs) * width])
        batch = Padded(self.cache, tables_.view(-1, width), positions_.view(-1, new), slots_, longest)
        hidden = self.decoder.forward(tokens_, positions_, batch)
        drawn, last = [], []
        for index, (row, logprobs) in enumerate(self._draw(seqs, hidden, drafted, found, sampled)):
            drawn.append(Drawn(seq=seqs[index], tokens=row, logprobs=logprobs, drafted=found[index]))
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
        drafted: list[list[int]],
        found: list[int],
        sampled: SampledDrafts | None = None,
    ) -> list[tuple[list[int], list[TokenLogprob] | None]]:
        """For each sequence the drawn tokens, cut after the first off its draft, and their log-probabilities.

        `drafted` are rows of one length n, of which the first `found` are followed; `hidden` (B * (1 + n), H).
        """
        new = 1 + len(drafted[0])
        raw = logits = self.decoder.logits(hidden)  # (B * Q, V)
        if any(seq.request.penalised for seq in seqs):
            logits = self._penalised(seqs, logits, drafted)
        law = self._law(seqs, new)
        positions = None
        if not law.all_greedy:
            positions = self._ids([len(seq.tokens) + i for seq in seqs for i in range(new)])
        draw = sampler.draw if sampled is None else sampled.verify
        tokens = draw(logits, law, positions).view(-1, new).tolist()
        result = []
        for index, (seq, row) in enumerate(zip(seqs, tokens, strict=True)):
            agreed = 0
            while agreed < found[index] and row[agreed] == drafted[index][agreed]:
                agreed += 1
            row = row[: agreed + 1]
            count = seq.request.logprobs
            logprobs = None
            if count is not None:
                logprobs = [sampler.logprobs_of(raw[index * new + i], token, count) for i, token in enumerate(row)]
            result.append((row, logprobs))
        return result

    def _penalised(self, seqs: list[Sequence], logits: torch.Tensor, drafted: list[list[int]]) -> torch.Tensor:
        logits, new = logits.clone(), 1 + len(drafted[0])
        for index, seq in enumerate(seqs):
            if not seq.request.penalised:
                continue
            prompt, output = seq.tokens[: seq.num_prompt], seq.tokens[seq.num_prompt :]
            for i in range(new):
                row = index * new + i
                logits[row] = sampler.penalise(logits[row], seq.request, prompt, output + drafted[index][:i])
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
