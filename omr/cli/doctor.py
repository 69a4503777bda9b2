"""omr doctor: what this machine can run, and the fix for what it cannot."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from importlib import metadata

from omr.config import default_tracking, home
from omr.errors import OmrError
from omr.machine import gpu_names, has_gpu
from omr.option import discover

BACKENDS = {
    "tensorrt_llm": "pip install 'omr[trtllm]'",
    "vllm": "pip install 'omr[vllm]'",
    "sglang": "pip install 'omr[sglang]'",
    "nemo_skills": "pip install 'omr[nemo]'",
    "recurrent_drafting": "pip install git+https://github.com/apple/ml-recurrent-drafter (Python 3.10)",
}
"""Optional packages and what brings each."""


def main(argv: list[str]) -> int:
    if argv:
        print(f"usage: {__doc__}", file=sys.stderr)
        return 2 if argv[0] not in ("-h", "--help") else 0
    ok = True
    row("omr", f"{metadata.version('omr')}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "transformers", "mlflow", "hydra-core", "omegaconf", "math-verify"):
        row(name, metadata.version(name))
    row("GPU", ", ".join(gpu_names()) or "NVIDIA device found" if has_gpu() else "none; device=auto takes the CPU")
    row("disk", f"{shutil.disk_usage(home()).free / 1e9:.0f} GB free in {home()}")
    row("tracking", default_tracking())
    for (group, name), cls in sorted(discover().items()):
        if group == "sandbox":
            try:
                cls().preflight()
                row(f"sandbox={name}", "works here")
            except OmrError as error:
                ok = ok and name != "local"
                row(f"sandbox={name}", str(error))
    for package, fix in BACKENDS.items():
        there = importlib.util.find_spec(package) is not None
        row(package, "installed" if there else f"not installed; {fix}")
    return 0 if ok else 1


def row(name: str, text: str) -> None:
    print(f"{name:20} {text}")
