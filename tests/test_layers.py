"""The layer table of the project, held by reading every import statement."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "omr"

CONTRACTS = ("omr.quant", "omr.drafter", "omr.server", "omr.sandbox", "omr.job")
RANKS: dict[str, int] = {
    "omr": 0,
    "omr.option": 0,
    "omr.errors": 0,
    "omr.machine": 1,
    "omr.nn": 1,
    "omr.artifact": 1,
    "omr.process": 1,
    "omr.tracker": 1,
    "omr.model": 1,
    "omr.records": 1,
    "omr.sampling": 1,
    "omr.stats": 1,
    "omr.text": 1,
    "omr.extra_trackers": 1,
    "omr.hub": 1,
    "omr.interrupt": 1,
    "omr.table": 1,
    "omr.chunks": 1,
    "omr.wire": 1,
    "omr.quant.*": 2,
    "omr.drafter.*": 2,
    "omr.client": 2,
    "omr.engine": 3,
    "omr.solve": 3,
    "omr.benchmark": 4,
    "omr.dataset": 4,
    "omr.source": 4,
    "omr.server.*": 4,
    "omr.sandbox.*": 4,
    "omr.config": 5,
    "omr.samples": 5,
    "omr.sft_data": 5,
    "omr.run": 6,
    "omr.corpus": 6,
    "omr.sft": 6,
    "omr.compose": 6,
    "omr.on_policy": 6,
    "omr.pipeline": 7,
    "omr.job.*": 8,
    "omr.sweep": 8,
    "omr.cli": 9,
    "omr.worker": 9,
    "omr.__main__": 10,
}
"""Imports go downwards only. Modules of one rank import each other only within one package."""

LAZY = ("torch", "mlflow", "transformers", "numpy", "pandas", "scipy", "pyarrow", "matplotlib", "hydra", "sympy")
"""Never imported by importing the config side of omr."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def rank(module: str) -> int:
    """The rank of a module: its own entry, or that of the nearest package above it."""
    if module in CONTRACTS:
        return 1
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        name = ".".join(parts[:size])
        if name in CONTRACTS and size < len(parts):
            return RANKS[f"{name}.*"]
        if name in RANKS and (size > 1 or len(parts) == 1):
            return RANKS[name]
    raise AssertionError(f"{module} has no rank: give it a place in the table")


def imports(path: Path, module: str) -> Iterator[tuple[str, int]]:
    """The omr modules a file imports, with line numbers; those under TYPE_CHECKING left out."""
    exempt: set[int] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            exempt |= {inner.lineno for stmt in node.body for inner in ast.walk(stmt) if hasattr(inner, "lineno")}
    known = {name for name, _ in modules()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            base = node.module or ""
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        else:
            continue
        if node.lineno not in exempt:
            yield from ((name, node.lineno) for name in names if name == "omr" or name.startswith("omr."))


def test_imports_go_downwards() -> None:
    wrong = []
    for module, path in modules():
        package = module.rsplit(".", 1)[0] if path.name != "__init__.py" else module
        for target, line in imports(path, module):
            same_package = package != "omr" and (target == package or target.startswith(f"{package}."))
            if not (rank(target) < rank(module) or target == module or same_package):
                wrong.append(f"{module}:{line} (rank {rank(module)}) imports {target} (rank {rank(target)})")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_docstring_and_a_readable_length() -> None:
    wrong = []
    for module, path in modules():
        text = path.read_text()
        if text.strip() and not ast.get_docstring(ast.parse(text)):
            wrong.append(f"{module} has no docstring")
        if (lines := text.count("\n")) > 400:
            wrong.append(f"{module} has {lines} lines: find the second noun in it")
    assert not wrong, "\n".join(wrong)


def test_no_drawers() -> None:
    drawers = {"utils", "helpers", "common", "misc", "core", "base"}
    assert not [module for module, _ in modules() if drawers & set(module.split("."))]


@pytest.mark.parametrize("module", ["omr.option", "omr.config", "omr.run", "omr.__main__", "discovered options"])
def test_config_side_imports_nothing_heavy(module: str) -> None:
    body = "from omr.option import discover; discover()" if " " in module else f"import {module}"
    code = f"import sys\n{body}\nprint(sorted(set({LAZY!r}) & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]", f"{module} imports {out.stdout}"
