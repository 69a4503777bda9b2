"""SGLang (https://docs.sglang.io): `python -m sglang.launch_server` as a child. NVIDIA GPUs only.

Checkpoints go in as they are: SGLang finds the quantisation in config.json. `--sampling-defaults openai` keeps the
model's own sampling defaults out. Its draft length counts the verified token as well, ours does not: hence the + 1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import ClassVar

from omr.drafter._elsewhere import ModelDrafter
from omr.drafter.mtp import Mtp
from omr.drafter.ngram import Ngram
from omr.errors import ConfigError
from omr.option import option
from omr.server import Endpoint, Server, ServeSpec, SpecCounts, _backend, _child, _prometheus

_ALGORITHMS = {"eagle3": "EAGLE3", "draft_model": "STANDALONE", "mtp": "EAGLE"}
"""MTP layers are driven like an EAGLE head whose weights are in the served checkpoint."""


class Dtype(Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"


class KvDtype(Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    fp8_e4m3 = "fp8_e4m3"
    fp8_e5m2 = "fp8_e5m2"


@option("server", "sglang")
@dataclass(kw_only=True)
class Sglang(Server):
    """Names of the knobs are SGLang's flags."""

    runs_quant: ClassVar[frozenset[str]] = frozenset({"bf16", "fp8", "int8_wo", "int4"})
    runs_drafter: ClassVar[frozenset[str]] = frozenset({"none", "ngram", "draft_model", "eagle3", "mtp"})

    start_timeout_s: float = 1800.0
    python: str | None = None
    """Interpreter of the environment that has SGLang; null is this one."""
    dtype: Dtype = Dtype.auto
    max_running_requests: int = 16
    """Sequences decoded together."""
    mem_fraction_static: float | None = None
    """Share of the GPU's memory for weights and KV cache; null leaves it to SGLang."""
    kv_cache_dtype: KvDtype = KvDtype.auto
    radix_cache: bool = True
    """Reuse of shared prefixes."""
    cuda_graph: bool = True
    """CUDA graphs for decode steps."""
    extra_args: list[str] = field(default_factory=list)
    """Flags without a knob here, as they stand."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_running_requests < 1:
            raise ConfigError(f"server.max_running_requests must be >= 1, got {self.max_running_requests}")
        if self.mem_fraction_static is not None and not 0 < self.mem_fraction_static < 1:
            raise ConfigError(f"server.mem_fraction_static must be in (0, 1), got {self.mem_fraction_static}")

    @property
    def serves_any_family(self) -> bool:
        return True

    def preflight(self, spec: ServeSpec) -> None:
        self.require_choices(spec.quant, spec.drafter.option_name)
        self.speculation(spec)
        _backend.require_package("sglang", extra="sglang", python=self.python)
        _backend.require_gpu("sglang", spec.device)
        _backend.require_memory(spec.params_b, spec.quant, spec.device, spec.tp)

    @contextlib.contextmanager
    def launch(self, spec: ServeSpec, log_dir: Path) -> Iterator[Endpoint]:
        python = _backend.interpreter(self.python)
        with _child.serve(
            self,
            lambda port: [str(python), "-m", "sglang.launch_server", *self.arguments(spec, port)],
            model=spec.model_name,
            log=log_dir / "sglang.log",
            env=dict(os.environ),
        ) as endpoint:
            yield endpoint

    def arguments(self, spec: ServeSpec, port: int) -> list[str]:
        """The command line after `python -m sglang.launch_server`."""
        args = ["--model-path", str(spec.checkpoint), "--served-model-name", spec.model_name]
        args += ["--host", self.host, "--port", str(port)]
        args += ["--dtype", self.dtype.name, "--tp-size", str(spec.tp)]
        args += ["--context-length", str(spec.context_tokens)]
        args += ["--max-running-requests", str(self.max_running_requests)]
        args += ["--random-seed", str(spec.seed), "--sampling-defaults", "openai", "--enable-metrics"]
        if self.mem_fraction_static is not None:
            args += ["--mem-fraction-static", str(self.mem_fraction_static)]
        if self.kv_cache_dtype is not KvDtype.auto:
            args += ["--kv-cache-dtype", self.kv_cache_dtype.name]
        if not self.radix_cache:
            args.append("--disable-radix-cache")
        if not self.cuda_graph:
            args.append("--disable-decode-cuda-graph")
        return [*args, *self.speculation(spec), *self.extra_args]

    def speculation(self, spec: ServeSpec) -> list[str]:
        """Speculation flags. Raises ConfigError for a knob that SGLang has not."""
        drafter = spec.drafter
        if isinstance(drafter, Ngram):
            if drafter.min_ngram != 1:
                raise ConfigError(f"server=sglang has no drafter.min_ngram ({drafter.min_ngram}); leave it at 1")
            return [
                *("--speculative-algorithm", "NGRAM"),
                *("--speculative-num-draft-tokens", str(drafter.draft_tok + 1)),
                *("--speculative-ngram-max-bfs-breadth", "1"),
                *("--speculative-ngram-max-trie-depth", str(drafter.max_ngram + drafter.draft_tok)),
            ]
        if isinstance(drafter, ModelDrafter | Mtp):
            weights = str(spec.checkpoint) if isinstance(drafter, Mtp) else drafter.weights()
            return [
                *("--speculative-algorithm", _ALGORITHMS[drafter.option_name]),
                *("--speculative-draft-model-path", weights),
                *("--speculative-num-steps", str(drafter.draft_tok)),
                *("--speculative-eagle-topk", "1"),
                *("--speculative-num-draft-tokens", str(drafter.draft_tok + 1)),
            ]
        return []

    def spec_counts(self, metrics_text: str) -> SpecCounts | None:
        """From counters, because SGLang's own acceptance figures are gauges over a moving window.

        Every verification of a sequence gives its accepted drafts and one token more; a request's first token comes
        from its prefill. So accepted = generated - verifications - requests. Positions are not told apart.
        """
        totals: dict[str, float] = {}
        for one in _prometheus.read(metrics_text):
            totals[one.name] = totals.get(one.name, 0) + one.value
        drafts = totals.get("sglang:spec_verify_calls_total")
        generated = totals.get("sglang:generation_tokens_total")
        if drafts is None or generated is None:
            return None
        accepted = generated - drafts - totals.get("sglang:num_requests_total", 0)
        verified = [s.value for s in _prometheus.read(metrics_text) if s.name == "sglang:spec_num_draft_tokens"]
        per_draft = max(verified, default=1) - 1
        return SpecCounts(
            drafts=int(drafts), draft_tokens=int(drafts * max(per_draft, 0)), accepted_tokens=max(int(accepted), 0)
        )
