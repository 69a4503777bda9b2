"""The order of things: weights -> text -> checkpoint -> drafter -> engine -> server.

Jobs pull: each step asks for what it needs, and makes its artifact only if the store has none of that key. So the order
below is the order of dependence, not of calls, and a sweep over servers and samplings builds each checkpoint once.

    weights     a Hugging Face folder             keyed by hub revision, package digest or file digests
    text        problems with solutions, parquet  keyed by the source, the prompt and the tokenizer's weights
    own text    the model's own solutions         keyed by weights, problems, prompt, sampling and tool limits
    checkpoint  quantised folder                  keyed by weights, recipe and calibration text; bf16 is the weights
    drafter     trained head                      keyed by weights, recipe and text: not by `quant`
    engine      a server's own build              only for servers that build one
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omr import dataset, extra_trackers, on_policy, source, tracker
from omr.artifact import Store, content, file_sha256, resume_folder
from omr.benchmark import Problem
from omr.config import Config, home
from omr.errors import ConfigError, ResourceError
from omr.machine import gpu_bytes, host_bytes
from omr.option import discover
from omr.process import check_port, run_verb
from omr.run import Run
from omr.server import Endpoint, ServeSpec
from omr.text import load_tokenizer

if TYPE_CHECKING:
    from omr.drafter._own_text import OwnText

MIN_FREE_BYTES = 1 << 30
"""Disk that must be free before a run starts."""


@dataclass(frozen=True)
class Made:
    """Something on disk and the key that names its content."""

    path: Path
    key: str


def preflight(cfg: Config) -> None:
    """Refuse what this machine cannot run, before anything is allocated. Cheap: nothing is imported or loaded.

    Raises MissingBackend, ConfigError, InputError or ResourceError.
    """
    device = cfg.device_name()
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":  # its ranks would wait for each other's artifacts
        raise ConfigError(
            "omr starts its own processes: run it once (drafter.num_processes=N trains on N GPUs), not under torchrun; "
            f"WORLD_SIZE is {world}"
        )
    cfg.job.preflight(cfg)
    extra_trackers.require(cfg.also_track)
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home()):
            pass
    except OSError as error:
        raise ResourceError(f"cannot write in {home()} ({error.strerror}); set OMR_HOME to another folder") from None
    if (free := shutil.disk_usage(home()).free) < MIN_FREE_BYTES:
        raise ResourceError(f"{free / 1e9:.1f} GB free in {home()}, a run needs 1 GB; free some or set OMR_HOME")
    if uri := cfg.tracking():
        tracker.preflight(uri)
    if cfg.server.needs_weights:
        source.preflight(cfg.model, serves=cfg.job.serves, any_family=cfg.any_family)
        _require_room_to_make(cfg, device)
    dataset.preflight(cfg.model.text)
    cfg.benchmark.preflight()
    own = cfg.drafter.own_text() if cfg.job.trains or cfg.job.needs_backend(cfg.server) else None
    if own:
        on_policy.problem_source(own)
    if cfg.job.uses_tools or (own and own.uses_tools):
        cfg.sandbox.preflight()
    if cfg.job.needs_backend(cfg.server):
        cfg.server.preflight(_spec(cfg, device))
    if cfg.job.trains and own:
        cfg.server.preflight(_spec(_writer(cfg), device))
    if cfg.job.serves and cfg.server.needs_weights and cfg.server.port:
        check_port(cfg.server.host, cfg.server.port)


def _require_room_to_make(cfg: Config, device: str) -> None:
    """Raise ResourceError when the base does not fit where it is calibrated, or a drafter trained on it.

    Once the store has a checkpoint or drafter of such a size, made here or copied from a larger machine, nothing is
    said: whether it is the one that this config wants is known only when the weights are here.
    """
    params = cfg.model.params_b * 1e9
    have = gpu_bytes() if device == "cuda" else host_bytes()
    if not 0 < have < 2 * params:
        return
    whole = cfg.job.needs_backend(cfg.server)  # then both are made on the way
    for kind, makes, what, least in (
        ("checkpoint", cfg.quant.calib_samples and (whole or cfg.job.option_name == "build"), "calibrates", 0.3),
        ("drafter", cfg.drafter.trained and (whole or cfg.job.trains), "is trained", 0.01),
    ):
        if makes and not _has_artifact(kind, least * params):
            option = cfg.quant if kind == "checkpoint" else cfg.drafter
            choice = f"{option.option_group}={option.option_name}"
            raise ResourceError(
                f"{choice} {what} on the whole model, {2 * params / 1e9:.0f} GB in bfloat16, and this machine's "
                f"{device} memory is {have / 1e9:.0f} GB; make the {kind} on a larger one and copy artifacts/ here"
            )


def _has_artifact(kind: str, least_bytes: float) -> bool:
    sizes = (
        sum(file["bytes"] for file in made.manifest["files"].values())
        for made in Store(home() / "artifacts").all()
        if made.kind == kind
    )
    return any(size >= least_bytes for size in sizes)


def weights(run: Run) -> Made:
    """The base model's folder."""
    found = source.resolve(run.cfg.model, run.store, any_family=run.cfg.any_family)
    return Made(found.folder, found.key)


def text(run: Run, rows: int, base: Made, *, use: str = "text") -> Made:
    """`rows` documents in the model's own prompt format, for calibration and drafter training.

    `use` names the stage and its artifact in the run.
    """
    model = run.cfg.model
    recipe = {**content(model.text), "rows": rows, "prompt": model.prompt, "code_tags": model.code_tags}

    def make(out: Path) -> dict[str, float]:
        written = dataset.write_text(
            islice(_rows(run, rows), rows),
            tokenizer_dir=base.path,
            prompt=model.prompt,
            code_tags=model.code_tags,
            out=out / "text.parquet",
            min_rows=rows,
            source=model.text.path or model.text.hub or "the corpus",
        )
        return {"rows": written}

    with run.stage(use):
        made = run.store.get("text", recipe, {"weights": base.key, **_rows_key(run)}, make)
    run.use(use, made)
    return Made(made.path / "text.parquet", made.key)


def _rows(run: Run, rows: int) -> Iterable[tuple[str, str]]:
    text_source = run.cfg.model.text
    if text_source.corpus:
        from omr import corpus

        return corpus.rows(rows, seed=text_source.seed)
    return dataset.read_rows(text_source, limit=rows)


def _rows_key(run: Run) -> dict[str, str]:
    if run.cfg.model.text.corpus:
        from omr import corpus

        return {"corpus": str(corpus.REVISION)}
    return dataset.source_key(run.cfg.model.text)


def own_text(run: Run, how: OwnText, rows: int, base: Made) -> Made:
    """`rows` documents that the model `base` writes itself, served without a drafter and with tools."""
    cfg, model = run.cfg, run.cfg.model
    recipe = {
        **content(how),
        "tools": how.uses_tools and cfg.sandbox.option_name != "none",
        "problems": None if how.problems else content(model.text),
        "rows": rows,
        "prompt": model.prompt,
        "code_tags": model.code_tags,
        "context_tokens": model.context_tokens,
        "output_chars": cfg.sandbox.output_chars,
        "timeout_s": cfg.sandbox.timeout_s,
    }
    if not cfg.server.needs_weights:  # a remote endpoint: whether it serves these weights is not ours to know
        recipe["endpoint"] = content(cfg.server)

    def make(out: Path) -> dict[str, float]:
        tokenizer = load_tokenizer(base.path)
        keep = resume_folder(out)
        with on_policy.Writing(keep, _problems(run, how, rows), how, model, tokenizer) as writing:
            if writing.num_done:
                run.say(f"own text: {writing.num_done} of {writing.planned} solutions are written already")
            if writing.num_done < writing.planned:
                folder = run.folder / "own_text"
                with contextlib.ExitStack() as stack:
                    sandbox = stack.enter_context(cfg.sandbox.launch(folder / "logs")) if how.uses_tools else None
                    live = stack.enter_context(endpoint(replace(run, cfg=_writer(cfg), folder=folder)))
                    writing.to_the_end(live, sandbox, cfg.sandbox.output_chars)
            return writing.finish(out)

    with run.stage("own_text"):
        inputs = {"weights": base.key, **_problems_key(run, how)}
        made = run.store.get("own_text", recipe, inputs, make, revision=on_policy.REVISION)
    run.use("own_text", made)
    run.log({f"own_text/{name}": value for name, value in made.metrics.items()})
    return Made(made.path / on_policy.TEXT, made.key)


def _writer(cfg: Config) -> Config:
    """The run that writes its drafter's training text: no drafter, and the weights that it is trained on."""
    known = discover()
    quant = cfg.quant if cfg.drafter.fits_checkpoint() else known["quant", "bf16"]()
    return replace(cfg, drafter=known["drafter", "none"](), quant=quant)


def _problems(run: Run, how: OwnText, rows: int) -> list[Problem]:
    named = on_policy.problem_source(how)
    if named:
        return on_policy.choose((problem.text for problem in named.load()), how, rows)
    spare = 2 * rows + 100  # a dataset may have several solutions of a problem
    return on_policy.choose((problem for problem, _ in _rows(run, spare)), how, rows)


def _problems_key(run: Run, how: OwnText) -> dict[str, str]:
    named = on_policy.problem_source(how)
    if named is None:
        return _rows_key(run)
    file = named.local_file()
    assert file is not None
    return {"problems": file_sha256(file)}


def checkpoint(run: Run) -> Made:
    """The weights as they are served: quantised, or the source itself for bf16."""
    quant, base = run.cfg.quant, weights(run)
    if quant.identity:
        return base
    calibration = text(run, quant.calib_samples, base, use="calibration") if quant.calib_samples else None
    inputs = {"weights": base.key} | ({"text": calibration.key} if calibration else {})

    def make(out: Path) -> Any:
        return run_verb(
            quant,
            "quantise",
            {
                "src": base.path,
                "out": out,
                "calibration": calibration.path if calibration else None,
                "device": run.cfg.device_name(),
            },
            log=run.folder / "logs" / "quantise.log",
        )

    with run.stage("checkpoint"):
        made = run.store.get("checkpoint", content(quant), inputs, make, revision=quant.REVISION)
    run.use("checkpoint", made)
    run.log({f"quant/{name}": value for name, value in made.metrics.items()})
    _log_curves(run, made.path)
    return Made(made.path, made.key)


def drafter(run: Run) -> Made | None:
    """The trained drafter, or None for one that is not trained."""
    option = run.cfg.drafter
    if not option.trained:
        return None
    original = weights(run)
    base = checkpoint(run) if option.fits_checkpoint() else original
    how = option.own_text()
    rows = own_text(run, how, option.text_rows(), base) if how else text(run, option.text_rows(), original)

    def make(out: Path) -> Any:
        return run_verb(
            option,
            "fit",
            {"base": base.path, "text": rows.path, "out": out, "device": run.cfg.device_name()},
            log=run.folder / "logs" / "train.log",
        )

    with run.stage("drafter"):
        made = run.store.get(
            "drafter",
            content(option),
            {"weights": base.key, "text": rows.key},
            make,
            revision=option.REVISION,
        )
    run.use("drafter", made)
    run.log({name if name.startswith("redrafter") else f"drafter/{name}": v for name, v in made.metrics.items()})
    _log_curves(run, made.path)
    return Made(made.path, made.key)


def serve_spec(run: Run) -> ServeSpec:
    """Everything that the server needs, made or reused, its engine included."""
    cfg = run.cfg
    spec = _spec(cfg, cfg.device_name())
    if not cfg.server.needs_weights:
        return spec
    served, head = checkpoint(run), drafter(run)
    spec.checkpoint, spec.drafter_path = served.path, head.path if head else None
    if cfg.server.builds_engine:
        inputs = {"checkpoint": served.key} | ({"drafter": head.key} if head else {})
        with run.stage("engine"):
            made = run.store.get(
                "engine",
                {
                    **content(cfg.server),
                    **cfg.server.engine_recipe(spec),
                    "tp": cfg.model.tp,
                    "context_tokens": cfg.model.context_tokens,
                },
                inputs,
                lambda out: cfg.server.build(spec, out),
                revision=cfg.server.REVISION,
            )
        run.use("engine", made)
        spec.engine = made.path
    return spec


@contextlib.contextmanager
def endpoint(run: Run) -> Iterator[Endpoint]:
    """A server that answers, with everything before it made or reused."""
    spec = serve_spec(run)
    with contextlib.ExitStack() as stack:
        with run.stage("server_start"):
            live = stack.enter_context(run.cfg.server.launch(spec, run.folder / "logs"))
        run.say(f"{run.cfg.server.option_name} serves {live.model} at {live.base_url}")
        yield live


def _spec(cfg: Config, device: str) -> ServeSpec:
    return ServeSpec(
        model_name=cfg.model.name,
        checkpoint=Path(),
        drafter=cfg.drafter,
        quant=cfg.quant.option_name,
        params_b=cfg.model.params_b,
        context_tokens=cfg.model.context_tokens,
        tp=cfg.model.tp,
        device=device,
        seed=cfg.sampling.seed,
    )


def _log_curves(run: Run, folder: Path) -> None:
    """Log what a maker left to be looked at: curve.jsonl as points, pictures as they are."""
    curve = folder / "curve.jsonl"
    if curve.exists():
        run.tracker.curve([json.loads(line) for line in curve.read_text().splitlines()])
    for file in [*folder.glob("*.png"), *folder.glob("ranges.json"), curve]:
        if file.exists():
            run.tracker.artifact(file, folder.parent.name)
