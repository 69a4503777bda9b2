"""One generation with tools: write until a call, run it, hand back the output, go on.

    prompt --> model writes ... <tool_call> code </tool_call>          the engine stops at the end tag
                      sandbox runs the code in this generation's session
           --> model goes on from prompt + text + output block ...     same prefix, so the KV cache is reused
                      ... \\boxed{7} and its end of turn

The loop works over any server that completes text, so it relies on little: an engine may show the stop string, hide it
and name it as `stop_reason`, or hide it without a word; and it may overshoot it. All four end up as the same text.

Budgets: tokens (what the model writes and what the harness appends, counted with the model's tokenizer), code
executions, seconds. When executions run out the model may still write; a further call is not run and ends the
generation. What goes wrong outside the model is a counted event, not an exception: a stream that drops is taken up
again from the text so far, a sandbox that dies answers with an error text and the next block gets a new session. Only
cancellation leaves `run` as an exception, after the stream and the session have been closed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from omr.chunks import Chunk
from omr.errors import ContextOverflow, OmrError, RequestError
from omr.sampling import Sampling
from omr.sandbox import Outcome, SandboxClient, Session
from omr.solve.answer import last_boxed
from omr.solve.completer import Completer, round_seed
from omr.solve.heard import Heard
from omr.solve.limits import Finish, Limits
from omr.solve.prompt import CodeTags, remaining_notice
from omr.solve.repetition import CHECK_CHARS, CodeRuns, is_loop

MAX_DROPS = 3
"""Streams that may drop in a row without a new token before the generation is given up."""
MAX_STRAY_STOPS = 16
"""End tags without a begin (an ordinary fence in Markdown) that are passed over."""
OUTPUT_CUT = "<output cut>"
SPECULATION = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


@dataclass(kw_only=True)
class Transcript:
    """One generation: what was written, run and counted. `run` fills it; a cancelled one keeps what it had."""

    prompt: str = ""
    prompt_tokens: int
    seed: int
    sampling: Sampling
    limits: Limits
    tags: CodeTags | None
    """None is plain reasoning, as is `limits.code_executions` 0."""
    count_tokens: Callable[[str], int]
    watch: Callable[[str], None] | None = None
    """Hears every piece of text as it comes, output blocks included."""

    text: str = ""
    """Everything after the prompt, output blocks included."""
    finish_reason: Finish | None = None
    """None until `run` returns."""
    error: str | None = None
    num_tokens: int = 0
    """Written by the model."""
    tool_tokens: int = 0
    """Appended by the harness."""
    rounds: int = 0
    """Requests sent."""
    speculation: tuple[int, ...] = (0, 0, 0)
    """Drafts, tokens drafted, tokens accepted, as the server tells; zeros when it does not."""
    code_runs: int = 0
    code_errors: int = 0
    code_timeouts: int = 0
    code_lost: int = 0
    """Blocks whose session died with them, timeouts left out."""
    code_seconds: float = 0.0
    sandbox_failures: int = 0
    stream_drops: int = 0
    started: float = 0.0
    """Wall clock (epoch seconds), as `ended`."""
    ended: float = 0.0
    seconds: float = 0.0
    ttft_s: float | None = None
    """First request sent to its first token."""
    tpot_s: list[float] = field(default_factory=list)
    """Of each request with more than one token."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """In order: text, code, output, drop and sandbox failure, with times relative to `started`."""

    _clock: float = 0.0
    _session: Session | None = None
    _checked: int = 0
    _ran: CodeRuns = field(default_factory=CodeRuns)

    @property
    def answer(self) -> str | None:
        return last_boxed(self.text)

    @property
    def truncated(self) -> bool:
        """Cut off by a budget rather than ended by the model."""
        return self.finish_reason in ("length", "time", "code_limit", "repetition")

    async def run(self, client: Completer, sandbox: SandboxClient | None) -> None:
        """Generate to the end, whatever that is: `finish_reason` says.

        Raises CancelledError, and ConfigError for a sampling parameter that this server has not.
        """
        self.started, self._clock = time.time(), time.perf_counter()
        try:
            async with asyncio.timeout(self.limits.seconds) as clock:
                self.finish_reason = await self._loop(client, sandbox)
        except TimeoutError:
            if not clock.expired():
                raise
            self.finish_reason = "time"
        except asyncio.CancelledError:
            self.finish_reason = "cancelled"
            raise
        finally:
            self.seconds, self.ended = self._now(), time.time()
            if self._session is not None:
                session, self._session = self._session, None
                await _close(session)

    def _now(self) -> float:
        return time.perf_counter() - self._clock

    async def _loop(self, client: Completer, sandbox: SandboxClient | None) -> Finish:
        tools = self.tags is not None and sandbox is not None and self.limits.code_executions > 0
        tags = self.tags if tools else None
        drops = stray = 0
        while True:
            room = min(
                self.limits.max_tokens - self.num_tokens - self.tool_tokens,
                self.limits.context_tokens - self.prompt_tokens - self.num_tokens - self.tool_tokens,
            )
            if room <= 0:
                return "length"
            before = self.num_tokens
            try:
                ended = await self._write(client, tags, room)
            except ContextOverflow:  # the server counts the prompt's tokens otherwise than we do
                return "length"
            except RequestError as error:
                drops = 1 if self.num_tokens > before else drops + 1
                if not await self._goes_on(error, drops):
                    return "error"
                if tags:
                    self._drop_partial(tags.end)
                continue
            drops = 0
            if ended != "tag":
                return ended
            assert tags is not None and sandbox is not None
            code = self._open_code(tags)
            if code is None:
                stray += 1
                if stray > MAX_STRAY_STOPS:
                    return "repetition"
                continue
            if self.code_runs >= self.limits.code_executions:
                return "code_limit"
            if not await self._execute(code, tags, sandbox):
                return "repetition"

    def _drop_partial(self, tag: str) -> None:
        """Take back a tag that a broken stream left half written: no server would match its second half."""
        for size in range(len(tag) - 1, 0, -1):
            if self.text.endswith(tag[:size]):
                self.text = self.text[:-size]
                return

    async def _goes_on(self, error: RequestError, drops: int) -> bool:
        """Count a stream that failed, the `drops`th in a row without a token, and wait a little; False gives up."""
        refused = error.status is not None and error.status < 500 and error.status != 429
        if not refused:
            self.stream_drops += 1
            self.events.append({"type": "drop", "error": str(error), "at_s": round(self._now(), 4)})
        if refused or drops >= MAX_DROPS:  # asking a refused request again cannot help
            self.error = str(error)
            return False
        await asyncio.sleep(0.2 * 2**drops)
        return True

    async def _write(self, client: Completer, tags: CodeTags | None, room: int) -> Finish | Literal["tag"]:
        """One request; "tag" when it stopped at the end tag, which is then the end of `text`."""
        end = tags.end if tags else ""
        heard = self._ask(tags)
        stream = client.stream_completion(
            self.prompt + self.text, self.sampling, stop=[end] if end else [], max_tokens=room, seed=heard.seed
        )
        try:
            await stream.each(lambda chunk: self._hear(heard, chunk))
        finally:
            event = self._wrote(stream, heard)
            named = heard.stop_reason
            event["stop_reason"] = named if isinstance(named, str | int | None) else str(named)
        start, found = heard.start, heard.found
        if found == "tag":
            at = self.text.index(end, start) + len(end)  # an engine may run past the tag
            self.text = self.text[:at]
        elif end and found is None and self._stop_was_hidden(heard):
            self.text += end
            found = "tag"
            if self.watch:
                self.watch(end)
        event["text"] = self.text[start:]
        if found:
            return found
        return "length" if heard.finish_reason == "length" else "stop"

    def _ask(self, tags: CodeTags | None) -> Heard:
        """The next request, about to be sent."""
        seed = round_seed(self.seed, self.rounds)
        self.rounds += 1
        return Heard(len(self.text), self._now(), seed, tags)

    def _hear(self, heard: Heard, chunk: Chunk) -> bool:
        """Take in a chunk; True when the text ends the request."""
        heard.add(chunk, self._clock)
        self.num_tokens += chunk.num_tokens
        if chunk.text:
            if self.watch:
                self.watch(chunk.text)
            heard.found = self._ends_here(heard, chunk.text)
        return heard.found is not None

    def _wrote(self, stream: Any, heard: Heard) -> dict[str, Any]:
        """Take over the text of a request that has ended now, and record it."""
        self.text += "".join(heard.pieces)
        first, tokens = heard.first, heard.tokens
        took = self._now()
        told = getattr(stream, "speculation", None) or (0, 0, 0)
        self.speculation = tuple(a + b for a, b in zip(self.speculation, told, strict=True))
        if self.ttft_s is None and first is not None:
            self.ttft_s = first - heard.sent
        if first is not None and tokens > 1:
            self.tpot_s.append((took - first) / (tokens - 1))
        event = {
            "type": "text",
            "text": self.text[heard.start :],
            "tokens": tokens,
            "sent_s": round(heard.sent, 4),
            "first_token_s": None if first is None else round(first, 4),
            "end_s": round(took, 4),
            "finish_reason": heard.finish_reason,
            "seed": heard.seed,
        }
        self.events.append(event)
        return event

    def _ends_here(self, heard: Heard, new: str) -> Finish | Literal["tag"] | None:
        """Whether the text just received ends this request. Runs once a chunk: cheap tests first."""
        tags = heard.tags
        if tags and tags.end in heard.tail and tags.end in "".join(heard.pieces):
            return "tag"
        if self.limits.stop_at_boxed and "}" in new and last_boxed(heard.tail) is not None:
            written = self.text[: heard.start] + "".join(heard.pieces)
            if tags is None or written.count(tags.begin) <= written.count(tags.end):
                return "boxed"
        self._checked += len(new)
        if self.limits.stop_on_repetition and self._checked >= CHECK_CHARS:
            self._checked = 0
            if is_loop("".join(heard.pieces)):
                return "repetition"
        return None

    def _stop_was_hidden(self, heard: Heard) -> bool:
        assert heard.tags is not None
        if heard.finish_reason != "stop":
            return False
        if isinstance(heard.stop_reason, str):
            return heard.stop_reason == heard.tags.end
        # Nothing was named: an open block means that the tag fired. (It is an int for a stop token's id.)
        return self._open_block(heard.tags, len(self.text)) is not None

    def _open_block(self, tags: CodeTags, end: int) -> int | None:
        """Where the code begins that is open at `end`; None when no block is."""
        begin = self.text.rfind(tags.begin, 0, end)
        if begin < 0 or begin < self.text.rfind(tags.end, 0, end):
            return None
        return begin + len(tags.begin)

    def _open_code(self, tags: CodeTags) -> str | None:
        """The code of the block that the text ends with."""
        close = len(self.text) - len(tags.end)
        begin = self._open_block(tags, close)
        return None if begin is None else self.text[begin:close]

    async def _execute(self, code: str, tags: CodeTags, sandbox: SandboxClient) -> bool:
        """Run a block and append its output; False when it is one repetition too many."""
        outcome, notice = await self._run_code(code, sandbox)
        self._hand_back(tags.output_block(outcome.status, outcome.stdout, outcome.stderr, notice))
        return not self._is_repeated(code, outcome)

    async def _run_code(self, code: str, sandbox: SandboxClient) -> tuple[Outcome, str]:
        """(what a block did, its output fit to be shown; the notice on what is left of the budget)."""
        at = self._now()
        outcome: Outcome
        try:
            if self._session is None:
                self._session = sandbox.session()
            outcome = await self._session.execute(code.strip("\n"), self.limits.code_timeout_s)
        except (OmrError, OSError) as error:  # the sandbox itself broke: the model is told, the run goes on
            self.sandbox_failures += 1
            outcome = Outcome(status="error", stdout="The code could not be run: the interpreter is gone.\n")
            outcome.state_lost = True
            self.events.append({"type": "sandbox_failure", "error": str(error), "at_s": round(at, 4)})
            if self._session is not None:
                session, self._session = self._session, None
                await _close(session)
        outcome.stdout, outcome.stderr = self._printable(outcome.stdout), self._printable(outcome.stderr)
        return outcome, self._ran_code(code, outcome, at)

    def _ran_code(self, code: str, outcome: Outcome, at: float) -> str:
        """Count a block that began at `at` and record it. Returns the notice that goes with its output."""
        self.code_runs += 1
        self.code_seconds += self._now() - at
        self.code_errors += outcome.status != "completed"
        self.code_timeouts += outcome.status == "timeout"
        self.code_lost += outcome.state_lost and outcome.status != "timeout"
        self.events.append(
            {
                "type": "code",
                "code": code,
                "status": outcome.status,
                "stdout": outcome.stdout,
                "stderr": outcome.stderr,
                "state_lost": outcome.state_lost,
                "at_s": round(at, 4),
                "end_s": round(self._now(), 4),
            }
        )
        remaining = self.limits.code_executions - self.code_runs
        return remaining_notice(remaining) if self.limits.remaining_notice else ""

    def _hand_back(self, block: str) -> None:
        """Append a block of output to the text."""
        self.text += block
        if self.watch:
            self.watch(block)
        tokens = self.count_tokens(block)
        self.tool_tokens += tokens
        self.events.append({"type": "output", "text": block, "tokens": tokens})

    def _is_repeated(self, code: str, outcome: Outcome) -> bool:
        return self._ran.is_loop(code, outcome.stdout + outcome.stderr) and self.limits.stop_on_repetition

    def _printable(self, output: str) -> str:
        """Output within the limit that any tokenizer and file can take: no NUL, no lone surrogate."""
        limit = self.limits.output_chars
        if len(output) > limit + len(OUTPUT_CUT) + 1:
            output = output[:limit] + OUTPUT_CUT
        return output.replace("\0", "�").encode("utf-8", "replace").decode("utf-8")

    def row(self) -> dict[str, Any]:
        """The counts under the names that NeMo-Skills gives them in its output files, and our own beside them."""
        return {
            "generation": self.text,
            "predicted_answer": self.answer,
            "finish_reason": self.finish_reason,
            "num_generated_tokens": self.num_tokens,
            "num_tool_tokens": self.tool_tokens,
            "num_prompt_tokens": self.prompt_tokens,
            **dict(zip(SPECULATION, self.speculation, strict=True)),
            "generation_start_time": self.started,
            "generation_end_time": self.ended,
            "generation_time": self.seconds,
            "code_rounds_executed": self.code_runs,
            "code_execution_time": self.code_seconds,
            "num_code_timeouts": self.code_timeouts,
            "num_code_errors": self.code_errors,
            "stopped_on_repetition": self.finish_reason == "repetition",
            "sandbox_failures": self.sandbox_failures,
            "stream_drops": self.stream_drops,
            "rounds": self.rounds,
            "random_seed": self.seed,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
        } | ({"error": self.error} if self.error else {})


async def _close(session: Session) -> None:
    try:
        await session.close()
    except (OmrError, OSError):
        return  # it was dead already, which is what closing is for
