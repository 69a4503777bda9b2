"""omr ask "PROBLEM" [OVERRIDES...]: put one problem through the composed run: streamed text, tool blocks, the vote."""

from __future__ import annotations

import argparse
import sys

from omr.benchmark import Problem
from omr.errors import ConfigError, Failure, InputError
from omr.job._report import vote_label
from omr.job.eval import Eval
from omr.run import new_folder, open_run
from omr.samples import SampleFile
from omr.solve.grade import Grader
from omr.sweep import checked


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omr ask", description=__doc__)
    parser.add_argument("problem", help="the problem's text; - reads it from standard input")
    parser.add_argument("overrides", nargs="*", help="as for a run, for example +experiment=fp8 job.num_generations=8")
    args = parser.parse_args(argv)
    text = sys.stdin.read() if args.problem == "-" else args.problem
    if not text.strip():
        raise InputError('the problem is empty; say omr ask "What is 2+2?"')
    plan = checked(["study=ask", "tracking_uri=null", *args.overrides], multirun=False)
    if plan.multirun:
        raise ConfigError("omr ask takes one configuration, not a sweep")
    cfg = plan.cells[0].cfg
    job = cfg.job
    if not isinstance(job, Eval):
        raise ConfigError(f"omr ask solves with job=eval, got job={job.option_name}")
    problem = Problem(id="asked", text=text.strip(), expected_answer=None)
    folder = new_folder(cfg.study)
    with (
        open_run(cfg, folder, overrides=args.overrides) as run,
        SampleFile(folder, {problem.id: problem}, job.planned(run)) as samples,
        Grader() as grader,
    ):
        (record,), _ = job.solve(run, [problem], samples, grader, watch=_show)
        record.cast_vote(job.vote)
    print("\n")
    for row in record.rows:
        print(
            f"generation {row['sample']}: {row['predicted_answer'] or 'no answer'} "
            f"({row['num_generated_tokens']} tokens, {row['code_rounds_executed']} executions, {row['finish_reason']})"
        )
    if record.answer is None:
        raise Failure(
            f"none of {len(record.rows)} generations gave an answer; transcript: {folder / 'transcript.jsonl'}"
        )
    print(f"{vote_label([record])}: {record.vote.votes:g} of {record.vote.total:g} votes")
    if record.selected and record.selected.how == "selected":
        print(f"genselect: {record.selected.picks} of {record.selected.comparisons} comparisons")
    print(record.answer)
    return 0


def _show(piece: str) -> None:
    sys.stdout.write(piece.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"))
    sys.stdout.flush()
