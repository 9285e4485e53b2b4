"""Whether a rendered chat shows what its messages say: a template that leaves something out would teach the rest."""

import json
import re
from typing import Any

from stages.extract.rows import BadRowError

THINKING_END = "</think>"
_THINKING_TAG = re.compile(r"</?think>")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def check_tool_messages(messages: list[dict[str, Any]], text: str) -> None:
    """Raises BadRowError for a chat whose tool calls or tool results the template ignores."""
    lists = [message.get("tool_calls") or [] for message in messages]
    if not all(isinstance(calls, list) for calls in lists):
        raise BadRowError("tool_calls that are no list")
    _check_calls([call for calls in lists for call in calls], text)
    results = [message["content"] for message in messages if message["role"] == "tool"]
    if not all(_has_words(result, text) for result in results):
        raise BadRowError("tool results that the chat template does not render")


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
    _check_calls(message.get("tool_calls") or [], shown)


def _check_calls(calls: list[Any], text: str) -> None:
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    if len(names) < len(calls) or not all(isinstance(name, str) and name in text for name in names):
        raise BadRowError("tool calls that the chat template does not render")


def _has_words(content: str, text: str) -> bool:
    """Whether the chat shows a tool's result; templates may take it apart, so its words are enough."""
    return all(word in text for word in re.findall(r"\w+", content))


def _shows(pieces: list[str], shown: str) -> bool:
    """Whether the pieces stand in `shown` in their order, white space aside, as they are or quoted as JSON."""
    squeezed, done = _squeeze(shown), 0
    for piece in pieces:
        forms = [_squeeze(piece), _squeeze(json.dumps(piece, ensure_ascii=False)[1:-1])]
        ends = [place + len(form) for form in forms if (place := squeezed.find(form, done)) >= 0]
        if not ends:
            return False
        done = min(ends)
    return True


def _squeeze(text: str) -> str:
    return "".join(text.split())
