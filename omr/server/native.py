"""omr's own engine behind its own HTTP server, on CPU or one CUDA device.

The server is a child process (`omr.server._http`), so that an out-of-memory ends it and not the run. Its log and the
exact spec it was started with stay in the run's log folder: `python -m omr.server._http --spec native.json` starts the
same server again by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from omr.errors import ConfigError
from omr.option import fields_of, option
from omr.server import Endpoint, Server, ServeSpec, SpecCounts, _backend, _child, _prometheus
from omr.server._http import NativeSpec


class Dtype(Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@option("server", "native")
@dataclass(kw_only=True)
class Native(Server):
    """Paged KV cache, continuous batching, speculation."""

    runs_quant: ClassVar[frozenset[str]] = frozenset({"bf16", "fp8", "int8_wo", "int4"})
    runs_drafter: ClassVar[frozenset[str]] = frozenset({"none", "redrafter", "ngram", "suffix", "draft_model"})

    max_batch_size: int = 16
    """Sequences decoded together; more wait."""
    kv_cache_tokens: int = 0
    """Tokens of KV cache for all sequences together. 0: a full batch of full contexts, as far as memory allows."""
    kv_cache_fraction: float = 0.85
    """Share of the memory left by the weights that the KV cache may take."""
    block_size: int = 16
    """Tokens in a KV block."""
    dtype: Dtype = Dtype.auto
    """Of activations and unquantised weights; auto is bfloat16 on CUDA and for big models, float32 for small on CPU."""
    num_threads: int = 0
    """CPU threads of the engine; 0 leaves one core to HTTP and the client."""
    stream_interval_s: float = 0.05
    """Streams to omr's own client share an event every so often: alone, one shows twenty a second; of sixteen, each
    shows one every 0.8 s (never less than one a second). On CPU an event costs both ends more than a token of a small
    model. The first token and the last go at once, so latencies are not touched. 0 is an event a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_batch_size", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"server.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("kv_cache_tokens", "num_threads", "stream_interval_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"server.{name} must be >= 0 (0 is automatic), got {getattr(self, name)}")
        if not 0 < self.kv_cache_fraction < 1:
            raise ConfigError(f"server.kv_cache_fraction must be in (0, 1), got {self.kv_cache_fraction}")

    def preflight(self, spec: ServeSpec) -> None:
        self.require_choices(spec.quant, spec.drafter.option_name)
        spec.drafter.preflight()
        if spec.tp != 1:
            raise ConfigError(
                f"server=native runs on one device; model.tp={spec.tp} needs server=vllm, sglang or trtllm"
            )
        if spec.device == "cuda":
            _backend.require_gpu("native", spec.device)
            _backend.require_cuda_torch()
        if 0 < self.kv_cache_tokens < spec.context_tokens:
            raise ConfigError(
                f"server.kv_cache_tokens={self.kv_cache_tokens} cannot hold one sequence of "
                f"model.context_tokens={spec.context_tokens}; raise the first or lower the second"
            )
        _backend.require_memory(spec.params_b, spec.quant, spec.device, 1)

    @contextlib.contextmanager
    def launch(self, spec: ServeSpec, log_dir: Path) -> Iterator[Endpoint]:
        def argv(port: int) -> list[str]:
            path = _child.write_json(log_dir / "native.json", dataclasses.asdict(self.native_spec(spec, port)))
            return [sys.executable, "-m", "omr.server._http", "--spec", str(path)]

        with _child.serve(self, argv, model=spec.model_name, log=log_dir / "native.log") as endpoint:
            yield endpoint

    def native_spec(self, spec: ServeSpec, port: int) -> NativeSpec:
        """What the child is told."""
        return NativeSpec(
            model_name=spec.model_name,
            checkpoint=str(spec.checkpoint.absolute()),
            drafter=spec.drafter.option_name,
            drafter_fields=fields_of(spec.drafter),
            drafter_path=str(spec.drafter_path.absolute()) if spec.drafter_path else None,
            context_tokens=spec.context_tokens,
            device=spec.device,
            seed=spec.seed,
            host=self.host,
            port=port,
            max_batch_size=self.max_batch_size,
            kv_cache_tokens=self.kv_cache_tokens,
            kv_cache_fraction=self.kv_cache_fraction,
            block_size=self.block_size,
            dtype=self.dtype.name,
            num_threads=self.num_threads,
        )

    def request_body(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        # Every event says what was used so far, the last one all of it: no event for that alone.
        options = {**body.get("stream_options", {}), "include_usage": False, "interval_s": self.stream_interval_s}
        return body | {"stream_options": options}

    def spec_counts(self, metrics_text: str) -> SpecCounts | None:
        return _prometheus.spec_counts(metrics_text, "omr:spec_decode_num_")
