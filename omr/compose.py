"""From a command line to typed configs: every cell is composed and checked before any cell starts.

Hydra would compose a cell only when its turn comes, so a typo in the last cell would surface hours later. Here the grid
is expanded first, with Hydra's own parser and sweeper rules, and every cell goes through composition, the unknown-key
check and all range and combination checks. What Hydra, OmegaConf and YAML raise becomes one line: key, value, nearest
choice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from omr.config import VALUES, Config, nearest, register_schemas, typed
from omr.errors import ConfigError
from omr.option import GROUPS, discover

USAGE = """\
omr - reproducible experiments on fast inference for math-reasoning LLMs

  python -m omr                                   a complete run on the embedded default
  python -m omr +experiment=fp8_redrafter         a named run
  python -m omr +experiment=fp8 sampling.temperature=0 server.port=5000
  python -m omr --multirun quant=bf16,fp8 drafter=none,redrafter
  omr VERB --help                                 what is not a run; `omr verbs` lists them

Groups, chosen as GROUP=CHOICE (+experiment=CHOICE); a key inside is GROUP.KEY=VALUE:"""


@dataclass
class Cell:
    """One run of the grid."""

    overrides: list[str]
    cfg: Config


@dataclass
class Plan:
    """What a command line asks for."""

    cells: list[Cell]
    multirun: bool
    refused: list[str]
    """One line for each cell that cannot be composed; then nothing may start."""


def conf_dir() -> Path:
    """The packaged conf/, else the checkout's."""
    here = Path(__file__).resolve().parent
    packaged = here / "_conf"
    return packaged if packaged.is_dir() else here.parent / "conf"


def search_path() -> list[Path]:
    """Further config roots: conf/ and experiments/ of the working folder, then the packaged or checkout studies."""
    here = Path(__file__).resolve().parent
    studies = here / "_experiments" if (here / "_experiments").is_dir() else here.parent / "experiments"
    own = [Path.cwd() / "conf", Path.cwd() / "experiments"]
    return [p for p in dict.fromkeys([*own, studies]) if p.is_dir() and p.resolve() != conf_dir().resolve()]


def with_search_path(overrides: list[str]) -> list[str]:
    """The overrides with Hydra's search path added, unless the user set one."""
    if any(o.lstrip("+").startswith("hydra.searchpath") for o in overrides):
        return overrides
    return [*overrides, f"hydra.searchpath=[{','.join(f'file://{p}' for p in search_path())}]"]


def usage() -> str:
    """The help text, with the choices of every group."""
    groups = [f"  {g:10} {', '.join(_choices(g))}" for g in (*GROUPS, *VALUES, "experiment")]
    return "\n".join([USAGE, *groups, "", "Every key with its value: python -m omr --cfg job"])


def plan(overrides: list[str], *, multirun: bool) -> Plan:
    """Compose every cell. Raises ConfigError when not even the grid can be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    register_schemas()
    overrides = with_search_path(overrides)
    with one_line():
        parsed = OverridesParser.create().parse_overrides(overrides)
    for override in parsed:
        _check_group(override)
    plain = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
    swept = [o for o in parsed if o.is_sweep_override()]
    with _hydra():
        params: dict[str, Any] = {}
        target = ""
        try:
            with one_line():
                root = _compose(plain, hydra=True).hydra
            multirun = multirun or str(root.mode).endswith("MULTIRUN")
            params = dict(root.sweeper.get("params") or {})
            target = str(root.sweeper._target_)
        except ConfigError:
            if not swept:
                raise  # with a swept group, the part of the grid that does not vary need not compose alone
        if swept and not multirun:
            raise ConfigError(
                f"{swept[0].input_line} lists several values; add --multirun to run them all, or quote the commas"
            )
        if not multirun:
            return Plan(*_cells([[o.input_line for o in parsed if o.input_line]], False))
        if target and not target.endswith("BasicSweeper"):  # an optimiser chooses the cells as it goes
            return Plan(*_cells([plain], True))
        with one_line():
            grid = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()]) + parsed
            return Plan(*_cells(_expand(grid), True))


def _check_group(override: Any) -> None:
    """Raise ConfigError for a group without a choice (`quant=`, `quant=null`), which Hydra answers at length."""
    group = override.key_or_group
    if group in (*GROUPS, *VALUES, "experiment") and not override.is_delete() and override.value() in (None, ""):
        raise ConfigError(f"{override.input_line}: {group} takes one of {', '.join(_choices(group))}")


def _expand(grid: list[Any]) -> list[list[str]]:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    batches = BasicSweeper.split_arguments([o for o in grid if not o.is_hydra_override()], max_batch_size=None)
    hydra_overrides = [o.input_line for o in grid if o.is_hydra_override() and not o.is_sweep_override()]
    return [[*cell, *hydra_overrides] for cell in batches[0]]


def _cells(grid: list[list[str]], multirun: bool) -> tuple[list[Cell], bool, list[str]]:
    cells, refused = [], []
    for at, overrides in enumerate(grid):
        own = [o for o in overrides if not o.lstrip("+").startswith("hydra.")]
        try:
            with one_line():
                cells.append(Cell(own, typed(_compose(overrides, hydra=False))))
        except ConfigError as error:
            refused.append(f"cell {at} ({' '.join(own)}): {error}" if len(grid) > 1 else str(error))
    return cells, multirun, refused


@contextmanager
def _hydra() -> Iterator[None]:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="omr"):
        yield


def _compose(overrides: list[str], *, hydra: bool) -> Any:
    from hydra import compose

    return compose("config", overrides=overrides, return_hydra_config=hydra)


@contextmanager
def one_line() -> Iterator[None]:
    """Raise what Hydra, OmegaConf and YAML raise as a ConfigError of one line."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_explain(error)) from None


def _explain(error: BaseException) -> str:
    from hydra.errors import OverrideParseException

    chain = []
    at: BaseException | None = error
    while at is not None:
        chain.append(at)
        at = at.__cause__ or at.__context__
    text = "\n".join(str(e) for e in chain)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not KEY=VALUE, +KEY=VALUE or ~KEY; quote a value that holds spaces, commas or ="
    if found := re.search(r"Could not find '([^']+)/([^/']+)'", text):
        group, choice = found.groups()
        if group.startswith("hydra/"):
            return f"{group}={choice}: no such choice; a plugin has to be installed (hydra-submitit-launcher for Slurm)"
        return f"{group}={choice}: no such choice{nearest(choice, _choices(group))}"
    if found := re.search(r"Could not override '([^'=]+)'\.\s+No match in the defaults list", text):
        return f"{found[1]}: no such group or key{nearest(found[1], _groups())}"
    if found := re.search(r"Key '([^']+)' (?:is )?not in (?:struct|'[^']+')\s*\n\s*full_key: (\S+)", text):
        return f"{found[2]}: no such key{_owners(found[2]) or nearest(found[2], _keys(found[2]))}"
    if found := re.search(r"full_key: (\S+)", text):
        cause = next((str(e) for e in reversed(chain) if "full_key" in str(e)), text)
        return f"{found[1]}: {cause.splitlines()[0]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2]) if lines else type(error).__name__


def _groups() -> list[str]:
    return [*GROUPS, *VALUES, "experiment", *(f.name for f in fields(Config))]


def _choices(group: str) -> list[str]:
    roots = [conf_dir(), *search_path()]
    return sorted({p.stem for root in roots for p in (root / group).glob("*.yaml")})


def _owners(full_key: str) -> str:
    """` here; drafter=redrafter has it`: the choices of the group whose option has the key, if any."""
    group, _, key = full_key.partition(".")
    having = sorted(name for (g, name), cls in discover().items() if g == group and key in _dotted(cls))
    return f" in the {group} chosen; {group}={','.join(having)} has it" if having else ""


def _keys(full_key: str) -> list[str]:
    """Every key that could have been meant: all fields of all dataclasses of that group, dotted."""
    group = full_key.split(".")[0]
    classes = [cls for (g, _), cls in discover().items() if g == group] or [VALUES.get(group, Config)]
    prefix = f"{group}." if "." in full_key else ""
    return sorted({prefix + name for cls in classes for name in _dotted(cls)})


def _dotted(cls: type[Any]) -> Iterator[str]:
    import typing

    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        yield f.name
        if is_dataclass(hints[f.name]):
            yield from (f"{f.name}.{inner}" for inner in _dotted(hints[f.name]))
