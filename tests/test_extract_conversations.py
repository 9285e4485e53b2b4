"""What a row means: tool calls, tools, system columns, thinking, and what a row says of its own loss."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.extract.conversations import Chat, parse_row
from stages.extract.rows import BadRowError, read_rows

QUESTION = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "because"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def parse(messages: list[Any], **columns: Any) -> Chat:
    chat = parse_row({"messages": messages, **columns})
    assert isinstance(chat, Chat)
    return chat


def calling(arguments: Any, *, wrapped: bool = True) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    call = {"type": "function", "id": "c1", "function": function} if wrapped else function
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def arguments_of(chat: Chat) -> Any:
    (call,) = chat.messages[1]["tool_calls"]
    return call.get("function", call)["arguments"]


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ('{"city": "Paris"}', {"city": "Paris"}),
        ({"city": "Paris"}, {"city": "Paris"}),
        ('{"b": 1, "a": [null, {"x": null}]}', {"b": 1, "a": [None, {"x": None}]}),
        ("", {}),
        ("  ", {}),
        ("{}", {}),
        (None, {}),
    ],
)
def test_arguments_are_objects_as_servers_give_them_to_templates(given: Any, meant: Any, wrapped: bool) -> None:
    chat = parse([QUESTION, calling(given, wrapped=wrapped), ANSWER])
    assert json.dumps(arguments_of(chat)) == json.dumps(meant)  # the order of keys too


@pytest.mark.parametrize("given", ["[1]", "3", "null", '"{}"', "city=Paris", '{"a": NaN}', "{" * 9, ["a"], 3])
def test_arguments_that_are_no_object_refuse_the_row(given: Any) -> None:
    with pytest.raises(BadRowError, match="arguments of 'f': expected"):
        parse([QUESTION, calling(given), ANSWER])


def test_conversations_and_whole_lists_as_json_text_are_decoded_too() -> None:
    call = {"name": "f", "arguments": '{"x": 1}'}
    turns = [
        {"from": "human", "value": "why?"},
        {"from": "gpt", "value": "", "tool_calls": json.dumps([call])},
        {"from": "gpt", "value": "because"},
    ]
    chat = parse_row({"conversations": turns})
    assert isinstance(chat, Chat)
    assert arguments_of(chat) == {"x": 1}
    assert "tool_calls" not in parse([QUESTION, {**ANSWER, "tool_calls": []}]).messages[1]
    with pytest.raises(BadRowError, match="tool_calls: expected a list of objects"):
        parse([QUESTION, {**ANSWER, "tool_calls": {"name": "f"}}])


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as Arrow gives them back: structs filled up with null."""
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert "null" in json.dumps(pq.read_table(file).to_pylist())
    return [row.value or {} for row in read_rows([str(file)])]


def test_nulls_that_arrow_fills_in_are_absent_and_those_of_json_stay(tmp_path: Path) -> None:
    tool = {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
    other = {"function": {"name": "g", "parameters": {"properties": {"b": {"type": "integer", "enum": [1]}}}}}
    deep = {"list": [{"x": 1}, {"y": {"z": 2}}]}
    rows = [
        {"messages": [QUESTION, calling({"city": "Paris"}), ANSWER], "tools": [tool]},
        {"messages": [QUESTION, calling(deep), ANSWER], "tools": [other]},
    ]
    first, second = map(parse_row, write_parquet(tmp_path / "a.parquet", rows))
    assert isinstance(first, Chat)
    assert isinstance(second, Chat)
    assert (arguments_of(first), first.tools) == ({"city": "Paris"}, [tool])
    assert (arguments_of(second), second.tools) == (deep, [other])

    text = [{"messages": [QUESTION, calling('{"x": null}'), ANSWER], "system": None}, {"messages": [], "system": "a"}]
    chat = parse_row(write_parquet(tmp_path / "b.parquet", text)[0])
    assert isinstance(chat, Chat)
    assert arguments_of(chat) == {"x": None}
    assert arguments_of(parse([QUESTION, calling({"x": None}), ANSWER])) == {"x": None}


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]])
def test_tools_are_a_list_of_objects_however_they_are_written(tools: Any) -> None:
    assert parse([QUESTION, ANSWER], tools=tools).tools == [WEATHER]


def test_parameters_of_a_tool_may_be_json_text() -> None:
    function = {"name": "weather", "parameters": '{"type": "object", "properties": {}}'}
    assert parse([QUESTION, ANSWER], tools=[{"type": "function", "function": function}]).tools == [WEATHER]


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_no_tools(tools: Any) -> None:
    assert parse([QUESTION, ANSWER], tools=tools).tools is None


@pytest.mark.parametrize("tools", ["weather(city)", json.dumps(WEATHER), WEATHER, [3], ["weather"], 3])
def test_tools_that_are_no_list_of_objects_refuse_the_row(tools: Any) -> None:
    with pytest.raises(BadRowError, match="tools: expected"):
        parse([QUESTION, ANSWER], tools=tools)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_leads_the_chat(column: str) -> None:
    system = {"role": "system", "content": "Speak French."}
    assert parse([QUESTION, ANSWER], **{column: "Speak French."}).messages == [system, QUESTION, ANSWER]
    assert parse([system, QUESTION, ANSWER], **{column: " Speak French.\n"}).messages == [system, QUESTION, ANSWER]
    assert parse([QUESTION, ANSWER], **{column: " "}).messages == [QUESTION, ANSWER]
    with pytest.raises(BadRowError, match="the column and the messages differ"):
        parse([{**system, "content": "Speak Dutch."}, QUESTION, ANSWER], **{column: "Speak French."})
    with pytest.raises(BadRowError, match="system: expected a string"):
        parse([QUESTION, ANSWER], **{column: ["Speak French."]})


def test_columns_that_change_the_prompt_are_refused_and_others_are_left_alone() -> None:
    for column, value in {
        "functions": [{"name": "f"}],
        "documents": ["a"],
        "chat_template_kwargs": {"enable_thinking": False},
        "images": ["a.png"],
    }.items():
        with pytest.raises(BadRowError, match=f"column {column}"):
            parse([QUESTION, ANSWER], **{column: value})
        assert parse([QUESTION, ANSWER], **{column: None}).messages == [QUESTION, ANSWER]
        assert parse([QUESTION, ANSWER], **{column: type(value)()}).messages == [QUESTION, ANSWER]
    assert parse([QUESTION, ANSWER], id=7, source="x", instruction="why?").messages == [QUESTION, ANSWER]


@pytest.mark.parametrize("content", ["", None, "Let me look."])
def test_a_legacy_function_call_is_named(content: Any) -> None:
    call = {"role": "assistant", "content": content, "function_call": {"name": "f", "arguments": "{}"}}
    with pytest.raises(BadRowError, match="function_call"):
        parse([QUESTION, call, {"role": "function", "name": "f", "content": "42"}, ANSWER])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"refusal": "I cannot."}, "refusal"),
        ({"audio": {"id": "a1"}}, "audio"),
        ({"parts": [{"text": "because"}]}, "parts"),
        ({"channel": "analysis"}, "channel"),
        ({"tool_plan": "First I look."}, "tool_plan"),
        ({"reasoning_details": [{"text": "deep"}]}, "reasoning_details"),
        ({"value": "since"}, "two texts, content and value"),
        ({"from": "human"}, "two roles"),
        ({"thinking": "deep", "reasoning": "shallow"}, "two texts of thinking"),
        ({"reasoning_content": ["deep"]}, "not text"),
        ({"weight": 0.5}, "weight of a message: expected 0 or 1"),
        ({"weight": "0"}, "weight of a message: expected 0 or 1"),
        ({"loss": 2.3}, "loss of a message"),
        ({"weight": 1, "train": False}, "to be trained and not to be trained"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail"),
        ({"content": [{"type": "thinking", "thinking": "deep"}]}, "content part that is not text, but 'thinking'"),
    ],
)
def test_what_would_be_lost_refuses_the_row(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        parse([QUESTION, {**ANSWER, **fields}])


def test_fields_without_meaning_for_the_text_are_left_alone() -> None:
    harmless: dict[str, Any] = {"id": 3, "timestamp": 1.5, "refusal": None, "audio": {"id": None}, "function_call": ""}
    harmless |= {"value": "because", "annotations": [], "thinking": " ", "tool_calls": None, "parts": []}
    assert parse([QUESTION, {**ANSWER, **harmless}]) == Chat(messages=[QUESTION, ANSWER])


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
def test_thinking_has_one_name_here(name: str) -> None:
    assert parse([QUESTION, {**ANSWER, name: "deep"}]).messages[1]["reasoning_content"] == "deep"
    both = {**ANSWER, name: "deep", "reasoning_content": "deep", "reasoning_details": [{"text": "deep"}]}
    assert parse([QUESTION, both]).messages[1] == {**ANSWER, "reasoning_content": "deep"}
    with pytest.raises(BadRowError, match="thinking in a message of role user"):
        parse([{**QUESTION, name: "deep"}, ANSWER])


@pytest.mark.parametrize("no", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"masked": True}])
def test_turns_that_a_row_leaves_out_of_the_loss(no: dict[str, Any]) -> None:
    turns = [QUESTION, {**ANSWER, **no}, QUESTION, {**ANSWER, "weight": 1, "train": True, "masked": False}]
    assert parse(turns) == Chat(messages=[QUESTION, ANSWER, QUESTION, ANSWER], unsupervised=frozenset({1}))
    assert parse(turns, system="Be short.").unsupervised == {2}
    sharegpt = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "no", **no}, {"from": "gpt", "value": "y"}]
    chat = parse_row({"conversations": sharegpt})
    assert isinstance(chat, Chat)
    assert chat.unsupervised == {1}
    with pytest.raises(BadRowError, match="every assistant turn is left out of the loss"):
        parse([QUESTION, {**ANSWER, **no}])


def test_the_weight_of_a_question_means_nothing() -> None:
    assert parse([{**QUESTION, "weight": 0, "train": True}, ANSWER]).unsupervised == frozenset()


@pytest.mark.parametrize("no", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"masked": True}])
@pytest.mark.parametrize(
    "content", [{"messages": [QUESTION, ANSWER]}, {"text": "a"}, {"input_ids": [1], "loss_mask": [1]}]
)
def test_a_row_that_leaves_all_of_itself_out_of_the_loss(content: dict[str, Any], no: dict[str, Any]) -> None:
    with pytest.raises(BadRowError, match="leaves all of it out of the loss"):
        parse_row({**content, **no})
    for yes in ({"weight": 0.3}, {"weight": 1}, {"train": True}, {"loss": 0.0}, {"masked": False}, {"weight": None}):
        assert parse_row({**content, **yes}) is not None
