"""job=train_model: the base model fine-tuned on problems with solutions; the result is an ordinary `model.path`.

The text comes from `model.text`: a jsonl or parquet file, a hub dataset, or the synthetic corpus. Loss counts what the
model writes itself, tool output is masked (omr/sft.py). With `fresh=true` only the base's tokenizer is used, and a new
model of `shape` is trained from random weights: that is how the embedded model was made (experiment=train_tiny).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from omr.artifact import content, resume_folder
from omr.errors import ConfigError
from omr.job import Job
from omr.option import option
from omr.sft import CURVE, REVISION, Recipe, Shape

if TYPE_CHECKING:
    from omr.config import Config
    from omr.pipeline import Made
    from omr.run import Run


@option("job", "train_model")
@dataclass(kw_only=True)
class TrainModel(Job):
    """Fine-tune the base model on TIR text. Returns the mean loss of the last steps."""

    REVISION: ClassVar[int] = REVISION

    rows: int = 20000
    """Documents of text; a file with fewer is refused. The corpus gives a few less: held-out problems are dropped."""
    recipe: Recipe = field(default_factory=Recipe)
    fresh: bool = False
    """Begin with random weights of `shape` instead of the base's."""
    shape: Shape = field(default_factory=Shape)
    """Sizes of a fresh model; not used otherwise."""
    workers: int = field(default=1, metadata={"content": False})
    """Processes that make and encode the text."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.workers < 1:
            raise ConfigError(f"job.rows and job.workers must be >= 1, got {self.rows} and {self.workers}")
        if self.fresh and self.recipe.max_length > self.shape.context_tokens:
            raise ConfigError(
                f"job.recipe.max_length={self.recipe.max_length} is over job.shape.context_tokens="
                f"{self.shape.context_tokens}; lower the first or raise the second"
            )

    def preflight(self, cfg: Config) -> None:
        text = cfg.model.text
        if not (text.corpus or text.path or text.hub):
            raise ConfigError(
                f"model={cfg.model.name} names no text to train on; set model.text.path to a jsonl of problem and "
                "solution, model.text.hub to a dataset, or model.text.corpus=true"
            )

    def run(self, run: Run) -> float | None:
        from omr import pipeline

        source = run.cfg.model.text
        base = pipeline.weights(run)
        text = self._corpus(run, base) if source.corpus else pipeline.text(run, self.rows, base)
        if self.fresh:
            base = self._fresh(run, base)

        def make(out: Path) -> dict[str, float]:
            from omr.process import run_verb

            kwargs = {"base": base.path, "text": text.path, "out": out, "device": run.cfg.device_name()}
            reported: dict[str, float] = run_verb(self, "fit", kwargs, log=run.folder / "logs" / "train_model.log")
            return reported

        with run.stage("model"):
            inputs = {"weights": base.key, "text": text.key}
            made = run.store.get("model", content(self), inputs, make, revision=self.REVISION)
        run.use("model", made)
        run.log({f"train/{name}": value for name, value in made.metrics.items()})
        points = [json.loads(line) for line in (made.path / CURVE).read_text().splitlines()]
        run.tracker.curve([{"step": p["step"], "train/step_loss": p["loss"], "train/lr": p["lr"]} for p in points])
        run.tracker.artifact(made.path / CURVE, made.kind)
        run.say(f"trained model: model.path={made.path}")
        return run.metrics.get("train/loss")

    def fit(self, base: Path, text: Path, out: Path, device: str) -> dict[str, float]:
        """Train in this process; what a killed one left is taken up again."""
        from omr import sft

        kept = resume_folder(out)
        return sft.train(
            base=base, text=text, out=out, recipe=self.recipe, device=device, workers=self.workers, keep=kept
        )

    def _corpus(self, run: Run, base: Made) -> Made:
        """The corpus in its training mix: several instructions, noise, slips (see omr/corpus/compose.py)."""
        from omr.corpus import compose
        from omr.corpus.encoded import encode_corpus
        from omr.pipeline import Made

        seed = run.cfg.model.text.seed
        recipe = {"corpus": "training mix", "rows": self.rows, "seed": seed, "max_length": self.recipe.max_length}

        def make(out: Path) -> dict[str, float]:
            made = encode_corpus(
                base.path, self.rows, seed=seed, max_length=self.recipe.max_length, workers=self.workers
            )
            made.save(out / "text.npz")
            return {"rows": float(len(made.lengths)), "tokens": float(len(made.ids))}

        with run.stage("text"):
            made = run.store.get("text", recipe, {"weights": base.key}, make, revision=compose.REVISION)
        run.use("text", made)
        return Made(made.path / "text.npz", made.key)

    def _fresh(self, run: Run, base: Made) -> Made:
        from omr.pipeline import Made

        def make(out: Path) -> dict[str, float]:
            kwargs = {"tokenizer_dir": base.path, "out": out}
            from omr.process import run_verb

            written: dict[str, float] = run_verb(self, "write_fresh", kwargs, log=run.folder / "logs" / "fresh.log")
            return written

        recipe = {"seed": self.recipe.seed, **content(self.shape)}
        made = run.store.get("fresh", recipe, {"tokenizer": base.key}, make, revision=self.REVISION)
        return Made(made.path, made.key)

    def write_fresh(self, tokenizer_dir: Path, out: Path) -> dict[str, float]:
        from omr import sft

        sft.write_fresh(out, tokenizer_dir=tokenizer_dir, shape=self.shape, seed=self.recipe.seed)
        return {}
