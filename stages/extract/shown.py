"""Whether a rendered chat shows what its messages say: a template that leaves something out would teach the rest."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stages.extract.rows import BadRowError
from stages.extract.tool_calls import function_of, name_of
from stages.extract.turns import RenderedChat

THINKING_END = "</think>"
_THINKING_TAG = re.compile(r"</?think>")
LONGEST_GAP = 64  # characters of white space that a template may put into a text
_NUMBER_MARK = "Zq{}number7qZ"  # stands in for a number; no text has it
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, kw_only=True)
class Said:
    """A text in message `index` that the chat must show; `path` leads to it in the message."""

    index: int
    path: tuple[Any, ...]
    text: str


def check_all_shown(chat: RenderedChat, spans: dict[int, tuple[int, int]]) -> None:
    """Raises BadRowError where the template leaves out a message, a tool call, or a text in one of them.

    Other answers without calls are left to `check_answer`. `spans` [characters] of the supervised turns: what these say
    must stand there. A mark at the end of each text tells where it is shown, whatever else has the same words.
    """
    said = [part for index in range(len(chat.messages)) for part in _read_said(chat.messages, index, index in spans)]
    for part, places in zip(said, _locate(chat, said), strict=True):
        low, high = spans.get(part.index, (0, len(chat.text)))
        if places is None:
            is_shown = _shows([part.text], chat.text[low:high])
        else:
            is_shown = any(low <= place <= high and _ends(chat.text, place, part.text) for place in places)
        if not is_shown:
            raise BadRowError(_describe(chat.messages, part))
    _check_numbers(chat)


def _read_said(messages: list[dict[str, Any]], index: int, is_supervised: bool) -> Iterator[Said]:
    message = messages[index]
    calls = message.get("tool_calls") or []
    content = message["content"]
    if message["role"] == "assistant":
        content = content.split(THINKING_END)[-1] if calls and is_supervised else ""
    if content.strip():
        yield Said(index=index, path=("content",), text=content)
    if not isinstance(calls, list):
        raise BadRowError("tool_calls that are no list")
    for number, call in enumerate(calls):
        if not isinstance(call, dict) or not isinstance(name_of(call), str) or not name_of(call).strip():
            raise BadRowError(f"a tool call without a name (message {index})")
        way = ("tool_calls", number, *(["function"] if function_of(call) is not call else []))
        yield Said(index=index, path=(*way, "name"), text=name_of(call))
        for path, value in _leaves(function_of(call).get("arguments"), (*way, "arguments")):
            if isinstance(value, str) and value.strip():
                yield Said(index=index, path=path, text=value)


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def _locate(chat: RenderedChat, said: list[Said]) -> list[list[int] | None]:
    """Where each text ends in the chat, however often it is shown; None where the template minds a mark in it."""
    found = _locate_marked(chat, said)
    if found is not None:
        return list(found)
    alone = (_locate_marked(chat, [part]) for part in said)
    return [None if places is None else places[0] for places in alone]


def _locate_marked(chat: RenderedChat, said: list[Said]) -> list[list[int]] | None:
    """None where the marked chat is not the chat itself once the marks are taken out."""
    messages = list(chat.messages)
    for number, part in enumerate(said):
        message = messages[part.index]
        whole = _get(message, part.path)
        end = len(whole.rstrip())
        marked = whole[:end] + chat.free_mark(number) + whole[end:]
        messages[part.index] = _put(message, part.path, marked)
    try:
        pieces = chat.free_marks.split(chat.render(messages))
    except ValueError:  # a template may look at what a text says
        return None
    if "".join(pieces[::2]) != chat.text:
        return None
    numbers = {chat.free_mark(number): number for number in range(len(said))}
    places: list[list[int]] = [[] for _ in said]
    done = 0
    for text, mark in zip(pieces[::2], pieces[1::2], strict=False):
        done += len(text)
        places[numbers[mark]].append(done)
    return places


def _check_numbers(chat: RenderedChat) -> None:
    """Numbers and truth values among arguments must be shown: another value in their place changes the chat."""
    messages = list(chat.messages)
    marks: dict[str, int] = {}
    for index, message in enumerate(chat.messages):
        for path, value in _leaves(message.get("tool_calls") or [], ("tool_calls",)):
            if "arguments" in path and isinstance(value, int | float):
                marks[mark := _NUMBER_MARK.format(len(marks))] = index
                messages[index] = _put(messages[index], path, mark)
    rendered = chat.render(messages) if marks else ""
    for mark, index in marks.items():
        if mark not in rendered:
            raise BadRowError(f"tool calls that the chat template does not render, or not whole (message {index})")


def _get(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _put(value: Any, path: tuple[Any, ...], text: str) -> Any:
    """A copy with another text at the end of the path."""
    if not path:
        return text
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = _put(value[path[0]], path[1:], text)
    return changed


def _describe(messages: list[dict[str, Any]], part: Said) -> str:
    role = messages[part.index]["role"]
    if part.path[0] == "tool_calls":
        return f"tool calls that the chat template does not render, or not whole (message {part.index})"
    if role == "assistant":
        return f"chat template does not show all that an answer says (message {part.index})"
    return f"chat template does not show all that message {part.index} (role {role}) says"


def check_no_end(messages: list[dict[str, Any]], turns: list[int], *, eos_texts: list[str]) -> None:
    """Raises BadRowError for a supervised turn that has the text of an end-of-turn token: the target stops there."""
    for index in turns:
        message = messages[index]
        fields = [message[field] for field in _REASONING_FIELDS if isinstance(message.get(field), str)]
        calls = json.dumps(message.get("tool_calls") or [], ensure_ascii=False)
        found = next(
            (eos for eos in eos_texts if eos and any(eos in text for text in (message["content"], *fields, calls))),
            None,
        )
        if found:
            raise BadRowError(f"an answer holds the text of an end-of-turn token, {found} (message {index})")


def check_answer(messages: list[dict[str, Any]], index: int, shown: str, *, is_past: bool) -> None:
    """Raises BadRowError where `shown`, the text of turn `index`, lacks something that the turn says.

    Thinking may be cut from an answer that a later question follows (`is_past`): that is what the target sees of it.
    """
    message = messages[index]
    *thinking, answer = _THINKING_TAG.split(message["content"])
    fields = [message[field] for field in _REASONING_FIELDS if isinstance(message.get(field), str)]
    if is_past:
        thinking, fields, answer = [], [], message["content"].split(THINKING_END)[-1]
    if not _shows([answer], shown):
        raise BadRowError(f"chat template does not show all that an answer says (message {index})")
    if not _shows([*fields[:1], *thinking, answer], shown):
        is_last = all(later["role"] != "assistant" for later in messages[index + 1 :])
        way_out = "" if is_last else ', or set data.supervise = "last", which leaves this turn out of the loss'
        raise BadRowError(
            f"chat template cuts the thinking from an answer (message {index}); name a template that shows it in "
            f"data.chat_template{way_out}"
        )


def _shows(pieces: list[str], shown: str) -> bool:
    """Whether the pieces stand in `shown` in their order, white space aside, as they are or quoted as JSON."""
    squeezed, done = _squeeze(shown), 0
    for piece in pieces:
        ends = [place + len(form) for form in _forms(piece) if (place := squeezed.find(form, done)) >= 0]
        if not ends:
            return False
        done = min(ends)
    return True


def _ends(text: str, place: int, said: str) -> bool:
    """Whether what was said ends at the place, white space aside, as it is or quoted as JSON."""
    if text.endswith(said.strip(), 0, place):
        return True
    window = text[max(0, place - 4 * len(said) - LONGEST_GAP) : place]
    return _squeeze(window).endswith(_forms(said))


def _forms(said: str) -> tuple[str, str]:
    return _squeeze(said), _squeeze(json.dumps(said, ensure_ascii=False)[1:-1])


def _squeeze(text: str) -> str:
    return "".join(text.split())
