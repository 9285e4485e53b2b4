"""A row's content to one of three typed forms: a chat, a text, or ready token ids."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.extract.messages import LOSS_FIELDS, is_blank, is_supervised, parse_message, parse_text
from stages.extract.rows import BadRowError
from stages.extract.tool_calls import parse_tools

SYSTEM_COLUMNS = ("system", "system_prompt")
LOST_COLUMNS = (
    *("functions", "documents", "chat_template", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
"""Columns that change what the target was shown, and that are not supported; any other column is left alone."""
NO_ANSWER = "no assistant turn"
"""The reason of rows that are questions alone; `dspark regenerate` answers them."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages in OpenAI form, thinking as `reasoning_content`; `tools` are the row's tool descriptions.

    `unsupervised` are indexes of assistant messages that the row itself leaves out of the loss.
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
    """The first of `input_ids`, `messages`, `conversations`, `text` that the row has. Raises BadRowError."""
    if any(_leaves_out(value.get(key), key) for key in LOSS_FIELDS):
        raise BadRowError("the row itself leaves all of it out of the loss")
    if "input_ids" in value:
        return _parse_tokens(value)
    if (chat := parse_chat(value)) is not None:
        answers = {index for index, message in enumerate(chat.messages) if message["role"] == "assistant"}
        if not answers:
            raise BadRowError(NO_ANSWER)
        if answers == chat.unsupervised:
            raise BadRowError("every assistant turn is left out of the loss by the row itself")
        return chat
    if "text" in value:
        if not isinstance(value["text"], str) or not value["text"].strip():
            raise BadRowError("text: expected a non-empty string")
        return Text(text=parse_text(value["text"]))
    raise BadRowError("no column messages, conversations, text or input_ids")


def _leaves_out(value: Any, key: str) -> bool:
    """Whether a row's own column says that nothing of it is trained; numbers mean that in `weight` alone."""
    if key == "weight" and isinstance(value, int | float):
        return value == 0
    return isinstance(value, bool) and value is not LOSS_FIELDS[key]


def parse_chat(value: dict[str, Any]) -> Chat | None:
    """The row's conversation, whether or not anybody has answered yet; None for a row of another form.

    Raises BadRowError.
    """
    column = next((column for column in ("messages", "conversations") if column in value), None)
    if column is None:
        return None
    lost = [name for name in LOST_COLUMNS if not is_blank(value.get(name))]
    if lost:
        raise BadRowError(f"column {lost[0]}: a part of what the target was shown, and not supported")
    raw = value[column]
    if not isinstance(raw, list):
        raise BadRowError(f"messages: expected a list, got {type(raw).__name__}")
    if not raw:
        raise BadRowError("empty conversation")
    messages = [parse_message(item) for item in raw]
    system = _parse_system(value, messages)
    unsupervised = (
        index + len(system)
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and not is_supervised(raw[index])
    )
    return Chat(
        messages=[*system, *messages], tools=parse_tools(value.get("tools")), unsupervised=frozenset(unsupervised)
    )


def _parse_system(value: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system message that a column of the row holds, where the messages do not have it: one or none."""
    given = [value[name] for name in SYSTEM_COLUMNS if not is_blank(value.get(name))]
    if not all(isinstance(text, str) for text in given):
        raise BadRowError("system: expected a string")
    said = {message["content"].strip() for message in messages if message["role"] in ("system", "developer")}
    if given and len(said | {text.strip() for text in given}) > 1:
        raise BadRowError("system: the column and the messages differ")
    return [{"role": "system", "content": parse_text(given[0])}] if given and not said else []


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
