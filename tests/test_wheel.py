"""An installed wheel, used from another folder, has everything: conf, studies, the embedded model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow

COMPOSE_ALL = """
import sys
from pathlib import Path
import omr
from omr.compose import conf_dir, plan
installed = Path(sys.argv[1]).resolve()
assert Path(omr.__file__).resolve().is_relative_to(installed), omr.__file__
assert conf_dir().is_relative_to(installed), conf_dir()
names = sorted(p.stem for p in (conf_dir() / "experiment").glob("*.yaml"))
assert names, "no experiment in the wheel"
for name in names:
    made = plan([f"+experiment={name}"], multirun=False)
    assert not made.refused, (name, made.refused)
made = plan(["+quickstart=sweep"], multirun=False)
assert len(made.cells) == 3 and not made.refused
for group in sorted(p.name for p in conf_dir().iterdir() if p.is_dir() and p.name != "experiment"):
    assert list((conf_dir() / group).glob("*.yaml")), f"conf/{group} is empty in the wheel"
print(" ".join(names))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    quiet = {"check": True, "capture_output": True, "text": True}
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], **quiet
    )
    wheel = next(folder.glob("omr-*.whl"))
    target = folder / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], **quiet)
    return target


def run(installed: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(installed)}
    env.pop("OMR_HOME", None)
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_every_experiment_composes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-c", COMPOSE_ALL, str(installed))
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml")}


def test_the_embedded_model_and_benchmarks_are_in_the_wheel(installed: Path) -> None:
    assert (installed / "omr" / "assets" / "tiny" / "model.safetensors").stat().st_size > 1_000_000
    assert (installed / "omr" / "assets" / "benchmarks" / "tiny_math.jsonl").exists()
    shipped = [p.relative_to(installed) for p in (installed / "omr").rglob("*") if p.suffix in {".pyc", ".db", ".log"}]
    assert not [p for p in shipped if "__pycache__" not in p.parts]


def test_help_and_a_mistake_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    helped = run(installed, tmp_path, "-m", "omr", "--help")
    assert helped.returncode == 0 and "fp8_channel" in helped.stdout
    wrong = run(installed, tmp_path, "-m", "omr", "quant=fp9")
    assert wrong.returncode == 2 and wrong.stderr.strip() == "omr: quant=fp9: no such choice; did you mean fp8?"
    script = run(installed, tmp_path, str(installed / "bin" / "omr"), "--help")
    assert script.returncode == 0
