"""Second opinions on a problem whose generations have ended: selection among them, and the judge's word on answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omr.benchmark import Problem
from omr.client import Client
from omr.config import Config
from omr.job._judging import Judgements
from omr.job._selecting import Selections
from omr.job.eval import Eval
from omr.solve.ask import Asker
from omr.solve.grade import Grader
from omr.solve.prompt import Message

Row = dict[str, Any]


class Opinions:
    """Both kinds, each only where the job asks for it. `begin` before anything is asked."""

    def __init__(self, job: Eval, cfg: Config, folder: Path, grader: Grader) -> None:
        self._job, self._cfg, self._grader = job, cfg, grader
        self._selections = Selections(job.select, folder, seed=cfg.sampling.seed) if job.select.on else None
        self._judgements = Judgements(job.judge, folder) if job.judge.on else None
        self._selector: Asker
        self._judge: Asker
        self._judge_model = ""
        self._count: Callable[[str], int]
        self._deadline_at: float | None = None

    def lacks(self, problem: Problem, rows: Sequence[Row]) -> bool:
        """Whether something would have to be asked about these samples."""
        if self._selections and self._selections.missing(problem.id, rows):
            return True
        return bool(self._judgements and self._judgements.open(problem, rows, self._grader))

    def begin(
        self,
        client: Client,
        judging: Client,
        *,
        lay_out: Callable[[Sequence[Message]], str] | None,
        count: Callable[[str], int],
        deadline_at: float | None,
    ) -> None:
        """`client` reaches the run's server, `judging` the judge's; `lay_out` is None for the chat API."""
        select, judge = self._job.select, self._job.judge
        drawn = replace(self._cfg.sampling, temperature=select.temperature, max_tokens=select.max_tokens)
        self._selector = Asker(client, drawn, lay_out=lay_out)
        self._judge = Asker(judging, judge.sampling, lay_out=lay_out if judging is client else None, name="the judge")
        self._judge_model = judging.endpoint.model
        self._count, self._deadline_at = count, deadline_at

    async def select(self, problem: Problem, rows: Sequence[Row]) -> None:
        if self._selections:
            await self._selections.ask(
                problem,
                rows,
                self._selector,
                count=self._count,
                context_tokens=self._cfg.model.context_tokens,
                deadline_at=self._deadline_at,
            )

    async def judge(self, problem: Problem, rows: Sequence[Row]) -> None:
        if self._judgements:
            await self._judgements.ask(problem, rows, self._grader, self._judge, self._judge_model)

    def picks(self, problem: Problem, rows: Sequence[Row]) -> list[Row] | None:
        return self._selections.kept(problem.id, rows) if self._selections else None

    def judgements(self, problem: Problem) -> list[Row]:
        return self._judgements.kept(problem) if self._judgements else []
