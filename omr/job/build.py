"""job=build: everything up to what a server loads. Weights, quantised checkpoint, and the engine where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omr.job import Job
from omr.option import option

if TYPE_CHECKING:
    from omr.run import Run
    from omr.server import Server


@option("job", "build")
@dataclass(kw_only=True)
class Build(Job):
    """Make or reuse the checkpoint; for a server that builds engines, the drafter and the engine too."""

    def needs_backend(self, server: Server) -> bool:
        return server.builds_engine

    def run(self, run: Run) -> float | None:
        from omr import pipeline

        if run.cfg.server.builds_engine:
            spec = pipeline.serve_spec(run)
            run.say(f"engine: {spec.engine}")
        else:
            run.say(f"checkpoint: {pipeline.checkpoint(run).path}")
        return None
