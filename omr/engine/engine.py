"""The engine: requests in, tokens out, one step at a time.

    engine.add(Request(id="a", prompt_ids=[1, 2, 3], max_tokens=20))
    while engine.num_unfinished:
        for output in engine.step():
            ...

A step is: schedule (which sequences, with blocks for them), run (the model, and the drafter when there is one), keep
(append tokens, stop, free). Nothing else happens between two steps, so `add` and `abort` may be called there, from
one thread.

What it promises. A request's tokens depend on the model, the prompt, the sampling fields and the seed alone, up to the
rounding of products over other batch shapes; not on batch mates, preemption, prefix reuse or speculation. Whatever
ends a request, its blocks are free again when the step or `abort` returns.
"""

from __future__ import annotations

import importlib.util
import random
import time

from omr.drafter import DraftModel
from omr.engine.blocks import BlockPool
from omr.engine.pace import Pace
from omr.engine.request import Output, Request, Sequence
from omr.engine.runner import Drawn, Runner
from omr.engine.scheduler import Prefill, Scheduler
from omr.errors import InputError
from omr.nn.decoder import Decoder
from omr.nn.paged import KVCache
from omr.nn.transformer import Transformer
from omr.server import SpecCounts

CUDA_PATIENCE = 8
"""Decode steps for which prompts are gathered (omr.engine.scheduler)."""


def _decoder(model: Transformer, num_positions: int) -> Decoder:
    """The decoder for the model's device: with Triton kernels on CUDA, in plain torch elsewhere."""
    if model.device.type == "cuda" and importlib.util.find_spec("triton"):
        from omr.nn.cuda_decoder import CudaDecoder

        return CudaDecoder(model, num_positions)
    return Decoder(model, num_positions)


class Engine:
    """See the module text.

    `kv_cache_tokens` is what the cache holds for all sequences together, in tokens. `context_tokens` is the longest
    sequence, prompt and output; it defaults to the smaller of the model's positions and the cache. `prefill_tokens`
    bounds the prompt tokens of one step. `draft` proposes tokens, None decodes plainly.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch_size: int = 16,
        kv_cache_tokens: int = 16384,
        block_size: int = 16,
        draft: DraftModel | None = None,
        context_tokens: int | None = None,
        prefill_tokens: int = 2048,
        prefix_caching: bool = True,
    ) -> None:
        config = model.config
        blocks = kv_cache_tokens // block_size
        if blocks < 1 or max_batch_size < 1:
            raise InputError(
                f"kv_cache_tokens {kv_cache_tokens} must hold a block of {block_size}, max_batch_size be >= 1"
            )
        limit = min(config.max_position_embeddings, blocks * block_size)
        if context_tokens is not None and context_tokens > limit:
            raise InputError(
                f"context_tokens {context_tokens} is over what the model's {config.max_position_embeddings} positions "
                f"and the cache of {blocks * block_size} tokens allow; lower it or raise kv_cache_tokens"
            )
        self.context_tokens = context_tokens or limit
        self.eos_token_ids = frozenset(config.eos_token_ids)
        self.vocab_size = config.vocab_size
        num_draft_tok = draft.num_draft_tok if draft else 0
        decoder = _decoder(model, self.context_tokens + num_draft_tok + 1)
        cache = KVCache(config, blocks + 1, block_size, decoder.device, decoder.dtype)
        self.pool = BlockPool(blocks + 1, block_size)
        self.scheduler = Scheduler(
            self.pool,
            max_batch_size=max_batch_size,
            prefill_tokens=prefill_tokens,
            num_draft_tok=num_draft_tok,
            prefix_caching=prefix_caching,
            patience=CUDA_PATIENCE if decoder.device.type == "cuda" else 1,
        )
        self.runner = self._runner(decoder, cache, max_batch_size, draft)
        # On CPU other programs must not be taken for slow steps; a GPU's time is not this thread's.
        clock = time.perf_counter if decoder.device.type == "cuda" else time.thread_time
        self.pace = Pace(num_draft_tok, clock) if draft and getattr(draft, "adaptive", False) else None
        self.counts = SpecCounts(accepted_per_pos=[0] * num_draft_tok, drafted_per_pos=[0] * num_draft_tok)
        self._seqs: dict[str, Sequence] = {}

    def _runner(self, decoder: Decoder, cache: KVCache, max_batch_size: int, draft: DraftModel | None) -> Runner:
        trees = hasattr(draft, "propose_tree")
        if type(decoder) is Decoder and not trees:
            return Runner(decoder, cache, max_batch_size=max_batch_size, draft=draft)
        if type(decoder) is Decoder:
            from omr.engine.tree import TreeRunner

            return TreeRunner(decoder, cache, max_batch_size=max_batch_size, draft=draft)
        if trees:
            from omr.engine.tree_graphs import TreeGraphRunner as OnGraphs
        else:
            from omr.engine.graphs import GraphRunner as OnGraphs
        return OnGraphs(decoder, cache, max_batch_size=max_batch_size, draft=draft, context_tokens=self.context_tokens)

    def warm_up(self) -> None:
        """Do now what the first requests would wait for: on CUDA, capture the graphs."""
        self.runner.warm_up()

    @property
    def num_unfinished(self) -> int:
        return len(self._seqs)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the cache's blocks that sequences hold, 0 to 1."""
        return 1 - self.pool.num_free / self.pool.capacity

    def add(self, request: Request) -> None:
        """Queue a request. Raises InputError for one that can never run."""
        if request.id in self._seqs:
            raise InputError(f"request id {request.id!r} is already in use")
        prompt = request.prompt_ids
        if len(prompt) >= self.context_tokens:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, the context of {self.context_tokens} leaves no room"
            )
        if not all(0 <= token < self.vocab_size for token in prompt):
            raise InputError(f"prompt_ids must be in 0..{self.vocab_size - 1}, the model's vocabulary")
        seed = random.SystemRandom().getrandbits(63) if request.seed is None else request.seed
        seed = (seed + 2**63) % 2**64 - 2**63
        max_len = min(len(prompt) + request.max_tokens, self.context_tokens)
        seq = self._seqs[request.id] = Sequence(request, seed, max_len)
        self.scheduler.waiting.append(seq)

    def abort(self, request_id: str) -> Output | None:
        """Drop a request and free what it holds; None when it is not (or no longer) here."""
        seq = self._seqs.pop(request_id, None)
        if seq is None:
            return None
        if seq.row >= 0:
            self.scheduler.release(seq)
        else:
            self.scheduler.waiting.remove(seq)
        return Output(id=request_id, token_ids=[], finish_reason="abort", num_cached_tokens=seq.num_cached)

    def step(self) -> list[Output]:
        """Run one step. Outputs of every request that got tokens; empty when there is nothing to do."""
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        if isinstance(plan, Prefill):
            drawn = self.runner.prefill(plan.chunks)
            for chunk in plan.chunks:
                chunk.seq.decoding = chunk.last
                self.scheduler.computed(chunk.seq, chunk.seq.num_computed + chunk.length)
        else:
            drawn = self._decode(plan.seqs)
        return [self._keep(one) for one in drawn]

    def _decode(self, seqs: list[Sequence]) -> list[Drawn]:
        draft = self.runner.draft
        if self.pace is None or draft is None or not any(seq.request.speculate for seq in seqs):
            return self.runner.decode(seqs)
        full, chosen = draft.num_draft_tok, self.pace.drafts(len(seqs))
        self.runner.speculate, draft.num_draft_tok = chosen > 0, chosen or full
        try:
            drawn = self.runner.decode(seqs)
        finally:
            draft.num_draft_tok = full
        self.pace.done([(one.drafted, len(one.tokens) - 1) for one in drawn])
        return drawn

    def _keep(self, drawn: Drawn) -> Output:
        """Append what was drawn up to the request's end, count acceptance, and free a finished sequence."""
        seq = drawn.seq
        request = seq.request
        if drawn.drafted:
            accepted = len(drawn.tokens) - 1
            self.counts.count(len(seq.tokens), drawn.drafted, accepted)
            seq.num_drafts += 1
            seq.num_draft_tokens += drawn.drafted
            seq.num_accepted_tokens += accepted
        tokens, reason, stopped_by = drawn.tokens[: seq.max_len - len(seq.tokens)], None, None
        for index, token in enumerate(tokens):
            if token in request.stop_token_ids or (token in self.eos_token_ids and not request.ignore_eos):
                tokens, reason, stopped_by = tokens[: index + 1], "stop", token
                break
        seq.tokens += tokens
        if reason is None and len(seq.tokens) >= seq.max_len:
            reason = "length"
        self.scheduler.computed(seq, len(seq.tokens) - 1)
        if reason is not None:
            del self._seqs[seq.id]
            self.scheduler.release(seq)
        return Output(
            id=seq.id,
            token_ids=tokens,
            logprobs=None if drawn.logprobs is None else drawn.logprobs[: len(tokens)],
            finish_reason=reason,
            stop_token_id=stopped_by,
            num_cached_tokens=seq.num_cached,
            num_drafts=seq.num_drafts,
            num_draft_tokens=seq.num_draft_tokens,
            num_accepted_tokens=seq.num_accepted_tokens,
        )
