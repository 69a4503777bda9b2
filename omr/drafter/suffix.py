"""Suffix decoding: drafts from a tree of everything generated so far, over all requests (arXiv 2411.04975)."""

from __future__ import annotations

from dataclasses import dataclass

from omr.drafter._elsewhere import ElsewhereDrafter
from omr.errors import ConfigError
from omr.option import option


@option("drafter", "suffix")
@dataclass(kw_only=True)
class Suffix(ElsewhereDrafter):
    """Served by vLLM, which drafts at most `draft_tok` tokens, fewer where it is less sure."""

    draft_tok: int = 24
    max_tree_depth: int = 24
    """Longest pattern remembered, in tokens."""
    max_spec_factor: float = 1.0
    """Drafted tokens per token of the matched pattern, at most."""
    min_token_prob: float = 0.1
    """Least estimated probability of a drafted token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tree_depth < 1 or self.max_spec_factor <= 0:
            raise ConfigError("drafter.max_tree_depth must be >= 1 and drafter.max_spec_factor > 0")
        if not 0 <= self.min_token_prob <= 1:
            raise ConfigError(f"drafter.min_token_prob must be in [0, 1], got {self.min_token_prob}")
