"""Whether this machine has what a server needs, asked cheaply: nothing is imported, no device is initialised."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from omr.errors import ConfigError, MissingBackend, ResourceError
from omr.machine import gpu_bytes, gpu_names, has_gpu, host_bytes

BYTES_PER_PARAM = {"bf16": 2.0, "fp8": 1.0, "int8_wo": 1.0, "int4": 0.6}
"""Weights on the device, per parameter; embeddings and scales make these lower bounds."""


def require_gpu(server: str, device: str) -> None:
    """Raise MissingBackend unless an NVIDIA GPU is visible and asked for."""
    if device != "cuda" or not has_gpu():
        raise MissingBackend(
            "a CUDA device", why=f"server={server} runs on NVIDIA GPUs only", fix="server=native, or a machine with one"
        )


def require_cuda_torch() -> None:
    """Raise MissingBackend when the installed torch was built without CUDA."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise MissingBackend("torch") from None
    if version.endswith("+cpu"):
        raise MissingBackend(
            "a CUDA build of torch",
            why=f"device=cuda, but torch {version} is installed",
            fix="pip install torch from the CUDA index, or device=cpu",
        )


def interpreter(python: str | None) -> Path:
    """The Python of a backend: the one named by `server.python`, else this one. Raises ConfigError."""
    if not python:
        return Path(sys.executable)
    path = Path(python).expanduser()
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise ConfigError(f"server.python={python!r} is not an executable file; give the path of a Python interpreter")
    return path.absolute()  # not resolved: a venv's python is a link, and its folder is what matters


def require_package(package: str, *, extra: str, python: str | None) -> None:
    """Raise MissingBackend unless the interpreter has the package (looked up, not imported)."""
    path = interpreter(python)
    found = importlib.util.find_spec(package) is not None if not python else _has_package(path, package)
    if not found:
        where = f"{path} has it not" if python else "it is not in this environment, and server.python names no other"
        raise MissingBackend(package, extra=extra, why=where)


@cache
def _has_package(python: Path, package: str) -> bool:
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def package_version(distribution: str, python: str | None) -> str | None:
    """The installed version in the interpreter of `server.python`; None when it is not there."""
    if not python:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None
    return _version(interpreter(python), distribution)


@cache
def _version(python: Path, distribution: str) -> str | None:
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def find_script(name: str, python: str | None) -> Path | None:
    """A console script beside the interpreter of `server.python`; else beside this one, else on PATH."""
    beside = interpreter(python).parent / name
    if beside.is_file() and os.access(beside, os.X_OK):
        return beside
    found = None if python else shutil.which(name)
    return Path(found) if found else None


def require_script(name: str, *, package: str, extra: str, python: str | None) -> Path:
    """The console script, or MissingBackend."""
    script = find_script(name, python)
    if script is None:
        where = f"beside {python}" if python else "beside this Python or on PATH; server.python may name another Python"
        raise MissingBackend(package, extra=extra, why=f"no `{name}` command {where}")
    return script


def require_memory(params_b: float, quant: str, device: str, tp: int) -> None:
    """Raise ConfigError for more GPUs than there are, ResourceError when the weights alone cannot fit.

    Says nothing about what is not known: a size of 0, GPUs that nvidia-smi does not list.
    """
    count = len(gpu_names())
    if device == "cuda" and 0 < count < tp:
        raise ConfigError(f"model.tp={tp} needs as many GPUs, and this machine has {count}; lower model.tp")
    needed = params_b * 1e9 * BYTES_PER_PARAM.get(quant, 2.0)
    if not needed:
        return
    have = gpu_bytes() * tp if device == "cuda" else host_bytes()
    if have and needed > have:
        what = f"{tp} GPU" if device == "cuda" else "this machine"
        raise ResourceError(
            f"the weights take about {needed / 1e9:.0f} GB ({params_b:g}B parameters in {quant}), {what} has "
            f"{have / 1e9:.0f} GB; take a smaller model or a narrower quant"
        )
