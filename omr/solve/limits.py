"""What one generation may use, and how it can end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "time", "code_limit", "repetition", "boxed", "error", "cancelled"]
"""stop: the model ended its turn. length: tokens or context ran out. time: seconds ran out. code_limit: it wrote a call
beyond its executions. repetition: it repeats itself. boxed: ended by us at its answer. error: the server failed."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one generation may use."""

    max_tokens: int
    """Model-written tokens and tool output together."""
    context_tokens: int
    """Prompt, text and tool output together."""
    code_executions: int = 8
    """0 is plain reasoning: no stop tag, nothing is run."""
    code_timeout_s: float | None = None
    """Per block; None is the sandbox's own."""
    output_chars: int = 1000
    seconds: float | None = None
    remaining_notice: bool = False
    """Tell the model after each block how many executions it has left."""
    stop_at_boxed: bool = False
    """End at the brace that closes an answer outside code."""
    stop_on_repetition: bool = True
