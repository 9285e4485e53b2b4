"""Tools and tool calls of a row in the form that servers give to chat templates: objects, nothing still encoded."""

import math
from typing import Any

from stages.extract.rows import BadRowError, parse_json

ARGUMENT_NAMES = ("arguments", "parameters", "args", "input")
"""What data sets call the arguments of a call; templates read the first."""
EMPTY = ("", "null", "[]")


def parse_tools(raw: Any) -> list[dict[str, Any]] | None:
    """The row's tool descriptions; the list, one of them or its `parameters` may be JSON text. Raises BadRowError."""
    return [_parse_part(tool, part="parameters") for tool in _parse_objects(raw, what="tools")] or None


def parse_tool_calls(raw: Any) -> list[dict[str, Any]]:
    """A message's tool calls with decoded arguments; none for None and an empty list. Raises BadRowError.

    OpenAI's clients give `arguments` as JSON text, which servers decode before they render it. No arguments are {}.
    """
    return [_parse_part(_with_arguments(call), part="arguments") for call in _parse_objects(raw, what="tool_calls")]


def name_of(item: dict[str, Any]) -> Any:
    """The name of a tool or of a tool call, with OpenAI's wrapper `function` or without."""
    return function_of(item).get("name")


def function_of(item: dict[str, Any]) -> dict[str, Any]:
    """What OpenAI's wrapper `function` holds; the item itself without one."""
    return item["function"] if isinstance(item.get("function"), dict) else item


def with_function(item: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The item with fields of its function changed."""
    function = {**function_of(item), **changes}
    return function if function_of(item) is item else {**item, "function": function}


def _parse_objects(raw: Any, *, what: str) -> list[dict[str, Any]]:
    if raw is None or (isinstance(raw, str) and raw.strip() in EMPTY):
        return []
    items = _decode(raw, what=what)
    if not isinstance(items, list):
        raise BadRowError(f"{what}: expected a list of objects, got {type(items).__name__}")
    items = [_decode(item, what=what) for item in items]
    if not all(isinstance(item, dict) for item in items):
        raise BadRowError(f"{what}: expected a list of objects, and an item is none")
    return items


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its arguments under that name, within its function. Raises BadRowError where two names differ."""
    holders = [function_of(call), call]
    given = [holder[name] for name in ARGUMENT_NAMES for holder in holders if not _is_empty(holder.get(name))]
    if any(other != given[0] for other in given[1:]):
        raise BadRowError(f"a tool call with two sets of arguments ({', '.join(ARGUMENT_NAMES)})")
    function = {key: value for key, value in function_of(call).items() if key not in ARGUMENT_NAMES[1:]}
    function["arguments"] = given[0] if given else {}
    if function_of(call) is call:
        return function
    return {key: value for key, value in call.items() if key not in ARGUMENT_NAMES} | {"function": function}


def _is_empty(arguments: Any) -> bool:
    return arguments is None or (isinstance(arguments, str) and not arguments.strip())


def _parse_part(item: dict[str, Any], *, part: str) -> dict[str, Any]:
    """The item with the object `part` of its function decoded, where it has one."""
    value = function_of(item).get(part)
    if value is None:
        return item
    what = f"{part} of {name_of(item)!r}"
    decoded = _decode(value, what=what)
    if not isinstance(decoded, dict):
        raise BadRowError(f"{what}: expected a JSON object, got {type(decoded).__name__}")
    if not _is_finite(decoded):
        raise BadRowError(f"{what}: NaN and Infinity are not JSON")
    return item if decoded is value else with_function(item, **{part: decoded})


def _decode(value: Any, *, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, parse_constant=_refuse_constant)
    except BadRowError as error:
        raise BadRowError(f"{what}: {error}") from error
    except ValueError as error:
        raise BadRowError(f"{what}: expected JSON, got a text that is none") from error


def _is_finite(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        return all(map(_is_finite, items))
    return not isinstance(value, float) or math.isfinite(value)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
