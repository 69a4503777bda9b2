"""Plain decoding: nothing is drafted, every token is the target's own step."""

from __future__ import annotations

from dataclasses import dataclass

from omr.drafter import Drafter
from omr.option import option


@option("drafter", "none")
@dataclass(kw_only=True)
class NoDrafter(Drafter):
    """`load` gives None: the engine decodes one token a step."""
