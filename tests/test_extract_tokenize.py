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
