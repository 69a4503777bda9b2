"""One execution: a typed config, an output folder, the artifact store and the tracker.

`open_run` guarantees how it ends: FINISHED, FAILED with a reason, or KILLED (Ctrl-C, SIGTERM). The fingerprint names
what was asked for: two runs with the same one would measure the same thing, so a sweep skips a cell that has finished
before and a killed evaluation continues where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import platform
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from omr import __version__, source
from omr.artifact import Artifact, Store, content, key_of
from omr.config import Config, home
from omr.errors import OmrError, ResourceError, Terminated, is_disk_full
from omr.extra_trackers import with_extras
from omr.option import GROUPS, fields_of
from omr.tracker import MlflowTracker, RecordingTracker, Status, Tracker

SUMMARY = "summary.json"
"""What each run leaves in its folder: id, status, choices, metrics."""
TRACEBACK = "traceback.txt"
"""What a run leaves that ended by a bug in omr."""


@dataclass
class Run:
    cfg: Config
    folder: Path
    """Output folder of this run: multirun/STUDY/TIME/N."""
    store: Store
    tracker: Tracker
    fingerprint: str
    chosen: dict[str, str]
    """What tells this run from others, see `choices`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Everything logged by `log`, for the table at the end."""

    def log(self, values: Mapping[str, float]) -> None:
        """Summary metrics, each logged once a run."""
        self.metrics.update(values)
        self.tracker.metrics(values)

    def say(self, line: str) -> None:
        """One line for the person watching."""
        print(f"[{self.cfg.study}] {line}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage into `stage/NAME_s`."""
        started = time.perf_counter()
        yield
        self.log({f"stage/{name}_s": time.perf_counter() - started})

    def use(self, name: str, artifact: Artifact) -> Artifact:
        """Record the artifact a stage made or reused: its key as a tag, its metrics when it was made here or not."""
        self.tracker.tags({f"artifact.{name}": f"{artifact.kind}/{artifact.key}"})
        self.log({f"stage/{name}_reused": float(not artifact.built)})
        return artifact

    def end(self, status: Status, reason: str = "") -> None:
        """Write the summary that tables are made from, then close the run in the tracker."""
        summary = {
            "run_id": self.tracker.run_id,
            "fingerprint": self.fingerprint,
            "status": status,
            "reason": reason,
            "name": run_name(self.chosen),
            "choices": self.chosen,
            "metrics": self.metrics,
        }
        try:
            (self.folder / SUMMARY).write_text(json.dumps(summary, indent=1))
            self.tracker.end(status, reason)
        except Exception as error:
            if not is_disk_full(error):
                raise
            if status == "FINISHED":
                raise disk_full() from None
            self.say(f"no disk space left to record that this run is {status}")

    def resume_folder(self) -> Path:
        """A folder that a killed run of the same fingerprint may have left for this one; its user deletes it."""
        return home() / "artifacts" / "unfinished" / self.fingerprint


def new_folder(study: str) -> Path:
    """A folder for one command's output that no other command has, made here: multirun/STUDY/TIME."""
    parent = home() / "multirun" / study
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for count in itertools.count(1):
        folder = parent / (stamp if count == 1 else f"{stamp}_{count}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()  # of two commands in the same second one makes it
            return folder
    raise AssertionError("unreachable")


def fingerprint(cfg: Config) -> str:
    """The digest of everything that can change what the run measures."""
    recipe: dict[str, Any] = {group: content(getattr(cfg, group)) for group in (*GROUPS, "model", "sampling")}
    recipe["benchmark"] = content(cfg.benchmark)
    recipe["device"] = cfg.device_name()
    revisions = {g: type(getattr(cfg, g)).REVISION for g in ("quant", "drafter", "server")}
    inputs = {"omr": __version__, **{g: str(r) for g, r in revisions.items()}, **_local_files(cfg)}
    return key_of("run", recipe, inputs)


def _local_files(cfg: Config) -> dict[str, str]:
    """Size and mtime of the files read from disk: an edited benchmark or checkpoint is another experiment."""
    text = cfg.model.text.path
    places = {
        "model": source.local_folder(cfg.model) if cfg.server.needs_weights else None,
        "text": Path(text).expanduser() if text else None,
        "benchmark": cfg.benchmark.local_file(),
        **cfg.job.local_files(),
    }
    own = cfg.drafter.own_text()
    if own and own.problems:
        places["own_text"] = Path(own.problems).expanduser()
    found = {}
    for name, place in places.items():
        if place is not None and place.exists():
            files = sorted(place.iterdir()) if place.is_dir() else [place]
            found[name] = json.dumps([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])
        elif place is not None:
            found[name] = str(place)  # the name of something shipped
    return found


@contextlib.contextmanager
def open_run(
    cfg: Config,
    folder: Path,
    *,
    overrides: Sequence[str],
    picked: Mapping[str, str] | None = None,
    parent_id: str | None = None,
) -> Iterator[Run]:
    """Open the run of `cfg` in `folder`, which is created; close it with the status that fits how the body ended.

    `overrides` and `picked` are the command line and Hydra's choice of each group that `cfg` was composed from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = choices(cfg, overrides, picked or {})
    uri = cfg.tracking()
    tracker: Tracker
    if uri is None:
        tracker = RecordingTracker()
    else:
        tracker = MlflowTracker(uri, cfg.study, run_name(chosen), home=home(), parent_id=parent_id)
    tracker = with_extras(tracker, cfg.also_track, study=cfg.study, name=run_name(chosen), folder=folder, home=home())
    run = Run(cfg, folder, Store(home() / "artifacts"), tracker, fingerprint(cfg), chosen)
    run.store.notice = run.say
    try:
        _describe(run, overrides)
        yield run
    except (KeyboardInterrupt, Terminated):
        run.end("KILLED", "interrupted")
        raise
    except OmrError as error:
        run.end("FAILED", str(error))
        raise
    except BaseException as error:
        if is_disk_full(error):
            full = disk_full()
            run.end("FAILED", str(full))
            raise full from None
        crash = folder / TRACEBACK
        crash.write_text(traceback.format_exc())
        run.tracker.artifact(crash)
        run.end("FAILED", f"{type(error).__name__}: {error}")
        raise
    run.end("FINISHED")


def disk_full() -> ResourceError:
    return ResourceError(f"no disk space left in {home()}; free some, or set OMR_HOME to another disk")


def choices(cfg: Config, overrides: Sequence[str], picked: Mapping[str, str]) -> dict[str, str]:
    """What tells runs apart: the choice of each group, then the keys set on the command line (`sampling.seed`).

    A preset keeps its name (`fp8_channel`, not `fp8`) if it was `picked`; models and benchmarks name themselves.
    """
    groups = {group: picked.get(group) or str(getattr(cfg, group).option_name) for group in GROUPS}
    groups |= {"model": cfg.model.name, "benchmark": cfg.benchmark.name}
    groups |= {"sampling": picked["sampling"]} if "sampling" in picked else {}
    keys = dict(o.split("=", 1) for o in overrides if re.match(r"[a-z_]+(\.\w+)+=", o))
    return groups | keys


def run_name(chosen: Mapping[str, str]) -> str:
    """`tiny fp8 redrafter native`: a run in a list."""
    return " ".join(chosen[group] for group in ("model", "quant", "drafter", "server"))


def _describe(run: Run, overrides: Sequence[str]) -> None:
    """Write the resolved config and log choices, params, versions and commit."""
    from omegaconf import OmegaConf

    data = {f.name: _plain(getattr(run.cfg, f.name)) for f in dataclasses.fields(run.cfg)}
    resolved = run.folder / "config.yaml"
    resolved.write_text(OmegaConf.to_yaml(OmegaConf.create(data)))
    settings = {key: value for key, value in data.items() if key not in ("study", "rerun", "tracking_uri")}
    run.tracker.params(run.chosen | dict(_flat(settings)))
    run.tracker.tags(
        {f"choice.{key}": value for key, value in run.chosen.items()}
        | {
            "omr.fingerprint": run.fingerprint,
            "omr.overrides": shlex.join(overrides),
            "omr.folder": str(run.folder),
            "omr.version": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()} {platform.system()} {platform.release()}",
            **_commit(),
            **{f"version.{name}": metadata.version(name) for name in ("torch", "transformers", "mlflow", "hydra-core")},
        }
    )
    run.tracker.artifact(resolved)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fields_of(value)
    return getattr(value, "name", value) if not isinstance(value, str | int | float | bool | None) else value


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _commit() -> dict[str, str]:
    """Commit and dirty flag of the checkout that omr runs from; empty from a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
        ).stdout.strip()

    return {
        "git.commit": git("rev-parse", "HEAD"),
        "git.dirty": str(bool(git("status", "--porcelain", "-uno"))).lower(),
    }
