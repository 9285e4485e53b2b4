"""Thinking that a message carries in a field of its own, under the name that the target's chat template reads."""

import re
from collections.abc import Callable, Iterable
from typing import Any

Message = dict[str, Any]
Render = Callable[[list[Message]], str]

FIELD = "reasoning_content"
"""The field of our own messages."""
NAMES = (FIELD, "thinking", "reasoning")
"""What templates, and data sets, call it: Qwen and GLM, gpt-oss, vLLM since 2026."""
_MARK = "Zq{}thinking7qZ"  # stands in for the thinking of one turn; no text has it


def name_thinking(messages: list[Message], render: Render) -> list[Message] | None:
    """The messages with thinking under a name that the template renders; None if it renders some turn's under none.

    Templates cut the thinking of earlier rounds by design, so a turn counts as rendered if the chat that ends with it
    shows its thinking. What `render` raises is raised here.
    """
    turns = [index for index, message in enumerate(messages) if message.get(FIELD)]
    if not turns:
        return messages
    for name in NAMES:
        named = [_rename(message, name) for message in messages]
        shown = find_shown(named, render)
        if all(turn in shown or turn in find_shown(named[: turn + 1], render) for turn in turns):
            return named
    return None


def find_shown(messages: list[Message], render: Render) -> set[int]:
    """Indexes of the messages whose thinking the rendered chat shows."""
    marked, marks = [], {}
    for index, message in enumerate(messages):
        name = next((name for name in NAMES if message.get(name)), None)
        if name is not None:
            marks[index] = _MARK.format(index)
        marked.append(message if name is None else {**message, name: marks[index]})
    text = render(marked)
    return {index for index, mark in marks.items() if mark in text}


def shows_words(messages: Iterable[Message], text: str) -> bool:
    """Whether every word of the messages' thinking stands in `text`; a template may trim or quote it."""
    return all(word in text for message in messages for name in NAMES for word in _words(message.get(name)))


def _words(text: Any) -> list[str]:
    return re.findall(r"\w+", text or "")


def _rename(message: Message, name: str) -> Message:
    return {name if key == FIELD else key: value for key, value in message.items()}
