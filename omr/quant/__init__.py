"""Quantisers: what a checkpoint's linear weights are stored and computed in. One module per option.

A quantiser writes a Hugging Face folder in the `compressed-tensors` dialect (and, for FP8, ModelOpt's beside it).
`omr.nn.loader` reads the dialect back, so an external checkpoint in the same format is served the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from omr.errors import ConfigError


@dataclass(kw_only=True)
class Quantiser:
    """Contract. `quantise` runs in a child process of its own."""

    option_group: ClassVar[str]
    option_name: ClassVar[str]
    REVISION: ClassVar[int] = 1
    """Bump when the written bytes change for the same fields: it is part of the artifact key."""
    identity: ClassVar[bool] = False
    """True when the checkpoint is the source itself: nothing is written."""
    calibrates: ClassVar[bool] = False
    """Whether it looks at activations, and so needs `calib_samples`."""
    calib_samples: int = 0
    """Rows of text seen while collecting activation ranges; 0 needs no calibration set."""
    calib_tokens: int = field(default=2048)
    """Longest calibration row, in tokens; longer rows are cut."""

    def __post_init__(self) -> None:
        if self.calib_samples and not self.calibrates:
            raise ConfigError(
                f"quant={self.option_name} reads weights alone and calibrates nothing; leave quant.calib_samples at 0, "
                f"got {self.calib_samples} (in a sweep over quant: an option file of its own for the one that does)"
            )

    def quantise(self, src: Path, out: Path, calibration: Path | None, device: str) -> dict[str, float]:
        """Write the quantised checkpoint of `src` into the empty folder `out` and return summary metrics.

        `calibration` is a parquet file with a `text` column, given when `calib_samples` > 0. Raises InputError for
        an unreadable source or too few samples, Failure when an activation range is not finite.
        """
        raise TypeError(f"{type(self).__name__} does not quantise")
