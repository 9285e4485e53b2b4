"""Tools and tool calls of a row in the form that servers give to chat templates: objects, nothing still encoded."""

from typing import Any

from stages.extract.rows import BadRowError, parse_json

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
    arguments = function_of(call).get("arguments")
    is_empty = arguments is None or (isinstance(arguments, str) and not arguments.strip())
    return with_function(call, arguments={}) if is_empty else call


def _parse_part(item: dict[str, Any], *, part: str) -> dict[str, Any]:
    """The item with the object `part` of its function decoded, where it has one."""
    value = function_of(item).get(part)
    if value is None:
        return item
    what = f"{part} of {name_of(item)!r}"
    decoded = _decode(value, what=what)
    if not isinstance(decoded, dict):
        raise BadRowError(f"{what}: expected a JSON object, got {type(decoded).__name__}")
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


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
