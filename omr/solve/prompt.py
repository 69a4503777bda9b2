"""What a model is asked, and how it marks code: prompts and code tags as data.

A `Prompt` turns a problem into chat messages; `render` lays the messages out with the model's own chat template, ready
for a text completion. A `CodeTags` says where the model's code begins and ends and how the harness hands the output
back. Both are looked up by the name that stands in the model's config (`model.prompt`, `model.code_tags`).

Wording and tags are those that the OpenMath family was trained with (NVIDIA NeMo-Skills, `generic/math` and
`openmath/tir`): a model that saw other words in training answers worse, so they are kept to the letter.

Two block styles exist. In style `fence` the output stands alone between its marks; in style `header` (Llama 3) it
follows a status word, stdout and stderr each in brackets of their own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from omr.errors import ConfigError

Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CodeTags:
    """The marks around code (written by the model) and around its output (written by the harness)."""

    begin: str
    end: str
    output_begin: str
    output_end: str
    style: Literal["fence", "header"] = "fence"

    def output_block(self, status: str, stdout: str, stderr: str, notice: str = "") -> str:
        """The text appended after an executed block. `notice` is `remaining_notice(...)` or empty."""
        if self.style == "fence":
            output = stdout + stderr
            if output and not output.endswith("\n"):
                output += "\n"
            return f"{self.output_begin}{output}{self.output_end}{notice}"
        parts = [status]
        parts += [f"[{name}]\n{text}[/{name}]" for name, text in (("stdout", stdout), ("stderr", stderr)) if text]
        return f"{self.output_begin}\n\n" + "\n".join(parts) + f"{notice}{self.output_end}\n\n"


def remaining_notice(remaining: int) -> str:
    """The block that tells the model how many code executions it has left."""
    if remaining > 0:
        text = (
            f"Remaining code executions: {remaining}. You will not be able to call code when you run out of executions,"
            " so use it wisely. Note that you can still continue solving the problem without code after that."
        )
    else:
        text = (
            "You have run out of code executions! You can no longer write or execute code. Now you should continue"
            " solving the problem by relying on your mathematical reasoning and analytical skills."
        )
    return f"```system\n{text}```\n"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A user turn with places to fill, and an optional system turn.

    Places: {problem}, {total_code_executions} and {examples} (few-shot solutions). Literal braces are doubled.
    """

    user: str
    system: str | None = None

    def messages(
        self,
        problem: str,
        *,
        total_code_executions: int = 8,
        examples: Sequence[tuple[str, str]] = (),
        suffix: str = "",
        system: str | None = None,
    ) -> list[Message]:
        """Chat messages that ask `problem`.

        `examples` are (problem, solution) pairs shown first, where the prompt has a place for them. `suffix` is
        appended to the user turn; `system` replaces the prompt's own system turn.
        """
        shown = "".join(f"Problem:\n{p}\n\nSolution:\n{s}\n\n\n\n\n\n" for p, s in examples)
        if shown:
            if "{examples}" not in self.user:
                raise ConfigError("this prompt has no place for few-shot examples; use generic/math or set none")
            shown = f"{EXAMPLES_PREFIX}{shown}{EXAMPLES_SUFFIX}"
        user = self.user.format(problem=problem, total_code_executions=total_code_executions, examples=shown)
        turn = self.system if system is None else system
        return ([{"role": "system", "content": turn}] if turn else []) + [{"role": "user", "content": user + suffix}]


EXAMPLES_PREFIX = "Here are some examples of problems and solutions you can refer to.\n\n"
EXAMPLES_SUFFIX = "Here is the problem you need to solve:\n"

PROMPTS: Mapping[str, Prompt] = {
    "generic/math": Prompt(
        user=(
            "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{{}}.\n\n"
            "{examples}{problem}"
        )
    ),
    "openmath/tir": Prompt(
        user=(
            "Solve the following math problem, integrating natural language reasoning with Python code executions.\n"
            "You may perform up to {total_code_executions} Python code calls to assist your reasoning.\n"
            "Make sure to put the answer (and only answer) inside \\boxed{{}}.\n\n"
            "{problem}"
        )
    ),
    "plain": Prompt(user="{examples}{problem}"),
}

CODE_TAGS: Mapping[str, CodeTags] = {
    "openmath": CodeTags(begin="<tool_call>", end="</tool_call>", output_begin="\n```output\n", output_end="```\n"),
    "qwen": CodeTags(begin="```python\n", end="```\n", output_begin="```output\n", output_end="```\n"),
    "nemotron": CodeTags(
        begin="<llm-code>\n",
        end="</llm-code>\n",
        output_begin="<llm-code-output>\n",
        output_end="</llm-code-output>\n",
    ),
    "llama3": CodeTags(
        begin="<|python_tag|>",
        end="<|eom_id|>",
        output_begin="<|start_header_id|>ipython<|end_header_id|>",
        output_end="<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        style="header",
    ),
    "gpt-oss": CodeTags(
        begin="<|start|>assistant<|channel|>analysis to=python code<|message|>",
        end="<|call|>",
        output_begin="<|start|>python code to=assistant<|channel|>analysis<|message|>",
        output_end="<|end|><|start|>assistant",
    ),
}


def _named(table: Mapping[str, T], name: str, key: str) -> T:
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(table)}"
    raise ConfigError(f"{key} has no choice {name!r}; {hint}")


def prompt_named(name: str) -> Prompt:
    """The prompt `name`. Raises ConfigError with the nearest choice."""
    return _named(PROMPTS, name, "model.prompt")


def tags_named(name: str) -> CodeTags:
    """The code tags `name`. Raises ConfigError with the nearest choice."""
    return _named(CODE_TAGS, name, "model.code_tags")


def render(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Messages as one string in the model's chat template, ending where the assistant's turn begins.

    A tokenizer without a template (a base model) gets its bos token and the contents, one after the other.
    """
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return str(text)
    bos = getattr(tokenizer, "bos_token", None) or ""
    return bos + "\n\n".join(m["content"] for m in messages) + "\n"
