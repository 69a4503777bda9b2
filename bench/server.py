"""What HTTP costs: the engine alone against the native server with the same engine, in turns.

    python bench/server.py [--model FOLDER] [--concurrency 1 4 12] [--requests 24] [--max-tokens 128] [--repeats 3]

Both ways the same prompts are decoded greedily, `concurrency` at a time, with end-of-text ignored. The engine alone
runs in this process; the server is the child process that runs use, its client is here. Wall time pays for the client
as well; CPU time is the server process's own, so its ratio is what detokenising, JSON, HTTP and the hand-over between
two threads under one interpreter lock cost. Rounds alternate and the median of the ratios within a round is given,
because the machine may be busy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from omr.client import Client
from omr.drafter.ngram import Ngram
from omr.drafter.none import NoDrafter
from omr.engine.request import Request
from omr.option import fields_of
from omr.sampling import Sampling
from omr.server import ServeSpec
from omr.server._app import Loaded
from omr.server._http import load
from omr.server.native import Native

TINY = Path(__file__).parent.parent / "omr" / "assets" / "tiny"
GREEDY = Sampling(temperature=0.0, top_p=1.0)


class NoEnd(Native):
    """The native server's dialect, with end-of-text ignored."""

    def request_body(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        return super().request_body({**body, "ignore_eos": True}, chat=chat)


def engine_alone(loaded: Loaded, prompts: list[list[int]], max_tokens: int, concurrency: int) -> int:
    """Tokens decoded, `concurrency` requests at a time."""
    waiting = list(enumerate(prompts))
    engine, written = loaded.engine, 0
    while waiting or engine.num_unfinished:
        while waiting and engine.num_unfinished < concurrency:
            i, ids = waiting.pop()
            engine.add(Request(id=str(i), prompt_ids=ids, max_tokens=max_tokens, ignore_eos=True))
        written += sum(len(output.token_ids) for output in engine.step())
    return written


async def through_http(client: Client, prompts: list[list[int]], max_tokens: int, concurrency: int) -> int:
    places = asyncio.Semaphore(concurrency)

    async def one(ids: list[int]) -> int:
        async with places:
            return (await client.stream_completion(ids, GREEDY, max_tokens=max_tokens).read()).num_tokens

    return sum(await asyncio.gather(*(one(ids) for ids in prompts)))


async def measure(args: argparse.Namespace) -> None:
    drafter = Ngram() if args.ngram else NoDrafter()
    server = NoEnd(
        max_batch_size=max(args.concurrency), num_threads=args.threads, stream_interval_s=args.stream_interval
    )
    spec = ServeSpec(model_name="bench", checkpoint=args.model, drafter=drafter, context_tokens=args.context)
    native = server.native_spec(spec, 0)
    native.drafter_fields = fields_of(drafter)
    loaded = load(native)
    problems = [f"<|im_start|>user\nWhat is {i} + {7 * i}?<|im_end|>\n<|im_start|>assistant\n" for i in range(1000)]
    prompts = [loaded.vocabulary.tokenizer.encode(p, add_special_tokens=False).ids for p in problems[: args.requests]]
    with tempfile.TemporaryDirectory() as logs, server.launch(spec, Path(logs)) as endpoint:
        child = psutil.Process(endpoint.pid)

        def cpu_s() -> float:
            times = child.cpu_times()
            return times.user + times.system

        async with Client(endpoint) as client:
            for concurrency in args.concurrency:
                rounds = []
                for i in range(args.repeats + 1):
                    wall, cpu = time.perf_counter(), time.process_time()
                    tokens = engine_alone(loaded, prompts, args.max_tokens, concurrency)
                    alone = (tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu))
                    wall, cpu = time.perf_counter(), cpu_s()
                    served = await through_http(client, prompts, args.max_tokens, concurrency)
                    http = (served / (time.perf_counter() - wall), served / (cpu_s() - cpu))
                    assert served == tokens, (served, tokens)
                    if i:  # the first round warms up
                        rounds.append((alone, http))
                row = {"concurrency": concurrency, "requests": len(prompts), "tokens": tokens}
                for k, name in enumerate(("tok_per_s", "tok_per_cpu_s")):
                    row[f"engine_{name}"] = round(statistics.median(a[k] for a, _ in rounds), 1)
                    row[f"http_{name}"] = round(statistics.median(h[k] for _, h in rounds), 1)
                    row[f"ratio_{name}"] = round(statistics.median(h[k] / a[k] for a, h in rounds), 3)
                print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="a checkpoint folder (default: the embedded model)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 12])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine")
    parser.add_argument("--stream-interval", type=float, default=Native.stream_interval_s, help="seconds")
    parser.add_argument("--ngram", action="store_true", help="speculate by prompt lookup: several tokens a step")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
