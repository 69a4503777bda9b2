"""Training text that the model writes itself: its own solutions, sampled, with tools, as it would be served.

    problems --> Solver, `generations` each          --> samples.jsonl, transcript.jsonl: fsynced one by one
             --> their prompts, texts and outputs    --> text.parquet (omr/text.py), in the order of the problems

A drafter guesses what its base will write next, so it learns most from what the base does write. A killed run goes on
from its last finished solution. What the model wrote and what the harness handed back is known from the transcript, not
searched for in the text. Every solution with a text is kept, right or wrong, cut off or not: serving meets them all.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from omr.benchmark import Benchmark, Problem
from omr.client import Client
from omr.dataset import end_of_turn_text, lay_out, write_parquet
from omr.drafter._own_text import OwnText
from omr.errors import Failure, InputError
from omr.interrupt import run_async, together
from omr.model import Model
from omr.records import SUFFIXES
from omr.samples import SAMPLES, TRANSCRIPTS, SampleFile, intact_rows
from omr.sandbox import SandboxClient
from omr.server import Endpoint
from omr.solve.limits import Limits
from omr.solve.prompt import CodeTags, prompt_named, render, tags_named
from omr.solve.solver import Solver, Task
from omr.solve.transcript import Transcript
from omr.solve.vote import Ballot, StopPolicy, TimeBank
from omr.text import Span, TextRow

REVISION = 1
"""Bump when the same solutions would be laid out as other text."""
TEXT = "text.parquet"
PLACES = 64
"""Problems open at a time; how many solutions are written at once is the recipe's."""


def problem_source(how: OwnText) -> Benchmark | None:
    """The problems that `how` names, as a benchmark; None when they are those of model.text. Raises InputError."""
    name = how.problems
    if name is None:
        return None
    if name.endswith(SUFFIXES):
        source = Benchmark(name=Path(name).name.split(".")[0], path=name)
    else:
        source = Benchmark(name=name, packaged=f"{name}.jsonl")
    try:
        source.preflight()
    except InputError as error:
        raise InputError(f"drafter.train.own.problems={name}: {error}") from None
    return source


def choose(texts: Iterable[str], how: OwnText, rows: int) -> list[Problem]:
    """The first different problems, as many as `rows` solutions need. Raises InputError when there are fewer."""
    wanted = -(-rows // how.generations)
    different = list(islice(dict.fromkeys(texts), wanted))
    if len(different) < wanted:
        raise InputError(
            f"{wanted} problems are needed for drafter.train.rows={rows} at drafter.train.own.generations="
            f"{how.generations}, and {how.problems or 'model.text'} has {len(different)}; lower the first or raise "
            "the second"
        )
    return [Problem(id=f"p{i}", text=text, expected_answer=None) for i, text in enumerate(different)]


class Writing:
    """Solutions in the making, in `folder`. Hold it in a `with`."""

    def __init__(self, folder: Path, problems: Sequence[Problem], how: OwnText, model: Model, tokenizer: Any) -> None:
        self._problems = {p.id: p for p in problems}
        self._how, self._model, self._tokenizer = how, model, tokenizer
        self._samples = SampleFile(folder, self._problems, how.generations)
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: Any) -> None:
        self._samples.__exit__(*about)

    @property
    def planned(self) -> int:
        return len(self._problems) * self._how.generations

    @property
    def num_done(self) -> int:
        """Solutions that have been written, those of an earlier, killed run included."""
        return sum("error" not in row for row in self._samples.rows)

    def to_the_end(self, live: Endpoint, sandbox: SandboxClient | None, output_chars: int) -> None:
        """Write what is missing. Raises Failure when the server fails, with nothing lost that had been written."""
        run_async(lambda: self._all(live, sandbox, output_chars))
        if failed := self.planned - self.num_done:
            why = next(row["error"] for row in self._samples.rows if "error" in row)
            raise Failure(
                f"the server failed {failed} of {self.planned} solutions, the first with: {why}. The others are kept; "
                "the same command asks for these again"
            )

    async def _all(self, live: Endpoint, sandbox: SandboxClient | None, output_chars: int) -> None:
        how, places = self._how, asyncio.Semaphore(PLACES)
        tools = how.uses_tools and sandbox is not None and sandbox.tier != "none"
        async with Client(live) as client:
            solver = Solver(
                client=client,
                sandbox=sandbox if tools else None,
                sampling=how.sampling,
                limits=Limits(
                    max_tokens=how.sampling.max_tokens,
                    context_tokens=self._model.context_tokens,
                    code_executions=how.max_code_executions if tools else 0,
                    output_chars=output_chars,
                ),
                tags=tags_named(self._model.code_tags) if tools else None,
                policy=StopPolicy(planned=how.generations),
                bank=TimeBank(budget_s=None),
                count_tokens=self._count,
                max_concurrent=how.max_concurrent_generations,
                keep=self._keep,
            )

            async def one(task: Task) -> None:
                async with places:
                    await solver.solve(task)

            with tqdm(
                total=self.planned,
                initial=self.num_done,
                desc="own text",
                unit="gen",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 5.0,
                file=sys.stderr,
            ) as self._bar:
                await together(one(task) for task in self._tasks())

    def _tasks(self) -> list[Task]:
        done: dict[str, list[Ballot]] = {i: [] for i in self._problems}
        for row in self._samples.rows:
            done[row["id"]].append(Ballot(sample=row["sample"], answer=None))
        tasks = []
        for problem in self._problems.values():
            if len(done[problem.id]) < self._how.generations:
                prompt = self._prompt(problem)
                tasks.append(
                    Task(id=problem.id, prompt=prompt, prompt_tokens=self._count(prompt), done=done[problem.id])
                )
        return tasks

    def _prompt(self, problem: Problem) -> str:
        messages = prompt_named(self._model.prompt).messages(
            problem.text, total_code_executions=self._how.max_code_executions
        )
        return render(self._tokenizer, messages)

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _keep(self, problem_id: str, sample: int, transcript: Transcript) -> None:
        row = {"id": problem_id, "problem": self._problems[problem_id].text, "sample": sample, **transcript.row()}
        self._samples.append(row, transcript.events)
        self._bar.update()

    def finish(self, out: Path) -> dict[str, float]:
        """Write text.parquet and the solutions it was made of into `out`. Raises InputError when none has a text."""
        assert self.num_done == self.planned, (self.num_done, self.planned)
        rows = sorted(self._samples.rows, key=lambda row: row["sample"])
        of: dict[str, list[dict[str, Any]]] = {i: [] for i in self._problems}
        for row in rows:
            of[row["id"]].append(row)
        ordered = [row for i in self._problems for row in of[i]]
        written = write_parquet(self._laid_out(ordered), out / TEXT)
        if not written:
            raise InputError(
                f"the model wrote nothing in any of {len(ordered)} solutions; check model.prompt={self._model.prompt}"
            )
        for name in (SAMPLES, TRANSCRIPTS):
            shutil.copyfile(self._samples.folder / name, out / name)
        tokens = sum(row["num_generated_tokens"] for row in ordered)
        return {
            "rows": float(written),
            "empty": float(len(ordered) - written),
            "output_tok": float(tokens),
            "tool_tok": float(sum(row["num_tool_tokens"] for row in ordered)),
            "executions_per_generation": sum(row["code_rounds_executed"] for row in ordered) / len(ordered),
            "truncated": sum(row["finish_reason"] not in ("stop", "boxed") for row in ordered) / len(ordered),
        }

    def _laid_out(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[TextRow]:
        events = {
            (row["id"], row["sample"]): row["events"]
            for row in intact_rows(self._samples.folder / TRANSCRIPTS, strict=True)
        }
        end, tags = end_of_turn_text(self._tokenizer), tags_named(self._model.code_tags)
        for row in rows:
            if row["generation"]:
                problem = self._problems[row["id"]]
                yield document(row, events[row["id"], row["sample"]], problem.text, self._prompt(problem), end, tags)


def document(
    row: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    problem: str,
    prompt: str,
    end_of_turn: str,
    tags: CodeTags,
) -> TextRow:
    """One solution as training text: what the model wrote is in spans, its end of turn included if it ended itself."""
    ending = end_of_turn if row["finish_reason"] == "stop" else ""
    pieces = [(e["text"], e["type"] == "text") for e in events if e["type"] in ("text", "output")]
    if "".join(text for text, _ in pieces) != row["generation"]:  # a dropped stream: part of a tag was taken back
        return lay_out(problem, row["generation"], prompt, ending, tags)
    text, spans = prompt, list[Span]()
    for piece, own in [*pieces, (ending, True)]:
        start, text = len(text), text + piece
        if own and piece:
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, len(text)))
    return TextRow(text=text, spans=spans, problem=problem)
