"""Where a model's weights come from. `resolve` turns a Model into a Hugging Face folder on disk and a content key.

    path       a local folder                      keyed by the digests of its files (memoised by path, size, mtime)
    embedded   a folder shipped in omr/assets      likewise
    package    a GGUF inside a wheel from PyPI     keyed by requirement, file and digest; converted to bf16 once
    hub        a Hugging Face repository           keyed by id and full commit hash; files stay in the hub's cache

The first that is set wins. Whatever the origin, the folder is checked before anything is built from it: a supported
architecture (`any_family` takes others: another program serves them as they are), safetensors whose headers agree with
the files' sizes, a tokenizer. Only safetensors, JSON and tokenizer files are fetched from the hub, and nothing in a
repository or wheel is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omr import hub
from omr.artifact import MANIFEST, Store, file_sha256, key_of, resume_folder
from omr.errors import ConfigError, InputError, MissingBackend, ResourceError
from omr.model import Model
from omr.nn.checkpoint import TOKENIZER_FILES, Checkpoint, open_checkpoint
from omr.nn.config import DecoderConfig, parse
from omr.process import log_tail, spawn

ASSETS = Path(__file__).parent / "assets"
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "merges.txt", "*.jinja")
OURS = (MANIFEST, "ranges.json", "digests.json")
"""Files that omr leaves beside a checkpoint; they say when and how, not what."""
REVISION = 1
"""Bump when a package would be converted to other bytes."""


@dataclass(frozen=True)
class Source:
    """A model folder that was checked."""

    folder: Path
    key: str
    """Names the content: equal keys, equal weights and tokenizer."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Where it came from: kind and, by kind, path, package, hub id and commit."""


def preflight(model: Model, *, serves: bool = False, any_family: bool = False) -> None:
    """Refuse a model that cannot be had here, without fetching or importing anything. Raises InputError and the like.

    A local folder is checked as in `resolve`, and with `serves` its longest context too. For the hub: a plausible id,
    room on disk, and the cache when offline.
    """
    if local := local_folder(model):
        config = check_folder(local, any_family=any_family).config
        longest = config.get("max_position_embeddings") if any_family else parse(config).max_position_embeddings
        if serves and isinstance(longest, int) and model.context_tokens > longest:
            raise ConfigError(
                f"model.context_tokens={model.context_tokens} is more than the model's "
                f"max_position_embeddings={longest}; set it to {longest} or less"
            )
    elif model.package:
        _package_of(model)
        if not _has_pip():
            raise MissingBackend("pip", why=f"model.package={model.package} is fetched with it; or set model.path")
    else:
        assert model.hub is not None
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model.hub):
            raise ConfigError(f"model.hub must be owner/name, got {model.hub!r}")
        if model.revision is not None and not hub.COMMIT.fullmatch(model.revision):
            raise ConfigError(f"model.revision must be a full commit hash (40 hex digits), got {model.revision!r}")
        _preflight_cache(model)


def resolve(model: Model, store: Store, *, any_family: bool = False) -> Source:
    """The model's folder, fetched or converted if it is not here yet, and the key of its content.

    Raises InputError (missing, truncated, unsupported files; unreachable or gated hub), MissingBackend, ResourceError.
    """
    if local := local_folder(model):
        check_folder(local, any_family=any_family)
        digests = {path.name: _digest(path, store.root) for path in content_files(local)}
        kind = "path" if model.path else "embedded"
        return Source(local, key_of("weights", {"files": digests}, {}), {"kind": kind, "path": str(local)})
    if model.package:
        requirement, file, sha256 = _package_of(model)
        recipe = {"package": requirement, "file": file, "sha256": sha256}
        made = store.get(
            "weights", recipe, {}, lambda out: _from_package(out, requirement, file, sha256), revision=REVISION
        )
        return Source(made.path, made.key, {"kind": "package", **recipe})
    assert model.hub is not None
    commit = hub.resolve_revision(model.hub, model.revision)
    folder = hub.snapshot(model.hub, commit, HUB_PATTERNS)
    check_folder(folder, any_family=any_family)
    recipe = {"hub": model.hub, "revision": commit}
    return Source(folder, key_of("weights", recipe, {}), {"kind": "hub", **recipe})


def local_folder(model: Model) -> Path | None:
    """The folder of a model that is already on disk (path, embedded), or None. Raises InputError if it is not there."""
    if model.path:
        folder = Path(model.path).expanduser().resolve()
        if not folder.is_dir():
            raise InputError(f"model.path {model.path} is not a folder; give a Hugging Face folder with safetensors")
        return folder
    if model.embedded:
        folder = ASSETS / model.embedded
        if "/" in model.embedded or not (folder / "config.json").is_file():
            known = sorted(p.parent.name for p in ASSETS.glob("*/config.json"))
            raise InputError(f"no embedded model {model.embedded!r}; shipped: {', '.join(known) or 'none'}")
        return folder
    return None


def check_folder(folder: Path, *, any_family: bool = False) -> Checkpoint:
    """Open a checkpoint and refuse what could not be served: see the module's docstring. Raises InputError."""
    opened = open_checkpoint(folder, any_family=any_family)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it from the base model")
    if any_family:
        return opened
    config = parse(opened.config)
    for name in ("model.embed_tokens.weight", f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"):
        if name not in opened.tensors:
            raise InputError(
                f"{folder} has no tensor {name}, which its config.json implies; fetch the checkpoint again"
            )
    return opened


def content_files(folder: Path) -> list[Path]:
    """The files that make a checkpoint what it is, sorted: weights, configuration, tokenizer; no pictures or notes."""
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in kinds and p.name not in OURS)


def memory_bytes(config: DecoderConfig, *, weight_bits: float = 16, tokens: int = 0, kv_bits: float = 16) -> int:
    """Bytes that a decoder takes with `tokens` in its KV cache; embeddings and lm_head stay at 16 bits. An estimate.

    Activations and the runtime's own share are not counted: leave a gigabyte or two.
    """
    tables = (2 - config.tie_word_embeddings) * config.vocab_size * config.hidden_size
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    return int((config.num_params - tables) * weight_bits / 8 + tables * 2 + kv * kv_bits / 8)


def _preflight_cache(model: Model) -> None:
    assert model.hub is not None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if (cache / f"models--{model.hub.replace('/', '--')}" / "snapshots").is_dir():
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise InputError(
            f"model {model.hub} is not in the hub cache and HF_HUB_OFFLINE is set; unset it, or set model.path"
        )
    there = next(p for p in (cache, *cache.parents) if p.exists())
    wanted, free = model.params_b * 2e9, shutil.disk_usage(there).free
    if free < wanted:
        raise ResourceError(
            f"{model.hub} needs about {wanted / 1e9:.0f} GB in {cache}, {free / 1e9:.0f} GB are free; "
            "free some or set HF_HOME elsewhere"
        )


def _digest(path: Path, cache: Path) -> str:
    """sha256 of a file, remembered in `cache` for as long as its size and modification time stay the same."""
    memo, stat = cache / "digests.json", path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):
        known = {}
    entry = known.get(str(path))
    if isinstance(entry, list) and entry[:2] == stamp:
        return str(entry[2])
    digest = file_sha256(path)
    known[str(path)] = [*stamp, digest]
    cache.mkdir(parents=True, exist_ok=True)
    partial = memo.with_name(f".digests.{os.getpid()}.json")
    partial.write_text(json.dumps(known, indent=0))
    os.replace(partial, memo)
    return digest


def _package_of(model: Model) -> tuple[str, str, str]:
    """Requirement, file and digest of a packaged model. Raises ConfigError when one is not set."""
    assert model.package is not None
    if not model.package_file or not model.package_sha256:
        raise ConfigError(f"model.package={model.package} needs model.package_file and model.package_sha256")
    return model.package, model.package_file, model.package_sha256


def _has_pip() -> bool:
    import importlib.util

    return importlib.util.find_spec("pip") is not None


def _from_package(out: Path, requirement: str, file: str, sha256: str) -> dict[str, float]:
    """Download the wheel, take the GGUF out of it, check its digest and write it as a bf16 folder into `out`."""
    scratch = resume_folder(out)
    scratch.mkdir(exist_ok=True)
    gguf = scratch / file
    if not (gguf.is_file() and file_sha256(gguf) == sha256):
        wheel = _download(requirement, scratch)
        _extract(wheel, file, sha256, gguf)
        wheel.unlink()
    log = scratch / "convert.log"
    with spawn([sys.executable, "-m", "omr.source", str(gguf), str(out)], log=log) as child:
        status = child.wait()
    if status:
        raise InputError(
            f"{file} of {requirement} cannot be converted: {log_tail(log, 1) or f'exit {status}'}; log: {log}"
        )
    return {"params": float(check_folder(out).num_params)}


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a pinned requirement. Nothing of it is installed or run. Raises InputError, MissingBackend."""
    if not _has_pip():
        raise MissingBackend("pip", why=f"{requirement} is fetched with it; or set model.path")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        why = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with status {done.returncode}"
        raise InputError(
            f"{requirement} cannot be downloaded ({why}); check the network and pip's index settings, or set model.path"
        )
    return wheels[-1]


def _extract(wheel: Path, file: str, sha256: str, to: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == file]
            if len(members) != 1:
                raise InputError(f"{wheel.name} holds {len(members)} files named {file}; check model.package_file")
            partial, digest = to.with_suffix(".partial"), hashlib.sha256()
            with archive.open(members[0]) as data, partial.open("wb") as copy:
                for block in _blocks(data):
                    digest.update(block)
                    copy.write(block)
    except zipfile.BadZipFile as error:
        wheel.unlink()
        raise InputError(f"{wheel.name} is not a whole wheel ({error}); run again to fetch it again") from None
    if digest.hexdigest() != sha256:
        partial.unlink()
        raise InputError(
            f"{file} of {wheel.name} has sha256 {digest.hexdigest()}, model.package_sha256 says {sha256}: "
            "the package is not the one that was pinned, and is refused"
        )
    os.replace(partial, to)


def _blocks(data: Any) -> Iterator[bytes]:
    while block := data.read(1 << 20):
        yield block


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write a GGUF as a Hugging Face folder: bf16 safetensors, config, tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes 0600: a server under another user could not read it


if __name__ == "__main__":  # a child process: loading a GGUF takes several times the model's size in memory
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
