"""Loss masks: what is supervised under templates with and without markers, held against decoded text."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.embedded import TARGET_DIR
from stages.extract.conversations import Chat, Text, Tokens
from stages.extract.rows import BadRowError, DataError
from stages.extract.tokenize import SampleTokenizer

WITHOUT_MARKERS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models do it: only the last assistant turn shows a thinking block.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3's rule: thinking is cut from every answer before the last question.
CUTS_THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{% if loop.index0 > ns.last %}{% set content = '<think>\n\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt ends in something that no finished turn contains.
OPENS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
COUNTS_TURNS = (
    "{{ messages | length }} {% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
)
CHAT = Chat(
    messages=[
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "First answer one?"},
        {"role": "assistant", "content": "First answer one."},
        {"role": "user", "content": "And two?"},
        {"role": "assistant", "content": "Second: answer two."},
    ]
)


def make_tokenizer(template: str | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def spans(tokenizer: Any, tokens: Tokens) -> list[str]:
    """Decoded runs of supervised tokens."""
    edges = np.flatnonzero(np.diff(tokens.loss_mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(tokens.input_ids[start:end]) for start, end in edges]


def tokenize(tokenizer: Any, row: Any, *, supervise: str = "all") -> Tokens:
    return SampleTokenizer(tokenizer, supervise=supervise, eos_token_ids=frozenset())(row)


@pytest.mark.parametrize("template", [None, WITHOUT_MARKERS, OPENS_THINKING])
def test_every_assistant_turn_with_its_end_of_turn_token(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    tokens = tokenize(tokenizer, CHAT)
    assert spans(tokenizer, tokens) == ["First answer one.<|im_end|>", "Second: answer two.<|im_end|>"]
    assert tokens.input_ids.tolist() == tokenizer.apply_chat_template(CHAT.messages, return_dict=False)


@pytest.mark.parametrize("template", [None, WITHOUT_MARKERS])
def test_only_the_last_turn(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    assert spans(tokenizer, tokenize(tokenizer, CHAT, supervise="last")) == ["Second: answer two.<|im_end|>"]


def test_markers_that_leave_the_end_of_turn_token_out() -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "<|im_end|>\n{% endfor %}"
    )
    assert spans(tokenizer, tokenize(tokenizer, CHAT))[0] == "First answer one.<|im_end|>"


def test_a_template_that_renders_the_last_turn_otherwise() -> None:
    tokenizer = make_tokenizer(THINKING)
    assert spans(tokenizer, tokenize(tokenizer, CHAT)) == [
        "First answer one.<|im_end|>",
        "<think>\n\n</think>\n\nSecond: answer two.<|im_end|>",
    ]


def test_the_quoted_answer_in_a_question_is_not_supervised() -> None:
    tokenizer = make_tokenizer(THINKING)
    chat = Chat(
        messages=[
            {"role": "user", "content": "Say yes"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "Again: yes"},
            {"role": "assistant", "content": "yes"},
        ]
    )
    assert spans(tokenizer, tokenize(tokenizer, chat)) == ["yes<|im_end|>", "<think>\n\n</think>\n\nyes<|im_end|>"]


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(messages=[{"role": role, "content": content} for role, content in turns])


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        # thinking is cut from an earlier turn, and the user quotes it
        (
            (
                ("user", "q"),
                ("assistant", "<think>a</think>four"),
                ("user", "you wrote <think>a</think>four, why?"),
                ("assistant", "because"),
            ),
            ["four<|im_end|>", "<think>\n\n</think>\n\nbecause<|im_end|>"],
        ),
        # an earlier answer ends in white space
        (
            (("user", "q"), ("assistant", "Here is the code.\n"), ("user", "z"), ("assistant", "fine")),
            ["Here is the code.\n<|im_end|>", "<think>\n\n</think>\n\nfine<|im_end|>"],
        ),
        # an earlier answer is empty; the next question begins like the one that is put in its place
        (
            (("user", "q"), ("assistant", ""), ("user", "a b"), ("assistant", "c")),
            ["<|im_end|>", "<think>\n\n</think>\n\nc<|im_end|>"],
        ),
    ],
)
def test_turns_that_look_different_once_they_are_history(turns: Any, expected: list[str]) -> None:
    tokenizer = make_tokenizer(CUTS_THINKING)
    assert spans(tokenizer, tokenize(tokenizer, chat(*turns))) == expected


@pytest.mark.parametrize("template", [None, WITHOUT_MARKERS])
def test_a_leading_assistant_turn_has_no_header_in_its_span(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    row = chat(("assistant", "I begin."), ("user", "Well?"), ("assistant", "Done."))
    assert spans(tokenizer, tokenize(tokenizer, row)) == ["I begin.<|im_end|>", "Done.<|im_end|>"]


def test_a_template_without_generation_prompt_is_taken_only_where_nothing_precedes_the_answer() -> None:
    bare = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[Q] ' + m['content'] + ' [/Q]' }}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(bare)
    row = chat(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    assert spans(tokenizer, tokenize(tokenizer, row)) == ["two<|im_end|>", "four<|im_end|>"]
    headed = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(BadRowError, match="no generation prompt"):
        tokenize(make_tokenizer(headed), row)


def test_an_answer_that_shares_letters_with_an_opened_thinking_block_is_whole() -> None:
    tokenizer = make_tokenizer(OPENS_THINKING)
    assert spans(tokenizer, tokenize(tokenizer, chat(("user", "q"), ("assistant", "<thing> is it")))) == [
        "<thing> is it<|im_end|>"
    ]


OPENS_AND_CUTS_THINKING = OPENS_THINKING.replace("m['content']", "m['content'].split('</think>')[-1]")
CLOSES_THE_CHAT = WITHOUT_MARKERS.replace(
    "{% if add", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add"
)


def test_an_answer_in_markup_is_whole_where_its_thinking_is_cut() -> None:
    tokenizer = make_tokenizer(OPENS_AND_CUTS_THINKING)
    answer = ("assistant", "<think>\nr\n</think><div>x</div>")
    row = chat(("user", "q"), answer, ("user", "again"), ("assistant", "<b>y</b>"))
    assert spans(tokenizer, tokenize(tokenizer, row)) == ["<div>x</div><|im_end|>", "<b>y</b><|im_end|>"]
    with pytest.raises(BadRowError, match=r"cuts the thinking from an answer \(message 1\).*data\.chat_template"):
        tokenize(tokenizer, chat(("user", "q"), answer))


def test_the_token_that_closes_the_whole_chat_is_not_part_of_the_answer() -> None:
    tokenizer = make_tokenizer(CLOSES_THE_CHAT)
    row = chat(("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two"))
    both = SampleTokenizer(tokenizer, supervise="all", eos_token_ids=frozenset({0, 2}))
    assert spans(tokenizer, both(row)) == ["one<|im_end|>", "two<|im_end|>"]
    with pytest.raises(BadRowError, match="holds the text of an end-of-turn token"):
        both(chat(("user", "q"), ("assistant", "one<|im_end|>")))


def test_a_begin_token_that_is_also_an_end_token_is_not_supervised_twice() -> None:
    wrapped = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_end|>[Q]{{ m['content'] }}[/Q]"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(wrapped)
    row = chat(("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two"))
    assert spans(tokenizer, tokenize(tokenizer, row)) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_header_that_differs_from_the_generation_prompt_is_refused() -> None:
    uneven = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ '\n' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}"
        "{% if m['role'] != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
    )
    with pytest.raises(BadRowError, match="beginning of an assistant turn was not found"):
        tokenize(make_tokenizer(uneven), chat(("user", "q"), ("assistant", "one"), ("assistant", "two")))


def test_tool_results_must_be_rendered() -> None:
    silent = WITHOUT_MARKERS.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    row = chat(("user", "w"), ("assistant", "x"), ("tool", "forty two"), ("assistant", "z"))
    with pytest.raises(BadRowError, match=r"does not show all that message 2 \(role tool\) says"):
        tokenize(make_tokenizer(silent), row)
    tokenizer = make_tokenizer(WITHOUT_MARKERS)
    assert spans(tokenizer, tokenize(tokenizer, row)) == ["x<|im_end|>", "z<|im_end|>"]


def test_tool_calls_must_be_rendered() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look_up", "arguments": {}}}]}
    row = Chat(messages=[{"role": "user", "content": "q"}, call])
    with pytest.raises(BadRowError, match="tool calls that the chat template does not render"):
        tokenize(make_tokenizer(), row)
    aware = WITHOUT_MARKERS.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ c.function.name }}(){% endfor %}",
    )
    tokenizer = make_tokenizer(aware)
    assert spans(tokenizer, tokenize(tokenizer, row)) == ["look_up()<|im_end|>"]


def test_a_tokenizer_with_several_templates() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": WITHOUT_MARKERS, "tool_use": WITHOUT_MARKERS}
    assert spans(tokenizer, tokenize(tokenizer, CHAT))[0] == "First answer one.<|im_end|>"
    tokenizer.chat_template = {"rag": WITHOUT_MARKERS, "tool_use": WITHOUT_MARKERS}
    with pytest.raises(DataError, match=r"none named default"):
        tokenize(tokenizer, CHAT)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[99].content }}", "{% include 'x' %}"])
def test_whatever_a_template_raises_is_a_bad_row(template: str) -> None:
    with pytest.raises(BadRowError, match="chat template: "):
        tokenize(make_tokenizer(template), CHAT)


def test_a_template_that_rewrites_history_is_refused_and_not_guessed() -> None:
    with pytest.raises(BadRowError, match="rewrites earlier turns"):
        tokenize(make_tokenizer(COUNTS_TURNS), CHAT)


def test_markers_around_everything_are_refused() -> None:
    everything = make_tokenizer(
        "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}"
    )
    with pytest.raises(BadRowError, match="all one"):
        tokenize(everything, CHAT)
    nothing = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}")
    with pytest.raises(BadRowError, match="all zero"):
        tokenize(nothing, CHAT)


def test_an_error_inside_the_template_is_a_bad_row() -> None:
    with pytest.raises(BadRowError, match="roles must alternate"):
        tokenize(make_tokenizer("{{ raise_exception('roles must alternate') }}"), CHAT)


def test_text_is_supervised_whole_and_ids_are_kept() -> None:
    tokenizer = make_tokenizer()
    assert tokenize(tokenizer, Text(text="def f(): pass")).loss_mask.all()
    ready = Tokens(input_ids=np.array([5, 6], dtype=np.int32), loss_mask=np.array([0, 1], dtype=np.uint8))
    assert tokenize(tokenizer, ready) is ready
    with pytest.raises(BadRowError, match="outside the target's vocabulary"):
        tokenize(tokenizer, Tokens(input_ids=np.array([4096], dtype=np.int32), loss_mask=ready.loss_mask[:1]))


def test_a_tokenizer_without_template_cannot_render_chats() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"data\.chat_template"):
        tokenize(tokenizer, CHAT)
