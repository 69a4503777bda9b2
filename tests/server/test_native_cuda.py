"""server=native on a GPU, as runs start it: the embedded model with a ReDrafter head, over HTTP."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest
import torch

from omr.client import Client
from omr.drafter import Drafter
from omr.drafter.none import NoDrafter
from omr.drafter.redrafter import Redrafter
from omr.nn.loader import load
from omr.nn.redrafter import Redrafter as Head
from omr.nn.redrafter import RedrafterConfig, fingerprint
from omr.sampling import Sampling
from omr.server import Endpoint, ServeSpec
from omr.server.native import Dtype, Native
from omr.source import ASSETS

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = ASSETS / "tiny"
ASKED = [[{"role": "user", "content": f"Compute {a} + {3 * a} and explain."}] for a in (12, 7, 105)]
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=40)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that starts as the base and was never trained: some of its drafts are right."""
    base = load(MODEL, device="cpu")
    hidden, vocab = base.config.hidden_size, base.config.vocab_size
    config = RedrafterConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        exit_dim=2 * hidden,
        num_draft_layers=2,
        rnn=True,
        predict_n=3,
        base=fingerprint(base.embed.weight),
    )
    torch.manual_seed(0)
    made = Head(config)
    made.start_from(base.embed.weight, base.lm_head.weight)
    folder = tmp_path_factory.mktemp("head")
    made.save(folder)
    return folder


def spec(drafter: Drafter, path: Path | None) -> ServeSpec:
    return ServeSpec(
        checkpoint=MODEL, model_name="tiny", drafter=drafter, drafter_path=path, context_tokens=256, device=DEVICE
    )


async def texts(endpoint: Endpoint, sampling: Sampling) -> list[str]:
    async with Client(endpoint) as client:
        done = await asyncio.gather(*(client.stream_chat(m, sampling).read() for m in ASKED))
    assert all(d.num_tokens > 1 for d in done)
    return [d.text for d in done]


def test_chat_counters_and_abort(head: Path, tmp_path: Path) -> None:
    """Greedy text with drafts is the text without; counters are shown; a stream that is closed frees its blocks."""
    server = Native(dtype=Dtype.float32, max_batch_size=4)
    with server.launch(spec(NoDrafter(), None), tmp_path / "plain") as endpoint:
        plain = asyncio.run(texts(endpoint, GREEDY))
    drafter = Redrafter(adaptive=False)
    server.preflight(spec(drafter, head))
    with server.launch(spec(drafter, head), tmp_path / "drafted") as endpoint:
        assert asyncio.run(texts(endpoint, GREEDY)) == plain
        asyncio.run(_close_and_count(endpoint, server))


async def _close_and_count(endpoint: Endpoint, server: Native) -> None:
    async with Client(endpoint) as client:
        counts = server.spec_counts(await client.metrics())
        assert counts is not None and counts.drafts > 10 and counts.draft_tokens == 3 * counts.drafts
        assert counts.accepted_tokens == sum(counts.accepted_per_pos)
        stream = client.stream_chat(ASKED[0], Sampling(temperature=5.0, top_p=1.0, max_tokens=200))
        begun = asyncio.Event()
        request = asyncio.create_task(stream.each(lambda chunk: begun.set()))
        await begun.wait()
        assert _gauge(await client.metrics(), "num_requests_running") == 1
        request.cancel()
        start = time.monotonic()
        while _gauge(await client.metrics(), "num_requests_running"):
            assert time.monotonic() - start < 5
            await asyncio.sleep(0.01)


def _gauge(page: str, name: str) -> float:
    found = re.search(rf"^\S*{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    assert found, page
    return float(found[1])


@pytest.mark.skipif(DEVICE != "cuda", reason="the fraction is of GPU memory")
def test_cache_takes_its_fraction_of_the_free_memory(tmp_path: Path) -> None:
    config = load(MODEL, device="cpu").config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2  # bf16
    free, _ = torch.cuda.mem_get_info()
    fraction = 20000 * per_token / free
    server = Native(kv_cache_fraction=fraction, max_batch_size=64)
    with server.launch(spec(NoDrafter(), None), tmp_path) as endpoint:
        asyncio.run(texts(endpoint, GREEDY))
        found = re.search(r"KV cache of (\d+) tokens", (tmp_path / "native.log").read_text())
    assert found is not None
    assert 0.9 * 20000 < int(found[1]) <= 20000  # the child sees what weights and its context left
