"""What a row carries beside its text must be in what the target is shown: tools and thinking."""

from collections.abc import Callable
from dataclasses import replace

from stages.extract.conversations import Chat
from stages.extract.rows import BadRowError
from stages.extract.tool_calls import name_of, with_function
from stages.thinking import NAMES, find_shown, name_thinking, shows_words

_MARK = "Zq{}tool7qZ"  # stands in for the name of one tool; no text has it


def show_all(chat: Chat, render: Callable[[Chat], str], *, supervise: str) -> Chat:
    """The chat with its thinking under the template's name for it.

    `render` gives the chat as the template shows it. Raises BadRowError for tools, and for thinking of a supervised
    turn after the last question, that the template does not render.
    """
    if chat.tools:
        _check_tools(chat, render)
    messages = name_thinking(chat.messages, lambda messages: render(replace(chat, messages=messages)))
    if messages is None:
        raise BadRowError(f"thinking ({', '.join(NAMES)}) that the chat template does not render")
    if messages is chat.messages:
        return chat
    named = replace(chat, messages=messages)
    _check_thinking(named, render, supervise=supervise)
    return named


def _check_tools(chat: Chat, render: Callable[[Chat], str]) -> None:
    tools = chat.tools or []
    if not all(isinstance(name_of(tool), str) for tool in tools):
        raise BadRowError("tools: one has no name")
    marks = [_MARK.format(index) for index in range(len(tools))]
    marked = [with_function(tool, name=mark) for tool, mark in zip(tools, marks, strict=True)]
    text = render(replace(chat, tools=marked))
    if not all(mark in text for mark in marks):
        raise BadRowError("tools that the chat template does not render")


def _check_thinking(chat: Chat, render: Callable[[Chat], str], *, supervise: str) -> None:
    """Thinking before the last question is cut by many templates, by design; later it belongs to the answer."""
    roles = [message["role"] for message in chat.messages]
    last_question = max((index for index, role in enumerate(roles) if role == "user"), default=-1)
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    turns = [
        index
        for index in (answers[-1:] if supervise == "last" else answers)
        if index > last_question
        and index not in chat.unsupervised
        and any(name in chat.messages[index] for name in NAMES)
    ]
    shown = find_shown(chat.messages, lambda messages: render(replace(chat, messages=messages)))
    if not shown.issuperset(turns) or not shows_words([chat.messages[turn] for turn in turns], render(chat)):
        raise BadRowError(
            "thinking of a supervised turn that the chat template does not render; data.supervise = last "
            "supervises the last turn alone"
        )
