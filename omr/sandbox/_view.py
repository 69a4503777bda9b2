"""Which folders of this machine a session needs to see, found out without importing anything heavy."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "sympy", "mpmath", "networkx", "pandas")


def find() -> dict[str, Any]:
    """The interpreter's library folders, the folders that hold packages, what to hide: arguments of `_root.View`
    under "view", and the folders to put on sys.path under "packages"."""
    packages = _package_folders()
    base = os.path.realpath(sys.base_prefix)
    standard = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    library = [f"{base}/lib"] if base not in ("/", "/usr") else []
    programs = [f"{base}/bin"] if base not in ("/", "/usr") else []
    return {
        "view": {
            "interpreter": sorted({*standard, *library, *packages}),
            "programs": programs,
            "hidden": [str(Path(__file__).resolve().parents[1])],
        },
        "packages": packages,
    }


def _package_folders() -> list[str]:
    """Real paths of the folders on sys.path that hold the packages worth preloading."""
    folders: list[str] = []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            folder = os.path.realpath(Path(spec.origin).parents[1])
            if folder not in folders:
                folders.append(folder)
    return folders
