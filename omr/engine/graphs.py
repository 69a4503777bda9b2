"""Decoding on CUDA: one graph replay a step.

A decode step of a small model is hundreds of kernels of a few microseconds, far faster to run than to launch. So for
each batch bucket (1, 2, 4, ... sequences) the whole step is captured once as a CUDA graph: drafting (when the drafter
works on hidden states), the forward over newest token and drafts, sampling, acceptance, and the hidden state for the
next draft. Inputs live in fixed tensors; rows beyond the batch belong to the null block. Per step the host writes two
integers per sequence, replays, and reads back the drawn tokens: the only synchronisation.

A drafter on the host is asked before. Only a few lengths have a graph, so drafts are filled up to the next of them; if
nothing was found the step is the plain graph.

Three graphs a bucket at most, by what the batch asks of the sampler: greedy, tempered (temperature alone), filtered
(top-k, top-p, min-p: sorts each row). They draw the same tokens where they overlap. Requests with penalties or
log-probabilities run the step without a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from omr.drafter import DraftModel
from omr.engine import sampler
from omr.engine.pace import lengths
from omr.engine.request import Sequence
from omr.engine.runner import Drawn, Runner, chains
from omr.engine.sampled import SampledDrafts
from omr.nn import kernels
from omr.nn.cuda_decoder import CudaDecoder, Grid
from omr.nn.paged import NULL_BLOCK, KVCache

KINDS = ("greedy", "tempered", "filtered")


def buckets(max_batch_size: int) -> list[int]:
    """Batch sizes that get a graph: powers of two, then the largest batch itself."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch_size:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == max_batch_size else [*sizes, max_batch_size]


@dataclass
class Inputs:
    """The step's input tensors, (B,) each unless said, B the largest bucket."""

    newest: torch.Tensor
    """(2, B) int64: token and position of each sequence's newest token."""
    tables: torch.Tensor
    """(B, W) int32."""
    row: torch.Tensor
    follow: torch.Tensor
    """int64, 1 where drafts may be followed."""
    seed: torch.Tensor
    top_k: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    drafts: torch.Tensor
    """(B, n) int64, from a drafter that works on the host."""

    @classmethod
    def empty(cls, batch: int, width: int, drafts: int, device: torch.device) -> Inputs:
        def ints(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def floats() -> torch.Tensor:
            return torch.zeros(batch, dtype=torch.float32, device=device)

        return cls(
            ints(2, batch), ints(batch, width, dtype=torch.int32), ints(batch), ints(batch), ints(batch), ints(batch),
            floats(), floats(), floats(), ints(batch, drafts),
        )  # fmt: skip


class GraphRunner(Runner):
    def __init__(
        self,
        decoder: CudaDecoder,
        cache: KVCache,
        *,
        max_batch_size: int,
        draft: DraftModel | None,
        context_tokens: int,
    ) -> None:
        # One row more: padding rows of a bucket write their hidden state there.
        super().__init__(decoder, cache, max_batch_size=max_batch_size + 1, draft=draft)
        self.scratch_row = max_batch_size
        self.buckets = buckets(max_batch_size)
        self.num_draft_tok = draft.num_draft_tok if draft else 0
        self.on_host = draft is not None and not draft.needs_hidden
        self.lengths = [self.num_draft_tok]
        """Numbers of drafts that have a graph."""
        if getattr(draft, "adaptive", False):
            self.lengths = lengths(self.num_draft_tok)
        elif self.on_host:
            self.lengths.append(0)  # for steps in which nothing is found
        self.width = (context_tokens + self.num_draft_tok) // cache.block_size + 1
        most = self.buckets[-1]
        self.inputs = Inputs.empty(most, self.width, self.num_draft_tok, self.device)
        self.inputs.top_k.fill_(self.vocab_size)
        self.inputs.top_p.fill_(1.0)
        self.drawn = torch.zeros(most, 2 + self.num_draft_tok, dtype=torch.int64, device=self.device)
        # Pinned copies on the host, safe to write to because every step ends with a read-back.
        self._newest = torch.zeros(2, most, dtype=torch.int64, pin_memory=True)
        self._tables = torch.zeros(most, self.width, dtype=torch.int32, pin_memory=True)
        self._newest_np, self._tables_np = self._newest.numpy(), self._tables.numpy()
        self._graphs: dict[tuple[int, str, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._members: list[int] = []
        self._num_blocks: list[int] = []

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture every graph that requests without filters can need, largest batch first."""
        for drafts in self.lengths:
            if self.draft is not None:
                self.draft.num_draft_tok = drafts or self.num_draft_tok
            for bucket in reversed(self.buckets):
                for kind in KINDS[:2]:
                    self._graph(bucket, kind, 1 + drafts)
        if self.draft is not None:
            self.draft.num_draft_tok = self.num_draft_tok

    @torch.inference_mode()
    def decode(self, seqs: list[Sequence]) -> list[Drawn]:
        if any(seq.request.penalised or seq.request.logprobs is not None for seq in seqs) or (
            self.on_host and self._samples_drafts(seqs)
        ):
            return super().decode(seqs)
        self._settle()
        sampled = [seq.request for seq in seqs if seq.request.temperature > 0]
        kind = KINDS[0] if not sampled else KINDS[2] if any(r.filtered for r in sampled) else KINDS[1]
        new, drafted, found = 1, None, [0] * len(seqs)
        if self._speculates(seqs):
            if self.on_host:
                drafts, _ = self._propose(seqs, self._ids([seq.tokens[-1] for seq in seqs]))
                drafted, found = chains(seqs, drafts)
                new = 1 + min(length for length in self.lengths if length >= len(drafted[0]))
            else:
                new = 1 + self.draft.num_draft_tok
                found = [new - 1 if seq.request.speculate else 0 for seq in seqs]
        bucket = next(size for size in self.buckets if size >= len(seqs))
        graph = self._graph(bucket, kind, new)
        self._upload(seqs, bucket)
        if new > 1 and drafted is not None:
            self.inputs.drafts[: len(seqs), : len(drafted[0])] = self._ids(drafted)
        graph.replay()
        drawn = []
        for seq, row, drafts in zip(seqs, self.drawn[: len(seqs)].tolist(), found, strict=True):
            agreed = min(row[-1], drafts)  # what fills up a draft may agree by chance
            drawn.append(Drawn(seq=seq, tokens=row[: agreed + 1], drafted=drafts))
        return drawn

    def _upload(self, seqs: list[Sequence], bucket: int) -> None:
        """Bring the inputs up to date: the newest tokens always, the rest when the batch or its blocks changed."""
        members = [seq.admission for seq in seqs]
        num_blocks = [len(seq.blocks) for seq in seqs]
        inputs, pad = self.inputs, bucket - len(seqs)
        if members != self._members:
            requests = [seq.request for seq in seqs]
            for tensor, values, filler in (
                (inputs.row, [seq.row for seq in seqs], self.scratch_row),
                (inputs.follow, [int(r.speculate) for r in requests], 0),
                (inputs.seed, [seq.seed for seq in seqs], 0),
                (inputs.top_k, [min(r.top_k or self.vocab_size, self.vocab_size) for r in requests], self.vocab_size),
                (inputs.temperature, [r.temperature for r in requests], 0.0),
                (inputs.top_p, [r.top_p for r in requests], 1.0),
                (inputs.min_p, [r.min_p for r in requests], 0.0),
            ):
                tensor[:bucket] = torch.tensor(values + [filler] * pad, dtype=tensor.dtype)
            self._tables_np[:bucket] = NULL_BLOCK
            self._num_blocks = [0] * len(seqs)
        if num_blocks != self._num_blocks:
            for index, (seq, known) in enumerate(zip(seqs, self._num_blocks, strict=True)):
                if len(seq.blocks) != known:
                    self._tables_np[index, known : len(seq.blocks)] = seq.blocks[known:]
            inputs.tables[:bucket].copy_(self._tables[:bucket], non_blocking=True)
        self._members, self._num_blocks = members, num_blocks
        self._newest_np[0, :bucket] = [seq.tokens[-1] for seq in seqs] + [0] * pad
        self._newest_np[1, :bucket] = [len(seq.tokens) - 1 for seq in seqs] + [0] * pad
        inputs.newest.copy_(self._newest, non_blocking=True)

    def _graph(self, bucket: int, kind: str, new: int) -> torch.cuda.CUDAGraph:
        key = (bucket, kind, new)
        graph = self._graphs.get(key)
        if graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Padding rows alone: nothing of a live sequence is written while warming up.
            self._members = []
            self.inputs.newest.zero_()
            self.inputs.tables.zero_()
            self.inputs.row.fill_(self.scratch_row)
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step(bucket, kind, new)
            torch.cuda.current_stream().wait_stream(stream)
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._step(bucket, kind, new)
        return graph

    def _step(self, bucket: int, kind: str, new: int) -> None:
        """What the graph holds. Reads `inputs`, writes `drawn`, `hidden` and the cache."""
        inputs, cache = self.inputs, self.cache
        tokens, starts = inputs.newest[0, :bucket], inputs.newest[1, :bucket]
        tables, row = inputs.tables[:bucket], inputs.row[:bucket]
        drafts, draw = None, sampler.draw
        if new > 1:
            drafts = inputs.drafts[:bucket, : new - 1]
            if self.draft.needs_hidden:
                propose = self.draft.propose
                if getattr(self.draft, "sampled", False) and kind != KINDS[0]:
                    law, follow = self._law_of(bucket, kind, 1), inputs.follow[:bucket] > 0
                    drafted = SampledDrafts(law, starts + 1, follow, new - 1, self.vocab_size, self.draft.draft_tokens)
                    propose, draw = partial(self.draft.propose_sampled, choose=drafted.choose), drafted.verify
                drafts = propose(self.hidden.index_select(0, row), tokens, None)
            tokens = torch.cat([tokens[:, None], drafts], 1).flatten()
        positions, slots = kernels.place(starts, tables, new, cache.block_size)
        batch = Grid(cache=cache, tables=tables, starts=starts, slots=slots, new=new)
        hidden = self.decoder.forward(tokens, positions, batch)
        logits = self.decoder.logits(hidden)
        drawn = draw(logits, self._law_of(bucket, kind, new), positions + 1).view(bucket, new)
        self.drawn[:bucket, :new] = drawn
        agreed = torch.zeros_like(row)
        if drafts is not None:
            agreed = (drawn[:, :-1] == drafts).long().cumprod(1).sum(1) * inputs.follow[:bucket]
        self.drawn[:bucket, -1] = agreed
        if self.draft is not None:
            last = torch.arange(bucket, device=self.device) * new + agreed
            self.hidden.index_copy_(0, row, hidden.index_select(0, last))

    def _law_of(self, bucket: int, kind: str, new: int) -> sampler.Law:
        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:bucket, None].expand(-1, new).reshape(-1)

        inputs = self.inputs
        greedy = rows(inputs.temperature) == 0
        filtered = kind == KINDS[2]
        return sampler.Law(
            temperature=torch.where(greedy, 1.0, rows(inputs.temperature))[:, None],
            greedy=greedy,
            top_k=rows(inputs.top_k)[:, None],
            top_p=rows(inputs.top_p)[:, None],
            min_p=rows(inputs.min_p)[:, None],
            seed=rows(inputs.seed),
            all_greedy=kind == KINDS[0],
            any_greedy=True,
            any_min_p=filtered,
            max_top_k=self.vocab_size if filtered else 0,
            all_top_k=False,
            any_top_p=filtered,
        )
