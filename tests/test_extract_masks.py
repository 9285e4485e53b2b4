"""Loss masks under the templates and tokenizers of many families, against spans that are built by hand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from chat_families import (
    CHATML,
    CHATML_MARKED,
    DEEPSEEK_R1,
    GEMMA,
    GLM,
    GPT_OSS,
    GRANITE,
    LLAMA3,
    MARKED_IN_MACRO,
    MISTRAL,
    PHI,
    QWEN3,
    byte_fallback_bpe,
    byte_level,
    metaspace_unigram,
    normalizing_words,
)
from stages.extract.conversations import Chat, Text, Tokens
from stages.extract.rows import BadRowError
from stages.extract.tokenize import SampleTokenizer

CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": "yes"}}}]
Turn = tuple[str, str] | tuple[str, str, dict[str, Any]]


def chat(*turns: Turn, unsupervised: tuple[int, ...] = ()) -> Chat:
    messages = [{"role": turn[0], "content": turn[1]} | (turn[2] if len(turn) > 2 else {}) for turn in turns]
    return Chat(messages=messages, unsupervised=frozenset(unsupervised))


def tokenize(tokenizer: Any, row: Any, *, supervise: str = "all", eos: tuple[str, ...] = ()) -> Tokens:
    ids = frozenset(tokenizer.convert_tokens_to_ids(list(eos)))
    return SampleTokenizer(tokenizer, supervise=supervise, eos_token_ids=ids)(row)


def spans(tokenizer: Any, row: Any, **options: Any) -> list[str]:
    """Decoded runs of supervised tokens."""
    tokens = tokenize(tokenizer, row, **options)
    edges = np.flatnonzero(np.diff(tokens.loss_mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(tokens.input_ids[start:end]) for start, end in edges]


ROUNDS = (("user", "one two?"), ("assistant", "two."), ("user", "two?"), ("assistant", "two."))
TOOL_ROUND = (
    ("user", "a?"),
    ("assistant", "", {"tool_calls": CALL, "reasoning_content": "why"}),
    ("tool", "r"),
    ("assistant", "two"),
    ("user", "c?"),
    ("assistant", "three"),
)
GPT_OSS_TOKENS = "<|start|> <|end|> <|message|> <|channel|> <|call|>"
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], tuple[Turn, ...], list[str]]] = {
    "llama 3": (
        LLAMA3,
        {"added": "<|start_header_id|> <|end_header_id|>", "bos": "<|begin|>", "eos": "<|eot_id|>"},
        (),
        (("system", "s"), *ROUNDS, ("user", "q"), ("assistant", "", {"tool_calls": CALL}), ("tool", "r"), ROUNDS[1]),
        ["two.<|eot_id|>"] * 2 + ['{"name": "f", "parameters": {"x": "yes"}}<|eot_id|>', "two.<|eot_id|>"],
    ),
    "qwen 3": (
        QWEN3.replace("PROMPT", ""),
        {},
        (),
        TOOL_ROUND,
        [
            '<tool_call>\n{"name": "f", "arguments": {"x": "yes"}}\n</tool_call><|im_end|>',
            "two<|im_end|>",
            "<think>\n\n</think>\n\nthree<|im_end|>",
        ],
    ),
    "qwen 3.5, whose prompt opens the thinking": (
        QWEN3.replace("PROMPT", "<think>\\n"),
        {"added": "<think> </think>"},
        (),
        (*TOOL_ROUND[:-1], ("assistant", "<think>\nhm\n</think>\n\nthree")),
        [
            '<tool_call>\n{"name": "f", "arguments": {"x": "yes"}}\n</tool_call><|im_end|>',
            "two<|im_end|>",
            "hm\n</think>\n\nthree<|im_end|>",
        ],
    ),
    "gpt-oss": (
        GPT_OSS,
        {"added": GPT_OSS_TOKENS, "eos": "<|return|>"},
        ("<|call|>",),
        (
            *ROUNDS,
            ("user", "d"),
            ("assistant", "", {"tool_calls": CALL}),
            ("tool", "r"),
            ("assistant", "end", {"thinking": "why"}),
        ),
        [
            *["<|channel|>final<|message|>two.<|end|>"] * 2,
            ' to=functions.f<|channel|>commentary json<|message|>{"x": "yes"}<|call|>',
            "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>end<|return|>",
        ],
    ),
    "deepseek r1": (
        DEEPSEEK_R1,
        {"added": "<|User|> <|Assistant|> <think> </think>", "bos": "<|begin|>", "eos": "<|eos|>"},
        (),
        (("user", "q"), ("assistant", "<think>\nhm\n</think>\n\none"), *ROUNDS),
        ["\n\none<|eos|>", "two.<|eos|>", "two.<|eos|>"],
    ),
    "mistral": (
        MISTRAL,
        {"added": "[INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]", "bos": "<s>", "eos": "</s>"},
        (),
        (("system", "s"), *ROUNDS, ("user", "q"), ("assistant", "", {"tool_calls": CALL}), ("tool", "r"), ROUNDS[1]),
        [" two.</s>"] * 2 + ['[TOOL_CALLS] [{"name": "f", "arguments": {"x": "yes"}}]</s>', " two.</s>"],
    ),
    "gemma": (
        GEMMA,
        {"added": "<start_of_turn>", "bos": "<bos>", "eos": "<end_of_turn>"},
        (),
        ROUNDS,
        ["two.<end_of_turn>"] * 2,
    ),
    "phi": (
        PHI,
        {"added": "<|user|> <|assistant|> <|end|>", "eos": "<|endoftext|>"},
        ("<|end|>",),
        ROUNDS,
        ["two.<|end|>"] * 2,
    ),
    "glm": (
        GLM,
        {"added": "[gMASK] <sop> <|user|> <|assistant|>", "eos": "<|endoftext|>"},
        ("<|user|>",),
        ROUNDS,
        ["two.<|user|>", "two."],
    ),
    "granite": (
        GRANITE,
        {"added": "<|start_of_role|> <|end_of_role|>", "eos": "<|end_of_text|>"},
        (),
        ROUNDS,
        ["two.<|end_of_text|>"] * 2,
    ),
    "markers in a macro": (MARKED_IN_MACRO, {}, (), ROUNDS, ["two.<|im_end|>"] * 2),
}


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_turn_as_it_stands_in_the_chat_with_its_closing_token(family: str, *, trim: bool) -> None:
    template, options, eos, turns, expected = FAMILIES[family]
    tokenizer = byte_level(template, **options, trim=trim)
    assert spans(tokenizer, chat(*turns), eos=eos) == expected
    assert spans(tokenizer, chat(*turns), eos=eos, supervise="last") == expected[-1:]
    ids = tokenize(tokenizer, chat(*turns), eos=eos).input_ids.tolist()
    assert ids == tokenizer.apply_chat_template(chat(*turns).messages, return_dict=False)


def test_a_header_that_swallows_white_space_leaves_the_answer_its_own() -> None:
    tokenizer = byte_level(PHI, added="<|user|> <|end|>", eos="<|endoftext|>")
    tokenizer.add_tokens(
        [AddedToken("<|assistant|>", special=True, rstrip=True, normalized=False)], special_tokens=True
    )
    row = chat(("user", "q"), ("assistant", "    return x"))
    assert spans(tokenizer, row, eos=("<|end|>",)) == ["    return x<|end|>"]


def test_turns_that_the_row_leaves_out() -> None:
    tokenizer = byte_level(CHATML)
    assert spans(tokenizer, chat(*ROUNDS, unsupervised=(1,))) == ["two.<|im_end|>"]
    assert not tokenize(tokenizer, chat(*ROUNDS, unsupervised=(3,))).loss_mask[-2]
    with pytest.raises(BadRowError, match="leaves every turn"):
        tokenize(tokenizer, chat(*ROUNDS, unsupervised=(3,)), supervise="last")


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
@pytest.mark.parametrize("answer", ["", " ", "\n\n"])
def test_an_answer_of_nothing_is_its_end_of_turn_token(template: str, answer: str) -> None:
    tokenizer = byte_level(template, trim=True)
    for row in (chat(("user", "q"), ("assistant", answer)), chat(("user", "q"), ("assistant", answer), *ROUNDS)):
        assert spans(tokenizer, row)[0] == f"{answer}<|im_end|>"


def test_an_answer_of_one_token_at_the_first_place() -> None:
    bare = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    tokenizer = byte_level(bare + "{% else %}{{ '\n' + m.content }}{% endif %}{% endfor %}", trim=True)
    tokens = tokenize(tokenizer, chat(("assistant", "x"), ("user", "x")))
    assert tokens.loss_mask.tolist() == [1] + [0] * (len(tokens.input_ids) - 1)


def test_a_generation_block_that_is_missing_or_holds_another_message_is_refused() -> None:
    only_last = CHATML_MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(BadRowError, match="no assistant token found in message 1"):
        tokenize(byte_level(only_last), chat(*ROUNDS))
    assert spans(byte_level(only_last), chat(*ROUNDS), supervise="last") == ["two.<|im_end|>"]
    everybody = CHATML_MARKED.replace("m.role == 'assistant'", "true")
    with pytest.raises(BadRowError, match="holds a message that is not the assistant's"):
        tokenize(byte_level(everybody), chat(*ROUNDS))


LEADING = (("assistant", "Hi"), ("user", "b?"), ("assistant", "two"))


def test_a_leading_turn_under_a_prompt_that_opens_thinking() -> None:
    tokenizer = byte_level(QWEN3.replace("PROMPT", "<think>\\n"), added="<think> </think>")
    assert spans(tokenizer, chat(*LEADING)) == ["Hi<|im_end|>", "\n</think>\n\ntwo<|im_end|>"]
    odd = byte_level(CHATML.replace("assistant\n{% endif", "model\n{% endif"))
    with pytest.raises(BadRowError, match="beginning of a leading assistant turn"):
        tokenize(odd, chat(*LEADING))


THINKS = "Let me think.\n</think>\n\nFour."


@pytest.mark.parametrize("thought", [THINKS, "<think>\na\n</think>answer", "<think>" + THINKS])
@pytest.mark.parametrize("last", [(), (("tool", "r"), ("assistant", "fine"))])
def test_thinking_that_the_template_cuts_from_the_last_round_is_refused(thought: str, last: tuple[Turn, ...]) -> None:
    row = chat(("user", "q?"), ("assistant", thought), *last)
    cuts = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    marked = CHATML_MARKED.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    for template in (cuts, marked):
        with pytest.raises(BadRowError, match=r"cuts the thinking from an answer \(message 1\)") as told:
            tokenize(byte_level(template), row)
        assert ('set data.supervise = "last"' in str(told.value)) == bool(last), "where it helps"
        if last:
            assert tokenize(byte_level(template), row, supervise="last").loss_mask.any()
    assert tokenize(byte_level(CHATML), row).loss_mask.any()


def test_a_field_of_thinking_that_the_template_ignores_is_refused() -> None:
    row = chat(("user", "q"), ("assistant", "four", {"reasoning_content": "hm"}))
    with pytest.raises(BadRowError, match=r"thinking .* that the chat template does not render"):
        tokenize(byte_level(CHATML), row)
    shown = byte_level(QWEN3.replace("PROMPT", ""))
    assert spans(shown, row) == ["<think>\nhm\n</think>\n\nfour<|im_end|>"]


def test_an_answer_that_the_template_shortens_is_refused() -> None:
    tokenizer = byte_level(CHATML.replace("{{ m.content }}", "{{ m.content[:8] }}"))
    with pytest.raises(BadRowError, match=r"not show all that an answer says \(message 1\)"):
        tokenize(tokenizer, chat(("user", "q"), ("assistant", "one two three")))


@pytest.mark.parametrize("text", ["<s>[INST]q[/INST]a</s>", "q a"])
def test_a_text_has_the_special_tokens_of_its_ends_once(text: str) -> None:
    tokenizer = byte_level(CHATML, bos="<s>", eos="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A $B </s>",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")],
    )
    tokens = tokenize(tokenizer, Text(text=text))
    assert tokenizer.decode(tokens.input_ids) == (text if text.startswith("<s>") else f"<s>{text}</s>")
    assert tokens.loss_mask.all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [(" <s>a", "white space before"), (" <s> ", "nothing but"), ("<s>", "nothing but"), ("<s>\n</s>", None)],
)
def test_a_text_begins_with_its_special_token_and_says_something(text: str, reason: str | None) -> None:
    tokenizer = byte_level(CHATML, bos="<s>", eos="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    if reason is None:
        assert tokenizer.decode(tokenize(tokenizer, Text(text=text)).input_ids) == text
        return
    with pytest.raises(BadRowError, match=reason):
        tokenize(tokenizer, Text(text=text))


CONTENTS = st.one_of(
    st.sampled_from(["", " ", "\n", "assistant", "assistant\n", "user\n", "  two ", "\n\nx\n", "a", "</s", "<|im_"]),
    st.text(alphabet=st.sampled_from("hi .\n\té日🙂e\u0301<|"), max_size=12),
)
ANSWERED = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3)
BYTE_LEVEL = [
    byte_level(template, trim=trim) for template in (CHATML, CHATML_MARKED, MARKED_IN_MACRO) for trim in (False, True)
]


@settings(max_examples=60, deadline=None)
@given(ANSWERED, st.sampled_from(BYTE_LEVEL))
def test_any_answer_is_supervised_whole_and_nothing_else(pairs: list[tuple[str, str]], tokenizer: Any) -> None:
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    tokens = tokenize(tokenizer, chat(*turns))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, mask = tokens.input_ids, tokens.loss_mask.astype(bool)
    for number, (first, last) in enumerate(zip(*(np.flatnonzero(ids == token) for token in (start, end)), strict=True)):
        if number % 2 == 0:
            assert not mask[first : last + 1].any()
            continue
        inside = mask[first : last + 1]
        header = tokenizer.decode(ids[first : last + 1][~inside])
        answer = tokenizer.decode(ids[first : last + 1][inside])
        assert inside[np.argmax(inside) :].all(), "one run up to the end-of-turn token"
        assert header == "<|im_start|>assistant\n", "a line's end that the tokenizer merges with the answer is cut"
        assert header + answer == f"<|im_start|>assistant\n{pairs[number // 2][1]}<|im_end|>"


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
INST_MARKED = INST.replace("{{ m.content + eos", "{% generation %}{{ m.content }}{% endgeneration %}{{ eos")
OTHER_KINDS = [
    make(template)
    for template in (INST, INST_MARKED)
    for make in (
        lambda template: byte_fallback_bpe(template, prefix=True),
        lambda template: byte_fallback_bpe(template, prefix=False),
        metaspace_unigram,
        normalizing_words,
    )
]


@settings(max_examples=80, deadline=None)
@given(ANSWERED, st.sampled_from(OTHER_KINDS))
def test_other_kinds_of_tokenizers(pairs: list[tuple[str, str]], tokenizer: Any) -> None:
    """Every token between the two special tokens beside an answer, and the one that ends it."""
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    tokens = tokenize(tokenizer, chat(*turns))
    asked, end = tokenizer.convert_tokens_to_ids(["[/INST]", "</s>"])
    expected, is_answer = [], False
    for token in tokens.input_ids.tolist():
        expected.append(int(is_answer))
        is_answer = (is_answer or token == asked) and token != end
    assert tokens.loss_mask.tolist() == expected
    assert tokens.input_ids.tolist() == tokenizer.apply_chat_template(chat(*turns).messages, return_dict=False)


def test_a_chat_of_a_thousand_turns_takes_no_longer_than_a_few_seconds() -> None:
    tokenizer = byte_level(QWEN3.replace("PROMPT", ""))
    turns = [("user" if i % 2 == 0 else "assistant", f"turn {i}") for i in range(1000)]
    found = spans(tokenizer, chat(*turns))
    assert [text.split("\n")[-1] for text in found] == [f"turn {i}<|im_end|>" for i in range(1, 1000, 2)]
