"""Which base model, where its weights come from, and how it is spoken to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omr.errors import ConfigError


@dataclass(kw_only=True)
class TextSource:
    """Problems with solutions in the model's own style: calibration and drafter training read these."""

    corpus: bool = False
    """Generate them with omr's synthetic corpus (the embedded model's training text)."""
    path: str | None = field(default=None, metadata={"content": False})  # its digest is keyed instead
    """A jsonl or parquet file (jsonl may be gzipped); read instead of corpus or hub, whatever those say."""
    hub: str | None = None
    """A Hugging Face dataset, for example nvidia/OpenMathReasoning."""
    revision: str | None = field(default=None, metadata={"content": False})  # the resolved hash is keyed instead
    """Full commit hash of the dataset; null resolves main when it is fetched and records what it was."""
    split: str = "train"
    problem_key: str = "problem"
    solution_key: str = "solution"
    seed: int = 1
    """Seed of the synthetic corpus; the embedded model was trained on seed 0."""

    def __post_init__(self) -> None:
        if self.path is not None:  # put over a model's own text, which it replaces
            self.corpus, self.hub = False, None
        if self.corpus and self.hub is not None:
            raise ConfigError(
                f"model.text has corpus=true and hub={self.hub}; set model.text.corpus=false or model.text.hub=null"
            )


@dataclass(kw_only=True)
class Model:
    """A causal LM of the Llama / Qwen2 / Qwen3 family. The first of path, embedded, package, hub that is set wins."""

    name: str = "tiny"
    """Short name, used as the served model name and in tables."""
    path: str | None = None
    """A local Hugging Face folder: config.json, tokenizer files, *.safetensors."""
    embedded: str | None = None
    """A model shipped inside omr (a folder of omr/assets)."""
    package: str | None = None
    """A PyPI requirement pinned with ==, whose wheel carries a GGUF file."""
    package_file: str | None = None
    """The GGUF's file name in that wheel."""
    package_sha256: str | None = None
    """Digest of that GGUF file."""
    hub: str | None = None
    """A Hugging Face model id."""
    revision: str | None = None
    """Full commit hash on the hub; null resolves main when it is fetched and records what it was."""
    prompt: str = "generic/math"
    """Prompt by name; see omr/solve/prompt.py."""
    code_tags: str = "openmath"
    """How the model marks code and reads its output; see omr/solve/prompt.py."""
    context_tokens: int = 2048
    """Longest sequence served, prompt and all rounds together."""
    params_b: float = 0.0
    """Parameters in billions, for memory estimates before anything is loaded."""
    tp: int = 1
    """Tensor-parallel GPUs."""
    text: TextSource = field(default_factory=TextSource)

    def __post_init__(self) -> None:
        if not (self.path or self.embedded or self.package or self.hub):
            raise ConfigError("model has no source: set one of model.path, model.embedded, model.package, model.hub")
        if self.path and self.name == self.embedded:
            self.name = Path(self.path).name  # another folder put over the embedded model does not keep its name
        if self.package and "==" not in self.package:
            raise ConfigError(f"model.package must pin a version with ==, got {self.package!r}")
        if self.context_tokens < 16:
            raise ConfigError(f"model.context_tokens must be >= 16, got {self.context_tokens}")
        if self.tp < 1:
            raise ConfigError(f"model.tp must be >= 1, got {self.tp}")
