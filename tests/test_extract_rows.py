"""Source files to rows to conversations: every form that is read, and every way in which a row can be bad."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.extract.conversations import Chat, Text, Tokens, parse_row
from stages.extract.rows import MAX_DEPTH, TOO_DEEP, BadRowError, DataError, digest_files, expand_files, read_rows

QUESTION = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "because"}


def test_jsonl_reports_broken_lines_where_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": \n[1]\n{"text": "five"}\n')
    rows = list(read_rows([str(file)]))
    assert [(row.row, row.value, row.error is None) for row in rows] == [
        (0, {"text": "one"}, True),
        (2, None, False),
        (3, None, False),
        (4, {"text": "five"}, True),
    ]
    assert "broken JSON" in (rows[1].error or "")
    assert "expected a JSON object" in (rows[2].error or "")


def test_invalid_utf8_is_a_bad_row_and_not_the_end(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "\xff"}\n{"text": "good"}\n')
    assert [row.value for row in read_rows([str(file)])] == [None, {"text": "good"}]


def test_gzip_and_parquet_give_the_rows_of_jsonl(tmp_path: Path) -> None:
    values = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(value) + "\n" for value in values)
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    for name in ("a.jsonl.gz", "a.parquet"):
        assert [row.value for row in read_rows([str(tmp_path / name)])] == values


def test_a_file_cut_short_is_an_error_with_its_name(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    for name in ("a.jsonl.gz", "a.parquet"):
        with pytest.raises(DataError, match=name):
            list(read_rows([str(tmp_path / name)]))


def compress(text: bytes, file: Path) -> bytes:
    """`text` as the ending of the file's name says."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", text)
        return file.read_bytes()
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[file.suffix].compress(text)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.bz2", "a.jsonl.zip"])
def test_a_flipped_bit_in_compressed_data_is_an_error_with_its_name(tmp_path: Path, name: str) -> None:
    lines = [{"text": f"line {number * number} of {number}"} for number in range(3000)]
    file = tmp_path / name
    packed = compress("".join(json.dumps(line) + "\n" for line in lines).encode(), file)
    raised = 0
    for place in range(0, len(packed), len(packed) // 40):
        for bit in (0, 3, 6):
            file.write_bytes(packed[:place] + bytes([packed[place] ^ 1 << bit]) + packed[place + 1 :])
            try:
                rows = [row.value for row in read_rows([str(file)])]
            except DataError as error:
                assert name in str(error)  # noqa: PT017
                raised += 1
            else:  # a date, a name: no byte of the text
                assert rows == lines
    assert raised > 90


def test_odd_numbers_and_bytes_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [' + "9" * 5000 + ']}\n{"text": "good"}\n')
    rows = list(read_rows([str(tmp_path / "a.jsonl")]))
    assert [row.value for row in rows] == [None, {"text": "good"}]
    broken = pa.array([b"good", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    rows = list(read_rows([str(tmp_path / "a.parquet")]))
    assert rows[0].value == {"text": "good"}
    assert "invalid UTF-8" in (rows[1].error or "")


def nested(depth: int) -> str:
    """JSON of so many lists and objects in each other."""
    pairs = [('{"a": ', "}"), ("[", "]")] * depth
    return "".join(opened for opened, _ in pairs[:depth]) + "1" + "".join(closed for _, closed in pairs[:depth][::-1])


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 300, 2_000, 100_000])
def test_what_is_nested_too_deeply_is_a_bad_row(tmp_path: Path, depth: int) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f"{nested(MAX_DEPTH)}\n{nested(depth)}\n" + json.dumps({"a": [{}] * 300, "b": "[" * 300}))
    rows = list(read_rows([str(file)]))
    assert [row.error for row in rows] == [None, TOO_DEEP, None]
    assert rows[0].value == json.loads(nested(MAX_DEPTH))
    call = {"function": {"name": "f", "arguments": nested(depth)}}
    with pytest.raises(BadRowError, match="arguments of 'f': nested too deeply"):
        parse_row({"messages": [QUESTION, ANSWER | {"tool_calls": [call]}]})


def test_parquet_that_is_nested_too_deeply_is_an_error_with_its_name(tmp_path: Path) -> None:
    kind, value = pa.int64(), 1
    for _ in range(300):
        kind, value = pa.list_(kind), [value]
    pq.write_table(pa.table({"x": pa.array([value], kind)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: .*too deeply nested"):
        list(read_rows([str(tmp_path / "a.parquet")]))


def test_an_address_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(DataError, match=r"nosuchprotocol://bucket/a\.jsonl"):
        expand_files(["nosuchprotocol://bucket/a.jsonl"])


def test_patterns_expand_sorted_and_must_match_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert [Path(file).name for file in expand_files([str(tmp_path / "*.jsonl")])] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="nothing matches"):
        expand_files([str(tmp_path / "*.parquet")])
    with pytest.raises(DataError, match="more than once"):
        expand_files([str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl")])


def test_fsspec_addresses_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    files = expand_files([f"file://{tmp_path}/*.jsonl"])
    assert [row.value for row in read_rows(files)] == [{"text": "x"}]


def test_data_digest_follows_contents_and_not_names(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    a, b, c = (digest_files([str(tmp_path / name)]) for name in "abc")
    assert a == b != c


def test_all_four_forms() -> None:
    chat = parse_row({"messages": [QUESTION, ANSWER]})
    assert chat == Chat(messages=[QUESTION, ANSWER])
    assert (
        parse_row({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]}) == chat
    )
    assert parse_row({"conversations": [QUESTION, ANSWER]}) == chat
    assert parse_row({"text": "plain"}) == Text(text="plain")
    tokens = parse_row({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]})
    assert isinstance(tokens, Tokens)
    assert (tokens.input_ids.tolist(), tokens.loss_mask.tolist()) == ([5, 6, 7], [0, 1, 1])


def test_content_parts_and_tool_turns() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    chat = parse_row({"messages": [{"role": "user", "content": parts}, call, {"from": "tool", "value": "1"}]})
    assert isinstance(chat, Chat)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool"]
    assert chat.messages[0]["content"] == "ab"
    assert chat.messages[1]["tool_calls"] == [{"function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "no column"),
        ({"prompt": "a"}, "no column"),
        ({"messages": []}, "empty conversation"),
        ({"messages": "hello"}, "expected a list"),
        ({"messages": ["hello"]}, "expected an object"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        ({"messages": [QUESTION]}, "no assistant turn"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "without content"),
        ({"messages": [QUESTION, {"role": "assistant", "content": 3}]}, "expected a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "not text"),
        ({"text": ""}, "non-empty"),
        ({"text": 7}, "non-empty"),
        ({"text": "a\ud800"}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, ANSWER]}, "lone surrogate"),
        ({"input_ids": [1, 2]}, "without loss_mask"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "differ in length"),
        ({"input_ids": [1, -2], "loss_mask": [1, 1]}, "from 0"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "from 0 to 1"),
        ({"input_ids": [[1], [2, 3]], "loss_mask": [1, 1]}, "flat list"),
        ({"input_ids": ["a"], "loss_mask": [1]}, "flat list"),
        ({"input_ids": [], "loss_mask": []}, "non-empty"),
    ],
)
def test_bad_rows_say_why(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        parse_row(value)
