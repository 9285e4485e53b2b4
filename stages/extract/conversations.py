"""A row's content to one of three typed forms: a chat, a text, or ready token ids."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.extract.rows import BadRowError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages in OpenAI form; `tools` is what the template may render of the row's tool descriptions.

    `unsupervised`: indexes of the messages that must not be supervised.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    unsupervised: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text, supervised as a whole."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids [T] int32 and loss mask [T] uint8, already made by somebody else."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


def parse_row(value: dict[str, Any]) -> Chat | Text | Tokens:
    """The first of `messages`, `conversations`, `input_ids`, `text` that the row has. Raises BadRowError."""
    if (chat := parse_chat(value)) is not None:
        if not any(message["role"] == "assistant" for message in chat.messages):
            raise BadRowError("no assistant turn")
        return chat
    if "input_ids" in value:
        return _parse_tokens(value)
    if "text" in value:
        if not isinstance(value["text"], str) or not value["text"].strip():
            raise BadRowError("text: expected a non-empty string")
        return Text(text=_parse_text(value["text"]))
    raise BadRowError("no column messages, conversations, text or input_ids")


def parse_chat(value: dict[str, Any]) -> Chat | None:
    """The row's conversation, whether or not anybody has answered yet; None for a row of another form.

    Raises BadRowError.
    """
    for column in ("messages", "conversations"):
        if column in value:
            return Chat(messages=_parse_messages(value[column]), tools=_parse_tools(value.get("tools")))
    return None


def _parse_messages(raw: Any) -> list[dict[str, Any]]:
    if not isinstance(raw, list):
        raise BadRowError(f"messages: expected a list, got {type(raw).__name__}")
    if not raw:
        raise BadRowError("empty conversation")
    return [_parse_message(item) for item in raw]


def _parse_message(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise BadRowError(f"message: expected an object, got {type(raw).__name__}")
    present = {key: item for key, item in raw.items() if item is not None}
    role = present.pop("role", None) or present.pop("from", None)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRowError(f"unknown role {role!r}")
    content = present.pop("content", None)
    if content is None:
        content = present.pop("value", None)
    if content is None and not present.get("tool_calls"):
        raise BadRowError("message without content")
    text = "" if content is None else _parse_content(content)
    extras = {
        key: present[key] for key in ("tool_calls", "tool_call_id", "name", "reasoning_content") if key in present
    }
    return {"role": ROLES[role.lower()], "content": text, **extras}


def _parse_content(content: Any) -> str:
    if isinstance(content, str):
        return _parse_text(content)
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise BadRowError("content part that is not text")
            parts.append(_parse_text(part["text"]))
        return "".join(parts)
    raise BadRowError(f"content: expected a string, got {type(content).__name__}")


def _parse_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("text with a lone surrogate, which no encoding has") from error
    return text


def _parse_tools(raw: Any) -> list[Any] | None:
    return raw if isinstance(raw, list) and raw else None


def _parse_tokens(value: dict[str, Any]) -> Tokens:
    if "loss_mask" not in value:
        raise BadRowError("input_ids without loss_mask")
    columns = {}
    for name, highest, dtype in (("input_ids", 2**31 - 1, np.int32), ("loss_mask", 1, np.uint8)):
        try:
            wide = np.asarray(value[name])
        except ValueError as error:
            raise BadRowError(f"{name}: expected a flat list of integers") from error
        if wide.ndim != 1 or wide.size == 0 or wide.dtype.kind not in "iub":
            raise BadRowError(f"{name}: expected a non-empty flat list of integers")
        if wide.min() < 0 or wide.max() > highest:
            raise BadRowError(f"{name}: expected values from 0 to {highest}, got {wide.min()} to {wide.max()}")
        columns[name] = wide.astype(dtype)
    if len(columns["input_ids"]) != len(columns["loss_mask"]):
        raise BadRowError("input_ids and loss_mask differ in length")
    return Tokens(**columns)
