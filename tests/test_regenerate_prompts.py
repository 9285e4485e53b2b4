"""Which turns are asked for, what an answer changes, and what becomes of a row."""

import hashlib
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chat_families import CHATML, GPT_OSS, LLAMA3, MISTRAL, QWEN3, byte_level
from pipeline.embedded import TARGET_DIR
from pipeline.regeneration import name_files, read_prompts
from stages.extract.settings import DataSection
from stages.regenerate.dialogue import Answer, Dialogue, Outcome
from stages.regenerate.prompts import NoTurnError, Prompt, PromptDigest, plan_prompt, seed_of
from stages.regenerate.render import PromptRenderer, RenderError, plan_tokens, to_request
from stages.regenerate.settings import RegenerateSection
from stages.regeneration_record import RegenerationError
from tiny_target import write_jsonl

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "c": "assistant"}


def make_messages(letters: str) -> list[dict[str, Any]]:
    """One message a letter; `c` is an assistant's turn that calls a tool."""
    messages = []
    for index, letter in enumerate(letters):
        message: dict[str, Any] = {"role": ROLES[letter], "content": f"{letter}{index}"}
        messages.append(message | ({"tool_calls": [{"function": {"name": "f"}}]} if letter == "c" else {}))
    return messages


def spell(messages: Any) -> str:
    """The plan in letters: `_` is a gap."""
    return "".join("_" if message is None else message["content"][0] for message in messages)


@pytest.mark.parametrize(
    ("letters", "every", "last"),
    [
        ("ua", "u_", "u_"),
        ("suaua", "su_u_", "suau_"),
        ("u", "u_", "u_"),  # a prompt that nobody has answered
        ("suau", "su_u_", "suau_"),
        ("uas", "u_", "u_"),  # nothing behind the last answer is of use
        ("aua", "au_", "au_"),  # a greeting that nothing asks for
        ("uaau", "u_u_", "uau_"),  # one answer for turns side by side
        ("uctaua", "uct_u_", "uctau_"),  # calls stay, with their results
        ("uctct", "uctct_", "uctct_"),
        ("uauc", "u_", "u_"),
    ],
)
def test_which_turns_are_gaps(letters: str, every: str, last: str) -> None:
    messages = make_messages(letters)
    assert spell(plan_prompt(0, messages, turns="all").messages) == every
    assert spell(plan_prompt(0, messages, turns="last").messages) == last


@pytest.mark.parametrize("letters", ["s", "a", "sa", "uc"])
def test_a_conversation_without_a_turn_to_say_is_refused(letters: str) -> None:
    with pytest.raises(NoTurnError, match="no turn to answer"):
        plan_prompt(0, make_messages(letters), turns="all")


def test_recorded_answers_are_no_part_of_what_is_asked() -> None:
    def digest(answer: str, question: str = "q", row: int = 0) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        digest = PromptDigest()
        digest.add(plan_prompt(row, messages, turns="all", source=f"file of {answer}"))
        return digest.hexdigest()

    assert digest("a") == digest("b")
    assert len({digest("a"), digest("a", question="other"), digest("a", row=1)}) == 3


def test_seeds_differ_by_row_and_turn_and_fit_what_servers_take() -> None:
    seeds = {seed_of(seed, row=row, turn=turn) for seed in range(5) for row in range(50) for turn in range(4)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_tokens_of_an_answer_end_where_the_cache_cuts() -> None:
    assert plan_tokens(100, max_tokens=None, max_length=512) == 412
    assert plan_tokens(100, max_tokens=50, max_length=512) == 50
    assert plan_tokens(500, max_tokens=50, max_length=512) == 12
    assert plan_tokens(600, max_tokens=None, max_length=512) < 1


def say(text: str, *, is_complete: bool = True, **fields: Any) -> Answer:
    return Answer(content=text, is_complete=is_complete, num_tokens=3, **fields)


def converse(letters: str, *answers: Answer, keep_truncated: bool = False, failure: str = "") -> Outcome:
    dialogue = Dialogue(plan_prompt(7, make_messages(letters), turns="all", source="f"), keep_truncated=keep_truncated)
    for answer in answers:
        assert dialogue.is_open
        dialogue.take(answer, rendered=[5] * 10)
    if failure:
        dialogue.fail(failure)
    assert not dialogue.is_open
    return dialogue.outcome()


def test_each_turn_is_asked_behind_the_new_ones() -> None:
    outcome = converse("suaua", say("one"), say("two", reasoning="hm"))
    assert [message["content"] for message in outcome.messages] == ["s0", "u1", "one", "u3", "two"]
    assert outcome.messages[-1]["reasoning_content"] == "hm"
    assert (outcome.kind, outcome.num_turns, outcome.num_tokens, outcome.reason) == ("answered", 2, 6, None)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (say("cut", is_complete=False), "did not end"),
        (say(" \n"), "empty answer"),
        (say("", reasoning="thought, but said nothing"), "empty answer"),
        (say("", calls_tool=True), "called a tool"),
        (say("half \ud83d of an emoji"), "lone surrogate"),
    ],
)
def test_an_answer_of_no_use_ends_the_conversation_before_it(bad: Answer, reason: str) -> None:
    dropped = converse("ua", bad)
    assert (dropped.kind, dropped.messages, dropped.source) == ("dropped", [], "f")
    assert reason in (dropped.reason or "")
    cut = converse("uauaua", say("one"), bad)
    assert [message["content"] for message in cut.messages] == ["u0", "one"]
    assert (cut.kind, cut.num_turns) == ("answered", 1)
    assert reason in (cut.reason or "")


def test_a_truncated_answer_is_kept_on_demand() -> None:
    outcome = converse("ua", say("cut", is_complete=False), keep_truncated=True)
    assert (outcome.kind, outcome.num_truncated, outcome.messages[1]["content"]) == ("answered", 1, "cut")


def test_a_failure_asks_for_the_whole_row_again() -> None:
    outcome = converse("uaua", say("one"), failure="status 500: oh")
    assert (outcome.kind, outcome.messages, outcome.num_turns) == ("failed", [], 0)


def test_a_prompt_of_another_length_is_counted() -> None:
    counts = [converse("ua", say("x", num_prompt_tokens=count)).num_mismatches for count in (None, 10, 11)]
    assert counts == [0, 0, 1]


def test_a_server_is_sent_arguments_as_json_text_and_no_weights() -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"city": "Orléans", "n": None}}}
    bare = {"name": "g", "arguments": {}}
    message = {"role": "assistant", "content": "", "tool_calls": [call, bare], "weight": 0, "reasoning_content": "deep"}
    sent = to_request(message)
    assert sent["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"city": "Orléans", "n": null}'}
    assert sent["tool_calls"][1] == {"name": "g", "arguments": "{}"}
    assert {key: value for key, value in sent.items() if key != "tool_calls"} == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "deep",
    }
    assert to_request({"role": "user", "content": "a"}) == {"role": "user", "content": "a"}


def test_earlier_thinking_is_rendered_under_the_templates_name_for_it() -> None:
    template = "{% for m in messages %}{% if m.thinking %}[{{ m.thinking }}]{% endif %}{{ m.content }};{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    tokenizer.chat_template = template
    renderer = PromptRenderer(tokenizer, variables={})
    turns = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "two", "reasoning_content": "deep"},
        {"role": "user", "content": "b?"},
    ]
    assert renderer.decode(renderer(turns, tools=None)) == "a?;[deep]two;b?;"
    tokenizer.chat_template = template.replace("thinking", "thoughts")
    assert renderer.decode(renderer(turns, tools=None)) == "a?;two;b?;"


@pytest.mark.parametrize("source", [CHATML, GPT_OSS, LLAMA3, MISTRAL, QWEN3])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]])
def test_prompts_are_those_of_transformers(source: str, tools: Any) -> None:
    tokenizer = byte_level(source, bos="<s>", eos="</s>")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\nb", "name": "n", "weight": None}]
    for names in ({}, {"enable_thinking": False, "reasoning_effort": "low", "bos_token": "B"}):
        theirs = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, **names)
        renderer = PromptRenderer(tokenizer, variables=names)
        assert renderer(messages, tools=tools) == theirs["input_ids"]
        assert pickle.loads(pickle.dumps(renderer))(messages, tools=tools) == theirs["input_ids"]
        assert renderer.shows(messages, "a\nb", tools=tools)


HOSTILE = "{% if messages[0].content == 'bad' %}{{ 'a'.ljust(10 ** 10) }}{% endif %}{{ messages[0].content }}"


def test_a_hostile_template_fails_rows_and_then_the_run() -> None:
    renderer = PromptRenderer(byte_level(HOSTILE), variables={})
    good, bad = [{"role": "user", "content": "good"}], [{"role": "user", "content": "bad"}]
    for chat in (*[bad] * 7, good, *[bad] * 7):
        if chat is good:
            assert renderer.decode(renderer(chat, tools=None)) == "good"
            continue
        with pytest.raises(RenderError, match="chat template: takes too much memory for one row"):
            renderer(chat, tools=None)
    with pytest.raises(RegenerationError, match=r"takes too much memory .* 8 .* in a row; .* data.chat_template"):
        renderer(bad, tools=None)


def test_without_a_template_there_is_no_prompt() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(RenderError, match=r"chat template: .*chat_template"):
        PromptRenderer(tokenizer, variables={})(ask("a")["messages"], tools=None)


def read_all(folder: Path, bad: Counter[str], **data: Any) -> list[Prompt]:
    section = DataSection(files=(str(folder / "a.jsonl"),), **data)
    return list(read_prompts(name_files(section), section=RegenerateSection(), bad=bad))


def test_a_kept_turn_without_weight_stays_without(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}], "weight": 0}
    rows = [
        {"messages": [{"role": "user", "content": "a?"}, call, {"role": "tool", "content": "r"}], "split": "test"},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (prompt,) = read_all(tmp_path, Counter())
    assert prompt.messages[1] is not None
    assert prompt.messages[1]["weight"] == 0
    assert prompt.messages[1]["tool_calls"] == [{"name": "f", "arguments": {}}]
    assert prompt.split == "validation"


def ask(question: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "old"}], **columns}


def test_rows_are_of_the_split_that_the_source_says(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [ask("a"), ask("b", split="dev"), ask("c", split="train"), ask("d", split="x")])
    bad: Counter[str] = Counter()
    assert [(p.row, p.split) for p in read_all(tmp_path, bad)] == [(0, None), (1, "validation"), (2, "train")]
    assert [reason.partition(":")[0] for reason in bad] == ["split"]


def test_held_out_files_come_first_and_their_prompts_are_in_no_other(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "held.jsonl", [ask("b"), ask("c", split="train"), ask("e")])
    write_jsonl(tmp_path / "a.jsonl", [ask("a"), ask("e"), ask("b"), ask("d", split="val")])
    held = {"validation_files": (str(tmp_path / "held.jsonl"),), "validation_fraction": 0.0}
    bad: Counter[str] = Counter()
    found = [(p.row, p.messages[0], p.split) for p in read_all(tmp_path, bad, **held)]
    expected = [(0, "b", "validation"), (2, "e", "validation"), (3, "a", "train"), (6, "d", "validation")]
    assert found == [(row, {"role": "user", "content": text}, split) for row, text, split in expected]
    assert bad == {
        "split: is train in a file of data.validation_files": 1, "its prompt is in data.validation_files": 2
    }  # fmt: skip


def test_the_digest_of_prompts_without_a_split_is_that_of_earlier_versions() -> None:
    digest = PromptDigest()
    prompt = plan_prompt(3, ask("a")["messages"], turns="all")
    digest.add(prompt)
    line = b'[3, [{"content": "a", "role": "user"}, null], null]\n'
    assert digest.hexdigest() == hashlib.sha256(line).hexdigest()
    digest.add(replace(prompt, split="train"))
    line += b'[3, [{"content": "a", "role": "user"}, null], null, "train"]\n'
    assert digest.hexdigest() == hashlib.sha256(line).hexdigest()


def test_the_first_usable_prompts_are_asked_for_and_held_out_files_whole(tmp_path: Path) -> None:
    def rows(prefix: str, count: int) -> list[dict[str, Any]]:
        return [{"messages": [{"role": "user", "content": f"{prefix}{index}"}]} for index in range(count)]

    write_jsonl(tmp_path / "train.jsonl", [{"text": "no chat"}, *rows("t", 6)])
    write_jsonl(tmp_path / "held.jsonl", rows("h", 3))
    data = DataSection(
        files=(str(tmp_path / "train.jsonl"),), validation_files=(str(tmp_path / "held.jsonl"),), max_samples=2
    )
    asked = [prompt.messages[0] for prompt in read_prompts(name_files(data), section=RegenerateSection())]
    assert [message["content"] for message in asked if message] == ["h0", "h1", "h2", "t0", "t1"]
