"""A generation through a server's chat API: the server lays out the turns, the model calls a tool named `python`.

    messages --> turn with content and calls      {"name": "python", "arguments": "{\\"code\\": ...}"}
                     sandbox runs each call's code in this generation's session
             --> messages + that turn + one tool message a call, and so on until a turn has no call

Budgets, events, session and counts are those of a Transcript, and so is the text: calls and results are written into it
with the model's code tags, so answers, votes and files are the same for both. What differs:
  - a broken stream cannot be continued in the middle of a turn: the turn is asked for again;
  - when executions run out, the tool stays on offer (the template needs it) with tool_choice `none`; a server that
    calls it all the same ends the generation;
  - a call that cannot be carried out (unknown name, broken JSON) is answered by an error text and counts as a block;
  - prompt tokens are the server's count; the tokenizer, if there is one, only bounds the first request.
A reasoning model's separate `reasoning_content` goes to the transcript, and neither into the text nor back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from omr.chunks import Chunk
from omr.errors import ContextOverflow, RequestError
from omr.sandbox import Outcome, SandboxClient
from omr.solve.completer import Completer
from omr.solve.limits import Finish
from omr.solve.prompt import CODE_TAGS, Message
from omr.solve.tool_calls import PYTHON_TOOL, BadCall, CallPieces, ToolCall, assistant_turn, result_turn
from omr.solve.transcript import Transcript

TURN_TOKENS = 16
"""Room kept in the context for what a template puts around a turn."""


@dataclass(kw_only=True)
class ToolChat(Transcript):
    """One generation as a conversation. `tags` only mark calls in the text; without a sandbox no tool is offered."""

    messages: Sequence[Message] = ()
    """The problem's own turns."""

    _turns: list[Message] = field(default_factory=list)
    _used: int = 0
    """Tokens of the context that are taken, as far as is known."""

    async def _loop(self, client: Completer, sandbox: SandboxClient | None) -> Finish:
        sandbox = sandbox if self.limits.code_executions > 0 else None
        self._turns, self._used = list(self.messages), self.prompt_tokens
        drops = 0
        while True:
            room = min(
                self.limits.max_tokens - self.num_tokens - self.tool_tokens, self.limits.context_tokens - self._used
            )
            if room <= 0:
                return "length"
            before, start = self.num_tokens, len(self.text)
            try:
                ended, calls = await self._turn(client, room, tools=sandbox is not None)
            except ContextOverflow:
                return "length"
            except RequestError as error:
                drops = 1 if self.num_tokens > before else drops + 1
                if not await self._goes_on(error, drops):
                    return "error"
                self.text = self.text[:start]
                continue
            drops = 0
            if ended:
                return ended
            if not calls or sandbox is None:
                return "stop"
            if self.code_runs >= self.limits.code_executions:
                return "code_limit"
            self._turns.append(assistant_turn(self.text[start:], calls))
            if not await self._answer_calls(calls, sandbox):
                return "repetition"

    async def _turn(self, client: Completer, room: int, *, tools: bool) -> tuple[Finish | None, list[ToolCall]]:
        """One request: (why the generation ends with it, or None; the calls it made)."""
        heard = self._ask(None)
        spent = self.code_runs >= self.limits.code_executions
        stream = client.stream_chat(
            self._turns,
            self.sampling,
            max_tokens=room,
            seed=heard.seed,
            tools=[PYTHON_TOOL] if tools else (),
            tool_choice="none" if tools and spent else None,
        )
        thought: list[str] = []
        gathered = CallPieces()

        def take(chunk: Chunk) -> bool:
            if chunk.reasoning:
                thought.append(chunk.reasoning)
            if chunk.tool_calls:
                gathered.add(chunk.tool_calls)
            return self._hear(heard, chunk)

        try:
            await stream.each(take)
        finally:
            event = self._wrote(stream, heard)
            if thought:
                event["reasoning"] = "".join(thought)
        if stream.num_prompt_tokens:
            self._used = stream.num_prompt_tokens + heard.tokens
            if self.rounds == 1:
                self.prompt_tokens = stream.num_prompt_tokens
        else:
            self._used += heard.tokens
        assert heard.found != "tag", "no tags were looked for"
        if heard.found or heard.finish_reason == "length":
            return heard.found or "length", []
        calls = gathered.calls(f"call_{self.rounds}_")
        if calls:
            event["tool_calls"] = [call.message() for call in calls]
        return None, calls

    async def _answer_calls(self, calls: Sequence[ToolCall], sandbox: SandboxClient) -> bool:
        """Run every call and put its result behind the model's turn; False when one is a repetition too many."""
        tags = self.tags or CODE_TAGS["openmath"]
        goes_on = True
        for call in calls:
            if self.code_runs >= self.limits.code_executions:
                self._turns.append(result_turn(call, "Not run: there are no code executions left."))
                continue
            try:
                code = call.code()
            except BadCall as wrong:
                code, outcome = call.arguments, Outcome(status="error", stdout=f"{wrong}\n")
                notice = self._ran_code(code, outcome, self._now())
            else:
                outcome, notice = await self._run_code(code, sandbox)
            shown = tags.begin if tags.begin.endswith("\n") else f"{tags.begin}\n"
            written = f"{shown}{code.strip(chr(10))}\n{tags.end}"
            self.text += written
            if self.watch:
                self.watch(written)
            self._hand_back(tags.output_block(outcome.status, outcome.stdout, outcome.stderr, notice))
            result = outcome.stdout + outcome.stderr + notice
            self._turns.append(result_turn(call, result))
            self._used += self.count_tokens(result) + TURN_TOKENS
            goes_on = goes_on and not self._is_repeated(code, outcome)
        return goes_on
