"""A small byte-level tokenizer in a Hugging Face folder, an engine that plays scripts, a service on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from omr.engine.request import Output, Request, TokenLogprob
from omr.server import SpecCounts
from omr.server._app import Loaded, Service
from omr.server._engine_thread import EngineThread
from omr.server._http import bind
from omr.server._text import Vocabulary

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'rude' %}{{ raise_exception('no rude messages') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% if not (loop.last and not add_generation_prompt) %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["the answer is 7 and the sum of the numbers is 12", "print(sum(range(10)))", "a stop string: STOP here."] * 5
EOS = 2


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(TAGS)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer.backend_tokenizer)


@dataclass
class ScriptedEngine:
    """Plays `script(request)`, some tokens a step. Every call is recorded; all requests run at once."""

    script: Callable[[Request], Sequence[int]]
    per_step: Callable[[Request, int], int] = lambda request, done: 1
    """Tokens of the next step, given how many came before."""
    pause_s: float = 0.0
    refuse: Callable[[Request], str | None] = lambda request: None
    before_step: Callable[[], object] = lambda: None
    die_at: int | None = None
    """Step number at which `step` raises."""
    counts: SpecCounts = field(default_factory=lambda: SpecCounts(accepted_per_pos=[0, 0, 0]))

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.num_steps = 0
        self._live: dict[str, tuple[Request, list[int], int]] = {}

    @property
    def num_running(self) -> int:
        return len(self._live)

    def add(self, request: Request) -> None:
        if reason := self.refuse(request):
            raise ValueError(reason)
        self.requests.append(request)
        self._live[request.id] = (request, list(self.script(request)), 0)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        del self._live[request_id]

    def step(self) -> list[Output]:
        self.before_step()
        time.sleep(self.pause_s)
        self.num_steps += 1
        if self.num_steps == self.die_at:
            raise MemoryError("the cache caught fire")
        outputs = []
        for request, tokens, done in list(self._live.values()):
            new = tokens[done : min(done + self.per_step(request, done), request.max_tokens)]
            reason = None
            for i, token in enumerate(new):
                if token in request.stop_token_ids or (token == EOS and not request.ignore_eos):
                    new, reason = new[: i + 1], "stop"
                    break
            done += len(new)
            if reason is None and done >= min(len(tokens), request.max_tokens):
                reason = "length"
            self._live[request.id] = (request, tokens, done)
            logprobs = None
            if request.logprobs is not None:
                top = [(t, -0.5 - t) for t in range(request.logprobs)]
                logprobs = [TokenLogprob(token_id=t, logprob=-0.25, top=top) for t in new]
            if reason is not None:
                del self._live[request.id]
            outputs.append(Output(id=request.id, token_ids=new, logprobs=logprobs, finish_reason=reason))
        return outputs


@dataclass
class Live:
    """A service that listens."""

    url: str
    service: Service
    thread: EngineThread
    server: uvicorn.Server


@contextlib.asynccontextmanager
async def live(
    engine: Any,
    tokenizer: Any,
    *,
    context_tokens: int = 512,
    load: Callable[[], object] = lambda: None,
    vocab: int = 0,
    speculates: bool = True,
) -> AsyncIterator[Live]:
    """Serve `engine` on a loopback port in this event loop."""

    def loaded() -> Loaded:
        load()
        vocabulary = Vocabulary(tokenizer.backend_tokenizer)
        return Loaded(
            engine=engine,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            vocab_size=vocab or vocabulary.size,
            speculates=speculates,
            load=lambda: (engine.num_running, 0, 0.25),
        )

    sock = bind("127.0.0.1", 0)
    thread = EngineThread(loaded, lambda built: built.engine)
    service = Service(thread, model="tiny", context_tokens=context_tokens)
    server = uvicorn.Server(
        uvicorn.Config(service.app(), log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1)
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    thread.start()
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        while not server.started:
            await asyncio.sleep(0.001)
        yield Live(f"http://127.0.0.1:{sock.getsockname()[1]}", service, thread, server)
    finally:
        server.should_exit = True
        await serving
        thread.stop(5)


@pytest.fixture(scope="session")
def model_folder(tokenizer: Any, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 with the tokenizer above, as any checkpoint folder."""
    import torch
    from safetensors.torch import save_file

    from omr.nn import config as decoder_config
    from omr.nn.transformer import Transformer

    folder = tmp_path_factory.mktemp("model")
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(1)
    model = Transformer(decoder_config.parse(raw))
    weights = {}
    for name, parameter in model.named_parameters():
        value = torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
        weights[name if name.startswith("lm_head") else f"model.{name}"] = value.detach().contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
