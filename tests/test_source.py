"""Model sources: local folders, the embedded model, wheels, a hub on this machine; and what each refuses."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omr import source
from omr.artifact import MANIFEST, Store
from omr.errors import ConfigError, InputError, ResourceError
from omr.model import Model
from omr.nn.checkpoint import open_checkpoint, read_header
from omr.nn.config import parse

Make = Callable[..., Path]
ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def test_a_folder_is_keyed_by_its_content(make_model: Make, store: Store, tmp_path: Path) -> None:
    folder = make_model()
    first = source.resolve(Model(path=str(folder)), store)
    assert first.folder == folder
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("a note changes nothing")
    (copy / MANIFEST).write_text("{}")
    assert source.resolve(Model(path=str(copy)), store).key == first.key
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert source.resolve(Model(path=str(copy)), store).key != first.key
    shutil.copyfile(folder / "config.json", copy / "config.json")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert source.resolve(Model(path=str(copy)), store).key != first.key


def test_digests_are_remembered(make_model: Make, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model()
    key = source.resolve(Model(path=str(folder)), store).key
    hashed: list[Path] = []
    monkeypatch.setattr(source, "file_sha256", lambda path: hashed.append(path) or "x")
    assert source.resolve(Model(path=str(folder)), store).key == key
    assert not hashed
    os.utime(folder / "model.safetensors", ns=(0, 0))
    source.resolve(Model(path=str(folder)), store)
    assert [path.name for path in hashed] == ["model.safetensors"]


def test_the_order_of_sources(make_model: Make, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = make_model(name="shipped")
    monkeypatch.setattr(source, "ASSETS", tmp_path)
    both = Model(path=str(make_model(name="mine")), embedded="shipped", hub="a/b")
    assert source.resolve(both, store).origin["kind"] == "path"
    found = source.resolve(Model(embedded="shipped", hub="a/b"), store)
    assert found.folder == folder and found.origin["kind"] == "embedded"
    for name in ("tiny", "../shipped", "shipped/."):
        with pytest.raises(InputError, match=r"no embedded model .*shipped"):
            source.preflight(Model(embedded=name))


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(data[:-100])
    elif how == "cut in the header":
        weights.write_bytes(data[:50])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "longer":
        weights.write_bytes(data + b"\0\0")
    elif how == "header":
        weights.write_bytes(data[:8] + b"x" + data[9:])
    elif how == "shape":
        weights.write_bytes(data.replace(b'"shape":[320,64]', b'"shape":[320,65]', 1))
    elif how == "offsets":
        weights.write_bytes(re.sub(rb'"data_offsets":\[0,', b'"data_offsets":[2,', data, count=1))
    elif how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "no weights":
        weights.unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    elif how == "more layers":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    elif how == "shard":
        weights.rename(folder / "model-00001-of-00002.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "index":
        index = {"weight_map": {"nobody.weight": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "outside":
        shutil.copytree(folder, folder.parent / "elsewhere")
        index = {"weight_map": {"a": "../elsewhere/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "should have .* bytes and has"),
        ("cut in the header", "not a whole safetensors file"),
        ("empty", "not a whole safetensors file"),
        ("longer", "should have .* bytes and has"),
        ("header", "header cannot be read"),
        ("shape", "has 40960 bytes"),
        ("offsets", "bytes; the file is truncated|gap or overlap"),
        ("pickle", "pytorch_model.bin but no safetensors.*run code when loaded"),
        ("no weights", "neither model.safetensors nor"),
        ("no tokenizer", "has no tokenizer"),
        ("no config", "config.json does not exist"),
        ("broken config", "is not JSON"),
        ("architecture", "omr runs LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ("more layers", "no tensor model.layers.2.input_layernorm.weight"),
        ("shard", "model-00002-of-00002.safetensors is listed in .* but missing"),
        ("index", "lists nobody.weight, which no file holds"),
        ("outside", "points outside the folder"),
    ],
)
def test_damaged_folders_are_refused_before_anything_is_built(how: str, message: str, make_model: Make) -> None:
    folder = make_model()
    source.preflight(Model(path=str(folder)))
    damage(folder, how)
    with pytest.raises(InputError, match=message) as refused:
        source.preflight(Model(path=str(folder)))
    assert "\n" not in str(refused.value)


def test_a_model_of_another_family_goes_to_another_server_as_it_is(make_model: Make, store: Store) -> None:
    folder = make_model()
    config = json.loads((folder / "config.json").read_text())
    other = {**config, "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(other))
    model = Model(path=str(folder))
    with pytest.raises(InputError, match="quant=bf16 and a drafter that omr does not train"):
        source.preflight(model)
    source.preflight(model, any_family=True)
    assert source.resolve(model, store, any_family=True).folder == folder
    long = Model(path=str(folder), context_tokens=4096)
    with pytest.raises(ConfigError, match="max_position_embeddings=512"):
        source.preflight(long, serves=True, any_family=True)
    damage(folder, "truncated")
    with pytest.raises(InputError, match=r"should have .* bytes and has"):
        source.preflight(model, any_family=True)


def test_a_missing_folder_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.path /nowhere is not a folder"):
        source.preflight(Model(path="/nowhere"))


def test_headers_agree_with_the_library(make_model: Make) -> None:
    from safetensors import safe_open

    folder = make_model("qwen3")
    infos = read_header(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(infos) == set(file.keys())
        for name, info in infos.items():
            view = file.get_slice(name)
            assert list(info.shape) == view.get_shape() and info.dtype == view.get_dtype()


def test_memory_counts_what_is_stored(make_model: Make) -> None:
    for tied in (False, True):
        folder = make_model("llama", name=f"tied{tied}", tie_word_embeddings=tied)
        opened = open_checkpoint(folder)
        config = parse(opened.config)
        norms = sum(info.num_bytes for name, info in opened.tensors.items() if "norm" in name)
        assert source.memory_bytes(config) == opened.num_bytes - norms
        linears = sum(info.num_bytes for name, info in opened.tensors.items() if "_proj" in name)
        assert source.memory_bytes(config) - source.memory_bytes(config, weight_bits=8) == linears / 2
        kv = source.memory_bytes(config, tokens=10) - source.memory_bytes(config)
        assert kv == 10 * 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


# --- packages ---------------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel `toymodel` 1.0 with these files in it."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "toymodel-1.0-py3-none-any.whl"
    info = "toymodel-1.0.dist-info"
    meta = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toymodel\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in {**{f"toymodel/{name}": data for name, data in files.items()}, **meta}.items():
            archive.writestr(name, data)
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder of wheels and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def packaged(data: bytes, **fields: Any) -> Model:
    sha256 = hashlib.sha256(data).hexdigest()
    return Model(**{"package": "toymodel==1.0", "package_file": "m.gguf", "package_sha256": sha256, **fields})


def test_a_package_that_cannot_be_had_is_refused(index: Path, store: Store) -> None:
    with pytest.raises(
        InputError, match=r"toymodel==1\.0 cannot be downloaded \(No matching distribution .*model\.path"
    ):
        source.resolve(packaged(b""), store)


def test_a_file_other_than_the_pinned_one_is_refused(index: Path, store: Store) -> None:
    write_wheel(index, {"m.gguf": b"something else"})
    with pytest.raises(InputError, match="the package is not the one that was pinned"):
        source.resolve(packaged(b"what was meant"), store)
    assert list(store.all()) == []


def test_a_wheel_without_the_file_is_refused(index: Path, store: Store) -> None:
    write_wheel(index, {"other.gguf": b"x"})
    with pytest.raises(InputError, match=r"holds 0 files named m\.gguf"):
        source.resolve(packaged(b"x"), store)


def test_a_package_needs_its_pin() -> None:
    with pytest.raises(ConfigError, match=r"needs model\.package_file and model\.package_sha256"):
        source.preflight(packaged(b"", package_sha256=None))


@pytest.mark.slow
def test_a_gguf_becomes_an_ordinary_folder_once(index: Path, store: Store, tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    wheel = write_wheel(index, {"m.gguf": data})
    said: list[str] = []
    store.notice = said.append
    found = source.resolve(packaged(data), store)
    assert source.check_folder(found.folder).num_params == sum(w.size for w in weights.values())
    tensors = dict(zip(weights, open_checkpoint(found.folder).read(*weights), strict=True))
    for name, want in weights.items():
        assert tensors[name].dtype.is_floating_point and tensors[name].element_size() == 2
        assert abs(tensors[name].float().numpy() - want).max() < 0.01, name
    assert (found.folder / "chat_template.jinja").is_file()
    assert (found.folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    wheel.unlink()
    assert source.resolve(packaged(data), store) == found
    assert [line.split(": ")[1] for line in said] == ["building", "reused"]
    assert [p.name for p in (store.root / "weights").iterdir() if p.is_dir()] == [found.key]


def write_gguf(path: Path) -> dict[str, Any]:
    """A random two-layer Llama as GGUF; returns its weights by Hugging Face name (q and k as that layout has them)."""
    import gguf
    import numpy as np

    hidden, inter, heads, kv, vocab = 32, 64, 4, 2, 300
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inter)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab)
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in alphabet] + [chr(256 + i) for i in range(256 - len(alphabet))]
    tokens = ["<|end|>", *letters, "ab"]
    tokens += [f"<extra{i}>" for i in range(vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (vocab - 1)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    names = {
        "attn_q": ("self_attn.q_proj", (hidden, hidden)),
        "attn_k": ("self_attn.k_proj", (hidden // heads * kv, hidden)),
        "attn_v": ("self_attn.v_proj", (hidden // heads * kv, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, hidden)),
        "ffn_gate": ("mlp.gate_proj", (inter, hidden)),
        "ffn_up": ("mlp.up_proj", (inter, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inter)),
        "attn_norm": ("input_layernorm", (hidden,)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
    }
    weights: dict[str, Any] = {}

    def add(ggml: str, name: str, shape: tuple[int, ...], rotary_heads: int = 0) -> None:
        value = rng.standard_normal(shape).astype(np.float32)
        weights[f"model.{name}.weight"] = value
        if rotary_heads:  # GGUF interleaves the two halves of each rotated head
            half = value.reshape(rotary_heads, 2, shape[0] // rotary_heads // 2, shape[1])
            value = np.ascontiguousarray(half.swapaxes(1, 2).reshape(shape))
        writer.add_tensor(f"{ggml}.weight", value)

    add("token_embd", "embed_tokens", (vocab, hidden))
    for layer in range(2):
        for ggml, (name, shape) in names.items():
            add(f"blk.{layer}.{ggml}", f"layers.{layer}.{name}", shape, {"attn_q": heads, "attn_k": kv}.get(ggml, 0))
    add("output_norm", "norm", (hidden,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """Enough of the hub's HTTP API for model repositories of local folders: `repos` maps id -> folder."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        parts = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve|paths-info)/([^/]+)(?:/(.+))?", path
        )
        if parts is None or parts[1] not in self.server.repos:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        repo, what, revision, name = parts.groups()
        folder = self.server.repos[repo]
        if revision not in ("main", COMMIT):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if repo in self.server.gated and (what == "resolve" or revision == COMMIT):
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        files = sorted(p.name for p in folder.iterdir())
        if what == "revision":
            data = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            return self.send(200, json.dumps(data).encode(), {}, body)
        if what == "tree":
            rows = [
                {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": tag(folder / n)} for n in files
            ]
            return self.send(200, json.dumps(rows).encode(), {}, body)
        file = folder / (name or "")
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        self.send(200, file.read_bytes(), {"ETag": f'"{tag(file)}"', "X-Repo-Commit": COMMIT}, body)

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def tag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def hub_server() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


CLIENT = """
import json, sys
from pathlib import Path
from omr import source
from omr.artifact import Store
from omr.errors import OmrError
from omr.model import Model
answers = []
for fields in json.loads(sys.argv[2]):
    try:
        found = source.resolve(Model(**fields), Store(Path(sys.argv[1])))
        answers.append([str(found.folder), found.key, dict(found.origin)])
    except OmrError as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def ask(server: str, tmp_path: Path, models: list[dict[str, Any]], **env: str) -> list[list[Any]]:
    """`resolve` each model in a process whose hub is `server`: [folder, key, origin] or [error, message]."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(tmp_path / "artifacts"), json.dumps(models)],
        env={
            **clean,
            "HF_ENDPOINT": server,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT),
            **env,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answers, list)
    return answers


def test_the_hub_is_asked_once_and_then_not_at_all(hub_server: Hub, make_model: Make, tmp_path: Path) -> None:
    repo = make_model()
    for name in ("README.md", "pytorch_model.bin", "run.py"):
        (repo / name).write_text("never fetched")
    gated = make_model(name="gated")
    hub_server.repos = {"owner/toy": repo, "owner/gated": gated}
    hub_server.gated = {"owner/gated"}
    models = [
        {"hub": "owner/toy"},
        {"hub": "owner/toy", "revision": COMMIT},
        {"hub": "owner/gated"},
        {"hub": "owner/none"},
        {"hub": "owner/toy", "revision": "f" * 40},
    ]
    online = ask(hub_server.url, tmp_path, models)
    folder, key, origin = online[0]
    assert origin == {"kind": "hub", "hub": "owner/toy", "revision": COMMIT}
    assert online[1][1] == key, "main and its commit are one content"
    fetched = {p.name for p in Path(folder).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= fetched
    assert not fetched & {"README.md", "pytorch_model.bin", "run.py"}
    assert online[2][0] == "InputError" and "gated: accept its terms" in online[2][1] and "HF_TOKEN" in online[2][1]
    assert online[3][0] == "InputError" and "not on the hub, or is private" in online[3][1]
    assert online[4][0] == "InputError" and "no such revision" in online[4][1]
    assert all("\n" not in answer[1] for answer in online[2:])

    hub_server.asked.clear()
    offline = ask(hub_server.url, tmp_path, models[:4], HF_HUB_OFFLINE="1")
    assert hub_server.asked == []
    assert offline[:2] == online[:2]
    assert offline[2][0] == offline[3][0] == "InputError"
    assert "HF_HUB_OFFLINE is set" in offline[3][1]


@pytest.mark.slow
def test_a_hub_out_of_reach_is_one_line(tmp_path: Path) -> None:
    (answer,) = ask("http://127.0.0.1:9", tmp_path, [{"hub": "owner/toy", "revision": COMMIT}])
    assert answer[0] == "InputError"
    assert "cannot be reached" in answer[1] and "set a path" in answer[1] and "\n" not in answer[1]


def test_preflight_of_a_hub_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    source.preflight(Model(hub="owner/name", params_b=0.001))
    with pytest.raises(ConfigError, match=r"model\.hub must be owner/name"):
        source.preflight(Model(hub="https://huggingface.co/owner/name"))
    with pytest.raises(ConfigError, match="full commit hash"):
        source.preflight(Model(hub="owner/name", revision="main"))
    with pytest.raises(ResourceError, match=r"owner/name needs about 2000000000 GB"):
        source.preflight(Model(hub="owner/name", params_b=1e9))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        source.preflight(Model(hub="owner/name"))
    (tmp_path / "hub" / "models--owner--name" / "snapshots").mkdir(parents=True)
    source.preflight(Model(hub="owner/name"))
