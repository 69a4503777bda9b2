"""TensorRT-LLM (https://github.com/NVIDIA/TensorRT-LLM): built engines with ReDrafter, or its PyTorch backend.

    backend=tensorrt   checkpoint -> omr's export -> `trtllm-build` -> engine folder -> `trtllm-serve --backend trt`.
                       The only server outside omr that runs a ReDrafter head. Versions 1.0 to 1.2: engines were removed
                       from TensorRT-LLM in the middle of 2026.
    backend=pytorch    the checkpoint as it is (an FP8 one with hf_quant_config.json), `trtllm-serve --backend pytorch`;
                       drafters ngram, draft_model, eagle3, mtp through its YAML options.

TensorRT-LLM is never imported here: its import starts MPI, and its workers import the main module again. What it is
asked to do are two commands, composed below. Its /metrics is a list of iterations since the last read, not counters.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from omr.drafter._elsewhere import ModelDrafter
from omr.drafter.mtp import Mtp
from omr.drafter.ngram import Ngram
from omr.drafter.redrafter import Head, Redrafter
from omr.errors import ChildError, ConfigError, MissingBackend
from omr.machine import gpu_names
from omr.option import option
from omr.process import log_tail, spawn
from omr.server import Endpoint, Server, ServeSpec, SpecCounts, _backend, _child
from omr.server._trtllm_checkpoint import ExportSpec

FIRST, REMOVED = (1, 0), (1, 3)
"""Versions with engines and Qwen2 ReDrafter: from the first, before the second."""
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json", "*.model")
_RUNS = {
    "tensorrt": frozenset({"none", "redrafter"}),
    "pytorch": frozenset({"none", "ngram", "draft_model", "eagle3", "mtp"}),
}
_DECODING = {"draft_model": "DraftTarget", "eagle3": "Eagle3"}


class Backend(Enum):
    tensorrt = "tensorrt"
    pytorch = "pytorch"


class GemmPlugin(Enum):
    by_quant = "by_quant"
    auto = "auto"
    bfloat16 = "bfloat16"
    fp8 = "fp8"
    disable = "disable"


def _serving(default: Any) -> Any:
    """A knob that does not change the engine's bytes."""
    return field(default=default, metadata={"content": False})


@option("server", "trtllm")
@dataclass(kw_only=True)
class Trtllm(Server):
    """Defaults are those of the AIMO-2 pipeline."""

    runs_quant: ClassVar[frozenset[str]] = frozenset({"bf16", "fp8", "int8_wo"})
    runs_drafter: ClassVar[frozenset[str]] = frozenset().union(*_RUNS.values())
    metrics_drain: ClassVar[bool] = True

    start_timeout_s: float = _serving(1800.0)
    python: str | None = _serving(None)
    """Interpreter of the environment that has TensorRT-LLM; null is this one."""
    backend: Backend = Backend.tensorrt
    max_batch_size: int = _serving(12)
    """Sequences decoded together."""
    kv_cache_free_gpu_memory_fraction: float = _serving(0.92)
    """Share of the GPU memory left by the weights that the KV cache takes."""
    mpirun: bool = _serving(True)
    """Start the server under `mpirun -n 1` when model.tp > 1, as the pipeline does."""
    engine_max_batch_size: int = 32
    """Largest batch the engine is built for."""
    engine_max_num_tokens: int | None = None
    """Tokens of one step; null is model.context_tokens, as in the pipeline."""
    gemm_plugin: GemmPlugin = GemmPlugin.by_quant
    """by_quant: fp8 for an fp8 checkpoint, else auto."""
    greedy_draft: bool = False
    """Build the ReDrafter engine for arg-max only: faster, and temperature is ignored."""
    disable_overlap_scheduler: bool = _serving(True)
    """backend=pytorch: what two-model speculation needs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_batch_size", "engine_max_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"server.{name} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.kv_cache_free_gpu_memory_fraction < 1:
            raise ConfigError(
                "server.kv_cache_free_gpu_memory_fraction must be in (0, 1), got "
                f"{self.kv_cache_free_gpu_memory_fraction}"
            )
        if self.backend is Backend.tensorrt and self.max_batch_size > self.engine_max_batch_size:
            raise ConfigError(
                f"server.max_batch_size={self.max_batch_size} is more than the engine is built for "
                f"(server.engine_max_batch_size={self.engine_max_batch_size})"
            )

    @property
    def builds_engine(self) -> bool:
        return self.backend is Backend.tensorrt

    @property
    def serves_any_family(self) -> bool:
        return not self.builds_engine

    def preflight(self, spec: ServeSpec) -> None:
        self.require_choices(spec.quant, spec.drafter.option_name)
        drafter = spec.drafter
        if drafter.option_name not in _RUNS[self.backend.name]:
            other = next(name for name, runs in _RUNS.items() if drafter.option_name in runs)
            raise ConfigError(
                f"server.backend={self.backend.name} cannot run drafter={drafter.option_name}; "
                f"server.backend={other} can"
            )
        if isinstance(drafter, Redrafter):
            if drafter.head is not Head.full or drafter.draft_vocab_size:
                raise ConfigError(
                    "a TensorRT-LLM engine takes a ReDrafter with drafter.head=full and drafter.draft_vocab_size=0, "
                    f"got {drafter.head.value} and {drafter.draft_vocab_size}; server=native takes any"
                )
            if drafter.sampled:
                raise ConfigError(
                    "a TensorRT-LLM engine drafts beams; set drafter.sampled=false, or server=native to sample drafts"
                )
        if self.backend is Backend.pytorch:
            if spec.quant == "int8_wo":
                raise ConfigError("server.backend=pytorch cannot run quant=int8_wo; server.backend=tensorrt can")
            self.llm_options(spec)
        for script in ("trtllm-serve", *(["trtllm-build"] if self.builds_engine else [])):
            self._script(script)
        if self.builds_engine:
            self._check_version()
        if spec.tp > 1 and self.mpirun and not shutil.which("mpirun"):
            raise MissingBackend("mpirun", why="model.tp > 1; server.mpirun=false starts without it")
        _backend.require_gpu("trtllm", spec.device)
        _backend.require_memory(spec.params_b, spec.quant, spec.device, spec.tp)

    def _script(self, name: str) -> Path:
        return _backend.require_script(name, package="tensorrt_llm", extra="trtllm", python=self.python)

    def _check_version(self) -> None:
        version = _backend.package_version("tensorrt_llm", self.python)
        if version is None:
            return  # a script on PATH from an environment that cannot be asked: it will speak for itself
        numbers = tuple(int(n) for n in version.split(".")[:2] if n.isdigit())
        if not FIRST <= numbers < REMOVED:
            raise MissingBackend(
                "a tensorrt_llm with engines",
                extra="trtllm",
                why=f"{version} is installed, ReDrafter engines exist from 1.0 to 1.2; or set server.backend=pytorch",
            )

    # the engine

    def engine_recipe(self, spec: ServeSpec) -> dict[str, Any]:
        return {
            "tensorrt_llm": _backend.package_version("tensorrt_llm", self.python),
            "gpu": gpu_names(),
            "draft": _draft_shape(spec),
        }

    def build(self, spec: ServeSpec, out: Path) -> dict[str, float]:
        """Export the checkpoint, build its engine into `out`, put the tokenizer beside it. Raises ChildError."""
        seconds: dict[str, float] = {}
        with tempfile.TemporaryDirectory(prefix=".trtllm-", dir=out.parent) as scratch:
            exported = Path(scratch) / "checkpoint"
            path = _child.write_json(Path(scratch) / "export.json", asdict(self.export_spec(spec, exported)))
            steps = {
                "export": [sys.executable, "-m", "omr.server._trtllm_checkpoint", str(path)],
                "build": [str(self._script("trtllm-build")), *self.build_arguments(spec, exported, out)],
            }
            for name, argv in steps.items():
                start = time.monotonic()
                _run(argv, out / "build.log")
                seconds[f"{name}_seconds"] = round(time.monotonic() - start, 3)
        for pattern in TOKENIZER_FILES:
            for file in spec.checkpoint.glob(pattern):
                shutil.copy(file, out / file.name)
        return seconds

    def export_spec(self, spec: ServeSpec, out: Path) -> ExportSpec:
        """How the checkpoint is written for `trtllm-build`."""
        return ExportSpec(
            checkpoint=str(spec.checkpoint.absolute()),
            out=str(out),
            tp=spec.tp,
            drafter=str(spec.drafter_path.absolute()) if spec.drafter_path else None,
            num_beams=_draft_shape(spec)[0],
            draft_tok=_draft_shape(spec)[1],
            greedy=self.greedy_draft,
        )

    def build_arguments(self, spec: ServeSpec, checkpoint: Path, out: Path) -> list[str]:
        """The command line after `trtllm-build`."""
        plugin = self.gemm_plugin.name
        if self.gemm_plugin is GemmPlugin.by_quant:
            plugin = "fp8" if spec.quant == "fp8" else "auto"
        context = spec.context_tokens
        args = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(out)]
        args += ["--gemm_plugin", plugin, "--use_paged_context_fmha", "enable", "--kv_cache_type", "paged"]
        args += ["--max_batch_size", str(self.engine_max_batch_size), "--max_beam_width", "1"]
        args += ["--max_input_len", str(context), "--max_seq_len", str(context)]
        args += ["--max_num_tokens", str(self.engine_max_num_tokens or context), "--workers", str(spec.tp)]
        if spec.drafter.option_name == "redrafter":
            args += ["--speculative_decoding_mode", "explicit_draft_tokens"]
        return args

    # the server

    @contextlib.contextmanager
    def launch(self, spec: ServeSpec, log_dir: Path) -> Iterator[Endpoint]:
        model = self._model(spec)
        prefix = [str(self._script("trtllm-serve"))]
        if spec.tp > 1 and self.mpirun:
            mpirun = shutil.which("mpirun")
            if mpirun is None:
                raise MissingBackend("mpirun", why="model.tp > 1; server.mpirun=false starts without it")
            prefix = [mpirun, "-n", "1", "--oversubscribe", "--allow-run-as-root", *prefix]
        options = self.llm_options(spec)
        path = _child.write_json(log_dir / "trtllm.yaml", options) if options else None  # JSON is YAML
        with _child.serve(
            self,
            lambda port: [*prefix, *self.serve_arguments(spec, port, path)],
            model=model.name,
            log=log_dir / "trtllm.log",
            env=dict(os.environ),
        ) as endpoint:
            yield endpoint

    def _model(self, spec: ServeSpec) -> Path:
        if not self.builds_engine:
            return spec.checkpoint
        assert spec.engine is not None, "server.backend=tensorrt serves a built engine"
        return spec.engine

    def serve_arguments(self, spec: ServeSpec, port: int, options: Path | None) -> list[str]:
        """The command line after `trtllm-serve`."""
        args = ["serve", str(self._model(spec)), "--host", self.host, "--port", str(port)]
        args += ["--backend", "trt" if self.builds_engine else "pytorch"]
        args += ["--max_batch_size", str(self.max_batch_size), "--max_seq_len", str(spec.context_tokens)]
        args += ["--max_num_tokens", str(self.engine_max_num_tokens or spec.context_tokens)]
        args += ["--tp_size", str(spec.tp)]
        args += ["--kv_cache_free_gpu_memory_fraction", str(self.kv_cache_free_gpu_memory_fraction)]
        if options is not None:
            args += ["--extra_llm_api_options", str(options)]
        return args

    def llm_options(self, spec: ServeSpec) -> dict[str, Any]:
        """The YAML of --extra_llm_api_options; empty for an engine, which carries its drafter."""
        if self.builds_engine:
            return {}
        options: dict[str, Any] = {"enable_iter_perf_stats": True}
        drafter = spec.drafter
        if isinstance(drafter, Ngram):
            if drafter.min_ngram != 1:
                raise ConfigError(f"server=trtllm has no drafter.min_ngram ({drafter.min_ngram}); leave it at 1")
            options["speculative_config"] = {
                "decoding_type": "NGram",
                "max_draft_len": drafter.draft_tok,
                "max_matching_ngram_size": drafter.max_ngram,
                "is_public_pool": False,
            }
        elif isinstance(drafter, ModelDrafter):
            options["speculative_config"] = {
                "decoding_type": _DECODING[drafter.option_name],
                "max_draft_len": drafter.draft_tok,
                "speculative_model_dir": drafter.weights(),
            }
        elif isinstance(drafter, Mtp):
            options["speculative_config"] = {
                "decoding_type": "MTP",
                "max_draft_len": drafter.draft_tok,
                "num_nextn_predict_layers": drafter.draft_tok,
            }
        if "speculative_config" in options and self.disable_overlap_scheduler and not isinstance(drafter, Mtp):
            options["disable_overlap_scheduler"] = True
        return options

    def spec_counts(self, metrics_text: str) -> SpecCounts | None:
        """Summed over the iterations of one read.

        The PyTorch backend counts drafts itself. An engine reports the mean of tokens per sequence and iteration, each
        iteration being one draft for each generating sequence; how many tokens were drafted it does not say. Iterations
        that fell out of the server's list between two reads are lost to both.
        """
        try:
            iterations = json.loads(metrics_text)
        except ValueError:
            return None
        counts, found = SpecCounts(), False
        for one in iterations if isinstance(iterations, list) else []:
            spec, batch = one.get("specDecodingStats") or {}, one.get("inflightBatchingStats") or {}
            if spec.get("numRequestsWithDraftTokens"):
                found = True
                counts.drafts += int(spec["numRequestsWithDraftTokens"])
                counts.draft_tokens += int(spec.get("numDraftTokens", 0))
                counts.accepted_tokens += int(spec.get("numAcceptedTokens", 0))
            elif batch.get("avgNumDecodedTokensPerIter") and batch.get("numGenRequests"):
                found = True
                generating = int(batch["numGenRequests"])
                counts.drafts += generating
                counts.accepted_tokens += round((float(batch["avgNumDecodedTokensPerIter"]) - 1) * generating)
        return counts if found else None


def _draft_shape(spec: ServeSpec) -> tuple[int, int]:
    """(beams, tokens of each) of the ReDrafter in the engine; (0, 0) without one."""
    drafter = spec.drafter
    return (drafter.num_beams, drafter.draft_tok or drafter.predict_n) if isinstance(drafter, Redrafter) else (0, 0)


def _run(argv: list[str], log: Path) -> None:
    with spawn(argv, log=log, env=dict(os.environ)) as child:
        status = child.wait()
    if status:
        what = Path(argv[0]).name if "-m" not in argv else argv[argv.index("-m") + 1]
        raise _child.last_word(log_tail(log, 1)) or ChildError(
            f"{what} failed with exit status {status}; log: {log}", log_tail(log)
        )
