"""Jobs: what a run does, straight-line. One module per option."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from omr.config import Config
    from omr.run import Run
    from omr.server import Server


@dataclass(kw_only=True)
class Job:
    """Contract. The float that `run` returns is what a sweeper may optimise."""

    option_group: ClassVar[str]
    option_name: ClassVar[str]
    serves: ClassVar[bool] = False
    """Whether the job launches a server."""
    trains: ClassVar[bool] = False
    """Whether it makes the drafter and does not serve it: its server, if any, writes the training text."""

    @property
    def uses_tools(self) -> bool:
        """Whether it runs model-written code, and so needs a sandbox."""
        return False

    def needs_backend(self, server: Server) -> bool:
        """Whether the machine must have what `server` runs on: to launch it, or to build its engine."""
        return self.serves

    def preflight(self, cfg: Config) -> None:
        """Refuse, before anything is allocated, what this job cannot do with the rest of `cfg`.

        Raises ConfigError or InputError.
        """

    def local_files(self) -> dict[str, Path]:
        """Files that the job reads: an edited one is another experiment."""
        return {}

    def run(self, run: Run) -> float | None:
        raise TypeError(f"{type(self).__name__} does nothing")
