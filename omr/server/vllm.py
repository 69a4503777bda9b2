"""vLLM (https://docs.vllm.ai): `vllm serve` as a child, in this environment or under `server.python`.

Checkpoints go in as they are: vLLM finds the quantisation in config.json. `--generation-config vllm` keeps the model's
own sampling defaults out, which would otherwise change what an experiment states. ReDrafter heads are not in vLLM.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from omr.drafter._elsewhere import ModelDrafter
from omr.drafter.mtp import Mtp
from omr.drafter.ngram import Ngram
from omr.drafter.suffix import Suffix
from omr.errors import ConfigError
from omr.option import option
from omr.server import Endpoint, Server, ServeSpec, SpecCounts, _backend, _child, _prometheus


class Dtype(Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class KvDtype(Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    fp8 = "fp8"
    fp8_e4m3 = "fp8_e4m3"
    fp8_e5m2 = "fp8_e5m2"


@option("server", "vllm")
@dataclass(kw_only=True)
class Vllm(Server):
    """Names of the knobs are vLLM's flags."""

    runs_quant: ClassVar[frozenset[str]] = frozenset({"bf16", "fp8", "int8_wo", "int4"})
    runs_drafter: ClassVar[frozenset[str]] = frozenset({"none", "ngram", "suffix", "draft_model", "eagle3", "mtp"})

    start_timeout_s: float = 1800.0
    python: str | None = None
    """Interpreter of the environment that has vLLM; null is this one."""
    dtype: Dtype = Dtype.auto
    max_num_seqs: int = 16
    """Sequences decoded together."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step; null leaves it to vLLM."""
    gpu_memory_utilization: float = 0.92
    """Share of the GPU's memory for weights and KV cache."""
    kv_cache_dtype: KvDtype = KvDtype.auto
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    """No CUDA graphs and no compilation: a quick start, slow steps."""
    cpu_kv_cache_gb: int = 4
    """KV cache of vLLM's CPU build."""
    cpu_omp_threads_bind: str = "auto"
    """Cores of the CPU build, for example 0-1; auto keeps one for the front end."""
    extra_args: list[str] = field(default_factory=list)
    """Flags without a knob here, as they stand."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_num_seqs < 1:
            raise ConfigError(f"server.max_num_seqs must be >= 1, got {self.max_num_seqs}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"server.gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"server.max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"server.max_num_seqs={self.max_num_seqs}"
            )

    @property
    def serves_any_family(self) -> bool:
        return True

    def preflight(self, spec: ServeSpec) -> None:
        self.require_choices(spec.quant, spec.drafter.option_name)
        self.speculative_config(spec)
        _backend.require_script("vllm", package="vllm", extra="vllm", python=self.python)
        _backend.require_memory(spec.params_b, spec.quant, spec.device, spec.tp)

    @contextlib.contextmanager
    def launch(self, spec: ServeSpec, log_dir: Path) -> Iterator[Endpoint]:
        script = _backend.require_script("vllm", package="vllm", extra="vllm", python=self.python)
        with _child.serve(
            self,
            lambda port: [str(script), *self.arguments(spec, port)],
            model=spec.model_name,
            log=log_dir / "vllm.log",
            env=self.environment(spec),
        ) as endpoint:
            yield endpoint

    def arguments(self, spec: ServeSpec, port: int) -> list[str]:
        """The command line after `vllm`."""
        args = ["serve", str(spec.checkpoint), "--served-model-name", spec.model_name]
        args += ["--host", self.host, "--port", str(port)]
        args += ["--dtype", self.dtype.name, "--tensor-parallel-size", str(spec.tp)]
        args += ["--max-model-len", str(spec.context_tokens), "--max-num-seqs", str(self.max_num_seqs)]
        args += ["--seed", str(spec.seed), "--generation-config", "vllm"]
        if spec.device == "cuda":
            args += ["--gpu-memory-utilization", str(self.gpu_memory_utilization)]
        if self.max_num_batched_tokens is not None:
            args += ["--max-num-batched-tokens", str(self.max_num_batched_tokens)]
        if self.kv_cache_dtype is not KvDtype.auto:
            args += ["--kv-cache-dtype", self.kv_cache_dtype.name]
        args.append("--enable-prefix-caching" if self.enable_prefix_caching else "--no-enable-prefix-caching")
        if self.enforce_eager:
            args.append("--enforce-eager")
        if speculative := self.speculative_config(spec):
            args += ["--speculative-config", json.dumps(speculative)]
        return args + self.extra_args

    def speculative_config(self, spec: ServeSpec) -> dict[str, Any] | None:
        """The value of --speculative-config; None decodes plainly. Raises ConfigError for a drafter without weights."""
        drafter = spec.drafter
        match drafter:
            case Ngram():
                return {
                    "method": "ngram",
                    "num_speculative_tokens": drafter.draft_tok,
                    "prompt_lookup_max": drafter.max_ngram,
                    "prompt_lookup_min": drafter.min_ngram,
                }
            case Suffix():
                return {
                    "method": "suffix",
                    "num_speculative_tokens": drafter.draft_tok,
                    "suffix_decoding_max_tree_depth": drafter.max_tree_depth,
                    "suffix_decoding_max_spec_factor": drafter.max_spec_factor,
                    "suffix_decoding_min_token_prob": drafter.min_token_prob,
                }
            case Mtp():
                return {"method": "mtp", "num_speculative_tokens": drafter.draft_tok}
            case ModelDrafter():
                return {
                    "method": drafter.option_name,
                    "model": drafter.weights(),
                    "num_speculative_tokens": drafter.draft_tok,
                }
        return None

    def environment(self, spec: ServeSpec) -> dict[str, str]:
        env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if spec.device == "cpu":
            env["VLLM_CPU_KVCACHE_SPACE"] = str(self.cpu_kv_cache_gb)
            env["VLLM_CPU_OMP_THREADS_BIND"] = self.cpu_omp_threads_bind
        return env

    def spec_counts(self, metrics_text: str) -> SpecCounts | None:
        return _prometheus.spec_counts(metrics_text, "vllm:spec_decode_num_")
