"""Marks in the messages of a chat: one letter of each is replaced by a character that occurs nowhere else.

A rendering of the marked messages shows where the template has put each of them, wherever that is and however often the
same words stand elsewhere. With the marks taken back it must be the rendering of the messages themselves; a mark that
changes more than its own letter (some templates look at what a message says) is put elsewhere, or left out.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

FIRST_MARK = 0x40000  # no character of Unicode is assigned from here to the private ones
LAST_MARK = 0x10FFFF
LONGEST_TAG = 64  # characters
NUM_GENERATION_MARKS = 2

_HIGH = re.compile(f"[{chr(FIRST_MARK)}-{chr(LAST_MARK)}]")

Message = dict[str, Any]


class NoMarksError(ValueError):
    """A chat whose characters leave no room for marks."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A marked message, the character that the mark replaced ("": none) and its place in the content.

    `offset` is None for a mark in a tool call.
    """

    message: Message
    original: str
    offset: int | None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A rendering without its marks.

    `after` of a message is the place right after its marked character, where it is shown last; `generated` are the
    spans of the `{% generation %}` blocks.
    """

    text: str
    after: dict[int, int]
    generated: list[tuple[int, int]]


class Marks:
    """The marks of one chat; `chosen[j]` is that of message j, None where it has none."""

    def __init__(self, messages: list[Message], *, taken: str) -> None:
        """`taken`: a text of all characters that must not be used. Raises NoMarksError."""
        high = [ord(character) for character in _HIGH.findall(taken)]
        self._base = max(high, default=FIRST_MARK - 1) + 1
        if self._base + NUM_GENERATION_MARKS + len(messages) > LAST_MARK:
            raise NoMarksError("the chat has characters or messages that leave no room to mark the turns")
        self._plain = messages
        self.pattern = re.compile(f"([{chr(self._base)}-{chr(LAST_MARK)}])")
        self.generation_marks = (chr(self._base), chr(self._base + 1))
        self.chosen = [next(self._candidates(index), None) for index in range(len(messages))]

    def settle(self, render: Callable[[list[Message]], str], *, text: str) -> Reading:
        """The reading of the marked chat, whose text is `text`; marks that the template minds are moved or left out.

        Raises what `render` raises. NoMarksError where the template minds the marks of `{% generation %}`.
        """
        reading = self._try(render, text)
        if reading is None:
            self._choose_one_by_one(render, text)
            reading = self._try(render, text)
        if reading is None:
            raise NoMarksError("the template changes what its generation blocks hold")
        return reading

    def _try(self, render: Callable[[list[Message]], str], text: str) -> Reading | None:
        reading = self.read(render(self.messages()))
        return reading if reading is not None and reading.text == text else None

    def _choose_one_by_one(self, render: Callable[[list[Message]], str], text: str) -> None:
        found: list[Mark | None] = [None] * len(self._plain)
        for index in range(len(self._plain)):
            for candidate in self._candidates(index):
                self.chosen = [None] * len(self._plain)
                self.chosen[index] = candidate
                if self._try(render, text) is not None:
                    found[index] = candidate
                    break
        self.chosen = found

    def messages(self) -> list[Message]:
        pairs = zip(self._plain, self.chosen, strict=True)
        return [message if mark is None else mark.message for message, mark in pairs]

    def free_character(self, number: int) -> str:
        """One of the characters that the chat does not have. Raises NoMarksError where there are not so many."""
        if self._base + number > LAST_MARK:
            raise NoMarksError("the chat has characters or texts that leave no room to mark them")
        return chr(self._base + number)

    def character(self, index: int) -> str:
        return chr(self._base + NUM_GENERATION_MARKS + index)

    def read(self, rendered: str) -> Reading | None:
        """None where a generation block has lost one of its ends."""
        pieces, after, generated, opened = [], {}, [], []
        done, length = 0, 0
        for found in self.pattern.finditer(rendered):
            pieces.append(rendered[done : found.start()])
            length += found.start() - done
            done = found.end()
            index = ord(found.group()) - self._base - NUM_GENERATION_MARKS
            if index >= 0:
                mark = self.chosen[index] if index < len(self.chosen) else None
                pieces.append(mark.original if mark else "")
                length += len(pieces[-1])
                after[index] = length
            elif found.group() == self.generation_marks[0]:
                opened.append(length)
            elif not opened:
                return None
            else:
                generated.append((opened.pop(), length))
        pieces.append(rendered[done:])
        return None if opened else Reading(text="".join(pieces), after=after, generated=generated)

    def _candidates(self, index: int) -> Iterator[Mark]:
        """Ways to mark the message, the best first: near its end, since a template may cut its beginning."""
        message, mark = self._plain[index], self.character(index)
        calls = message.get("tool_calls")
        if calls:
            yield from _marks_of_call(message, calls, mark)
        content = message.get("content")
        if not isinstance(content, str):
            return
        for offset in _offsets(content):
            marked = content[:offset] + mark + content[offset + 1 :]
            yield Mark(message=message | {"content": marked}, original=content[offset], offset=offset)
        if not content.strip() and not calls:
            yield Mark(message=message | {"content": content + mark}, original="", offset=len(content))


def _offsets(content: str) -> Iterator[int]:
    """Letters to replace, outside of tags, on which templates decide: the last, one between, the first.

    Where there is none: the last character that is no white space.
    """
    if (last := _last_letter(content, len(content))) is None:
        yield from [len(content.rstrip()) - 1] * bool(content.strip())
        return
    yield last
    for end in (len(content) // 2, len(content) // 8, min(last, 16)):
        if (place := _last_letter(content, end)) is not None:
            yield place


def _last_letter(content: str, end: int) -> int | None:
    """The place of the last letter before `end` that is not in a tag."""
    place = end - 1
    while place >= 0 and not content[place].isalnum():
        opened = content.rfind("<", max(0, place - LONGEST_TAG), place) if content[place] == ">" else -1
        place = (opened if opened >= 0 else place) - 1
    return place if place >= 0 else None


def _marks_of_call(message: Message, calls: Any, mark: str) -> Iterator[Mark]:
    """The last tool call marked in the last text of its arguments, or in its name."""
    call = calls[-1] if isinstance(calls, list) else None
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return
    for key in ("arguments", "name"):
        if (found := _mark_last_text(function.get(key), mark)) is not None:
            value, original = found
            marked = function | {key: value}
            last = {**call, "function": marked} if isinstance(call, dict) and "function" in call else marked
            yield Mark(message=message | {"tool_calls": [*calls[:-1], last]}, original=original, offset=None)


def _mark_last_text(value: Any, mark: str) -> tuple[Any, str] | None:
    """The value with the last letter of its last text replaced, and that letter; None where there is no text."""
    if isinstance(value, str):
        offset = _last_letter(value, len(value))
        return None if offset is None else (value[:offset] + mark + value[offset + 1 :], value[offset])
    if isinstance(value, dict | list):
        items: list[Any] = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, item in reversed(items):
            if (found := _mark_last_text(item, mark)) is not None:
                marked = value | {key: found[0]} if isinstance(value, dict) else [*value]
                if isinstance(marked, list):
                    marked[key] = found[0]
                return marked, found[1]
    return None
