"""The native server with the real engine on a random model: in this process, and as the child that runs start."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

import omr
from omr.client import Client
from omr.drafter.ngram import Ngram
from omr.drafter.none import NoDrafter
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.errors import ConfigError, InputError, MissingBackend, RequestError, ResourceError, StreamDropped
from omr.nn import loader
from omr.process import free_port
from omr.sampling import Sampling
from omr.sandbox import Outcome
from omr.server import Endpoint, ServeSpec, _backend
from omr.server._text import Vocabulary
from omr.server.native import Dtype, Native
from omr.solve.limits import Limits
from omr.solve.prompt import prompt_named, render, tags_named
from omr.solve.tool_chat import ToolChat
from omr.solve.transcript import Transcript
from omr.text import load_tokenizer

from .conftest import Live, live

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=30)
PROMPTS = ["the answer is", "print(sum(", "a stop string", "naïve", "7 and 12 and 7 and"]


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return loader.load(model_folder, device="cpu")


def make_engine(model: Any, *, speculate: bool, batch: int = 8) -> Engine:
    draft = Ngram(draft_tok=3, adaptive=False).load(None, model) if speculate else None
    return Engine(model, max_batch_size=batch, kv_cache_tokens=batch * 256, draft=draft, context_tokens=256)


def without_server(
    model: Any, prompt_ids: list[int], sampling: Sampling, seeds: Iterable[int] = (0,)
) -> list[list[int]]:
    """The oracle: tokens of the engine itself, plain decoding, one sequence for each seed."""
    seeds = list(seeds)
    engine = make_engine(model, speculate=False, batch=len(seeds))
    fields = {k: getattr(sampling, k) for k in ("temperature", "top_p", "top_k", "min_p", "max_tokens")}
    tokens: dict[str, list[int]] = {str(seed): [] for seed in seeds}
    for seed in seeds:
        engine.add(Request(id=str(seed), prompt_ids=prompt_ids, seed=seed, **fields))
    while engine.num_unfinished:
        for output in engine.step():
            tokens[output.id] += output.token_ids
    return [t[:-1] if t[-1] in engine.eos_token_ids else t for t in tokens.values()]


def alone(model: Any, prompt_ids: list[int], sampling: Sampling) -> list[int]:
    return without_server(model, prompt_ids, sampling)[0]


def shown(vocabulary: Vocabulary, ids: list[int]) -> str:
    """Decoded, without an unfinished character at the end."""
    detokeniser = vocabulary.detokeniser(skip_special=False)
    return "".join(detokeniser.push(i) for i in ids)


async def emptied(engine: Engine) -> None:
    """An abort reaches the engine between two of its steps."""
    start = time.perf_counter()
    while engine.num_unfinished:
        assert time.perf_counter() - start < 5
        await asyncio.sleep(0.002)
    assert engine.kv_usage == 0


def serve(
    model: Any, tokenizer: Any, test: Callable[[Client, Live, Engine], Awaitable[None]], *, speculate: bool
) -> None:
    engine = make_engine(model, speculate=speculate)

    async def main() -> None:
        async with live(
            engine, tokenizer, context_tokens=256, vocab=model.config.vocab_size, speculates=speculate
        ) as server:
            await server.thread.ready.wait()
            async with Client(Endpoint(base_url=server.url, model="tiny", server=Native())) as client:
                await test(client, server, engine)
            await emptied(engine)
            engine.pool.check([])

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("speculate", [False, True])
def test_greedy_text_is_the_engines_tokens_decoded(model: Any, tokenizer: Any, speculate: bool) -> None:
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    want = {p: alone(model, tokenizer.backend_tokenizer.encode(p).ids, GREEDY) for p in PROMPTS}

    async def test(client: Client, server: Live, engine: Engine) -> None:
        streams = [client.stream_completion(p, GREEDY) for p in PROMPTS]
        done = await asyncio.gather(*(stream.read() for stream in streams))
        for prompt, got in zip(PROMPTS, done, strict=True):
            assert got.text == shown(vocabulary, want[prompt])
            assert got.num_tokens == len(want[prompt]) + (got.finish_reason == "stop")
            assert got.num_prompt_tokens == len(tokenizer.backend_tokenizer.encode(prompt).ids)
        counts = Native().spec_counts(await client.metrics())
        if speculate:
            assert counts == engine.counts and counts.accepted_tokens > 0
            told = [stream.speculation or (0, 0, 0) for stream in streams]  # silent about a text without any draft
            each = (counts.drafts, counts.draft_tokens, counts.accepted_tokens)
            assert tuple(map(sum, zip(*told, strict=True))) == each
            assert tuple(map(sum, zip(*counts.by_context.values(), strict=True))) == each
        else:
            assert counts is None

    serve(model, tokenizer, test, speculate=speculate)


def test_a_request_switches_drafting_off_for_itself(model: Any, tokenizer: Any) -> None:
    engine = make_engine(model, speculate=True)
    body = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 30, "ignore_eos": True}

    async def main() -> None:
        shape = {"context_tokens": 256, "vocab": model.config.vocab_size, "speculates": True}
        async with live(engine, tokenizer, **shape) as server, httpx.AsyncClient(base_url=server.url) as http:
            await server.thread.ready.wait()
            quiet = (await http.post("/v1/completions", json={**body, "speculate": False})).json()
            assert engine.counts.drafts == 0
            drafted = (await http.post("/v1/completions", json=body)).json()
            assert engine.counts.drafts > 0
            assert quiet["choices"][0]["text"] == drafted["choices"][0]["text"]

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("speculate", [False, True])
def test_stop_strings_cut_the_same_text_with_and_without_speculation(
    model: Any, tokenizer: Any, speculate: bool
) -> None:
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    texts = {p: shown(vocabulary, alone(model, tokenizer.backend_tokenizer.encode(p).ids, GREEDY)) for p in PROMPTS[:3]}

    async def test(client: Client, server: Live, engine: Engine) -> None:
        for prompt, text in texts.items():
            for start, length in ((3, 2), (10, 5), (len(text) - 6, 3)):
                stop = text[start : start + length]
                got = await client.stream_completion(prompt, GREEDY, stop=[stop, "never written"]).read()
                assert (got.text, got.finish_reason, got.stop_reason) == (text[: text.index(stop)], "stop", stop)

    serve(model, tokenizer, test, speculate=speculate)


def test_sixteen_sampled_streams_do_not_mix_and_seeds_reproduce(model: Any, tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=40, max_tokens=24)
    ids = tokenizer.backend_tokenizer.encode("the sum").ids
    want = [shown(vocabulary, tokens) for tokens in without_server(model, ids, sampling, range(16))]

    async def test(client: Client, server: Live, engine: Engine) -> None:
        for _ in range(2):
            streams = (client.stream_completion("the sum", sampling, seed=s).read() for s in range(16))
            assert [c.text for c in await asyncio.gather(*streams)] == want
        assert len(set(want)) > 10

    serve(model, tokenizer, test, speculate=True)


def reading(client: Client, sampling: Sampling, count: int) -> tuple[list[asyncio.Task[Any]], list[asyncio.Event]]:
    """Tasks that read a stream each and give its finish reason; events that are set by the first chunk."""
    begun = [asyncio.Event() for _ in range(count)]

    async def read(seed: int) -> Any:
        reasons: list[Any] = []

        def take(chunk: Any) -> None:
            begun[seed].set()
            reasons.append(chunk.finish_reason)

        await client.stream_completion("go", sampling, seed=seed).each(take)
        return next(reason for reason in reversed(reasons) if reason)

    return [asyncio.create_task(read(seed)) for seed in range(count)], begun


def test_closing_a_stream_frees_the_engine(model: Any, tokenizer: Any) -> None:
    endless = dataclasses.replace(GREEDY, temperature=1.0, max_tokens=250)

    async def test(client: Client, server: Live, engine: Engine) -> None:
        for _ in range(3):
            requests, begun = reading(client, endless, 12)
            await asyncio.gather(*(event.wait() for event in begun[:8]))
            assert engine.num_unfinished > 0
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            await emptied(engine)
            assert server.thread.num_open == 0

    serve(model, tokenizer, test, speculate=True)


# the child process


def spec(folder: Path, **fields: Any) -> ServeSpec:
    values = {"model_name": "tiny", "checkpoint": folder, "drafter": NoDrafter(), "context_tokens": 256, **fields}
    return ServeSpec(**values)


def test_the_chat_api_solves_as_the_text_loop_does() -> None:
    """The embedded model calls its tool through chat messages, and every text is the one of plain completions."""
    folder = Path(omr.__file__).parent / "assets" / "tiny"
    tokenizer = load_tokenizer(folder)
    engine = Engine(loader.load(folder, device="cpu"), max_batch_size=4, kv_cache_tokens=2048, context_tokens=512)
    problems = ["What is the modular inverse of 125 modulo 129?", "What is 7 + 5?", "What is 15/12 + 2/5?"]

    class Constant:
        """A sandbox whose every block prints the same."""

        tier = "process"

        def session(self) -> Constant:
            return self

        async def execute(self, code: str, timeout_s: float | None = None) -> Outcome:
            return Outcome(status="completed", stdout="32\n")

        async def close(self) -> None:
            """It holds nothing."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    async def main() -> list[tuple[Transcript, Transcript]]:
        async with live(engine, tokenizer) as server:
            await server.thread.ready.wait()
            async with Client(Endpoint(base_url=server.url, model="tiny", server=Native())) as client:
                return [await both(client, problem) for problem in problems]

    async def both(client: Client, problem: str) -> tuple[Transcript, Transcript]:
        messages = prompt_named("generic/math").messages(problem)
        prompt = render(tokenizer, messages)
        common: dict[str, Any] = {
            "prompt_tokens": count(prompt),
            "seed": 5,
            "sampling": Sampling(temperature=0.7, max_tokens=200),
            "limits": Limits(max_tokens=200, context_tokens=512),
            "tags": tags_named("openmath"),
            "count_tokens": count,
        }
        pair = Transcript(prompt=prompt, **common), ToolChat(messages=messages, **common)
        for one in pair:
            await one.run(client, Constant())
        return pair

    pairs = asyncio.run(main())
    for text, chat in pairs:
        assert chat.text == text.text and chat.finish_reason == text.finish_reason
        assert (chat.code_runs, chat.rounds, chat.prompt_tokens) == (text.code_runs, text.rounds, text.prompt_tokens)
    assert any(text.code_runs for text, _ in pairs)


@pytest.mark.slow
def test_the_child_serves_and_dies_with_its_owner(
    model: Any, tokenizer: Any, model_folder: Path, tmp_path: Path
) -> None:
    want = alone(model, tokenizer.backend_tokenizer.encode("the answer is").ids, GREEDY)
    server = Native(dtype=Dtype.float32, num_threads=1)

    async def ask(endpoint: Endpoint) -> tuple[str, list[str]]:
        async with Client(endpoint) as client:
            return (await client.stream_completion("the answer is", GREEDY).read()).text, await client.models()

    with server.launch(spec(model_folder, drafter=Ngram(draft_tok=2)), tmp_path) as endpoint:
        text, models = asyncio.run(ask(endpoint))
        assert text == shown(Vocabulary(tokenizer.backend_tokenizer), want)
        assert models == ["tiny"] and endpoint.pid is not None
        assert os.getpgid(endpoint.pid) == endpoint.pid
        port = int(endpoint.base_url.rsplit(":", 1)[1])
    with pytest.raises(ProcessLookupError):
        os.killpg(endpoint.pid, 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))  # the port is free again
    log = (tmp_path / "native.log").read_text()
    assert "ready: tiny" in log and "Traceback" not in log
    assert json.loads((tmp_path / "native.json").read_text())["drafter"] == "ngram"


@pytest.mark.slow
def test_mistakes_found_while_loading_are_the_users(model_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"), Native().launch(spec(broken), tmp_path):
        pass
    (broken / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes())
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text())
    names = tokenizer["model"]["vocab"]
    names |= {f"word {i}": len(names) + i for i in range(1000)}
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with (
        pytest.raises(InputError, match=r"the tokenizer has 1\d\d\d tokens, the weights have 3\d\d"),
        Native().launch(spec(broken), tmp_path),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"model\.context_tokens=4096.*512"),
        Native().launch(spec(model_folder, context_tokens=4096), tmp_path),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"a KV cache of 100000000000 tokens takes .*GB are free; lower"),
        Native(kv_cache_tokens=10**11).launch(spec(model_folder), tmp_path),
    ):
        pass


@pytest.mark.slow
def test_sigterm_ends_open_streams_and_the_process_quickly(model_folder: Path, tmp_path: Path) -> None:
    server = Native(num_threads=1)
    port = free_port()
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(dataclasses.asdict(server.native_spec(spec(model_folder, context_tokens=512), port))))
    argv = [sys.executable, "-m", "omr.server._http", "--spec", str(path)]
    endpoint = Endpoint(base_url=f"http://127.0.0.1:{port}", model="tiny", server=server)
    endless = dataclasses.replace(GREEDY, temperature=5.0, max_tokens=500)

    async def main(child: subprocess.Popen[bytes]) -> None:
        async with Client(endpoint, attempts=60, pause_s=0.5) as client:
            while True:
                with contextlib.suppress(RequestError):
                    await client.models()
                    break
                await asyncio.sleep(0.1)
            requests, begun = reading(client, endless, 4)
            await asyncio.gather(*(event.wait() for event in begun))
            start = time.perf_counter()
            child.send_signal(signal.SIGTERM)
            for request in requests:
                with contextlib.suppress(StreamDropped):
                    assert await request in ("abort", "stop", "length")
            await asyncio.to_thread(child.wait, 10)
            assert time.perf_counter() - start < 6

    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        try:
            asyncio.run(main(child))
            assert child.returncode == 0, child.stdout and child.stdout.read()
        finally:
            child.kill()


def test_a_port_in_use_is_one_line(model_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ResourceError, match=f"port {port} .*server.port"),
            Native(port=port).launch(spec(model_folder), tmp_path),
        ):
            pass
        path = tmp_path / "spec.json"
        path.write_text(json.dumps(dataclasses.asdict(Native().native_spec(spec(model_folder), port))))
        argv = [sys.executable, "-m", "omr.server._http", "--spec", str(path)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1 and f"port {port}" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"block_size": 0}, "block_size"),
        ({"kv_cache_tokens": -1}, "kv_cache_tokens"),
        ({"kv_cache_fraction": 1.0}, "kv_cache_fraction"),
        ({"num_threads": -1}, "num_threads"),
        ({"port": 70000}, "port"),
    ],
)
def test_ranges(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=f"server.{word}"):
        Native(**fields)


def test_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Native().preflight(spec(tmp_path))
    with pytest.raises(ConfigError, match="tp=2"):
        Native().preflight(spec(tmp_path, tp=2))
    with pytest.raises(ConfigError, match="kv_cache_tokens=64"):
        Native(kv_cache_tokens=64).preflight(spec(tmp_path))
    with pytest.raises(ResourceError, match="parameters in bf16"):
        Native().preflight(spec(tmp_path, params_b=1e6))
    monkeypatch.setattr(_backend, "has_gpu", lambda: False)
    with pytest.raises(MissingBackend, match="CUDA"):
        Native().preflight(spec(tmp_path, device="cuda"))
