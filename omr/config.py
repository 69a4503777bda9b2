"""The root config: one typed value for each group, and the checks that need more than one of them.

Hydra composes YAML against the structured schemas registered here, so a wrong name or type fails at compose time.
`typed` turns the composed config into these dataclasses; ranges (`__post_init__` of the options) and combinations
(`Config.__post_init__`) are checked there. After that no code sees a DictConfig.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from omr.benchmark import Benchmark
from omr.drafter import Drafter
from omr.errors import ConfigError
from omr.extra_trackers import Extra
from omr.job import Job
from omr.machine import has_gpu
from omr.model import Model
from omr.option import GROUPS, discover
from omr.quant import Quantiser
from omr.sampling import Sampling
from omr.sandbox import Sandbox
from omr.server import Server
from omr.solve.prompt import CODE_TAGS, PROMPTS

VALUES: dict[str, type[Any]] = {"model": Model, "sampling": Sampling, "benchmark": Benchmark}
"""Value groups: one dataclass, many YAMLs."""


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(kw_only=True)
class Config:
    """One run."""

    job: Job
    model: Model
    quant: Quantiser
    drafter: Drafter
    server: Server
    sampling: Sampling
    sandbox: Sandbox
    benchmark: Benchmark
    study: str = "default"
    """The question this run belongs to: folder in multirun/ and MLflow experiment."""
    device: Device = Device.auto
    rerun: bool = False
    """Run a cell of a sweep again although the study has a finished run of the same config."""
    tracking_uri: str | None = "sqlite"
    """An MLflow URI; `sqlite` is mlflow.db in OMR_HOME; null tracks nothing."""
    also_track: list[Extra] = field(default_factory=list)
    """`tensorboard` and `wandb` get the same params, metrics and curves; see omr/extra_trackers.py."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.study):
            raise ConfigError(f"study must be a plain folder name, got {self.study!r}")
        _known("model.prompt", self.model.prompt, PROMPTS)
        _known("model.code_tags", self.model.code_tags, CODE_TAGS)
        served = "none" if self.job.trains else self.drafter.option_name
        self.server.require_choices(self.quant.option_name, served)
        text = self.model.text
        if self.server.needs_weights and not (text.corpus or text.path or text.hub):
            own = self.drafter.own_text()
            drafter_rows = 0 if own and own.problems else self.drafter.text_rows()
            for wants, why in ((self.quant.calib_samples, "calibrates"), (drafter_rows, "is trained")):
                if wants:
                    group = "quant" if why == "calibrates" else "drafter"
                    raise ConfigError(
                        f"{group}={getattr(self, group).option_name} {why} on text and model={self.model.name} names "
                        "none; set model.text.path to a jsonl of problem and solution, or model.text.corpus=true"
                    )
        self._check_room("sampling", self.sampling)
        if own := self.drafter.own_text():
            self._check_room("drafter.train.own.sampling", own.sampling)

    @property
    def any_family(self) -> bool:
        """Whether the model may be of any family: another program serves it as it is, and omr does not load it."""
        as_it_is = self.quant.identity and not self.drafter.trained
        return self.job.serves and as_it_is and self.server.serves_any_family

    def _check_room(self, name: str, sampling: Sampling) -> None:
        if sampling.max_tokens >= self.model.context_tokens:
            raise ConfigError(
                f"{name}.max_tokens={sampling.max_tokens} leaves no room for a prompt in "
                f"model.context_tokens={self.model.context_tokens}; lower the first or raise the second"
            )

    def device_name(self) -> str:
        """`cuda` or `cpu`. Raises ConfigError for device=cuda without a GPU. Initialises nothing."""
        present = has_gpu()
        if self.device is Device.cuda and not present:
            raise ConfigError("device=cuda, but there is no NVIDIA GPU here; use device=cpu or device=auto")
        return "cpu" if self.device is Device.cpu or not present else "cuda"

    def tracking(self) -> str | None:
        """The MLflow URI with the default filled in."""
        return default_tracking() if self.tracking_uri == "sqlite" else self.tracking_uri


def home() -> Path:
    """Where artifacts, runs and the tracking database go: OMR_HOME, else the working folder."""
    return Path(os.environ.get("OMR_HOME") or ".").resolve()


def default_tracking() -> str:
    """The MLflow URI of the local database."""
    return f"sqlite:///{home() / 'mlflow.db'}"


def register_schemas() -> None:
    """Put every option and value dataclass into Hydra's ConfigStore: schema/GROUP/NAME, schema/GROUP, omr_schema."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for (group, name), cls in discover().items():
        store.store(group=f"schema/{group}", name=name, node=cls)
    for group, cls in VALUES.items():
        store.store(group="schema", name=group, node=cls)
    store.store(name="omr_schema", node=Config)


def typed(composed: Any) -> Config:
    """The typed config of one composed run (without Hydra's own node).

    Raises ConfigError for a key that no dataclass has (`+quant.clp=0.9`), a bad value or an impossible combination.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _refuse_unknown(composed, Config, "")
    try:
        cfg = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    assert isinstance(cfg, Config)
    return cfg


def _refuse_unknown(node: Any, cls: type[Any], where: str) -> None:
    from omegaconf import DictConfig, OmegaConf

    names = {f.name for f in fields(cls)}
    for key in node:
        if key not in names:
            raise ConfigError(f"unknown key {where}{key}{nearest(str(key), names)}")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            child_cls = OmegaConf.get_type(child)
            if isinstance(child_cls, type) and hasattr(child_cls, "__dataclass_fields__"):
                _refuse_unknown(child, child_cls, f"{where}{key}.")


def nearest(word: str, among: Iterable[str]) -> str:
    """`; did you mean X?` or the list of choices: the end of an error line."""
    choices = sorted(among)
    same_leaf = [c for c in choices if c.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    close = same_leaf or difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(choices)}"


def _known(key: str, value: str, among: Iterable[str]) -> None:
    names = list(among)
    if value not in names:
        raise ConfigError(f"{key}={value!r} is unknown{nearest(value, names)}")


assert set(VALUES) | set(GROUPS) <= {f.name for f in fields(Config)}
