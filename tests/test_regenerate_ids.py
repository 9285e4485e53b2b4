"""What is cached is what was sampled, token for token, behind what the target was shown; nothing else is supervised."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from openai.types.chat import ChatCompletion
from transformers import AutoTokenizer

from pipeline import regeneration
from pipeline.cli import main
from pipeline.config import Config
from pipeline.embedded import TARGET_DIR
from pipeline.stage_one import settings_of
from stages.extract.rows import DataError
from stages.extract.run import describe_inputs, extract, iterate_samples
from stages.extract.samples import SampleCounts
from stages.regenerate.completion import parse_completion
from stages.regenerate.render import PromptRenderer
from stages.regenerate.sampled_rows import AnsweredTurn, plan_rows, render_row
from stages.regenerate.settings import RegenerateSection
from stages.regeneration_record import RegenerationError
from storage import CacheReader
from tiny_target import make_config, write_jsonl
from token_server import Sampled, token_server

END = 2
Turn = tuple[tuple[int, ...], tuple[int, ...]]  # what the target was shown, and what it said


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def ask_for(folder: Path, **section: Any) -> Config:
    """Eight conversations of two turns each, for the embedded target."""
    modules = ["operator", "sndhdr", "codeop", "json", "heapq", "shlex", "bisect", "abc"]
    rows = []
    for name in modules:
        messages = [
            message
            for question in (f"List the functions of {name}.", f"How do I call {name}.f?")
            for message in ({"role": "user", "content": question}, {"role": "assistant", "content": "recorded"})
        ]
        rows.append({"messages": messages})
    config = make_config(folder)
    write_jsonl(folder / "chats.jsonl", rows)
    target = config.target.model_copy(update={"model": str(TARGET_DIR), "dtype": "float32"})
    fields = {"path": folder / "out", "max_tokens": 40, "truncated": "keep", "max_retries": 0, "seed": 1, **section}
    return config.model_copy(update={"target": target, "regenerate": RegenerateSection(**fields)})


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def supervised_turns(input_ids: Any, loss_mask: Any) -> list[Turn]:
    """Each run of supervised tokens, behind all tokens before it."""
    ids, mask = [int(token) for token in input_ids], [int(bit) for bit in loss_mask]
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [(tuple(ids[:start]), tuple(ids[start:end])) for start, end in edges.reshape(-1, 2).tolist()]


def noted_turns(sampled: Sampled) -> Counter[Turn]:
    return Counter((tuple(prompt), tuple(new)) for prompt, new, _ in sampled.turns)


def extract_rows(config: Config, folder: Path) -> CacheReader:
    data = config.data.model_copy(update={"files": (f"{folder}/out/*.jsonl",), "min_supervised_tokens": 2})
    return CacheReader(extract(settings_of(config.model_copy(update={"data": data}))).plan.path)


def test_an_endpoints_ids_are_cached_and_supervised_as_they_were_sampled(tmp_path: Path) -> None:
    config = ask_for(tmp_path)
    with token_server() as (url, sampled):
        counts = regeneration.regenerate(config, endpoint=url, is_local=False).manifest.counts
    rows = read_rows(tmp_path / "out")
    assert 8 < len(rows) < 16, "some conversations are one row, some are two"
    assert Counter(turn for row in rows for turn in supervised_turns(row["input_ids"], row["loss_mask"])) == (
        noted_turns(sampled)
    )
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    texts = [tokenizer.decode([token for token in new if token != END]) for _, new, _ in sampled.turns]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    own = [len(new) - new.count(END) for _, new, _ in sampled.turns]
    assert lengths != own, "some answers are tokenised to another length than they were sampled as"
    cut = [finish for _, _, finish in sampled.turns].count("length")
    assert 0 < cut < len(sampled.turns) == 16
    assert counts is not None
    assert (counts.num_text, counts.num_unfinished, counts.num_turns, counts.num_prompt_mismatches) == (0, cut, 16, 0)
    with extract_rows(config, tmp_path) as reader:
        cached = [reader.read_tokens(index) for index in range(len(reader))]
        said = reader.manifest.header.provenance["answers"]
    assert Counter(turn for ids, mask in cached for turn in supervised_turns(ids, mask)) == noted_turns(sampled)
    assert said == f"16, {cut} of them cut at their token limit; 0 of 8 conversations are text"
    shown = CliRunner().invoke(main, ["inspect", str(config.cache.path)], env={"COLUMNS": "200"})
    assert said in " ".join(shown.output.replace("│", " ").split())


def test_one_row_as_long_as_prompts_go_on_from_it() -> None:
    turns = [
        AnsweredTurn(num_messages=2, prompt_ids=[1, 5], ids=[6, 2]),
        AnsweredTurn(num_messages=4, prompt_ids=[1, 5, 6, 2, 7], ids=[8]),  # goes on, and is cut
        AnsweredTurn(num_messages=6, prompt_ids=[1, 5, 6, 2, 7, 9, 2, 4], ids=[3, 2]),  # its text has other tokens
    ]
    joined, alone = (render_row(row, [{"role": "r"}] * 6) for row in plan_rows(turns))
    assert (joined["input_ids"], joined["loss_mask"]) == ([1, 5, 6, 2, 7, 8], [0, 0, 1, 1, 0, 1])
    assert (alone["input_ids"], alone["loss_mask"]) == ([1, 5, 6, 2, 7, 9, 2, 4, 3, 2], [0] * 8 + [1, 1])
    assert (len(joined["messages"]), len(alone["messages"])) == (4, 6)


def test_texts_with_thinking_have_rows_that_end_with_them() -> None:
    """Qwen3's template shows thinking in the last answer alone."""
    turns = [AnsweredTurn(num_messages=n, has_thinking=n == 2, prompt_ids=None, ids=None) for n in (2, 4)]
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    first, second = (render_row(row, messages)["messages"] for row in plan_rows(turns))
    assert first == messages[:2]
    assert second == [messages[0], {**messages[1], "weight": 0}, *messages[2:]]
    plain = [AnsweredTurn(num_messages=n, prompt_ids=None, ids=None) for n in (2, 4)]
    assert [render_row(row, messages) for row in plan_rows(plain)] == [{"messages": messages}]


def test_without_ids_an_answer_is_text_and_a_cut_one_gets_no_end(tmp_path: Path) -> None:
    """The server does not know `return_token_ids`, and says so or keeps quiet about it."""
    for name, refuses in (("strict", ("return_token_ids",)), ("quiet", ())):
        config = ask_for(tmp_path / name, extra_body={} if refuses else {"return_token_ids": False})
        with token_server(refuses=refuses) as (url, sampled):
            counts = regeneration.regenerate(config, endpoint=url, is_local=False).manifest.counts
        assert counts is not None
        assert (counts.num_text, counts.num_answered, counts.num_turns) == (8, 8, 16)
        rows = read_rows(tmp_path / name / "out")
        finishes = {tuple(prompt): finish for prompt, _, finish in sampled.turns}
        masked = [row for row in rows if "input_ids" in row]
        of_ids = [turn for row in masked for turn in supervised_turns(row["input_ids"], row["loss_mask"])]
        assert sorted(prompt for prompt, _ in of_ids) == sorted(
            p for p, finish in finishes.items() if finish == "length"
        )
        assert all(END not in new for _, new in of_ids)
        said = [message for row in rows if "input_ids" not in row for message in row["messages"][1::2]]
        assert sum("weight" not in message for message in said) == list(finishes.values()).count("stop")
        assert {message["weight"] for message in said if "weight" in message} == {0}


@pytest.mark.parametrize("fault", [{"shift": 1}, {"loses_end": True}], ids=["another tokenizer", "no end"])
def test_ids_that_cannot_be_the_answer_are_not_taken(tmp_path: Path, fault: dict[str, Any]) -> None:
    config = ask_for(tmp_path, truncated="drop", max_tokens=60)
    with token_server(**fault) as (url, sampled):
        counts = regeneration.regenerate(config, endpoint=url, is_local=False).manifest.counts
    assert counts is not None
    assert counts.num_text == counts.num_answered > 0
    assert not any("input_ids" in row for row in read_rows(tmp_path / "out"))
    assert any(new[-1] == END for _, new, _ in sampled.turns)


@pytest.mark.parametrize(
    ("said", "content", "reasoning", "is_exact"),
    [
        ("Hello there<|im_end|>", "Hello there", None, True),
        (" Hello there\n<|im_end|>", "Hello there", None, True),
        ("<think>\n\n</think>\n\nHello<|im_end|>", "Hello", None, True),
        ("<think>\nSo.\n</think>\n\nHello<|im_end|>", "Hello", "So.", True),
        ("So.</think>Hello<|im_end|>", "Hello", "So.", True),
        ("<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Hello<|im_end|>",
         "Hello", "So.", True),
        ("Something else. Hello and more<|im_end|>", "Hello", None, False),
        ("The prompt Hello<|im_end|>", "Hello", None, False),
        ("HelloHello<|im_end|>", "Hello", None, False),
        ("Hello<|im_end|> there<|im_end|>", "Hello there", None, False),
        ("Hello<|im_end|><|im_end|>", "Hello", None, False),
        ("Hello", "Hello", None, False),
        ("Hello</think>So.<|im_end|>", "Hello", "So.", False),
        ("a<|im_end|>", "a", "a", False),
        ("So. But no.</think>Hello<|im_end|>", "Hello", "So.", False),
        ("analysis Hello<|im_end|>", "Hello", None, False),
    ],
)  # fmt: skip
def test_ids_are_taken_that_say_the_answer_and_nothing_else(
    said: str, content: str, reasoning: str | None, *, is_exact: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert ids.count(END) == said.count("<|im_end|>")
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": ids}
    completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    answer = parse_completion(
        ChatCompletion.model_validate(completion | {"prompt_token_ids": [5]}),
        renderer=PromptRenderer(tokenizer, variables={}),
        end_ids=frozenset({END}),
    )
    assert answer.is_exact == is_exact
    assert answer.ids == (ids if is_exact else None)


QUIET = "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def test_an_answer_to_a_prompt_with_variables_is_cached_behind_that_prompt(tmp_path: Path) -> None:
    template = (TARGET_DIR / "chat_template.jinja").read_text() + QUIET
    (tmp_path / "quiet.jinja").write_text(template)
    off = {"enable_thinking": False}
    config = ask_for(tmp_path, extra_body={"return_token_ids": False}, chat_template_kwargs=off)
    data = config.data.model_copy(update={"chat_template": tmp_path / "quiet.jinja"})
    with token_server(template=template) as (url, sampled):
        regeneration.regenerate(config.model_copy(update={"data": data}), endpoint=url, is_local=False)
    rows = read_rows(tmp_path / "out")
    turns = [turn for row in rows for turn in supervised_turns(row["input_ids"], row["loss_mask"])]
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    told = {tuple(prompt): (tokenizer.decode(new), finish) for prompt, new, finish in sampled.turns}
    assert len(turns) == len(told) == 16
    for prompt, new in turns:
        text, finish = told[prompt]
        assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
        assert tokenizer.decode(new) == (
            text.strip() if finish == "length" else text[: -len("<|im_end|>")].strip() + "<|im_end|>"
        )


def test_a_server_that_takes_max_completion_tokens_alone_is_served(tmp_path: Path) -> None:
    config = ask_for(tmp_path, concurrency=1)
    with token_server(refuses=("max_tokens",)) as (url, sampled):
        counts = regeneration.regenerate(config, endpoint=url, is_local=False).manifest.counts
    assert counts is not None
    assert (counts.num_turns, counts.failed) == (16, {})
    limits = [(body.get("max_tokens"), body.get("max_completion_tokens")) for body in sampled.bodies]
    assert limits == [(40, None), *[(None, 40)] * 16], "it is told once"


def test_ids_of_another_tokenizer_are_not_extracted(tmp_path: Path) -> None:
    config = ask_for(tmp_path)
    regeneration.regenerate(config, endpoint=None, is_local=True)
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    tokenizer.add_tokens(["<another>"])
    other = tmp_path / "other"
    for file in TARGET_DIR.iterdir():
        if file.is_file():
            (tmp_path / "other").mkdir(exist_ok=True)
            (other / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(other)
    target = config.target.model_copy(update={"model": str(other)})
    with pytest.raises(RegenerationError, match=r"token ids of another tokenizer.*regenerate with this target"):
        extract_rows(config.model_copy(update={"target": target}), tmp_path)


def sides_by_row(reader: CacheReader, rows: list[dict[str, Any]]) -> dict[int, set[str]]:
    """Conversation -> the splits that its rows are in."""
    sides: dict[int, set[str]] = {}
    for index, split in zip(reader.sample_ids.tolist(), reader.splits.tolist(), strict=True):
        sides.setdefault(rows[index]["row"], set()).add(split)
    return sides


def test_all_rows_of_a_conversation_are_on_the_side_of_its_prompt(tmp_path: Path) -> None:
    config = ask_for(tmp_path)
    half = config.data.model_copy(update={"validation_fraction": 0.5, "min_supervised_tokens": 2})
    config = config.model_copy(update={"data": half})
    settings = settings_of(config)
    source = {
        s.source_row: {s.split} for s in iterate_samples(describe_inputs(settings), settings, counts=SampleCounts())
    }
    with token_server() as (url, _):
        regeneration.regenerate(config, endpoint=url, is_local=False)
    rows = read_rows(tmp_path / "out")
    assert len(rows) > 8, "some conversations are two rows"
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        assert row["dspark_prompt"] == hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).hexdigest()
        assert "split" not in row
    with extract_rows(config, tmp_path) as reader:
        assert sides_by_row(reader, rows) == source
    assert {min(side) for side in source.values()} == {"train", "validation"}


def test_answers_keep_the_splits_of_their_rows(tmp_path: Path) -> None:
    config = ask_for(tmp_path)
    chats = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    held = write_jsonl(tmp_path / "held.jsonl", chats[:2])
    write_jsonl(tmp_path / "chats.jsonl", [chats[1], *chats[2:6], chats[6] | {"split": "dev"}])
    both = config.data.model_copy(update={"validation_files": (str(held),), "validation_fraction": 0.0})
    with token_server() as (url, _):
        regeneration.regenerate(config.model_copy(update={"data": both}), endpoint=url, is_local=False)
    rows = read_rows(tmp_path / "out")
    expected = {row: {"validation" if row in (0, 1, 7) else "train"} for row in (0, 1, 3, 4, 5, 6, 7)}
    half = config.data.model_copy(update={"validation_fraction": 0.5})
    with extract_rows(config.model_copy(update={"data": half}), tmp_path) as reader:
        assert sides_by_row(reader, rows) == expected


@pytest.mark.parametrize("value", ["x" * 16, "ab", 7, "A" * 16])
def test_a_prompt_hash_that_is_none_is_a_bad_row(tmp_path: Path, value: Any) -> None:
    config = ask_for(tmp_path)
    chats = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "chats.jsonl", [chat | {"dspark_prompt": value} for chat in chats])
    data = config.data.model_copy(update={"min_supervised_tokens": 2})
    settings = settings_of(config.model_copy(update={"data": data}))
    with pytest.raises(DataError, match="dspark_prompt: expected 16 hexadecimal digits"):
        list(iterate_samples(describe_inputs(settings), settings, counts=SampleCounts()))
