"""One message of a row to OpenAI form, and whether the row wants its tokens supervised."""

from typing import Any

from stages.extract.rows import BadRowError
from stages.extract.tool_calls import parse_tool_calls
from stages.thinking import FIELD, NAMES

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
LOST_FIELDS = (
    *("function_call", "tool_call", "tool_use", "tool_result", "tool_responses", "tool_plan"),
    *("refusal", "parts", "channel", "recipient", "tools", "functions", "documents", "attachments"),
    *("audio", "audios", "input_audio", "image", "images", "image_url", "video", "videos"),
)
"""Fields that are part of what was said, and that no chat template would be given."""
THINKING_LISTS = ("reasoning_details", "thinking_blocks")
"""Forms of the thinking that stand beside its text; alone, they would be lost."""
LOSS_FIELDS = {"weight": True, "train": True, "loss": True, "masked": False}
"""What a message may say of its own supervision -> what means yes: OpenAI, axolotl, ms-swift, torchtune."""
UNCLEAR_LOSS_FIELDS = ("mask", "loss_mask", "loss_scale", "train_detail")


def parse_message(raw: Any) -> dict[str, Any]:
    """`role`, `content`, and what else a template may render; thinking as `reasoning_content`. Raises BadRowError."""
    if not isinstance(raw, dict):
        raise BadRowError(f"message: expected an object, got {type(raw).__name__}")
    present = {key: item for key, item in raw.items() if item is not None}
    role = parse_role(raw)
    _check_nothing_lost(present)
    calls = parse_tool_calls(present.get("tool_calls"))
    thinking = _parse_thinking(present)
    if thinking and role != "assistant":
        raise BadRowError(f"thinking in a message of role {role}")
    extras = {key: present[key] for key in ("tool_call_id", "name") if key in present}
    extras |= {key: value for key, value in (("tool_calls", calls), (FIELD, thinking)) if value}
    return {"role": role, "content": _parse_said(present, has_calls=bool(calls)), **extras}


def parse_role(raw: dict[str, Any]) -> str:
    """OpenAI's name of the role in `role` or `from`. Raises BadRowError."""
    names = [raw[key] for key in ("role", "from") if raw.get(key)]
    known = [ROLES[name.lower()] for name in names if isinstance(name, str) and name.lower() in ROLES]
    if not known or known[0] != ROLES.get(str(names[0]).lower()):
        raise BadRowError(f"unknown role {names[0] if names else None!r}")
    if len(set(known)) > 1:
        raise BadRowError(f"a message with two roles, {names[0]!r} and {names[1]!r}")
    return known[0]


def is_supervised(raw: dict[str, Any]) -> bool:
    """Whether the row leaves an assistant message in the loss; where it says nothing, yes. Raises BadRowError."""
    unclear = [key for key in UNCLEAR_LOSS_FIELDS if raw.get(key) is not None]
    if unclear:
        raise BadRowError(f"{unclear[0]} in a message is not read; say by weight 0 or 1 which turns are trained")
    verdicts = {_parse_flag(raw, key) is yes for key, yes in LOSS_FIELDS.items() if raw.get(key) is not None}
    if len(verdicts) > 1:
        raise BadRowError(f"a message that is to be trained and not to be trained ({', '.join(LOSS_FIELDS)})")
    return verdicts != {False}


def _parse_flag(raw: dict[str, Any], key: str) -> bool:
    value = raw[key]
    if not isinstance(value, int | float) or value not in (0, 1):
        raise BadRowError(f"{key} of a message: expected 0 or 1, false or true")
    return bool(value)


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: null, false, blank text, or only such things in it."""
    if isinstance(value, dict | list | tuple):
        return all(map(is_blank, value.values() if isinstance(value, dict) else value))
    return not value.strip() if isinstance(value, str) else value is None or value is False


def parse_text(text: str) -> str:
    """`text` itself. Raises BadRowError for one that no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("text with a lone surrogate, which no encoding has") from error
    return text


def _check_nothing_lost(present: dict[str, Any]) -> None:
    lost = [key for key in LOST_FIELDS if not is_blank(present.get(key))]
    if not any(present.get(name) for name in NAMES):
        lost += [key for key in THINKING_LISTS if not is_blank(present.get(key))]
    if lost:
        advice = "write the call as tool_calls" if lost[0] == "function_call" else "no chat template is given it"
        raise BadRowError(f"{lost[0]} in a message: {advice}")


def _parse_thinking(present: dict[str, Any]) -> str | None:
    """The thinking under any of its names; None for blank. Raises BadRowError where two of them differ."""
    given = [present[name] for name in NAMES if not is_blank(present.get(name))]
    if not all(isinstance(text, str) for text in given):
        raise BadRowError("thinking that is not text")
    if len(set(given)) > 1:
        raise BadRowError(f"a message with two texts of thinking ({', '.join(NAMES)})")
    return parse_text(given[0]) if given else None


def _parse_said(present: dict[str, Any], *, has_calls: bool) -> str:
    said = [_parse_content(present[key]) for key in ("content", "value") if key in present]
    if not said and not has_calls:
        raise BadRowError("message without content")
    if len(set(said)) > 1:
        raise BadRowError("a message with two texts, content and value")
    return said[0] if said else ""


def _parse_content(content: Any) -> str:
    if isinstance(content, str):
        return parse_text(content)
    if not isinstance(content, list):
        raise BadRowError(f"content: expected a string, got {type(content).__name__}")
    return "".join(map(_parse_content_part, content))


def _parse_content_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRowError(f"content part that is not text, but {kind!r}")
    return parse_text(part["text"])
