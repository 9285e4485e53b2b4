"""What a row carries beside its text goes to the template in a form that it renders, or the row is refused."""

from collections.abc import Callable
from dataclasses import replace

from stages.extract.conversations import Chat
from stages.extract.rows import BadRowError
from stages.extract.tool_calls import name_of, with_function
from stages.thinking import NAMES, name_thinking

_MARK = "Zq{}tool7qZ"  # stands in for the name of one tool; no text has it


def show_to_template(chat: Chat, render: Callable[[Chat], str]) -> Chat:
    """The chat with its thinking under the template's name for it.

    `render` gives the chat as the template shows it. Raises BadRowError for tools that the template does not render,
    and for thinking that it renders under no name.
    """
    if chat.tools:
        _check_tools(chat, render)
    messages = name_thinking(chat.messages, lambda messages: render(replace(chat, messages=messages)))
    if messages is None:
        raise BadRowError(f"thinking ({', '.join(NAMES)}) that the chat template does not render")
    return replace(chat, messages=messages)


def _check_tools(chat: Chat, render: Callable[[Chat], str]) -> None:
    tools = chat.tools or []
    if not all(isinstance(name_of(tool), str) for tool in tools):
        raise BadRowError("tools: one has no name")
    marks = [_MARK.format(index) for index in range(len(tools))]
    marked = [with_function(tool, name=mark) for tool, mark in zip(tools, marks, strict=True)]
    text = render(replace(chat, tools=marked))
    if not all(mark in text for mark in marks):
        raise BadRowError("tools that the chat template does not render")
