"""job=judge: put the answers of a finished evaluation to the composed server, whatever that is, and count again.

    job.folder --> samples.jsonl of job=eval     \
    pipeline.endpoint --> a server that answers   > one question an answer --> judgements.jsonl, fsynced
                                                 /
    grades, judgements --> votes --> samples.jsonl, metrics.json, report.md, problems.csv in this run's own folder

`model`, `quant` and `server` choose the judge, as they choose the solver of job=eval; the judged folder stays as it is.
The same command after a kill asks only what is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from omr.errors import ConfigError, Failure, InputError
from omr.job import Job
from omr.job._judging import JUDGEMENTS, Judge, When
from omr.option import option

if TYPE_CHECKING:
    from omr.benchmark import Problem
    from omr.config import Config
    from omr.job._finished import Finished
    from omr.job._judging import Judgements
    from omr.run import Run
    from omr.server import Endpoint
    from omr.solve.grade import Grader


def _fallback() -> Judge:
    return Judge(when=When.fallback)


@option("job", "judge")
@dataclass(kw_only=True)
class JudgeRun(Job):
    """An LLM's verdicts on a finished run. Returns pass@1 with them."""

    serves: ClassVar[bool] = True

    folder: str | None = None
    """The folder of a finished job=eval (multirun/STUDY/TIME/N)."""
    judge: Judge = field(default_factory=_fallback)
    chat: bool = False
    """Ask through the server's chat API; false lays the question out here, in the model's own chat template."""
    grade_timeout_s: float = field(default=10.0, metadata={"content": False})
    """For one answer that takes computer algebra."""

    def __post_init__(self) -> None:
        if not self.judge.on:
            raise ConfigError("job.judge.when=never judges nothing; set fallback or always")
        if self.judge.url is not None:
            raise ConfigError(
                "job=judge asks the composed server: leave out job.judge.url, set server=openai server.url"
            )

    def preflight(self, cfg: Config) -> None:
        from omr.samples import SAMPLES

        if self.folder is None:
            raise ConfigError("job=judge needs job.folder=FOLDER, the folder of a finished job=eval")
        if not (Path(self.folder).expanduser() / SAMPLES).is_file():
            raise InputError(
                f"job.folder={self.folder} holds no {SAMPLES}: it is not the folder of a finished evaluation"
            )

    def local_files(self) -> dict[str, Path]:
        from omr.samples import SAMPLES

        return {"samples": Path(self.folder).expanduser() / SAMPLES} if self.folder else {}

    def run(self, run: Run) -> float | None:
        from omr.benchmark import Problem
        from omr.job._finished import read_finished
        from omr.job._judging import Judgements
        from omr.job._outcome import conclude
        from omr.job._report import METRICS, PROBLEMS, REPORT
        from omr.job._selecting import SELECTIONS
        from omr.samples import SAMPLES, held
        from omr.solve.grade import Grader

        assert self.folder is not None
        judged = read_finished(Path(self.folder).expanduser())
        problems = {
            r.id: Problem(id=r.id, text=_text(r.rows), expected_answer=r.expected_answer) for r in judged.records
        }
        if all(p.expected_answer is None for p in problems.values()):
            raise InputError(f"the problems of {self.folder} have no expected answers: there is nothing to judge by")
        unfinished = run.resume_folder()
        with held(unfinished), Grader(timeout_s=self.grade_timeout_s) as grader:
            judgements = Judgements(self.judge, unfinished)
            open_records = [r for r in judged.records if judgements.open(problems[r.id], r.rows, grader)]
            if open_records:
                self._ask(run, judgements, [(problems[r.id], r.rows) for r in open_records], grader)
            for record in judged.records:
                record.judgements = judgements.kept(problems[record.id])
            with run.stage("grade"):
                about = self._about(run, judged)
                metrics = conclude(run.folder, about, judged.records, grader, judged.weight)
            for source in (unfinished / JUDGEMENTS, Path(self.folder).expanduser() / SELECTIONS):
                if source.exists():
                    shutil.copyfile(source, run.folder / source.name)
            shutil.rmtree(unfinished)
        run.log({name: value for name, value in metrics.items() if name.split("/")[0] in ("accuracy", "judge")})
        for name in (SAMPLES, SELECTIONS, JUDGEMENTS, METRICS, REPORT, PROBLEMS):
            if (run.folder / name).exists():
                run.tracker.artifact(run.folder / name)
        return metrics.get("accuracy/pass_at_1")

    def _ask(
        self, run: Run, judgements: Judgements, asked: Sequence[tuple[Problem, list[dict[str, Any]]]], grader: Grader
    ) -> None:
        from omr import pipeline
        from omr import text as text_data
        from omr.interrupt import run_async
        from omr.job._solving import check_alive
        from omr.job.eval import tokenizer_folder

        tokenizer = None if self.chat else text_data.load_tokenizer(tokenizer_folder(run))
        with pipeline.endpoint(run) as live, run.stage("judge"):
            try:
                run_async(lambda: self._ask_all(live, tokenizer, judgements, asked, grader))
            except Failure as error:
                check_alive(live, error)
                raise

    async def _ask_all(
        self,
        live: Endpoint,
        tokenizer: Any,
        judgements: Judgements,
        asked: Sequence[tuple[Problem, list[dict[str, Any]]]],
        grader: Grader,
    ) -> None:
        from omr.client import Client
        from omr.interrupt import together
        from omr.solve.ask import Asker
        from omr.solve.prompt import render

        async with Client(live) as client:
            lay_out = None if tokenizer is None else lambda messages: render(tokenizer, messages)
            asker = Asker(client, self.judge.sampling, lay_out=lay_out, name="the judge")
            await together(judgements.ask(problem, rows, grader, asker, live.model) for problem, rows in asked)

    def _about(self, run: Run, judged: Finished) -> dict[str, Any]:
        cfg = run.cfg
        return judged.about | {
            "judge": f"{self.judge.when.name}, {cfg.model.name} {cfg.quant.option_name} on {cfg.server.option_name}",
            "judged from": str(self.folder),
            "run": run.tracker.run_id,
            "fingerprint": run.fingerprint,
        }


def _text(rows: Sequence[dict[str, Any]]) -> str:
    return str(rows[0].get("problem") or "") if rows else ""
