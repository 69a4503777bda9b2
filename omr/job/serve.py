"""job=serve: the composed model behind an OpenAI-compatible endpoint, until Ctrl-C."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from omr.errors import ChildError
from omr.job import Job
from omr.option import option
from omr.process import is_alive, log_tail

if TYPE_CHECKING:
    from omr.run import Run


@option("job", "serve")
@dataclass(kw_only=True)
class Serve(Job):
    """Launch and wait. A server that dies meanwhile is a failure with its last log lines."""

    serves: ClassVar[bool] = True

    def run(self, run: Run) -> float | None:
        from omr import pipeline

        with pipeline.endpoint(run) as live:
            run.say(f"model {live.model!r} at {live.base_url}/v1 - Ctrl-C ends it")
            while live.pid is None or is_alive(live.pid):
                time.sleep(0.5)
            raise ChildError(f"the server died; log: {live.log}", log_tail(live.log) if live.log else "")
