"""No quantisation: the checkpoint is the source itself, in whatever type it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omr.option import option
from omr.quant import Quantiser


@option("quant", "bf16")
@dataclass(kw_only=True)
class Bf16(Quantiser):
    """Weights as they are. Also the choice for a checkpoint that was quantised elsewhere: its own format is served."""

    identity: ClassVar[bool] = True
