"""Drafts drawn from the drafter's own law, verified by rejection (Leviathan et al. 2211.17192, Chen et al. 2302.01318).

    q  the drafter's law at a drafted position, at the request's temperature     x  the draft, drawn from q
    p  the target's law there, after penalties and filters

    x stands if u q(x) < p(x); otherwise a token is drawn from (p - q)+, normalised. Its law is p either way:
    min(p, q) comes from drafts that stand, the rest of p from those that do not.

Every position gets its token by itself: the draft or a replacement, which is never the draft again, since (p - q)+ is 0
where a draft fell. So the chain is followed while token and draft agree, as with deterministic drafts; the last
position has no draft, q = 0 there, and the token is a plain draw.

Three uniforms belong to a position: of the draft, of its test, and of the plain draw or replacement. Each takes part in
the choice of one emitted token at most, since what lies behind the first rejection is never looked at. Other than with
deterministic drafts the token at a position depends on whether it was drafted: sampled output is not that of plain
decoding, only its law is, and a seed fixes it as long as the steps are the same (preemption may change them). A greedy
row is greedy in both models.

Shapes: B sequences, n drafts each, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

import torch

from omr.engine.sampler import Law, filtered, invert, uniform
from omr.nn.argmax import argmax

DRAFT, TEST = 1 << 40, 2 << 40
"""Added to a position: the position of its second and third uniform."""


class SampledDrafts:
    """Draws the drafts of one step and keeps their law. Static shapes, no host synchronisation.

    `law` has a row per sequence, `starts` (B,) int64 is the position of its first draft, `follow` (B,) bool says whose
    drafts may stand, `draft_tokens` (D,) int64 which token a draft row is (None: D = V).
    """

    def __init__(
        self,
        law: Law,
        starts: torch.Tensor,
        follow: torch.Tensor,
        num_draft_tok: int,
        vocab_size: int,
        draft_tokens: torch.Tensor | None,
    ) -> None:
        self.law, self.starts, self.follow, self.draft_tokens = law, starts, follow, draft_tokens
        shape = (len(starts), num_draft_tok + 1)  # the last position is not drafted
        self.q = torch.zeros(*shape, vocab_size, device=starts.device)
        self.tokens = torch.full(shape, -1, dtype=torch.int64, device=starts.device)

    def choose(self, step: int, logits: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(B, D) draft logits of position starts + step -> (B,) int64 token ids. `rows` names a part of the batch."""
        law, seed, greedy, at = self.law.temperature, self.law.seed, self.law.greedy, self.starts + step
        if rows is not None:
            law, seed, greedy, at = law[rows], seed[rows], greedy[rows], at[rows]
        q = (logits.float() / law).softmax(-1)
        index = torch.where(greedy, argmax(logits), invert(q, uniform(seed, at + DRAFT)))
        tokens = index if self.draft_tokens is None else self.draft_tokens[index]
        everyone = slice(None) if rows is None else rows
        if self.draft_tokens is None:
            self.q[everyone, step] = q
        else:
            whole = torch.zeros(len(q), self.q.shape[-1], device=q.device)
            self.q[everyone, step] = whole.index_copy_(1, self.draft_tokens, q)
        self.tokens[everyone, step] = tokens
        return tokens

    def verify(self, logits: torch.Tensor, law: Law, positions: torch.Tensor) -> torch.Tensor:
        """As sampler.draw, for the B * (n + 1) rows of a step that verifies these drafts."""
        p = filtered((logits / law.temperature).softmax(-1), law)
        p = p / p.sum(-1, keepdim=True)
        q = (self.q * self.follow[:, None, None]).view(p.shape)
        drafts = torch.where(self.follow[:, None], self.tokens, -1).flatten()
        rest = (p - q).clamp_(min=0)
        x = drafts.clamp(min=0)[:, None]
        coin = uniform(law.seed, positions + TEST)
        stands = coin * q.gather(-1, x)[:, 0] < p.gather(-1, x)[:, 0]
        stands = (stands | (rest.sum(-1) <= 0)) & (drafts >= 0)  # nothing left: p and q are equal
        tokens = torch.where(stands, drafts, invert(rest, uniform(law.seed, positions)))
        return torch.where(law.greedy, argmax(logits), tokens)
