"""omr artifacts [verify | prune]: list finished artifacts, check their digests, delete what killed runs left."""

from __future__ import annotations

import argparse
import json
import shutil

from omr.artifact import Store, file_sha256
from omr.config import home


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omr artifacts", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["ls", "verify", "prune"], default="ls")
    action = parser.parse_args(argv).action
    damaged: list[str] = []
    store = Store(home() / "artifacts", damaged.append)
    if action == "prune":
        return _prune(store)
    bad = 0
    for artifact in store.all():
        files = artifact.manifest["files"]
        size = sum(f["bytes"] for f in files.values())
        line = f"{artifact.kind}/{artifact.key}  {size / 1e6:10.1f} MB  {artifact.manifest['created']}"
        if action == "verify":
            wrong = [
                name
                for name, known in files.items()
                if not (artifact.path / name).is_file() or file_sha256(artifact.path / name) != known["sha256"]
            ]
            bad += bool(wrong)
            line += f"  CHANGED: {', '.join(wrong)}; delete {artifact.path} to rebuild it" if wrong else "  ok"
        else:
            line += f"  {json.dumps(artifact.manifest['recipe'].get('type', ''))[1:-1]}"
        print(line)
    for line in damaged:
        print(f"DAMAGED: {line}")
    return 1 if bad or (damaged and action == "verify") else 0


def _prune(store: Store) -> int:
    """Delete half-made folders and resume states. Only safe while nothing is building, hence not done by itself."""
    found = [p for pattern in ("*/.*.building", "*/.*.resume", "unfinished/*") for p in store.root.glob(pattern)]
    for folder in found:
        shutil.rmtree(folder)
        print(f"deleted {folder}")
    print(f"{len(found)} unfinished folders deleted")
    return 0
