"""job=serve ends when its server does."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from omr import pipeline
from omr.compose import plan
from omr.errors import ChildError
from omr.process import spawn
from omr.run import Run, open_run
from omr.server import Endpoint


def test_a_server_that_dies_ends_the_job_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def endpoint(run: Run) -> Iterator[Endpoint]:
        log = tmp_path / "server.log"
        log.write_text("out of memory\n")
        with spawn([sys.executable, "-c", "import time; time.sleep(60)"], log=log) as child:
            os.kill(child.pid, signal.SIGKILL)
            yield Endpoint(base_url="http://127.0.0.1:1", model="m", server=run.cfg.server, log=log, pid=child.pid)

    monkeypatch.setattr(pipeline, "endpoint", endpoint)
    monkeypatch.setenv("OMR_HOME", str(tmp_path))
    cfg = plan(["job=serve", "tracking_uri=null", "device=cpu"], multirun=False).cells[0].cfg
    with (
        pytest.raises(ChildError, match=r"(?s)the server died.*out of memory"),
        open_run(cfg, tmp_path / "run", overrides=[]) as run,
    ):
        cfg.job.run(run)
