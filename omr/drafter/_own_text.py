"""How a base model writes its drafter's training text itself: part of the drafter's recipe, and so of its key.

Where it is written (which server, how many at a time) is not: every server draws from the same law, up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omr.errors import ConfigError
from omr.sampling import Sampling


@dataclass(kw_only=True)
class OwnText:
    """The base's own solutions, one document for each."""

    problems: str | None = field(default=None, metadata={"content": False})  # its digest is keyed instead
    """What is solved: a file as a benchmark reads it (.jsonl, .jsonl.gz, .parquet, .csv), or the name of a shipped
    benchmark; null takes the problems of model.text, whose solutions are then not read."""
    generations: int = 1
    """Solutions per problem; number i is drawn with sampling.seed + i."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=1024))
    """How they are drawn; best as they will be when serving."""
    tools: bool = True
    """Run the code that the model writes; false is plain reasoning."""
    max_code_executions: int = 8
    """Blocks run in one solution."""
    max_concurrent_generations: int = field(default=16, metadata={"content": False})

    def __post_init__(self) -> None:
        for name in ("generations", "max_concurrent_generations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"drafter.train.own.{name} must be >= 1, got {getattr(self, name)}")
        if self.max_code_executions < 0:
            raise ConfigError(f"drafter.train.own.max_code_executions must be >= 0, got {self.max_code_executions}")
        if self.sampling.temperature == 0 and self.generations > 1:
            raise ConfigError(
                f"drafter.train.own.generations={self.generations} at temperature 0 would be one and the same text; "
                "set it to 1, or drafter.train.own.sampling.temperature above 0"
            )

    @property
    def uses_tools(self) -> bool:
        return self.tools and self.max_code_executions > 0
