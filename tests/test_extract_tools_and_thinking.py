"""Tools and thinking are in what the target is shown, or the row is refused; told by decoded text and spans."""

from typing import Any

import pytest

from stages.extract.conversations import parse_row
from stages.extract.rows import BadRowError
from test_extract_tokenize import make_tokenizer, spans, tokenize

HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + HEADER
# As Qwen3 and gpt-oss do it: the thinking of the last round is shown, that of earlier ones is cut. NAME is the field.
SHOWS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.NAME and loop.index0 > ns.last %}<think>\n{{ m.NAME | trim }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + HEADER
)
# The thinking of a step with a later step is cut, although no question stands between them.
SHOWS_LAST = SHOWS.replace("loop.index0 > ns.last", "loop.last")
WITH_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + PLAIN
QUESTION, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "two"}
NAMES = ("reasoning_content", "thinking", "reasoning")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}, {"name": "stock", "parameters": {}}]


def shown(template: str, messages: list[dict[str, Any]], *, supervise: str = "all", **columns: Any) -> tuple[str, Any]:
    tokenizer = make_tokenizer(template)
    tokens = tokenize(tokenizer, parse_row({"messages": messages, **columns}), supervise=supervise)
    return tokenizer.decode(tokens.input_ids), spans(tokenizer, tokens)


@pytest.mark.parametrize("read", NAMES)
@pytest.mark.parametrize("written", NAMES)
def test_thinking_goes_to_the_template_under_the_name_that_it_reads(read: str, written: str) -> None:
    _, found = shown(SHOWS.replace("NAME", read), [QUESTION, {**ANSWER, written: "deep thought"}])
    assert found == ["<think>\ndeep thought\n</think>\n\ntwo<|im_end|>"]


@pytest.mark.parametrize("read", NAMES)
def test_thinking_of_earlier_rounds_is_the_templates_to_cut(read: str) -> None:
    turns = [QUESTION, {**ANSWER, "thinking": "first"}, QUESTION, {**ANSWER, "thinking": "second"}]
    text, found = shown(SHOWS.replace("NAME", read), turns)
    assert found == ["two<|im_end|>", "<think>\nsecond\n</think>\n\ntwo<|im_end|>"]
    assert "first" not in text
    assert shown(SHOWS.replace("NAME", read), [*turns[:3], ANSWER])[1] == ["two<|im_end|>", "two<|im_end|>"]


@pytest.mark.parametrize("template", [PLAIN, SHOWS.replace("NAME", "thoughts")])
@pytest.mark.parametrize("place", [1, 3])
def test_thinking_that_no_name_shows_refuses_the_row(template: str, place: int) -> None:
    turns = [QUESTION, ANSWER, QUESTION, ANSWER]
    turns[place] = {**ANSWER, "reasoning_content": "a two"}  # its words stand in the chat all the same
    with pytest.raises(BadRowError, match=r"thinking .* that the chat template does not render"):
        shown(template, turns)


def test_a_supervised_step_after_the_question_keeps_its_thinking() -> None:
    step = {**ANSWER, "thinking": "first"}
    turns = [QUESTION, step, {"role": "tool", "content": "r"}, {**ANSWER, "thinking": "second"}]
    template = SHOWS_LAST.replace("NAME", "thinking")
    assert shown(SHOWS.replace("NAME", "thinking"), turns)[1][0] == "<think>\nfirst\n</think>\n\ntwo<|im_end|>"
    with pytest.raises(BadRowError, match="cuts the thinking from an answer"):
        shown(template, turns)
    text, _ = shown(template, turns, supervise="last")
    assert ("first" in text, "second" in text) == (False, True)


def test_thinking_that_the_template_shortens_refuses_the_row() -> None:
    template = SHOWS.replace("m.NAME | trim", "m.NAME.split('|')[-1]").replace("NAME", "thinking")
    with pytest.raises(BadRowError, match="cuts the thinking from an answer"):
        shown(template, [QUESTION, {**ANSWER, "thinking": "deep | thought"}])


def test_tools_are_shown_or_the_row_is_refused() -> None:
    text, found = shown(WITH_TOOLS, [QUESTION, ANSWER], tools=TOOLS)
    assert '"name": "weather"' in text
    assert '"name": "stock"' in text
    assert found == ["two<|im_end|>"]
    for template in (PLAIN, WITH_TOOLS.replace("tools or []", "(tools or [])[:1]")):
        naming = {"role": "user", "content": "weather and stock?"}  # the names alone are no description
        with pytest.raises(BadRowError, match="tools that the chat template does not render"):
            shown(template, [naming, ANSWER], tools=TOOLS)
    with pytest.raises(BadRowError, match="tools: one has no name"):
        shown(WITH_TOOLS, [QUESTION, ANSWER], tools=[{"type": "function", "function": {"parameters": {}}}])
