"""Prompts and code tags to the letter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omr.errors import ConfigError
from omr.solve.prompt import CODE_TAGS, PROMPTS, prompt_named, remaining_notice, render, tags_named


def test_generic_math_wording() -> None:
    (turn,) = prompt_named("generic/math").messages("1+1?")
    wording = "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{}."
    assert turn == {"role": "user", "content": f"{wording}\n\n1+1?"}


def test_openmath_tir_wording() -> None:
    (turn,) = prompt_named("openmath/tir").messages("1+1?", total_code_executions=3)
    assert turn["content"].split("\n") == [
        "Solve the following math problem, integrating natural language reasoning with Python code executions.",
        "You may perform up to 3 Python code calls to assist your reasoning.",
        "Make sure to put the answer (and only answer) inside \\boxed{}.",
        "",
        "1+1?",
    ]


def test_few_shot_examples_suffix_and_system() -> None:
    system, user = prompt_named("generic/math").messages(
        "3?", examples=[("1?", "\\boxed{1}")], suffix=" /no_think", system="Be brief."
    )
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"].endswith(
        "Problem:\n1?\n\nSolution:\n\\boxed{1}\n\n\n\n\n\nHere is the problem you need to solve:\n3? /no_think"
    )
    with pytest.raises(ConfigError, match="few-shot"):
        prompt_named("openmath/tir").messages("3?", examples=[("1?", "1")])


@given(st.text(), st.sampled_from(sorted(PROMPTS)))
def test_a_problem_goes_in_unchanged_whatever_braces_it_has(problem: str, name: str) -> None:
    assert problem in PROMPTS[name].messages(problem)[-1]["content"]


def test_an_unknown_name_gets_its_nearest_choice() -> None:
    with pytest.raises(ConfigError, match="did you mean generic/math"):
        prompt_named("generic/maths")
    with pytest.raises(ConfigError, match=r"model\.code_tags has no choice 'zzz'; choose one of openmath"):
        tags_named("zzz")


@pytest.mark.parametrize("name", sorted(CODE_TAGS))
def test_an_output_block_can_be_told_from_the_next_call(name: str) -> None:
    tags = CODE_TAGS[name]
    block = tags.output_block("completed", "42", "", remaining_notice(1))
    assert block.startswith(tags.output_begin) and "42" in block and "Remaining code executions: 1." in block
    assert tags.begin not in block


@pytest.mark.parametrize(
    ("name", "begin", "end", "block"),
    [
        ("openmath", "<tool_call>", "</tool_call>", "\n```output\n7\n```\n"),
        ("qwen", "```python\n", "```\n", "```output\n7\n```\n"),
        ("nemotron", "<llm-code>\n", "</llm-code>\n", "<llm-code-output>\n7\n</llm-code-output>\n"),
        (
            "llama3",
            "<|python_tag|>",
            "<|eom_id|>",
            "<|start_header_id|>ipython<|end_header_id|>\n\ncompleted\n[stdout]\n7\n[/stdout]"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "gpt-oss",
            "<|start|>assistant<|channel|>analysis to=python code<|message|>",
            "<|call|>",
            "<|start|>python code to=assistant<|channel|>analysis<|message|>7\n<|end|><|start|>assistant",
        ),
    ],
)
def test_code_tags_to_the_letter(name: str, begin: str, end: str, block: str) -> None:
    tags = tags_named(name)
    assert (tags.begin, tags.end, tags.output_block("completed", "7\n", "")) == (begin, end, block)


def test_openmath_output_block() -> None:
    assert tags_named("openmath").output_block("completed", "42\n", "") == "\n```output\n42\n```\n"
    assert tags_named("openmath").output_block("completed", "", "") == "\n```output\n```\n"
    assert remaining_notice(0).startswith("```system\nYou have run out of code executions!")


def test_render_uses_the_template_and_a_base_model_gets_plain_text() -> None:
    def template(messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    chat = SimpleNamespace(chat_template="x", apply_chat_template=template)
    assert render(chat, [{"role": "user", "content": "hi"}]) == "<user>hi<assistant>"
    base = SimpleNamespace(chat_template=None, bos_token="<s>")
    assert render(base, [{"role": "user", "content": "hi"}]) == "<s>hi\n"
