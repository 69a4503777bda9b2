"""How tokens are drawn: the values a request carries to any server."""

from __future__ import annotations

from dataclasses import dataclass

from omr.errors import ConfigError


@dataclass(kw_only=True)
class Sampling:
    """Sampling parameters, named as in the OpenAI and vLLM request bodies."""

    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.95
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 512
    """Budget of one generation over all its rounds, tool output included, in tokens."""
    seed: int = 0
    """Generation i of a problem is drawn with seed + i."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"sampling.temperature must be >= 0, got {self.temperature}; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p must be in (0, 1], got {self.top_p}; 1 keeps everything")
        if self.top_k < 0:
            raise ConfigError(f"sampling.top_k must be >= 0, got {self.top_k}; 0 keeps everything")
        if not 0 <= self.min_p < 1:
            raise ConfigError(f"sampling.min_p must be in [0, 1), got {self.min_p}")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"sampling.repetition_penalty must be > 0, got {self.repetition_penalty}; 1 is off")
        if self.max_tokens < 1:
            raise ConfigError(f"sampling.max_tokens must be >= 1, got {self.max_tokens}")
