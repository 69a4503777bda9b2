"""The running part of an evaluation: all open problems at once, every finished generation to disk, progress shown."""

from __future__ import annotations

import asyncio
import gc
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import lru_cache
from typing import Any

from tqdm import tqdm

from omr.benchmark import Problem
from omr.client import Client
from omr.config import Config
from omr.errors import ChildError, Failure, RequestError
from omr.interrupt import run_async, together
from omr.job._score import Record, ballot_of
from omr.job._second import Opinions
from omr.job.eval import Api, Eval
from omr.process import is_alive, log_tail
from omr.run import Run
from omr.samples import SampleFile
from omr.sandbox import SandboxClient
from omr.server import Endpoint, SpecCounts
from omr.solve.answer import settle
from omr.solve.grade import Grader
from omr.solve.limits import Limits
from omr.solve.prompt import Message, prompt_named, render, tags_named
from omr.solve.solver import Solved, Solver, Task
from omr.solve.tool_calls import PYTHON_TOOL
from omr.solve.transcript import Transcript
from omr.solve.vote import Ballot, StopPolicy, TimeBank


def open_samples(run: Run, problems: Sequence[Problem], planned: int) -> SampleFile:
    """The sample file of this run's config, with what a killed run of it left; a fresh one while another run has it."""
    by_id = {p.id: p for p in problems}
    folder = run.resume_folder()
    if run.cfg.rerun:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        return SampleFile(folder, by_id, planned)
    except BlockingIOError:
        run.say("another run of the same config is going on; this one starts from nothing and cannot be resumed")
        return SampleFile(run.folder, by_id, planned)


class Solving:
    """What is to be solved and what has been."""

    def __init__(
        self,
        job: Eval,
        cfg: Config,
        problems: Sequence[Problem],
        samples: SampleFile,
        grader: Grader,
        policy: StopPolicy,
        watch: Callable[[str], None] | None = None,
    ) -> None:
        self._job, self._cfg, self._samples, self._grader, self._policy = job, cfg, samples, grader, policy
        self._problems = {p.id: p for p in problems}
        self._done: dict[str, list[Ballot]] = {p.id: [] for p in problems}
        self._rows: dict[str, list[dict[str, Any]]] = {p.id: [] for p in problems}
        self._right = self._graded = 0
        for row in samples.rows:
            self._done[row["id"]].append(ballot_of(row))
            self._rows[row["id"]].append(row)
            known = settle(row["predicted_answer"], row["expected_answer"]) if "expected_answer" in row else None
            self._graded += known is not None
            self._right += bool(known)
        self._solved: dict[str, Solved] = {}
        self._opinions = Opinions(job, cfg, samples.folder, grader)
        self.todo = [
            p for p in problems if self._is_open(self._done[p.id]) or self._opinions.lacks(p, self._rows[p.id])
        ]
        """Problems with generations, comparisons or judgements still to be made."""
        self._tasks: list[Task] = []
        self._count: Any = None
        self._lay_out: Callable[[Sequence[Message]], str] | None = None
        self._grading: set[asyncio.Task[None]] = set()
        self._bar: Any = None
        self._tools = job.uses_tools
        self._watch = watch

    def _is_open(self, done: Sequence[Ballot]) -> bool:
        return len(done) < self._policy.planned and self._policy.reason(done) is None

    def with_tools(self, sandbox: SandboxClient | None) -> SandboxClient | None:
        """The sandbox, or None when there is none to speak of: then the model reasons without tools."""
        self._tools = sandbox is not None and sandbox.tier != "none"
        return sandbox if self._tools else None

    def lay_out(self, tokenizer: Any) -> None:
        """Turn the open problems into prompts, or into messages for the server's chat API."""
        job, model = self._job, self._cfg.model
        prompt = prompt_named(model.prompt)
        examples = job.few_shot.load()
        chat = job.api is Api.chat
        tools = [PYTHON_TOOL] if chat and self._tools else ()

        fast = getattr(tokenizer, "backend_tokenizer", None)

        def count(text: str) -> int:
            if fast is not None:  # what transformers puts around it costs ten times the encoding of a short text
                return len(fast.encode(text, add_special_tokens=False).ids)
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        self._count = count
        self._lay_out = None if chat else lambda messages: render(tokenizer, messages)
        for problem in self.todo:
            messages = prompt.messages(
                problem.text,
                total_code_executions=job.max_code_executions,
                examples=[example for example in examples if example[0].strip() != problem.text.strip()],
                suffix=job.prompt_suffix,
                system=job.system_message,
            )
            text = render(tokenizer, messages, tools)
            self._tasks.append(
                Task(
                    id=problem.id,
                    prompt="" if chat else text,
                    messages=messages if chat else (),
                    prompt_tokens=count(text),
                    done=tuple(self._done[problem.id]),
                )
            )

    def to_the_end(
        self, live: Endpoint, sandbox: SandboxClient | None, judge: Endpoint | None = None
    ) -> SpecCounts | None:
        """Solve all open problems; `judge` judges, or the server itself. Returns its speculation counters of that time.

        Raises ChildError when the server died, Failure when it or the judge fails every request. What was failed is
        asked for again when the same command is run again.
        """
        before = len(self._samples.rows)
        gc.freeze()  # or every full collection looks at all that imports have made: a tenth of a second each
        try:
            counts = run_async(lambda: self._all(live, sandbox, judge))
        except Failure as error:
            check_alive(live, error)
            raise
        finally:
            gc.unfreeze()
        made = self._samples.rows[before:]
        failed = [row["error"] for row in made if "error" in row]
        if failed:
            check_alive(live)
        if failed and len(failed) == len(made):
            raise Failure(f"the server failed all {len(made)} generations; the last with: {failed[-1]}")
        return counts

    async def _all(self, live: Endpoint, sandbox: SandboxClient | None, judge: Endpoint | None) -> SpecCounts | None:
        job, cfg = self._job, self._cfg
        deadline_at = None if job.deadline_s is None else time.monotonic() + job.deadline_s
        places = asyncio.Semaphore(job.max_concurrent_problems)
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(Client(live))
            judging = client if judge is None else await stack.enter_async_context(Client(judge))
            self._opinions.begin(client, judging, lay_out=self._lay_out, count=self._count, deadline_at=deadline_at)
            solver = Solver(
                client=client,
                sandbox=sandbox,
                sampling=cfg.sampling,
                limits=Limits(
                    max_tokens=cfg.sampling.max_tokens,
                    context_tokens=cfg.model.context_tokens,
                    code_executions=job.max_code_executions if self._tools else 0,
                    output_chars=cfg.sandbox.output_chars,
                    seconds=job.generation_timeout_s,
                    remaining_notice=job.remaining_notice,
                    stop_at_boxed=job.stop_at_boxed,
                    stop_on_repetition=job.stop_on_repetition,
                ),
                tags=tags_named(cfg.model.code_tags) if self._tools else None,
                policy=self._policy,
                bank=TimeBank(budget_s=job.time_budget_s, buffer_s=job.time_buffer_s, deadline_at=deadline_at),
                count_tokens=lru_cache(maxsize=1024)(self._count),  # of outputs, which repeat
                max_concurrent=job.max_concurrent_generations,
                keep=self._keep,
                watch=self._watch,
            )
            before = await _counts(client)
            with self._progress():
                await together(self._one(solver, task, places) for task in self._tasks)
                await asyncio.gather(*self._grading)
            after = await _counts(client)
        if after is None or before is None or client.endpoint.server.metrics_drain:
            return after
        return after - before

    async def _one(self, solver: Solver, task: Task, places: asyncio.Semaphore) -> None:
        problem, rows = self._problems[task.id], self._rows[task.id]
        was_open = self._is_open(task.done)
        async with places:
            solved = await solver.solve(task)
            self._solved[task.id] = solved
            if was_open:
                self._bar.update(solved.cancelled + solved.not_started)
            await self._opinions.select(problem, rows)
        await self._opinions.judge(problem, rows)

    def _progress(self) -> Any:
        planned, made = self._policy.planned, sum(len(done) for done in self._done.values())
        total = sum(planned if self._is_open(done) else len(done) for done in self._done.values())
        self._bar = tqdm(
            total=total,
            initial=made,
            desc=self._cfg.benchmark.name,
            unit="gen",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 5.0,
            file=sys.stderr,
            disable=self._watch is not None,
        )
        return self._bar

    def _keep(self, problem_id: str, sample: int, transcript: Transcript) -> None:
        problem = self._problems[problem_id]
        row = problem.row | {"id": problem_id, "problem": problem.text, "sample": sample}
        if problem.expected_answer is not None:
            row["expected_answer"] = problem.expected_answer
        row |= transcript.row()
        self._samples.append(row, transcript.events)
        self._rows[problem_id].append(row)
        self._bar.update()
        if problem.expected_answer is None:
            return
        settled = settle(row["predicted_answer"], problem.expected_answer)
        if settled is not None:
            self._show(settled)
            return
        grading = asyncio.get_running_loop().create_task(self._grade(row["predicted_answer"], problem.expected_answer))
        self._grading.add(grading)
        grading.add_done_callback(self._grading.discard)

    async def _grade(self, answer: str | None, expected: str) -> None:
        """For the progress bar; the verdict is remembered by the grader and asked for again at the end."""
        self._show((await self._grader.grade(answer, expected)).equal)

    def _show(self, right: bool) -> None:
        self._graded += 1
        self._right += right
        self._bar.set_postfix_str(f"right {100 * self._right / self._graded:.1f} %", refresh=False)

    def records(self) -> list[Record]:
        """Every problem with its rows, in the order of the benchmark; samples in order of their index."""
        return [self._record(problem, self._rows[problem.id]) for problem in self._problems.values()]

    def _record(self, problem: Problem, rows: list[dict[str, Any]]) -> Record:
        rows.sort(key=lambda row: row["sample"])
        record = Record(
            id=problem.id,
            expected_answer=problem.expected_answer,
            rows=rows,
            picks=self._opinions.picks(problem, rows),
            judgements=self._opinions.judgements(problem),
        )
        solved = self._solved.get(problem.id)
        if solved is None:
            record.stopped = self._policy.reason([ballot_of(row) for row in rows])
            record.not_started = self._policy.planned - len(rows)
        else:
            record.stopped, record.cancelled, record.not_started = solved.stopped, solved.cancelled, solved.not_started
            record.spent_tok, record.saved_tok = solved.spent_tok, solved.saved_tok
            record.start_time, record.end_time = solved.start_time, solved.end_time
        return record


async def _counts(client: Client) -> SpecCounts | None:
    try:
        return client.endpoint.server.spec_counts(await client.metrics())
    except RequestError:
        return None  # a server without a metrics page has no acceptance to report


def check_alive(live: Endpoint, cause: Failure | None = None) -> None:
    """Raise ChildError when a server of ours is gone: what was asked of it since then says nothing about the model."""
    if live.pid is not None and not is_alive(live.pid):
        tail = log_tail(live.log) if live.log else ""
        raise ChildError(f"the server died while solving; log: {live.log}", tail) from cause
