"""Runs and sweeps: check every cell, then let Hydra's launcher run them, then the table.

A sweep is one parent run in MLflow with a child for each cell. The parent, and so the database, is created before the
first cell: cells that start at the same moment must not race to create it. A cell that fails is reported and the rest
go on; the exit code at the end is not zero. A cell whose fingerprint has a FINISHED run in the study is not run again:
it stands in the table with the run it comes from (`rerun=true` insists).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from omr import compose, pipeline, table
from omr.config import Config, home, typed
from omr.errors import ConfigError, Failure, OmrError, ResourceError, Terminated, UserError
from omr.run import SUMMARY, TRACEBACK, choices, fingerprint, new_folder, open_run, run_name
from omr.tracker import MlflowTracker

PARENT = "OMR_PARENT_RUN"
"""Environment variable that carries the parent run's id to the cells, whichever launcher runs them."""


_failures: list[OmrError] = []
"""What ended the cells of this process. They do not raise through Hydra, which would print its own account of it."""


def run_all(overrides: list[str], *, multirun: bool) -> int:
    """Check, run and tabulate what the command line asks for; the exit code."""
    plan = checked(overrides, multirun=multirun)
    first = plan.cells[0].cfg
    folder = new_folder(first.study)
    places = [f"hydra.run.dir={folder}/0", f"hydra.sweep.dir={folder}"]
    if not plan.multirun:
        hand_to_hydra([*overrides, *places])
        rows = [row for row in summaries(folder) if "accuracy/problems" in row["metrics"]]
        if rows:
            print(table.table(rows))
            _say_where(folder / "0", first)
        return 0
    return _sweep(first, [*overrides, *places, "--multirun"], folder)


def checked(overrides: list[str], *, multirun: bool) -> compose.Plan:
    """Every cell composed and passed by preflight.

    Raises what refused a single run. For a sweep each refused cell gets a line on stderr, and an error counts them.
    """
    plan = compose.plan(overrides, multirun=multirun)
    refused: list[tuple[str, OmrError]] = [(line, ConfigError(line)) for line in plan.refused]
    for at, cell in enumerate(plan.cells):
        try:
            pipeline.preflight(cell.cfg)
        except OmrError as error:
            refused.append((f"cell {at} ({' '.join(cell.overrides)}): {error}", error))
    if not refused:
        return plan
    if not plan.multirun:
        raise refused[0][1]
    for line in dict.fromkeys(line for line, _ in refused):
        print(f"omr: {line}", file=sys.stderr)
    mistakes = any(isinstance(error, UserError) for _, error in refused)
    raise (ConfigError if mistakes else ResourceError)(f"{len(refused)} cell(s) refused, nothing was started")


def _sweep(first: Config, args: list[str], folder: Path) -> int:
    uri = first.tracking()
    parent = MlflowTracker(uri, first.study, f"sweep {folder.name}", home=home()) if uri else None
    if parent:
        os.environ[PARENT] = parent.run_id
        parent.tags(
            {"omr.overrides": shlex.join(a for a in args if not a.startswith(("hydra.", "--"))), "omr.kind": "sweep"}
        )
    try:
        hand_to_hydra(args)
        rows = summaries(folder)
        failed = [row for row in rows if row["status"] == "FAILED"]
        files = table.write(rows, folder)
        print((folder / "table.md").read_text())
        for row in failed:
            print(f"omr: {row['name']} failed: {row['reason']}", file=sys.stderr)
        if parent:
            for file in files:
                parent.artifact(file)
            parent.end("FAILED" if failed else "FINISHED", f"{len(failed)} cells failed" if failed else "")
    except (KeyboardInterrupt, Terminated):
        if parent:
            parent.end("KILLED", "interrupted")
        raise
    except BaseException as error:
        if parent:
            parent.end("FAILED", f"{type(error).__name__}: {error}")
        raise
    finally:
        os.environ.pop(PARENT, None)
    _say_where(folder, first)
    return 1 if failed else 0


def _say_where(folder: Path, cfg: Config) -> None:
    print(f"everything it wrote: {folder}")
    if uri := cfg.tracking():
        ui = "mlflow" if shutil.which("mlflow") else f"{sys.executable} -m mlflow"
        print(f"in the browser: {ui} ui --backend-store-uri {uri}   (study {cfg.study!r} at http://127.0.0.1:5000)")


def summaries(folder: Path) -> list[dict[str, Any]]:
    """The summary of each cell under a sweep's folder, in cell order."""
    found = sorted(folder.glob(f"*/{SUMMARY}"), key=lambda p: int(p.parent.name) if p.parent.name.isdigit() else 0)
    return [json.loads(path.read_text()) for path in found]


def hand_to_hydra(args: list[str]) -> None:
    """Let Hydra parse `args` and call `cell` for each run, or print what a flag like --help asks for.

    A single run that failed raises its error here; in a sweep the summaries tell.
    """
    import hydra

    from omr.config import register_schemas

    register_schemas()
    overrides = [a for a in args if "=" in a and not a.startswith("-")]
    flags = [a for a in args if a not in overrides]  # Hydra's parser wants them before the overrides
    sys.argv = ["omr", *flags, *compose.with_search_path(overrides)]
    with compose.one_line():
        hydra.main(version_base="1.3", config_path=str(compose.conf_dir()), config_name="config")(cell)()
    if _failures and "--multirun" not in args:
        raise _failures[0]


def cell(composed: Any) -> float | None:
    """One run: typed config, open Run, job. Called by Hydra with the composed config."""
    from hydra.core.hydra_config import HydraConfig

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    cfg = typed(composed)
    overrides = list(hydra_cfg.overrides.task)
    picked = {group: str(name) for group, name in hydra_cfg.runtime.choices.items()}
    parent_id = os.environ.get(PARENT)
    if parent_id and not cfg.rerun and (earlier := _finished_before(cfg)):
        chosen = choices(cfg, overrides, picked)
        summary = {
            "run_id": earlier["id"],
            "fingerprint": fingerprint(cfg),
            "status": "SKIPPED",
            "reason": "finished before",
            "name": run_name(chosen),
            "choices": chosen,
            "metrics": earlier["metrics"],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY).write_text(json.dumps(summary, indent=1))
        print(f"[{cfg.study}] {run_name(chosen)}: finished before as run {earlier['id'][:8]}, skipped", file=sys.stderr)
        return None
    try:
        with open_run(cfg, folder, overrides=overrides, picked=picked, parent_id=parent_id) as run:
            return cfg.job.run(run)
    except OmrError as error:
        _failures.append(error)
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        _failures.append(Failure(f"internal error: {line}; traceback: {folder / TRACEBACK}"))
    return None


def _finished_before(cfg: Config) -> dict[str, Any] | None:
    uri = cfg.tracking()
    if uri is None:
        return None
    found = MlflowTracker(uri, cfg.study, "", home=home(), run_id=os.environ[PARENT]).finished_runs(
        cfg.study, fingerprint(cfg)
    )
    return found[0] if found else None
