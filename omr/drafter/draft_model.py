"""A small model of the same vocabulary that drafts for the big one (arXiv 2211.17192).

The native engine runs it greedily, unless `sampled`: its chain is a deterministic proposal, so acceptance is the chance
that the target draws the small model's favourite, and the output is the target's own. vLLM, SGLang and TensorRT-LLM
have their own way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omr.drafter import check_sampled
from omr.drafter._elsewhere import ModelDrafter
from omr.errors import ConfigError, InputError
from omr.option import option

if TYPE_CHECKING:
    from omr.drafter import DraftModel
    from omr.nn.transformer import Transformer


@option("drafter", "draft_model")
@dataclass(kw_only=True)
class SmallModel(ModelDrafter):
    """Drafts with the model `model`."""

    kv_cache_tokens: int = field(default=32768, metadata={"content": False})
    """Tokens of all sequences together that the small model's cache holds, in the native engine."""
    adaptive: bool = field(default=True, metadata={"content": False})
    """Draft only while that is faster than plain decoding, as measured while serving; output is the same either way."""

    sampled: bool = field(default=False, metadata={"content": False})
    """In the native engine, draw the drafts of requests with temperature from the small model's own law and verify them
    by rejection. Output keeps the model's law but is no longer plain decoding's token for token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampled(sampled=self.sampled, adaptive=self.adaptive)
        if self.kv_cache_tokens < 1:
            raise ConfigError(f"drafter.kv_cache_tokens must be >= 1, got {self.kv_cache_tokens}")

    def preflight(self) -> None:
        self._folder()

    def _folder(self) -> Path:
        path = Path(self.weights()).expanduser()
        if not path.is_dir():
            raise InputError(f"drafter.model={self.model} is no folder here; server=native needs the model on disk")
        return path

    def load(self, folder: Path | None, base: Transformer) -> DraftModel:
        """Native engine only; needs a local folder. Refuses a model of another vocabulary."""
        from omr.drafter._small_model import SmallModelDraft

        draft = SmallModelDraft(self._folder(), base, self.draft_tok, self.kv_cache_tokens)
        draft.adaptive, draft.sampled = self.adaptive, self.sampled
        return draft
