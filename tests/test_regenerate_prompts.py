"""Which turns are asked for, what an answer changes, and what becomes of a row."""

from typing import Any

import pytest

from stages.regenerate.dialogue import Answer, Dialogue, Outcome
from stages.regenerate.prompts import NoTurnError, PromptDigest, plan_prompt, seed_of
from stages.regenerate.render import plan_tokens

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
