"""Every choice and every experiment composes; what cannot be run as written gets one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from omr.compose import Plan, conf_dir, plan
from omr.config import VALUES, Config
from omr.errors import ConfigError
from omr.option import GROUPS, discover, fields_of, from_fields

CONF = conf_dir()
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
CHOICES = [(g, p.stem) for g in (*GROUPS, *VALUES) for p in sorted((CONF / g).glob("*.yaml"))]


def one(*overrides: str) -> Config:
    made = plan(list(overrides), multirun=False)
    assert not made.refused, made.refused
    return made.cells[0].cfg


def refusal(*overrides: str, multirun: bool = False) -> str:
    try:
        made: Plan = plan(list(overrides), multirun=multirun)
    except ConfigError as error:
        return str(error)
    assert made.refused, "it composed"
    return made.refused[0]


def test_every_option_has_a_yaml_and_every_yaml_an_option() -> None:
    without = [f"{g}/{n}" for g, n in discover() if not (CONF / g / f"{n}.yaml").exists()]
    assert not without
    for group in (*GROUPS, *VALUES):
        assert (CONF / group).is_dir()


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda v: str(v))
def test_every_choice_composes(group: str, choice: str) -> None:
    servers = sorted(name for g, name in discover() if g == "server")
    chosen = [f"{group}={choice}", "model.context_tokens=32768"]
    hosts = [chosen, *([*chosen, f"server={server}"] for server in servers)]
    made = next(m for overrides in hosts if not (m := plan(overrides, multirun=False)).refused)
    cfg = made.cells[0].cfg
    if group in GROUPS:
        option = getattr(cfg, group)
        assert from_fields(type(option), fields_of(option)) == option


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str) -> None:
    assert isinstance(one(f"+experiment={name}"), Config)


def test_whose_models_may_be_of_any_family() -> None:
    assert one("server=vllm", "drafter=mtp").any_family and one("server=trtllm_pytorch", "quant=bf16").any_family
    for loads in (["server=native"], ["server=vllm", "quant=int8_wo"], ["server=vllm", "job=build"], ["server=trtllm"]):
        assert not one(*loads, "model.context_tokens=32768").any_family, loads


def test_the_bare_command_is_the_embedded_default() -> None:
    cfg = one()
    assert (cfg.model.name, cfg.server.option_name, cfg.job.option_name) == ("tiny", "native", "eval")
    assert cfg.server.host == "127.0.0.1"


def test_the_quickstart_is_exactly_three_cells() -> None:
    made = plan(["+quickstart=sweep"], multirun=False)
    assert made.multirun and not made.refused
    cells = [(c.cfg.quant.option_name, c.cfg.drafter.option_name, c.cfg.study) for c in made.cells]
    assert cells == [("bf16", "none", "quickstart"), ("fp8", "none", "quickstart"), ("fp8", "redrafter", "quickstart")]


def test_own_text_beside_the_corpus_is_two_cells() -> None:
    made = plan(["+own_text=sweep"], multirun=False)
    assert not made.refused
    assert [fields_of(c.cfg.drafter)["train"]["data"] for c in made.cells] == ["self", "text"]


def test_a_grid_is_expanded() -> None:
    made = plan(
        ["+experiment=fp8_redrafter", "quant=bf16,fp8,int8_wo", "drafter=none,redrafter"],
        multirun=True,
    )
    assert not made.refused and len(made.cells) == 6


def test_an_experiment_is_hardware_neutral() -> None:
    cfg = one("+experiment=fp8_redrafter", "model=openmath_nemotron_14b_kaggle", "server=trtllm")
    assert cfg.server.option_name == "trtllm" and cfg.drafter.option_name == "redrafter"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["quant=fp9"], "quant=fp9: no such choice; did you mean fp8?"),
        (["qunt=fp8"], "qunt: no such key; did you mean quant?"),
        (["quant=fp8", "quant.clib_samples=3"], "quant.clib_samples: no such key; did you mean quant.calib_samples?"),
        (["drafter=redrafter", "drafter.lr=1"], "drafter.lr: no such key; did you mean drafter.train.lr?"),
        (["server.port=foo"], "server.port: Value 'foo' of type 'str' could not be converted to Integer"),
        (["server.port=99999"], "server.port must be 0 (any free port) to 65535, got 99999"),
        (["+quant.clp=0.9"], "quant.clp"),
        (["+nonsense=1"], "nonsense"),
        (["+experiment=fp8_redraftr"], "did you mean fp8_redrafter?"),
        (["sampling.temperature=-1"], "sampling.temperature must be >= 0, got -1"),
        (["drafter=redrafter", "server=vllm"], "server=vllm cannot run drafter=redrafter"),
        (["quant=int4", "server=trtllm"], "server=trtllm cannot run quant=int4"),
        (["model.prompt=generic/maths"], "did you mean generic/math?"),
        (["sampling.max_tokens=2048"], "leaves no room for a prompt"),
        (["drafter.predict_n=2"], "drafter.predict_n: no such key in the drafter chosen; drafter=redrafter has it"),
        (["quant=bf16,fp8"], "add --multirun"),
        (["quant="], "quant=: quant takes one of bf16, fp8,"),
        (["model=null"], "model=null: model takes one of"),
        (["hydra/launcher=nope"], "hydra/launcher=nope: no such choice; a plugin has to be installed"),
        (["model=qwen3_0_6b", "model.text.corpus=true"], "model.text.corpus=false or model.text.hub=null"),
        (["study=../up"], "study must be a plain folder name"),
        (["a b c"], "a b c: not KEY=VALUE"),
        (["device=tpu"], "device"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_is_one_line(overrides: list[str], says: str) -> None:
    line = refusal(*overrides)
    assert says in line, line
    assert "\n" not in line and "Traceback" not in line


def test_one_bad_cell_is_named_before_anything_starts() -> None:
    made = plan(["quant=bf16,fp8", "drafter=none,redrafter", "server=native,vllm"], multirun=True)
    assert made.refused and len(made.cells) + len(made.refused) == 8
    assert all("server=vllm" in line for line in made.refused)


def test_a_broken_yaml_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nstudy: [unclosed\n")
    monkeypatch.chdir(tmp_path)
    line = refusal("+experiment=mine")
    assert "mine.yaml" in line and "\n" not in line


def test_own_experiments_are_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nstudy: mine\n")
    monkeypatch.chdir(tmp_path)
    assert one("+experiment=mine").study == "mine"


@pytest.mark.parametrize("model", ["tiny", "qwen3_0_6b"])
def test_a_text_of_ones_own_replaces_the_models(model: str) -> None:
    text = one(f"model={model}", "model.text.path=mine.jsonl").model.text
    assert (text.path, text.corpus, text.hub) == ("mine.jsonl", False, None)


AIMO2 = {
    "model": {"hub": "nvidia/OpenMath-Nemotron-14B-Kaggle", "tp": 2, "context_tokens": 32000, "prompt": "generic/math"},
    "quant": {"option_name": "fp8", "calib_samples": 4096},
    "drafter": {"num_draft_layers": 2, "predict_n": 3, "rnn": True, "num_beams": 1},
    "server": {
        "option_name": "trtllm",
        "kv_cache_free_gpu_memory_fraction": 0.92,
        "max_batch_size": 12,
        "engine_max_batch_size": 32,
    },
    "sampling": {"temperature": 0.7, "max_tokens": 20000, "seed": 0},
    "job": {"num_generations": 12, "stop_after": 10, "max_code_executions": 2, "max_concurrent_problems": 1},
}
EIGHT_CALLS = AIMO2 | {"job": {"num_generations": 12, "stop_after": 10, "max_code_executions": 8}}
L4X4 = AIMO2 | {
    "model": {"hub": "nvidia/OpenMath-Nemotron-14B-Kaggle", "tp": 4},
    "job": {"num_generations": 12, "time_budget_s": 350, "time_buffer_s": 210, "stop_when_decided": True},
}
SEED = AIMO2 | {
    "drafter": {"option_name": "none"},
    "sampling": {"temperature": 0, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1, "max_tokens": 8000},
    "job": {"option_name": "eval"},
}


@pytest.mark.parametrize(
    ("name", "values"),
    [("aimo2_h100x2", AIMO2), ("aimo2_h100x2_8calls", EIGHT_CALLS), ("aimo2_l4x4", L4X4), ("seed_tutorial", SEED)],
)
def test_published_experiments_have_the_published_values(name: str, values: dict[str, dict[str, object]]) -> None:
    cfg = one(f"+experiment={name}")
    for group, wanted in values.items():
        got = {key: getattr(getattr(cfg, group), key) for key in wanted}
        assert got == wanted
    text = cfg.model.text
    assert (text.hub, text.split, text.solution_key) == ("nvidia/OpenMathReasoning", "tir", "generated_solution")
    if cfg.drafter.trained:
        how = fields_of(cfg.drafter)["train"]
        assert (how["rows"], how["max_length"], how["epochs"]) == (100_000, 2048, 1)
        assert (how["lr"], how["schedule"], how["warmup"], how["weight_decay"]) == (1e-3, "cosine", 0.1, 0.0)
        assert how["batch_rows"] * how["accumulation"] == 1 * 4 * 2, "documents a step: 1 x 4 accumulated x 2 GPUs"
