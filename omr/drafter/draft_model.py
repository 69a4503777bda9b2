"""A small model of the same vocabulary that drafts for the big one (arXiv 2211.17192)."""

from __future__ import annotations

from dataclasses import dataclass

from omr.drafter._elsewhere import ModelDrafter
from omr.option import option


@option("drafter", "draft_model")
@dataclass(kw_only=True)
class SmallModel(ModelDrafter):
    """Served by vLLM, SGLang and TensorRT-LLM."""
