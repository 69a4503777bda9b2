"""Jobs: what a run does, straight-line. One module per option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from omr.run import Run


@dataclass(kw_only=True)
class Job:
    """Contract. The float that `run` returns is what a sweeper may optimise."""

    option_group: ClassVar[str]
    option_name: ClassVar[str]
    serves: ClassVar[bool] = False
    """Whether the job launches a server (and so needs the server's preflight)."""

    def run(self, run: Run) -> float | None:
        raise TypeError(f"{type(self).__name__} does nothing")
