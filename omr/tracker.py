"""Tracking: one small interface, MLflow behind it, and the table of every metric name.

A metric's unit is in its name, its denominator in the table, and it means the same for every server backend. MLflow
refuses `@` and `%` in names, hence `pass_at_1`. MLflow is slow to import and to call: it is imported when a run starts
and values go to it in batches.

A run always ends FINISHED, FAILED with a reason, or KILLED. A run whose process died without a word (kill -9) still
says RUNNING in the database; the next run on the same host sees that its process is gone and marks it KILLED.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil

from omr.errors import ConfigError, Failure

Status = Literal["FINISHED", "FAILED", "KILLED"]

METRICS: dict[str, str] = {
    "accuracy/pass_at_1": "share of graded generations that are right, averaged over problems; unanswered is wrong",
    "accuracy/pass_at_1_low": "lower end of its 95 % interval (bootstrap over problems; Wilson if all are 0 or 1)",
    "accuracy/pass_at_1_high": "upper end of the same interval",
    "accuracy/pass_at_{k}": "unbiased pass@k (Chen et al. 2021); absent after early stops or with fewer than k",
    "accuracy/maj_at_{k}": "expected share of right majorities of k generations, ties shared; absent after early stops",
    "accuracy/maj": "share of problems whose vote over all kept generations is right, early-stopped votes included",
    "accuracy/maj_low": "lower end of its 95 % Wilson interval",
    "accuracy/maj_high": "upper end of the same interval",
    "accuracy/select": "share of problems whose answer after selection is right; the vote's where nothing was selected",
    "accuracy/select_low": "lower end of its 95 % Wilson interval",
    "accuracy/select_high": "upper end of the same interval",
    "accuracy/symbolic_pass_at_1": "pass@1 by the symbolic grader alone, where a judge had its say in the others",
    "accuracy/no_answer": "share of generations without a boxed answer",
    "accuracy/truncated": "share of generations that ran out of tokens or time",
    "accuracy/problems": "problems graded",
    "accuracy/generations": "generations graded",
    "tool/executions_per_generation": "code blocks run, mean over generations",
    "tool/errors_per_execution": "blocks that ended in an error or a timeout, share of blocks",
    "tool/time_s": "seconds spent in the sandbox, sum over generations",
    "latency/ttft_p{q}_ms": "request sent to first token, client clock, first request of a generation",
    "latency/tpot_p{q}_ms": "(end - first token) / (tokens - 1) of a request, client clock",
    "latency/e2e_p{q}_s": "first request sent to last token of a generation, tool time included",
    "throughput/output_tok_s": "model-written tokens over the wall time of generation; tool output excluded",
    "throughput/output_tok": "model-written tokens",
    "throughput/generations_per_s": "finished generations over the same wall time",
    "throughput/solved_per_hour": "problems with a right answer over that wall time, comparisons of solutions included",
    "throughput/solved_per_gpu_hour": "the same over the GPUs that served; absent on CPU and for a server elsewhere",
    "harness/cpu_s": "CPU seconds of omr's own process while generating; server, sandboxed code and grader are others",
    "harness/share_of_wall": "the same over the wall seconds of generation",
    "harness/server_cpu_s": "CPU seconds of the server's processes meanwhile; absent for a server elsewhere",
    "harness/share_of_server_cpu": "the harness's CPU seconds over the server's",
    "accept/drafts": "verification steps that had a draft",
    "accept/draft_tok": "draft tokens proposed",
    "accept/accepted_tok": "draft tokens accepted, bonus tokens not counted",
    "accept/rate": "accepted / proposed draft tokens",
    "accept/len_mean_tok": "mean acceptance length: 1 + accepted / drafts",
    "accept/pos{i}_marginal": "drafts whose token at position i was accepted, over the drafts that had one there",
    "accept/pos{i}_drafted": "drafts that had a token at position i, over all drafts; an adaptive drafter varies it",
    "accept/pos{i}_conditional": "the marginal share over that of position i - 1",
    "accept/pos{i}_predicted": "the marginal share that held-out text predicted when the drafter was trained",
    "accept/len_predicted_tok": "acceptance length predicted in training: 1 + sum of those over the positions served",
    "accept/len_gap_tok": "accept/len_mean_tok - accept/len_predicted_tok",
    "accept/pos{i}_replayed": "the marginal share when held-out text is replayed step by step",
    "accept/len_replayed_tok": "1 + sum of those: acceptance length of the replay",
    "accept/len_replay_gap_tok": "accept/len_mean_tok - accept/len_replayed_tok",
    "accept/generations": "generations whose server told what it drafted for them: the denominator of the next three",
    "accept/len_request_mean_tok": "mean over generations of each one's own 1 + accepted / drafts",
    "accept/len_token_mean_tok": "the same mean, weighted by the tokens that each generation wrote",
    "accept/rate_request_mean": "mean over generations of each one's own accepted / proposed",
    "accept/context{n}_drafts": "drafts for sequences up to n tokens long and over n / 2 (256: any shorter too)",
    "accept/context{n}_len_mean_tok": "1 + accepted / drafts of those",
    "accept/context{n}_rate": "accepted / proposed of those",
    "stage/{name}_s": "wall seconds of text, own_text, calibration, checkpoint, drafter, engine, server_start, ...",
    "stage/{name}_reused": "1 when the stage's artifact was there already",
    "early_stop/cancelled": "generations cut off because the problem was done",
    "early_stop/not_started": "generations never begun because the problem was done",
    "early_stop/saved_tok": "estimate of the tokens that both would still have written",
    "fault/stream_drops": "streams that the server broke off; taken up again from the text so far",
    "fault/sandbox_failures": "blocks that could not be run because the sandbox itself broke",
    "fault/generations": "generations given up because the server failed them; counted as wrong",
    "select/problems": "problems on which solutions were compared: those whose generations disagree",
    "select/comparisons": "comparisons made",
    "select/unreadable": "comparisons whose reply names no solution",
    "select/changed": "problems whose answer selection changed",
    "select/prompt_tok": "tokens read in comparisons, as the server counts them",
    "select/output_tok": "tokens written in comparisons",
    "select/time_s": "seconds of comparisons, sum over requests",
    "select/failed": "comparisons that the server failed",
    "judge/questions": "answers put to the judge, each once a problem",
    "judge/unreadable": "replies without a verdict: the symbolic grader's stands",
    "judge/made_right": "generations that the judge counts right and the symbolic grader wrong",
    "judge/made_wrong": "generations that the judge counts wrong and the symbolic grader right",
    "judge/prompt_tok": "tokens read by the judge, as its server counts them",
    "judge/output_tok": "tokens written by the judge",
    "judge/time_s": "seconds of judgements, sum over requests",
    "judge/failed": "judgements that the server failed",
    "quant/{name}": "what the quantiser reports about its checkpoint",
    "redrafter{i}_top{k}": "held-out share of targets among the drafter's k best at draft position i",
    "redrafter{i}_loss": "held-out cross-entropy at draft position i, nats",
    "redrafter{i}_prefix": "held-out share of contexts whose first i+1 drafts are all right",
    "redrafter{i}_replay": "the same share over the contexts where steps begin when held-out text is replayed",
    "drafter/{name}": "what drafter training reports",
    "own_text/{name}": "what the model's own training text is: rows, tokens, share cut off",
    "train/{name}": "what fine-tuning reports",
}
"""Every metric that a run may log, with its meaning. Braces stand for a number or a name."""


def preflight(uri: str) -> None:
    """Refuse a tracking server that nobody listens at: MLflow itself would try again for minutes. Raises Failure."""
    place = urllib.parse.urlsplit(uri)
    if place.scheme not in ("http", "https"):
        return
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        with socket.create_connection((place.hostname or "", port), timeout=10):
            pass
    except (OSError, ValueError) as error:
        raise Failure(f"MLflow at {uri} does not answer ({error}); set tracking_uri, or tracking_uri=null") from None


class Tracker(Protocol):
    """Where a run writes what it was and what it measured."""

    run_id: str

    def params(self, values: Mapping[str, Any]) -> None: ...

    def tags(self, values: Mapping[str, str]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...

    def curve(self, rows: Sequence[Mapping[str, float]], step_key: str = "step") -> None:
        """Many points at once: each row's values at its own step."""
        ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...

    def end(self, status: Status, reason: str = "") -> None: ...


class RecordingTracker:
    """Keeps everything in memory: for tests and for `tracking=null`."""

    def __init__(self, run_id: str = "untracked") -> None:
        self.run_id = run_id
        self.logged_params: dict[str, Any] = {}
        self.logged_tags: dict[str, str] = {}
        self.logged_metrics: dict[str, float] = {}
        self.curves: list[Mapping[str, float]] = []
        self.artifacts: list[Path] = []
        self.status: str = "RUNNING"
        self.reason = ""

    def params(self, values: Mapping[str, Any]) -> None:
        self.logged_params.update(values)

    def tags(self, values: Mapping[str, str]) -> None:
        self.logged_tags.update(values)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.logged_metrics.update(values)

    def curve(self, rows: Sequence[Mapping[str, float]], step_key: str = "step") -> None:
        self.curves.extend(rows)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        assert path.exists(), path
        self.artifacts.append(path)

    def end(self, status: Status, reason: str = "") -> None:
        self.status, self.reason = status, reason


class MlflowTracker:
    """One MLflow run, opened on construction."""

    def __init__(
        self, uri: str, study: str, name: str, *, home: Path, parent_id: str | None = None, run_id: str | None = None
    ) -> None:
        """`run_id` reopens a run, for example the parent of a sweep, instead of starting one."""
        self._client = _client(uri, home)
        if run_id is not None:
            self.run_id = run_id
            return
        experiment = _experiment(self._client, study, home)
        _reap_dead_runs(self._client, experiment)
        tags = {
            "mlflow.runName": name,
            "mlflow.user": os.environ.get("USER", "omr"),
            "omr.host": socket.gethostname(),
            "omr.process": _process_tag(os.getpid()),
        }
        if parent_id:
            tags["mlflow.parentRunId"] = parent_id
        self.run_id = str(self._client.create_run(experiment, tags=tags).info.run_id)

    def params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(key, str(value)[:6000]) for key, value in values.items()]
        for at in range(0, len(rows), 100):
            self._client.log_batch(self.run_id, params=rows[at : at + 100])

    def tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(key, value[:5000]) for key, value in values.items()]
        for at in range(0, len(rows), 100):
            self._client.log_batch(self.run_id, tags=rows[at : at + 100])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self._log_points([(key, float(value), step) for key, value in values.items()])

    def curve(self, rows: Sequence[Mapping[str, float]], step_key: str = "step") -> None:
        self._log_points([(k, float(v), int(row[step_key])) for row in rows for k, v in row.items() if k != step_key])

    def _log_points(self, points: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        rows = [Metric(key, value, now_ms, step) for key, value, step in points]
        for at in range(0, len(rows), 1000):
            self._client.log_batch(self.run_id, metrics=rows[at : at + 1000])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._client.log_artifact(self.run_id, str(path), folder)

    def end(self, status: Status, reason: str = "") -> None:
        if reason:
            self.tags({"omr.reason": reason})
        self._client.set_terminated(self.run_id, status)

    def finished_runs(self, study: str, fingerprint: str) -> list[dict[str, Any]]:
        """FINISHED runs of `study` with this config fingerprint, newest first: id, metrics, tags."""
        experiment = self._client.get_experiment_by_name(study)
        if experiment is None:
            return []
        found = self._client.search_runs(
            [experiment.experiment_id],
            filter_string=f"attributes.status = 'FINISHED' and tags.`omr.fingerprint` = '{fingerprint}'",
            order_by=["attributes.start_time DESC"],
        )
        return [_as_dict(run) for run in found]

    def children(self) -> list[dict[str, Any]]:
        """The runs under this one, oldest first."""
        info = self._client.get_run(self.run_id).info
        found = self._client.search_runs(
            [info.experiment_id],
            filter_string=f"tags.`mlflow.parentRunId` = '{self.run_id}'",
            order_by=["attributes.start_time ASC"],
        )
        return [_as_dict(run) for run in found]


def study_runs(uri: str, study: str, home: Path) -> list[dict[str, Any]]:
    """All runs of a study, newest first: id, name, status, metrics, params, tags. Raises ConfigError for no study."""
    client = _client(uri, home)
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        names = sorted(e.name for e in client.search_experiments() if e.name != "Default")
        raise ConfigError(f"no study {study!r} in {uri}; there are: {', '.join(names) or 'none'}")
    return [_as_dict(run) for run in _all_runs(client, experiment.experiment_id)]


def studies(uri: str, home: Path) -> dict[str, int]:
    """Study names with their number of runs, those without runs left out."""
    client = _client(uri, home)
    counts = {e.name: sum(1 for _ in _all_runs(client, e.experiment_id)) for e in client.search_experiments()}
    return {name: count for name, count in sorted(counts.items()) if count}


def get_run(uri: str, run_id: str, home: Path) -> dict[str, Any]:
    """One run by id or by a unique prefix of it. Raises ConfigError when there is none, or more than one."""
    client = _client(uri, home)
    found = [
        run
        for experiment in client.search_experiments()
        for run in _all_runs(client, experiment.experiment_id)
        if run.info.run_id.startswith(run_id)
    ]
    if not found:
        raise ConfigError(f"no run {run_id!r} in {uri}; `omr ls` lists them")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} runs begin with {run_id!r} in {uri}; give more of the id")
    return _as_dict(found[0])


def _all_runs(client: Any, experiment_id: str) -> Iterator[Any]:
    """Every run of an experiment, newest first, page by page."""
    token = None
    while True:
        page = client.search_runs([experiment_id], page_token=token, order_by=["attributes.start_time DESC"])
        yield from page
        token = page.token
        if not token:
            return


def _as_dict(run: Any) -> dict[str, Any]:
    return {
        "id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "start_time": run.info.start_time,
        "metrics": dict(run.data.metrics),
        "params": dict(run.data.params),
        "tags": dict(run.data.tags),
    }


def _client(uri: str, home: Path) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    home.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(home / ".mlflow.lock"):  # two processes creating one SQLite schema at once corrupt it
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        return client
    except MlflowException as error:
        first = str(error).splitlines()[0]
        raise Failure(f"MLflow at {uri} does not answer: {first}; set tracking_uri, or tracking_uri=null") from None


def _experiment(client: Any, study: str, home: Path) -> str:
    with _lock(home / ".mlflow.lock"):
        found = client.get_experiment_by_name(study)
        if found is None:
            local = client.tracking_uri.startswith("sqlite:")
            location = (home / "mlartifacts" / study).resolve().as_uri() if local else None
            return str(client.create_experiment(study, artifact_location=location))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _process_tag(pid: int) -> str:
    return f"{pid}:{psutil.Process(pid).create_time():.2f}"


def _reap_dead_runs(client: Any, experiment_id: str) -> None:
    """Mark RUNNING runs of this host whose process is gone as KILLED."""
    running = client.search_runs([experiment_id], filter_string="attributes.status = 'RUNNING'")
    for run in running:
        process = run.data.tags.get("omr.process")
        if process is None or run.data.tags.get("omr.host") != socket.gethostname():
            continue
        pid = int(process.split(":")[0])
        alive = False
        with contextlib.suppress(psutil.Error):
            alive = _process_tag(pid) == process
        if not alive:
            client.set_tag(run.info.run_id, "omr.reason", "its process died without closing it")
            client.set_terminated(run.info.run_id, "KILLED")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
