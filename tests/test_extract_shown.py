"""What a template leaves out of a chat refuses the row, whatever else in it has the same words; and where turns end."""

from typing import Any

import pytest

from chat_families import CHATML, GPT_OSS, LLAMA3, MISTRAL, QWEN3, byte_level
from stages.extract.conversations import Chat, parse_row
from stages.extract.rows import BadRowError
from test_extract_masks import GPT_OSS_TOKENS, spans, tokenize

QUESTION, ANSWER = {"role": "user", "content": "Paris or Rome?"}, {"role": "assistant", "content": "Rome, 5."}
CALLS = "{% for t in m.tool_calls or [] %}<call>SHOWN</call>{% endfor %}"


def calling(*calls: tuple[str, Any], content: str = "", key: str = "arguments") -> dict[str, Any]:
    functions = [{"type": "function", "function": {"name": name, key: arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": content, "tool_calls": functions}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def row(*messages: dict[str, Any], **columns: Any) -> Chat:
    chat = parse_row({"messages": list(messages), **columns})
    assert isinstance(chat, Chat)
    return chat


def showing(calls: str) -> Any:
    """ChatML that shows each tool call as the expression says."""
    return byte_level(CHATML.replace("{{ m.content }}", "{{ m.content }}" + CALLS.replace("SHOWN", calls)))


def gpt_oss() -> Any:
    return byte_level(GPT_OSS, added=GPT_OSS_TOKENS, eos="<|return|>")


WHOLE = "{{ t.function | tojson }}"
NOT_RENDERED = r"tool calls that the chat template does not render, or not whole \(message 1\)"


def test_calls_that_stand_nowhere_but_in_the_text_are_refused() -> None:
    chat = row(QUESTION, calling(("get", {"city": "Paris"}), content="I get Paris"), result("ok"), ANSWER)
    with pytest.raises(BadRowError, match=NOT_RENDERED):
        tokenize(byte_level(CHATML), chat)
    assert spans(showing(WHOLE), chat) == [
        'I get Paris<call>{"name": "get", "arguments": {"city": "Paris"}}</call><|im_end|>',
        "Rome, 5.<|im_end|>",
    ]


@pytest.mark.parametrize(
    "calls",
    [
        [("get", {"city": "Paris"}), ("get", {"city": "Rome"})],
        [("get", {"city": "Paris"}), ("get", {"city": "Paris"})],
        [("get_more", {"city": "Paris"}), ("get", {"city": "Par"})],
        [("get", {"n": 1}), ("get", {"n": 1})],
        [("get", {}), ("get", {})],
    ],
)
def test_a_second_call_that_the_template_drops_is_refused(calls: list[tuple[str, Any]]) -> None:
    chat = row(QUESTION, calling(*calls), result("ok"), ANSWER)
    with pytest.raises(BadRowError, match=NOT_RENDERED):
        tokenize(gpt_oss(), chat, eos=("<|call|>",))
    assert len(spans(showing(WHOLE), chat)) == 2


@pytest.mark.parametrize(
    ("shown", "arguments"),
    [
        ("{{ t.function.name }}", {"city": "Paris"}),
        ("{{ t.function.name }}", {"n": 5}),
        ("{{ t.function.name }}", {"deep": [{"is": True}]}),
        ("{{ t.function.name }}{{ t.function.arguments.a }}", {"a": "x", "b": "x"}),
        ("{{ t.function.name }}{{ t.function.arguments.a[:5] }}", {"a": "Rome, and Paris"}),
        ("{{ t.function.arguments | tojson }}", {"a": "x"}),
    ],
)
def test_names_and_arguments_that_the_template_drops_are_refused(shown: str, arguments: Any) -> None:
    with pytest.raises(BadRowError, match=NOT_RENDERED):
        tokenize(showing(shown), row(QUESTION, calling(("x5", arguments)), result("x"), ANSWER))


def test_arguments_are_shown_in_whatever_form() -> None:
    chat = row(QUESTION, calling(("f", {"a": ' "x"\n', "n": 5, "yes": True, "none": None})), result("x"), ANSWER)
    pairs = "{{ t.function.name }}({% for k, v in t.function.arguments | items %}{{ k }}={{ v | trim }};{% endfor %})"
    assert spans(showing(pairs), chat)[0] == '<call>f(a="x";n=5;yes=True;none=None;)</call><|im_end|>'


@pytest.mark.parametrize("content", ["x", "city", "the city"])
def test_content_that_a_call_takes_the_place_of_is_refused(content: str) -> None:
    chat = row(QUESTION, calling(("x", {"city": "the city"}), content=content), result("ok"), ANSWER)
    tokenizer = byte_level(LLAMA3, added="<|start_header_id|> <|end_header_id|>", bos="<|begin|>", eos="<|eot_id|>")
    with pytest.raises(BadRowError, match=r"not show all that an answer says \(message 1\)"):
        tokenize(tokenizer, chat)
    assert spans(tokenizer, row(chat.messages[0], {**chat.messages[1], "content": ""}, *chat.messages[2:]))[0] == (
        '{"name": "x", "parameters": {"city": "the city"}}<|eot_id|>'
    )


def test_a_system_prompt_that_is_shown_only_where_a_question_is_last_is_refused() -> None:
    only_asked = MISTRAL.replace("loop.index0 == ns.last", "loop.last")
    system = {"role": "system", "content": "Rome"}
    options: dict[str, Any] = {"added": "[INST] [/INST]", "bos": "<s>", "eos": "</s>"}
    with pytest.raises(BadRowError, match=r"does not show all that message 0 \(role system\) says"):
        tokenize(byte_level(only_asked, **options), row(system, QUESTION, ANSWER))
    assert spans(byte_level(MISTRAL, **options), row(system, QUESTION, ANSWER)) == [" Rome, 5.</s>"]
    assert spans(byte_level(only_asked, **options), row(QUESTION, ANSWER)) == [" Rome, 5.</s>"]


@pytest.mark.parametrize(
    ("content", "shows"),
    [
        ("{% if m.role != 'ROLE' %}{{ m.content }}{% endif %}", False),
        ("{{ m.content[:3] if m.role == 'ROLE' else m.content }}", False),
        ("{{ m.content[-3:] if m.role == 'ROLE' else m.content }}", False),
        ("{{ m.content | trim }}", True),
        ("{{ m.content | tojson if m.role == 'ROLE' else m.content }}", True),
        ("{{ m.content | replace('x', 'y') if m.role == 'ROLE' else m.content }}", False),
    ],
)
@pytest.mark.parametrize("role", ["system", "developer", "user", "tool"])
def test_every_message_that_is_not_an_answer_is_shown_whole(role: str, content: str, *, shows: bool) -> None:
    tokenizer = byte_level(CHATML.replace("{{ m.content }}", content.replace("ROLE", role)))
    chat = row(QUESTION, {**ANSWER, "content": 'x says "Rome"\nx'}, {"role": role, "content": ' x "Rome"\nx '}, ANSWER)
    if shows:
        assert spans(tokenizer, chat)[-1] == "Rome, 5.<|im_end|>"
        return
    number = "[02]" if role == "user" else 2  # a user speaks twice here
    with pytest.raises(BadRowError, match=rf"does not show all that message {number} \(role {role}\) says"):
        tokenize(tokenizer, chat)


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}BLOCK{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"
)
HEADER = "<|im_start|>assistant\n"


@pytest.mark.parametrize("opened", ["", "<think>\n"])
@pytest.mark.parametrize(
    "block",
    [
        HEADER + "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}",
        "{% generation %}" + HEADER + "{{ m.content }}<|im_end|>{% endgeneration %}\n",
        "{% generation %}{{ '\n' }}" + HEADER + "{{ m.content + '<|im_end|>\n\n' }}{% endgeneration %}",
        HEADER + "{% generation %}{{ m.content }}<|im_end|>\n<|im_start|>{% endgeneration %}system\n<|im_end|>",
        HEADER + "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>\n{% endgeneration %}",
    ],
)
def test_generation_blocks_hold_the_turn_from_its_header_to_its_end(block: str, opened: str) -> None:
    tokenizer = byte_level(MARKED.replace("BLOCK", block).replace("OPEN", opened))
    assert spans(tokenizer, row(QUESTION, ANSWER, QUESTION, ANSWER)) == ["Rome, 5.<|im_end|>"] * 2


def test_a_generation_block_with_a_header_that_asks_for_nothing_is_refused() -> None:
    block = "{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>{% endgeneration %}\n"
    odd = MARKED.replace("BLOCK", block).replace("prompt %}<|im_start|>assistant\nOPEN", "prompt %}<|im_start|>\nmodel")
    with pytest.raises(BadRowError, match="header that asks for no turn"):
        tokenize(byte_level(odd), row(QUESTION, ANSWER))


ANSWERS_WITH_AN_END = [
    {"role": "assistant", "content": "a<|im_end|>b"},
    {"role": "assistant", "content": "a<|im_end|>"},
    {"role": "assistant", "content": "a<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc"},
    {"role": "assistant", "content": "c", "reasoning_content": "a<|im_end|>b"},
    calling(("f", {"q": "<|im_end|>"})),
    calling(("f", {"q": "<|im_end|>", "n": 5})),
    calling(("f", {"<|im_end|>": 5})),
    calling(("<|im_end|>", {})),
]


@pytest.mark.parametrize("answer", ANSWERS_WITH_AN_END)
def test_an_end_of_turn_token_within_a_supervised_turn_is_refused(answer: dict[str, Any]) -> None:
    plain = QWEN3.replace("PROMPT", "")
    marked = plain.replace("{{ '<|im_start|>assistant\n' }}", HEADER + "{% generation %}", 1).replace(
        "{{ '<|im_end|>\n' }}", "<|im_end|>{% endgeneration %}{{ '\n' }}"
    )
    assert "endgeneration" in marked
    for template in (plain, marked):
        with pytest.raises(BadRowError, match=r"end-of-turn token, <\|im_end\|> \(message 1\)"):
            tokenize(byte_level(template), row(QUESTION, answer, QUESTION, ANSWER))
        later = row(QUESTION, {**answer, "weight": 0}, QUESTION, ANSWER)
        assert spans(byte_level(template), later)[-1].endswith("Rome, 5.<|im_end|>")


def test_an_end_of_turn_token_that_is_a_common_word_ends_the_turn() -> None:
    tokenizer = byte_level(CHATML)
    (dot,) = tokenizer.encode(".", add_special_tokens=False)
    with pytest.raises(BadRowError, match=r"end-of-turn token in the midst of an assistant turn \(message 1\)"):
        tokenize(
            tokenizer,
            row(QUESTION, {"role": "assistant", "content": "a. b"}),
            eos=(tokenizer.convert_ids_to_tokens(dot),),
        )


@pytest.mark.parametrize("answer", ["    return x", "\n\nx", " x", "\n  x"])
def test_no_supervised_token_holds_white_space_of_the_header(answer: str) -> None:
    tokenizer = byte_level(CHATML)
    chat = row(QUESTION, {"role": "assistant", "content": answer}, QUESTION, ANSWER)
    assert spans(tokenizer, chat) == [f"{answer}<|im_end|>", "Rome, 5.<|im_end|>"]
    tokens = tokenize(tokenizer, chat)
    asked = tokenizer.apply_chat_template(chat.messages[:1], add_generation_prompt=True, return_dict=False)
    assert tokens.input_ids[: len(asked)].tolist() == asked, "the prompt that the target is asked with"
    assert tokens.loss_mask[: len(asked) + 1].tolist() == [0] * len(asked) + [1]


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
def test_arguments_have_one_name_here(key: str) -> None:
    chat = row(QUESTION, calling(("f", '{"x": "yes"}'), key=key), result("x"), ANSWER)
    assert spans(showing(WHOLE), chat)[0] == '<call>{"name": "f", "arguments": {"x": "yes"}}</call><|im_end|>'
    beside = {"function": {"name": "f"}, key: {"x": "yes"}}
    assert row(QUESTION, {**ANSWER, "tool_calls": [beside]}).messages[1]["tool_calls"] == [
        {"function": {"name": "f", "arguments": {"x": "yes"}}}
    ]
    two = {"function": {"name": "f", "arguments": {"x": "no"}, key: {"x": "yes"}}, "args": {"x": "perhaps"}}
    with pytest.raises(BadRowError, match="two sets of arguments"):
        row(QUESTION, {**ANSWER, "tool_calls": [two]})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), '{"x": 1e999}'])
def test_numbers_that_json_does_not_have_are_refused(number: Any) -> None:
    arguments = number if isinstance(number, str) else {"x": [number]}
    with pytest.raises(BadRowError, match="NaN and Infinity are not JSON"):
        row(QUESTION, calling(("f", arguments)))
