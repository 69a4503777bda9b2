"""Drafters that other servers bring: options that carry their knobs there and have no side in the native engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omr.drafter import Drafter
from omr.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from omr.drafter import DraftModel
    from omr.nn.transformer import Transformer


@dataclass(kw_only=True)
class ElsewhereDrafter(Drafter):
    """Contract of drafters that run in another server than omr's own."""

    draft_tok: int = 3
    """Tokens drafted per step."""

    def __post_init__(self) -> None:
        if self.draft_tok < 1:
            raise ConfigError(f"drafter.draft_tok must be >= 1, got {self.draft_tok}; drafter=none drafts nothing")

    def load(self, folder: Path | None, base: Transformer) -> DraftModel | None:
        raise ConfigError(f"server=native cannot run drafter={self.option_name}; see `runs_drafter` of the servers")


@dataclass(kw_only=True)
class ModelDrafter(ElsewhereDrafter):
    """One that has weights, trained elsewhere."""

    model: str | None = None
    """A local folder or a Hugging Face model id; must be set before it is served."""

    def weights(self) -> str:
        """The drafter's folder or id. Raises ConfigError when none was named."""
        if not self.model:
            raise ConfigError(f"drafter={self.option_name} needs drafter.model: a folder or a Hugging Face id")
        return self.model
