"""omr verbs: this list."""

from __future__ import annotations

import ast
from pathlib import Path

from omr.cli import jobs, verbs


def main(argv: list[str]) -> int:
    for name in verbs():
        doc = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text())) or ""
        print(f"  {doc.splitlines()[0]}")
    print("\n  omr JOB KEY=VALUE ... with JOB one of " + ", ".join(jobs()) + " is python -m omr job=JOB KEY=VALUE ...")
    return 0
