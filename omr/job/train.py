"""job=train: the drafter of this config, trained for its base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from omr.errors import ConfigError
from omr.job import Job
from omr.option import option

if TYPE_CHECKING:
    from omr.config import Config
    from omr.run import Run


@option("job", "train")
@dataclass(kw_only=True)
class Train(Job):
    """Make or reuse the drafter. Returns the acceptance length predicted on held-out text, when it is known."""

    trains: ClassVar[bool] = True

    def preflight(self, cfg: Config) -> None:
        if not cfg.drafter.trained:
            raise ConfigError(f"job=train: drafter={cfg.drafter.option_name} is not trained; choose drafter=redrafter")

    def run(self, run: Run) -> float | None:
        from omr import pipeline

        made = pipeline.drafter(run)
        assert made is not None, f"preflight let drafter={run.cfg.drafter.option_name} pass"
        run.say(f"drafter: {made.path}")
        return run.metrics.get("drafter/predicted_len_mean_tok")
