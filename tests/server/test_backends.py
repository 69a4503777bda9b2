"""Servers that omr only starts: every flag against the recorded tables, every way to start and die with a fake."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from omr.client import Client
from omr.drafter import Drafter
from omr.drafter.draft_model import SmallModel
from omr.drafter.eagle3 import Eagle3
from omr.drafter.mtp import Mtp
from omr.drafter.ngram import Ngram
from omr.drafter.none import NoDrafter
from omr.drafter.redrafter import Head, Redrafter
from omr.drafter.suffix import Suffix
from omr.errors import ChildError, ConfigError, MissingBackend, RequestError, ResourceError
from omr.option import discover
from omr.process import free_port
from omr.server import Server, ServeSpec, SpecCounts, _backend
from omr.server import sglang as sglang_module
from omr.server import vllm as vllm_module
from omr.server.native import Native
from omr.server.nemo import Nemo, ServerType
from omr.server.openai import Dialect, OpenAi
from omr.server.sglang import Sglang
from omr.server.trtllm import _RUNS, Backend, GemmPlugin, Trtllm
from omr.server.vllm import Vllm

FLAGS = Path(__file__).parent.parent / "data" / "flags"
FAKE = Path(__file__).parent / "fake_server.py"


def table(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FLAGS / f"{name}.json").read_text())
    return data


def spec(**fields: Any) -> ServeSpec:
    values = {"model_name": "tiny", "checkpoint": Path("/m/ckpt"), "drafter": NoDrafter(), "device": "cuda", **fields}
    return ServeSpec(**values)


def check_flags(args: list[str], flags: list[dict[str, Any]], aliases: dict[str, list[str]] | None = None) -> None:
    """Every flag is known and has a value exactly when it takes one, of its type and one of its choices."""
    known = {name: flag for flag in flags for name in flag["flags"]}
    rest = list(args)
    while rest:
        name = rest.pop(0)
        assert name.startswith("--"), f"{name} stands where a flag should: {args}"
        is_negated = name.startswith("--no-") and name not in known
        assert is_negated or name in known, f"{name} is in no table"
        flag = known["--" + name.removeprefix("--no-")] if is_negated else known[name]
        if flag["type"] in ("bool", "flag"):
            assert not rest or rest[0].startswith("--"), f"{name} takes no value, got {rest[0]}"
            continue
        assert not is_negated, f"{name}: only switches can be negated"
        value = rest.pop(0)
        choices = [*flag.get("choices", []), *(aliases or {}).get(name, [])]
        assert not choices or value in choices, f"{name}={value} is none of {choices}"
        kind = str(flag["type"])
        if "int" in kind and "str" not in kind:
            int(value)
        elif "float" in kind:
            float(value)


DRAFTERS: dict[str, Drafter] = {
    "none": NoDrafter(),
    "ngram": Ngram(draft_tok=3, max_ngram=4),
    "suffix": Suffix(),
    "draft_model": SmallModel(model="/m/small"),
    "eagle3": Eagle3(model="/m/eagle", draft_tok=5),
    "mtp": Mtp(draft_tok=2),
    "redrafter": Redrafter(),
}


# flags


@pytest.mark.parametrize("drafter", sorted(Vllm.runs_drafter))
def test_vllm_flags(drafter: str) -> None:
    recorded = table("vllm")
    for dtype, kv, prefix, eager in itertools.product(
        vllm_module.Dtype, vllm_module.KvDtype, (True, False), (True, False)
    ):
        server = Vllm(dtype=dtype, kv_cache_dtype=kv, enable_prefix_caching=prefix, enforce_eager=eager)
        for device in ("cpu", "cuda"):
            args = server.arguments(spec(drafter=DRAFTERS[drafter], device=device, tp=2, seed=5), 8000)
            assert args[:2] == ["serve", "/m/ckpt"]
            check_flags(args[2:], recorded["flags"])
    check_flags(Vllm(max_num_batched_tokens=4096).arguments(spec(), 1)[2:], recorded["flags"])
    config = Vllm().speculative_config(spec(drafter=DRAFTERS[drafter]))
    assert (config is None) == (drafter == "none")
    if config is not None:
        assert set(config) <= set(recorded["speculative_config"])
        assert config["method"] == drafter and drafter in recorded["speculative_methods"]


@pytest.mark.parametrize("drafter", sorted(Sglang.runs_drafter))
def test_sglang_flags(drafter: str) -> None:
    recorded = table("sglang")
    for dtype, kv in itertools.product(sglang_module.Dtype, sglang_module.KvDtype):
        server = Sglang(dtype=dtype, kv_cache_dtype=kv, mem_fraction_static=0.8, radix_cache=False, cuda_graph=False)
        args = server.arguments(spec(drafter=DRAFTERS[drafter], tp=2), 8000)
        check_flags(args, recorded["flags"])
        if drafter != "none":
            assert args[args.index("--speculative-algorithm") + 1] in recorded["speculative_algorithms"]


@pytest.mark.parametrize("drafter", ["none", "redrafter"])
@pytest.mark.parametrize("quant", sorted(Trtllm.runs_quant))
def test_trtllm_engine_flags(drafter: str, quant: str, tmp_path: Path) -> None:
    recorded = table("trtllm")
    for plugin in GemmPlugin:
        server = Trtllm(gemm_plugin=plugin)
        one = spec(drafter=DRAFTERS[drafter], quant=quant, engine=tmp_path, tp=2, context_tokens=32000)
        check_flags(server.build_arguments(one, tmp_path, tmp_path), recorded["build"])
        args = server.serve_arguments(one, 8000, None)
        assert args[:2] == ["serve", str(tmp_path)]
        check_flags(args[2:], recorded["serve"], {"--backend": ["trt"]})


def test_the_pipelines_engine_is_built_to_the_letter() -> None:
    one = spec(drafter=Redrafter(), quant="fp8", tp=2, context_tokens=32000)
    args = Trtllm().build_arguments(one, Path("/c"), Path("/e"))
    for flag, value in {
        "--gemm_plugin": "fp8",
        "--use_paged_context_fmha": "enable",
        "--max_batch_size": "32",
        "--max_seq_len": "32000",
        "--max_input_len": "32000",
        "--max_num_tokens": "32000",
        "--speculative_decoding_mode": "explicit_draft_tokens",
        "--max_beam_width": "1",
        "--kv_cache_type": "paged",
    }.items():
        assert args[args.index(flag) + 1] == value
    exported = Trtllm().export_spec(one, Path("/c"))
    assert (exported.num_beams, exported.draft_tok, exported.tp) == (1, 3, 2)
    one.engine = Path("/e")
    args = Trtllm().serve_arguments(one, 8000, None)
    for flag, value in {"--max_batch_size": "12", "--kv_cache_free_gpu_memory_fraction": "0.92"}.items():
        assert args[args.index(flag) + 1] == value


@pytest.mark.parametrize("drafter", sorted(_RUNS["pytorch"]))
def test_trtllm_pytorch_options(drafter: str) -> None:
    recorded = table("trtllm")
    server = Trtllm(backend=Backend.pytorch)
    assert not server.builds_engine and Trtllm().builds_engine
    one = spec(drafter=DRAFTERS[drafter])
    options = server.llm_options(one)
    check_flags(server.serve_arguments(one, 8000, Path("o.yaml"))[2:], recorded["serve"])
    speculative = dict(options.get("speculative_config", {}))
    assert bool(speculative) == (drafter != "none")
    if speculative:
        name = recorded["decoding_types"][speculative.pop("decoding_type")]
        fields = {"speculative_model_dir"}
        while name in recorded["decoding_classes"]:
            fields |= set(recorded["decoding_classes"][name]["fields"])
            name = recorded["decoding_classes"][name]["bases"][0]
        assert set(speculative) <= fields


def test_mtp_drafts_with_the_served_checkpoint() -> None:
    one = spec(drafter=Mtp(draft_tok=2))
    assert Vllm().speculative_config(one) == {"method": "mtp", "num_speculative_tokens": 2}
    flags = Sglang().speculation(one)
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    assert values["--speculative-algorithm"] == "EAGLE" and values["--speculative-draft-model-path"] == "/m/ckpt"
    assert (values["--speculative-num-steps"], values["--speculative-num-draft-tokens"]) == ("2", "3")
    options = Trtllm(backend=Backend.pytorch).llm_options(one)  # one model: nothing that two-model speculation needs
    chosen = {"decoding_type": "MTP", "max_draft_len": 2, "num_nextn_predict_layers": 2}
    assert options == {"enable_iter_perf_stats": True, "speculative_config": chosen}
    with pytest.raises(ConfigError, match="draft_tok"):
        Mtp(draft_tok=0)


@pytest.mark.parametrize("kind", list(ServerType))
def test_nemo_wraps_flags_of_the_server_inside(kind: ServerType) -> None:
    server = Nemo(server_type=kind, server_args=["--port", "5000"], cluster="local", with_sandbox=True)
    args = server.arguments(spec(tp=2))
    options = dict(zip(args[1::2], args[2::2], strict=False))
    assert args[0] == "start_server" and args[-1] == "--with_sandbox"
    assert options["--server_type"] == kind.name and options["--server_gpus"] == "2"
    recorded = table(kind.name)
    check_flags(shlex.split(options["--server_args"]), recorded.get("flags") or recorded["serve"])


def test_the_check_itself_can_fail() -> None:
    flags = [{"flags": ["--a", "-a"], "type": "int"}, {"flags": ["--b"], "type": "bool"}]
    flags += [{"flags": ["--c"], "type": "str", "choices": ["x"]}]
    check_flags(["--a", "1", "--no-b", "--c", "x", "--b"], flags)
    for bad in (["--d", "1"], ["--a", "x"], ["--b", "1"], ["--c", "y"], ["--no-a"], ["a"]):
        with pytest.raises((AssertionError, ValueError, IndexError)):
            check_flags(bad, flags)


# what is refused


@pytest.mark.parametrize(
    ("server", "fields", "says"),
    [
        (Vllm(), {"drafter": Redrafter()}, "server=native,trtllm can"),
        (Sglang(), {"drafter": Suffix()}, "server=native,vllm can"),
        (Trtllm(), {"quant": "int4"}, "server=trtllm cannot run quant=int4"),
        (Trtllm(), {"drafter": Ngram()}, "server.backend=pytorch can"),
        (Trtllm(backend=Backend.pytorch), {"drafter": Redrafter()}, "server.backend=tensorrt can"),
        (Trtllm(backend=Backend.pytorch), {"quant": "int8_wo"}, "server.backend=tensorrt can"),
        (Trtllm(), {"drafter": Redrafter(head=Head.base)}, "got base and 0"),
        (Trtllm(), {"drafter": Redrafter(sampled=True, adaptive=False)}, "drafter.sampled=false"),
        (Vllm(), {"drafter": Eagle3()}, "drafter.model"),
        (Sglang(), {"drafter": SmallModel()}, "drafter.model"),
        (Trtllm(), {"drafter": Mtp()}, "server.backend=pytorch can"),
        (Native(), {"drafter": Mtp()}, "server=sglang,trtllm,vllm can"),
        (Sglang(), {"drafter": Ngram(min_ngram=2)}, "min_ngram"),
        (Nemo(server_type=ServerType.trtllm), {"quant": "int4"}, "server_type=trtllm cannot run quant=int4"),
        (Nemo(), {"drafter": Ngram()}, "server=nemo cannot run drafter=ngram"),
        (Vllm(python="/nowhere/python"), {}, "server.python='/nowhere/python'"),
        (OpenAi(), {}, "server.url"),
        (OpenAi(url="ftp://x"), {}, "server.url"),
        (OpenAi(url="http://x", api_key_env="OMR_TEST_NO_SUCH_KEY"), {}, "OMR_TEST_NO_SUCH_KEY"),
    ],
)
def test_refused_before_anything_starts(server: Server, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        server.preflight(spec(**fields))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Vllm(max_num_seqs=0), "max_num_seqs"),
        (lambda: Vllm(gpu_memory_utilization=0), "gpu_memory_utilization"),
        (lambda: Vllm(max_num_batched_tokens=4), "max_num_batched_tokens"),
        (lambda: Sglang(max_running_requests=0), "max_running_requests"),
        (lambda: Sglang(mem_fraction_static=1.0), "mem_fraction_static"),
        (lambda: Trtllm(max_batch_size=64), "engine_max_batch_size"),
        (lambda: Trtllm(engine_max_batch_size=0), "engine_max_batch_size"),
        (lambda: Trtllm(kv_cache_free_gpu_memory_fraction=1.0), "kv_cache_free_gpu_memory_fraction"),
        (lambda: Nemo(port=8000), "port 5000"),
        (lambda: Nemo(server_nodes=0), "server_nodes"),
    ],
)
def test_ranges(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize(
    ("server", "extra"), [(Vllm(), "vllm"), (Sglang(), "sglang"), (Trtllm(), "trtllm"), (Nemo(), "nemo")]
)
def test_a_missing_backend_names_its_extra(server: Server, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(_backend, "has_gpu", lambda: True)
    with pytest.raises(MissingBackend, match=rf"pip install 'omr\[{extra}\]'"):
        server.preflight(spec())


def test_a_python_without_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "has_gpu", lambda: True)
    with pytest.raises(MissingBackend, match="sglang"):
        Sglang(python=sys.executable).preflight(spec())
    assert _backend.package_version("pytest", sys.executable) == pytest.__version__
    assert _backend.package_version("no-such-package", sys.executable) is None
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    with pytest.raises(MissingBackend, match="`vllm` command beside"):
        Vllm(python=str(link)).preflight(spec())


@pytest.mark.parametrize(("version", "fine"), [("1.0.0", True), ("1.2.1", True), ("1.3.0rc9", False), ("0.17", False)])
def test_engines_need_the_versions_that_have_them(
    version: str, fine: bool, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.script("trtllm-serve", "trtllm-build")
    monkeypatch.setattr(_backend, "has_gpu", lambda: True)
    monkeypatch.setattr(_backend, "package_version", lambda name, python: version)
    server = Trtllm()
    if fine:
        server.preflight(spec())
    else:
        with pytest.raises(MissingBackend, match=rf"{version} is installed.*backend=pytorch"):
            server.preflight(spec())
    Trtllm(backend=Backend.pytorch).preflight(spec())


def test_gpu_servers_need_a_gpu(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.script("trtllm-serve", "trtllm-build", "vllm", "ns")
    monkeypatch.setattr(_backend, "has_gpu", lambda: False)
    for server in (Trtllm(), Nemo()):
        with pytest.raises(MissingBackend, match="CUDA"):
            server.preflight(spec())
    Vllm().preflight(spec(device="cpu"))  # vLLM has a CPU build
    monkeypatch.setattr(_backend, "has_gpu", lambda: True)
    Nemo().preflight(spec())
    with pytest.raises(MissingBackend, match="mpirun"):
        Trtllm().preflight(spec(tp=2))
    Trtllm(mpirun=False).preflight(spec(tp=2))


def test_every_quant_and_drafter_in_a_matrix_exists() -> None:
    names = {group: {n for g, n in discover() if g == group} for group in ("quant", "drafter")}
    for (group, name), cls in discover().items():
        if group == "server":
            assert cls.runs_quant <= names["quant"], name
            assert cls.runs_drafter <= names["drafter"], name


# starting and dying


class Fake:
    """A folder of fake executables on PATH, and what they were called with."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.record = folder / "record.jsonl"
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.setenv("FAKE_RECORD", str(self.record))

    def script(self, *names: str) -> None:
        for name in names:
            path = self.folder / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} {name} "$@"\n')
            path.chmod(0o755)

    def package(self, name: str) -> None:
        """A package whose launch_server module is the fake."""
        module = self.folder / name / "launch_server.py"
        module.parent.mkdir()
        (module.parent / "__init__.py").write_text("")
        code = (
            f"import runpy, sys\nsys.argv[0:1] = ['', 'sglang']\nrunpy.run_path({str(FAKE)!r}, run_name='__main__')\n"
        )
        module.write_text(code)
        self._monkeypatch.setenv("PYTHONPATH", str(self.folder))
        self._monkeypatch.syspath_prepend(self.folder)

    def mode(self, name: str) -> None:
        self._monkeypatch.setenv("FAKE_MODE", name)

    def calls(self) -> list[list[str]]:
        return [json.loads(line)[1:] for line in self.record.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    folder = tmp_path / "bin"
    folder.mkdir()
    return Fake(folder, monkeypatch)


@pytest.fixture(params=["vllm", "sglang", "trtllm", "trtllm_pytorch", "nemo"])
def backend(
    request: pytest.FixtureRequest, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, str]]:
    """A server whose program is the fake, and the name that its client must ask for."""
    fake.script("vllm", "trtllm-serve", "ns", "mpirun")
    fake.package("sglang")
    nemo = Nemo()
    nemo.port = free_port()  # `ns` has no flag for it, the fake has a variable
    monkeypatch.setenv("FAKE_PORT", str(nemo.port))
    servers: dict[str, tuple[Server, str]] = {
        "vllm": (Vllm(start_timeout_s=20), "tiny"),
        "sglang": (Sglang(start_timeout_s=20), "tiny"),
        "trtllm": (Trtllm(start_timeout_s=20), "engine"),
        "trtllm_pytorch": (Trtllm(start_timeout_s=20, backend=Backend.pytorch), "ckpt"),
        "nemo": (nemo, "/m/ckpt"),
    }
    yield servers[request.param]


def running(pgid: int | None) -> list[int]:
    """Processes of a group that still run; a killed one that nobody has waited for yet does not."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def gone(pgid: int | None) -> None:
    """A killed process takes the kernel a moment."""
    deadline = time.monotonic() + 5
    while found := running(pgid):
        assert time.monotonic() < deadline, f"still there: {found}"
        time.sleep(0.01)


def launched(server: Server, tmp_path: Path, **fields: Any) -> Any:
    return server.launch(spec(engine=tmp_path / "engine", **fields), tmp_path / "logs")


def test_launch_serves_and_leaves_no_process(backend: tuple[Server, str], fake: Fake, tmp_path: Path) -> None:
    server, name = backend
    fake.mode("orphan")
    with launched(server, tmp_path) as endpoint:
        assert endpoint.model == name and endpoint.server is server
        assert endpoint.log is not None and "worker" in endpoint.log.read_text()
        port = int(endpoint.base_url.rsplit(":", 1)[1])
        assert server.port in (0, port)
        assert len(running(endpoint.pid)) >= 2
    gone(endpoint.pid)  # and with it the worker that it had started
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
    assert len(fake.calls()) == 1


def test_a_child_that_dies_shows_its_last_lines(backend: tuple[Server, str], fake: Fake, tmp_path: Path) -> None:
    fake.mode("die")
    with (
        pytest.raises(ChildError, match=r"(?s)exit status 3.*no kernel image") as caught,
        launched(backend[0], tmp_path),
    ):
        pass
    assert "no kernel image is available" in caught.value.log_tail


def test_a_child_that_never_gets_ready(fake: Fake, tmp_path: Path) -> None:
    fake.script("vllm")
    fake.mode("hang")
    with pytest.raises(ChildError, match="not ready after 1 s"), launched(Vllm(start_timeout_s=1), tmp_path):
        pass


def test_a_port_in_use(fake: Fake, tmp_path: Path) -> None:
    fake.script("vllm")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port}"), launched(Vllm(port=port), tmp_path):
            pass
    assert not fake.record.exists()


def test_an_exception_inside_ends_the_child(fake: Fake, tmp_path: Path) -> None:
    fake.script("vllm")
    with pytest.raises(KeyboardInterrupt), launched(Vllm(), tmp_path) as endpoint:
        raise KeyboardInterrupt
    gone(endpoint.pid)


def test_trtllm_under_mpirun_and_with_options(fake: Fake, tmp_path: Path) -> None:
    fake.script("trtllm-serve", "mpirun")
    with launched(Trtllm(), tmp_path, tp=2):
        pass
    [call] = fake.calls()
    assert call[:5] == ["mpirun", "-n", "1", "--oversubscribe", "--allow-run-as-root"]
    assert Path(call[5]).name == "trtllm-serve" and call[6] == "serve"
    fake.record.unlink()
    with launched(Trtllm(backend=Backend.pytorch), tmp_path, drafter=Ngram()):
        pass
    [call] = fake.calls()
    options = json.loads(Path(call[call.index("--extra_llm_api_options") + 1]).read_text())
    assert options["speculative_config"]["decoding_type"] == "NGram" and options["disable_overlap_scheduler"]


def test_vllm_on_cpu_gets_its_environment() -> None:
    env = Vllm(cpu_kv_cache_gb=3, cpu_omp_threads_bind="0-1").environment(spec(device="cpu"))
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "0-1")
    assert "VLLM_CPU_KVCACHE_SPACE" not in Vllm().environment(spec())


# a remote endpoint


def test_openai_probes_and_names_the_model(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.script("vllm")
    monkeypatch.setenv("OMR_TEST_KEY", "secret")
    with launched(Vllm(), tmp_path) as vllm:
        remote = OpenAi(url=f"{vllm.base_url}/v1/", model="remote", api_key_env="OMR_TEST_KEY")
        remote.preflight(spec())
        with launched(remote, tmp_path) as endpoint:
            assert (endpoint.base_url, endpoint.model, endpoint.api_key) == (vllm.base_url, "remote", "secret")
            assert endpoint.pid is None
            Client(endpoint)
        wrong = OpenAi(url=vllm.base_url, model="gpt", api_key_env=None)
        with pytest.raises(RequestError, match="no model 'gpt'; it has remote"), launched(wrong, tmp_path):
            pass
    with pytest.raises(RequestError, match="does not answer"), launched(remote, tmp_path):
        pass


def test_openai_bodies() -> None:
    plain = OpenAi(url="http://x")
    body = {"model": "m", "prompt": "p", "max_tokens": 5, "temperature": 1.0, "skip_special_tokens": False}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    sent = plain.request_body(dict(body), chat=False)
    assert sent["max_tokens"] == 5 and "skip_special_tokens" not in sent
    assert sent["stream_options"] == {"include_usage": True}
    assert plain.request_body(dict(body), chat=True)["max_completion_tokens"] == 5
    assert "max_tokens" not in plain.request_body(dict(body), chat=True)
    for key in ("top_k", "min_p", "repetition_penalty"):
        with pytest.raises(ConfigError, match=f"sampling.{key}"):
            plain.request_body({**body, key: 1}, chat=False)
    with pytest.raises(ConfigError, match="stop strings"):
        plain.request_body({**body, "stop": list("abcde")}, chat=False)
    loose = OpenAi(url="http://x", dialect=Dialect.vllm)
    assert loose.request_body({**body, "top_k": 3}, chat=False) == {**body, "top_k": 3}


# metrics pages

VLLM_PAGE = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="smollm2"} 102.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="smollm2"} 306.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="smollm2"} 124.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="smollm2",position="0"} 57.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="smollm2",position="1"} 42.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="smollm2",position="2"} 25.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="smollm2"} 1.7e+09
"""


def test_vllm_counts() -> None:
    counts = Vllm().spec_counts(VLLM_PAGE)
    assert counts == SpecCounts(drafts=102, draft_tokens=306, accepted_tokens=124, accepted_per_pos=[57, 42, 25])
    two = VLLM_PAGE + VLLM_PAGE.replace('engine="0"', 'engine="1"')
    both = Vllm().spec_counts(two)
    assert both is not None and both.drafts == 204 and both.accepted_per_pos == [114, 84, 50]
    assert both - counts == counts
    assert Vllm().spec_counts("vllm:num_requests_running 0\n") is None
    assert OpenAi().spec_counts(VLLM_PAGE) == counts
    names = {f"{n}_total" for n in table("vllm")["prometheus"]}
    assert {line.split("{")[0] for line in VLLM_PAGE.splitlines() if "_total{" in line} == names


SGLANG_PAGE = """sglang:generation_tokens_total{model_name="m"} 330.0
sglang:num_requests_total{model_name="m"} 10.0
sglang:spec_verify_calls_total{model_name="m"} 100.0
sglang:spec_accept_length{model_name="m"} 3.2
sglang:spec_num_draft_tokens{model_name="m"} 4.0
"""


def test_sglang_counts() -> None:
    counts = Sglang().spec_counts(SGLANG_PAGE)
    assert counts == SpecCounts(drafts=100, draft_tokens=300, accepted_tokens=220)
    assert Sglang().spec_counts("sglang:generation_tokens_total 5\n") is None
    names = {line.split("{")[0] for line in SGLANG_PAGE.splitlines()}
    assert names <= set(table("sglang")["prometheus"])


def test_trtllm_counts() -> None:
    recorded = table("trtllm")
    pytorch = {"numDraftTokens": 30, "numAcceptedTokens": 12, "numRequestsWithDraftTokens": 10, "acceptanceLength": 2.2}
    engine = {"numGenRequests": 4, "avgNumDecodedTokensPerIter": 2.5}
    assert set(pytorch) <= set(recorded["spec_stats"]) and set(engine) <= set(recorded["batch_stats"])
    page = [{"iter": 1, "specDecodingStats": pytorch, "inflightBatchingStats": {"avgNumDecodedTokensPerIter": 0}}] * 2
    counts = Trtllm().spec_counts(json.dumps(page))
    assert counts == SpecCounts(drafts=20, draft_tokens=60, accepted_tokens=24)
    page = [{"inflightBatchingStats": engine}] * 3 + [{"inflightBatchingStats": {"numGenRequests": 0}}]
    assert Trtllm().spec_counts(json.dumps(page)) == SpecCounts(drafts=12, accepted_tokens=18)
    for nothing in ("[]", "{}", "not json", json.dumps([{"iter": 1}])):
        assert Trtllm().spec_counts(nothing) is None
    assert Trtllm.metrics_drain and not Vllm.metrics_drain
