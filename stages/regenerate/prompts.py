"""Conversations to prompts: which turns the target is to say, and what stays as it is."""

import hashlib
import json
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

Message = dict[str, Any]


class NoTurnError(ValueError):
    """A conversation in which nothing is to be said; the message is the reason that the report counts."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation with gaps: None stands for a turn that the target is to say. The last message is a gap.

    `row` counts all rows of the source, the unreadable ones too; `source` says where that is, for a person; `split` is
    what the source says of it, if it does.
    """

    row: int
    messages: tuple[Message | None, ...]
    tools: list[Any] | None = None
    source: str = ""
    split: str | None = None

    def digest_question(self) -> bytes:
        """sha256 of what the target is shown first: equal exactly if the same is asked."""
        question = list(takewhile(lambda message: message is not None, self.messages))
        return hashlib.sha256(_render([question, self.tools])).digest()


def plan_prompt(
    row: int,
    messages: list[Message],
    *,
    turns: Literal["all", "last"],
    tools: list[Any] | None = None,
    source: str = "",
    split: str | None = None,
) -> Prompt:
    """Which turns of a conversation the target is to say: every assistant turn, or the last. Raises NoTurnError.

    A conversation that ends with somebody else's message gets an answer to it. Two kinds of assistant turn stay as they
    are: one before any user's message, which nothing asks for, and one that calls tools, since no tool is run here and
    the recorded results belong to the recorded calls.
    """
    pairs = _drop_repeated(list(zip(messages, _find_gaps(messages), strict=True)))
    if pairs and pairs[-1][0]["role"] in ("user", "tool"):
        pairs.append(({}, True))
    gaps = [index for index, (_, is_gap) in enumerate(pairs) if is_gap]
    if not gaps:
        raise NoTurnError("no turn to answer")
    asked = set(gaps if turns == "all" else gaps[-1:])
    kept = (None if index in asked else message for index, (message, _) in enumerate(pairs[: gaps[-1] + 1]))
    return Prompt(row=row, messages=tuple(kept), tools=tools, source=source, split=split)


def _find_gaps(messages: list[Message]) -> list[bool]:
    gaps, is_asked = [], False
    for message in messages:
        is_asked = is_asked or message["role"] in ("user", "tool")
        gaps.append(is_asked and message["role"] == "assistant" and not message.get("tool_calls"))
    return gaps


def _drop_repeated(pairs: list[tuple[Message, bool]]) -> list[tuple[Message, bool]]:
    """Of turns that follow each other the last stands for all: the target says one answer."""
    following = [*pairs[1:], ({}, False)]
    return [pair for pair, (_, is_next_gap) in zip(pairs, following, strict=True) if not (pair[1] and is_next_gap)]


class PromptDigest:
    """sha256 over prompts in their order: equal exactly if the same is asked in the same rows."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.num_prompts = 0

    def add(self, prompt: Prompt) -> None:
        split = [] if prompt.split is None else [prompt.split]
        self._digest.update(_render([prompt.row, prompt.messages, prompt.tools, *split]) + b"\n")
        self.num_prompts += 1

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _render(value: list[Any]) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def seed_of(seed: int, *, row: int, turn: int) -> int:
    """The seed of one answer, 31 bits: a function of these three alone, so of no batch and no order."""
    digest = hashlib.blake2b(f"{seed} {row} {turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
