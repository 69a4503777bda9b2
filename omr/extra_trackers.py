"""TensorBoard and Weights & Biases beside MLflow, for those who ask: `also_track=[tensorboard,wandb]`.

    tensorboard   OMR_HOME/tensorboard/STUDY/TIME-N  torch's SummaryWriter; pip install 'omr[tensorboard]'
    wandb         project STUDY, the run's own name  W&B's settings are those of its environment (WANDB_MODE=offline,
                                                     WANDB_API_KEY); pip install 'omr[wandb]'

Both get params, tags, metrics, curves and how the run ended. Files stay with MLflow: transcripts are not sent anywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omr.errors import MissingBackend

if TYPE_CHECKING:
    from omr.tracker import Status, Tracker


class Extra(Enum):
    tensorboard = "tensorboard"
    wandb = "wandb"


def require(extras: Iterable[Extra]) -> None:
    """Raise MissingBackend for one whose package is not here. Imports nothing."""
    for extra in extras:
        if importlib.util.find_spec(extra.value) is None:
            raise MissingBackend(extra.value, extra=extra.value, why=f"also_track=[{extra.value}] writes with it")


def with_extras(first: Tracker, extras: Sequence[Extra], *, study: str, name: str, folder: Path, home: Path) -> Tracker:
    """`first`, and everything that it hears told to `extras` too. `folder` is the run's, TIME/N its last two parts."""
    if not extras:
        return first
    made: list[Tracker] = []
    for extra in extras:
        if extra is Extra.tensorboard:
            made.append(TensorBoardTracker(home / "tensorboard" / study / "-".join(folder.parts[-2:])))
        else:
            made.append(WandbTracker(study, name, first.run_id, home))
    return Several(first, made)


class Several:
    """A tracker that tells others what it is told; its id is the first one's."""

    def __init__(self, first: Tracker, others: Sequence[Tracker]) -> None:
        self.run_id = first.run_id
        self.trackers = [first, *others]

    def params(self, values: Mapping[str, Any]) -> None:
        for one in self.trackers:
            one.params(values)

    def tags(self, values: Mapping[str, str]) -> None:
        for one in self.trackers:
            one.tags(values)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        for one in self.trackers:
            one.metrics(values, step)

    def curve(self, rows: Sequence[Mapping[str, float]], step_key: str = "step") -> None:
        for one in self.trackers:
            one.curve(rows, step_key)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        for one in self.trackers:
            one.artifact(path, folder)

    def end(self, status: Status, reason: str = "") -> None:
        for one in reversed(self.trackers):  # the first decides how the run ended: it is told last
            one.end(status, reason)


class TensorBoardTracker:
    """An event file in `folder`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = folder.name
        writer: Callable[[str], Any] = SummaryWriter
        self._writer = writer(str(folder))

    def params(self, values: Mapping[str, Any]) -> None:
        self._text("params", values)

    def tags(self, values: Mapping[str, str]) -> None:
        self._text("tags", values)

    def _text(self, title: str, values: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {key} | {value} |" for key, value in values.items())
        self._writer.add_text(title, f"| name | value |\n| --- | --- |\n{rows}")

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, float(value), step)

    def curve(self, rows: Sequence[Mapping[str, float]], step_key: str = "step") -> None:
        for row in rows:
            self.metrics({k: v for k, v in row.items() if k != step_key}, int(row[step_key]))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """It keeps no files."""

    def end(self, status: Status, reason: str = "") -> None:
        self._text("status", {"status": status, "reason": reason})
        self._writer.close()


class WandbTracker:
    """One run in the project `study`."""

    def __init__(self, study: str, name: str, run_id: str, home: Path) -> None:
        import wandb

        home.mkdir(parents=True, exist_ok=True)
        self.run_id = run_id
        self._run: Any = wandb.init(project=study, name=name, dir=str(home), config={"omr.run_id": run_id})
        self._run.define_metric("*", step_metric="step")

    def params(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def tags(self, values: Mapping[str, str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self._run.summary.update({key: float(value) for key, value in values.items()})

    def curve(self, rows: Sequence[Mapping[str, float]], step_key: str = "step") -> None:
        for row in rows:
            self._run.log({"step" if key == step_key else key: float(value) for key, value in row.items()})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Nothing is uploaded."""

    def end(self, status: Status, reason: str = "") -> None:
        self._run.summary.update({"omr.status": status, "omr.reason": reason})
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
