"""job=eval: solve a benchmark through the composed server and sandbox, vote, grade, report.

    pipeline.endpoint --> a server that answers        \\
    sandbox.launch    --> where model-written code runs  > Solver: N generations a problem, stopped early by policy
    benchmark.load    --> problems                     /
        every finished generation --> samples.jsonl, fsynced
        a problem's generations   --> comparisons among them (select), judgements on them (judge), both fsynced
        all of them --> grades --> votes --> metrics.json, report.md, problems.csv

The samples of an unfinished run lie in a folder named by the run's fingerprint. The same command after a kill finds it
there, keeps what had finished and asks only for the rest; on success the folder moves into the run's own.

At temperature 0 the generations of a problem would be one and the same, so one is made, and that is said.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from omr.errors import ConfigError
from omr.job import Job
from omr.job._examples import FewShot
from omr.job._judging import JUDGEMENTS, Judge
from omr.job._report import METRICS, PROBLEMS, REPORT
from omr.job._selecting import SELECTIONS, Select
from omr.option import option
from omr.solve.vote import StopPolicy, Weight

if TYPE_CHECKING:
    from omr.benchmark import Problem
    from omr.config import Config
    from omr.job._score import Record
    from omr.run import Run
    from omr.samples import SampleFile
    from omr.server import SpecCounts
    from omr.solve.grade import Grader

T = TypeVar("T")


class Api(Enum):
    completions = "completions"
    """Prompts are laid out here, in the model's own chat template; code is marked by model.code_tags."""
    chat = "chat"
    """The server lays out the turns; code comes as OpenAI-style calls of a tool named `python`."""


@option("job", "eval")
@dataclass(kw_only=True)
class Eval(Job):
    """pass@1, votes, latency, throughput and acceptance on a benchmark. Returns pass@1, None without answers."""

    serves: ClassVar[bool] = True

    num_generations: int = 4
    """Generations per problem; number i is drawn with sampling.seed + i."""
    vote: Weight = Weight.equal
    """What a generation's vote counts."""
    stop_after: int | None = None
    """A problem is done when so many of its generations have finished; the others are cancelled."""
    stop_when_decided: bool = False
    """A problem is done when no remaining vote can change its winner."""
    stop_at_agreement: float | None = None
    """A problem is done when this share of its votes agrees, ..."""
    agreement_after: int = 3
    """... once so many of its generations have finished."""
    stop_at_boxed: bool = False
    """A generation ends at the brace that closes its first answer."""
    time_budget_s: float | None = None
    """Seconds for a problem; what it leaves unused later problems may draw on."""
    time_buffer_s: float = 0.0
    """At most so many saved seconds go to one problem on top of its budget."""
    deadline_s: float | None = None
    """Seconds for the whole benchmark; problems not begun by then stay unanswered."""
    generation_timeout_s: float | None = None
    """Seconds for one generation, tool time included."""
    api: Api = Api.completions
    """How the model is spoken to."""
    tools: bool = True
    """Run the code that the model writes; false is plain reasoning."""
    max_code_executions: int = 8
    """Blocks run in one generation."""
    remaining_notice: bool = False
    """Tell the model after each block how many executions are left."""
    stop_on_repetition: bool = True
    """End a generation that repeats itself."""
    prompt_suffix: str = ""
    """Appended to every user turn."""
    system_message: str | None = None
    """Replaces the prompt's own system turn."""
    few_shot: FewShot = field(default_factory=FewShot)
    """Solved problems shown first."""
    select: Select = field(default_factory=Select)
    """How the answer is taken from the generations."""
    judge: Judge = field(default_factory=Judge)
    """A model's verdict beside the symbolic grader's."""
    max_concurrent_generations: int = 16
    """In flight at a time, over all problems."""
    max_concurrent_problems: int = 16
    """Problems open at a time; with a time budget use 1, since a problem's clock runs while it waits for a slot."""
    grade_timeout_s: float = field(default=10.0, metadata={"content": False})
    """For one answer that takes computer algebra; beyond, it counts as wrong."""

    def __post_init__(self) -> None:
        self.policy(self.num_generations)
        for name in ("max_concurrent_generations", "max_concurrent_problems"):
            if getattr(self, name) < 1:
                raise ConfigError(f"job.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("time_budget_s", "deadline_s", "generation_timeout_s", "grade_timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"job.{name} must be > 0 or null, got {value}")
        if self.time_buffer_s < 0:
            raise ConfigError(f"job.time_buffer_s must be >= 0, got {self.time_buffer_s}")
        if self.time_buffer_s and self.time_budget_s is None:
            raise ConfigError("job.time_buffer_s needs job.time_budget_s: the buffer is filled from what budgets leave")
        if self.max_code_executions < 0:
            raise ConfigError(f"job.max_code_executions must be >= 0, got {self.max_code_executions}")

    def preflight(self, cfg: Config) -> None:
        from omr.solve.prompt import prompt_named

        if self.few_shot.load() and not prompt_named(cfg.model.prompt).takes_examples:
            raise ConfigError(
                f"model.prompt={cfg.model.prompt} has no place for job.few_shot; use generic/math or plain, or set "
                "job.few_shot.source=null"
            )
        asked = [("select", self.select.max_tokens, self.select.on)]
        asked.append(("judge", self.judge.max_tokens, self.judge.on and self.judge.url is None))
        for name, max_tokens, on in asked:
            if on and max_tokens >= cfg.model.context_tokens:
                raise ConfigError(
                    f"job.{name}.max_tokens={max_tokens} leaves no room for a prompt in "
                    f"model.context_tokens={cfg.model.context_tokens}; lower the first or raise the second"
                )
        self.judge.preflight()

    def local_files(self) -> dict[str, Path]:
        examples = self.few_shot.file()
        return {"examples": examples} if examples else {}

    def policy(self, planned: int) -> StopPolicy:
        return StopPolicy(
            planned=planned,
            stop_after=self.stop_after if planned == self.num_generations else None,
            when_decided=self.stop_when_decided,
            agreement=self.stop_at_agreement,
            agreement_after=self.agreement_after,
            weight=self.vote,
        )

    @property
    def uses_tools(self) -> bool:
        return self.tools and self.max_code_executions > 0

    def second_opinions(self, served: str) -> dict[str, str]:
        """Selection and judge, for the report; `served` is the model of the run."""
        select, judge = self.select, self.judge
        told = {}
        if select.on:
            told["selection"] = f"genselect, {select.comparisons} comparisons of up to {select.candidates} solutions"
        if judge.on:
            told["judge"] = f"{judge.when.name}, {judge.url or served}"
        return told

    def run(self, run: Run) -> float | None:
        from omr.job._outcome import conclude
        from omr.job._solving import open_samples
        from omr.samples import SAMPLES, TRANSCRIPTS
        from omr.solve.grade import Grader

        problems = run.cfg.benchmark.load()
        planned = self.planned(run)
        if planned != self.num_generations:
            run.say(f"temperature 0: one generation per problem instead of {self.num_generations} equal ones")
        with open_samples(run, problems, planned) as samples, Grader(timeout_s=self.grade_timeout_s) as grader:
            if samples.rows:
                run.say(f"resuming: {len(samples.rows)} generations of {len(problems)} problems are done already")
            records, counts = self.solve(run, problems, samples, grader)
            with run.stage("grade"):
                metrics = conclude(run.folder, about(run, planned), records, grader, self.vote, counts, run.metrics)
            if samples.folder != run.folder:
                for name in (TRANSCRIPTS, SELECTIONS, JUDGEMENTS):
                    if (samples.folder / name).exists():
                        shutil.copyfile(samples.folder / name, run.folder / name)
                shutil.rmtree(samples.folder)
        run.log(metrics)
        for name in (SAMPLES, TRANSCRIPTS, SELECTIONS, JUDGEMENTS, METRICS, REPORT, PROBLEMS):
            if (run.folder / name).exists():
                run.tracker.artifact(run.folder / name)
        return metrics.get("accuracy/pass_at_1")

    def solve(
        self,
        run: Run,
        problems: Sequence[Problem],
        samples: SampleFile,
        grader: Grader,
        watch: Callable[[str], None] | None = None,
    ) -> tuple[list[Record], SpecCounts | None]:
        """Make every generation that `samples` lacks; starts a server only if there are any.

        `watch` hears what generation 0 writes, as it comes, and takes the place of the progress bar.
        """
        from omr import pipeline
        from omr.job._cost import harness_cost
        from omr.job._solving import Solving

        solving = Solving(self, run.cfg, problems, samples, grader, self.policy(self.planned(run)), watch)
        if not solving.todo:
            return solving.records(), None
        judge = self.judge.endpoint()
        with ExitStack() as stack:
            reading = stack.enter_context(meanwhile(load_tokenizer(tokenizer_folder(run))))
            launch = run.cfg.sandbox.launch(run.folder / "logs") if self.uses_tools else nullcontext()
            caged = stack.enter_context(meanwhile(launch))
            live = stack.enter_context(pipeline.endpoint(run))
            sandbox = solving.with_tools(caged.result())
            run.tracker.tags({"sandbox.tier": sandbox.tier if sandbox else "none"})
            solving.lay_out(reading.result())
            with run.stage("generate"), harness_cost(live.pid) as cost:
                counts = solving.to_the_end(live, sandbox, judge)
            run.log(cost)
        return solving.records(), counts

    def planned(self, run: Run) -> int:
        """Generations per problem: one at temperature 0, where all would be the same."""
        return 1 if run.cfg.sampling.temperature == 0 else self.num_generations


@contextmanager
def meanwhile(manager: AbstractContextManager[T]) -> Iterator[Future[T]]:
    """Enter `manager` in a thread of its own while the caller does something else; leave it, there, at the end.

    A server takes seconds to start, a sandbox and a tokenizer take others. The thread lives as long as what it started,
    which a child process tied to its starter needs.
    """
    with ThreadPoolExecutor(1) as thread:
        entered = thread.submit(manager.__enter__)
        try:
            yield entered
        finally:
            if entered.exception() is None:
                thread.submit(manager.__exit__, None, None, None).result()


@contextmanager
def load_tokenizer(folder: Path) -> Iterator[Any]:
    """The tokenizer, as something to be entered."""
    from omr import text

    yield text.load_tokenizer(folder)


def tokenizer_folder(run: Run) -> Path:
    """The folder of the model's tokenizer; for a remote server without fetching weights."""
    from omr import hub, pipeline, source

    model = run.cfg.model
    if run.cfg.server.needs_weights:
        return pipeline.weights(run).path
    local = source.local_folder(model)
    if local is not None:
        return local
    if model.hub is None:
        raise ConfigError(f"server={run.cfg.server.option_name} needs a tokenizer here: set model.path or model.hub")
    commit = hub.resolve_revision(model.hub, model.revision)
    return hub.snapshot(model.hub, commit, ["*token*", "*.jinja", "vocab*", "merges*", "config.json"])


def about(run: Run, planned: int) -> dict[str, Any]:
    """What the numbers are numbers of, for report.md and metrics.json."""
    cfg, job = run.cfg, run.cfg.job
    assert isinstance(job, Eval)
    policy = [
        f"first {job.stop_after} finished" if job.stop_after else "",
        "majority decided" if job.stop_when_decided else "",
        f"{job.stop_at_agreement:.0%} agree after {job.agreement_after}" if job.stop_at_agreement else "",
        "stop at the boxed answer" if job.stop_at_boxed else "",
        f"{job.time_budget_s:g} s + {job.time_buffer_s:g} s a problem" if job.time_budget_s else "",
        f"{job.deadline_s:g} s in all" if job.deadline_s else "",
    ]
    gpus = cfg.model.tp if cfg.server.needs_weights and cfg.device_name() == "cuda" else 0
    return {
        "title": f"{cfg.benchmark.name}: {cfg.model.name} {cfg.quant.option_name} {cfg.drafter.option_name}",
        "server": f"{cfg.server.option_name} on {cfg.device_name()}",
        **({"GPUs": gpus} if gpus else {}),
        "sampling": f"temperature {cfg.sampling.temperature}, top_p {cfg.sampling.top_p}, top_k {cfg.sampling.top_k}, "
        f"max_tokens {cfg.sampling.max_tokens}, seed {cfg.sampling.seed}",
        "generations per problem": planned,
        "tools": f"up to {job.max_code_executions} executions" if job.uses_tools else "off",
        "api": job.api.name,
        **({"few-shot": f"{job.few_shot.count} of {job.few_shot.source}"} if job.few_shot.source else {}),
        "stop policy": ", ".join(part for part in policy if part) or "none",
        "vote weight": job.vote.name,
        **job.second_opinions(cfg.model.name),
        "run": run.tracker.run_id,
        "fingerprint": run.fingerprint,
    }
