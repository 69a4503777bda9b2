"""What this machine has, asked cheaply: nothing is imported that initialises a device."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is visible, without loading CUDA."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and Path("/dev/nvidia0").exists()


def gpu_names() -> list[str]:
    """Names of the GPUs, sorted, for keys of what is built for one kind; empty when nvidia-smi does not say."""
    return sorted(_nvidia_smi("name"))


def gpu_bytes() -> int:
    """Memory of the smallest GPU; 0 when nvidia-smi does not say."""
    return min((int(mib) << 20 for mib in _nvidia_smi("memory.total") if mib.isdigit()), default=0)


def host_bytes() -> int:
    """Main memory, used or not."""
    import psutil

    return int(psutil.virtual_memory().total)


@cache
def _nvidia_smi(what: str) -> tuple[str, ...]:
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in out.splitlines() if line.strip())
