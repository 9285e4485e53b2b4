"""A chat completion to an answer: what of it can be believed, how it ended, and which token ids it was sampled as."""

import re
from typing import Any, TypeGuard

from openai.types.chat import ChatCompletion, ChatCompletionMessage

from stages.regenerate.dialogue import Answer
from stages.regenerate.render import PromptRenderer

# How servers say that the target ended its answer, and that it was cut. Whatever else they say (abort, error, nothing)
# is no end: the answer may lack any part. Known names of OpenAI, vLLM, SGLang, TGI, Mistral, Anthropic and Gemini.
ENDED = {"stop", "eos", "eos_token", "end_turn", "tool_calls", "function_call"}
CUT = {"length", "max_tokens", "model_length", "stop_sequence"}
FILTERED = {"content_filter", "safety"}
# What stands around thinking and an answer where a server has told them apart.
MAX_MARKUP = 200
_MARKUP = re.compile(
    r"(?:</?[\w:|]*(?:think|thought|reason|answer|response)[\w|]*>|\[/?THINK\]|\u25c1/?think\u25b7|<\|(?:START|END)_\w+\|>"
    r"|<\|channel\|?>(?:analysis|commentary|final|thought)?|<\|(?:message|end)\|>|<\|start\|>assistant|<channel\|>)*",
    re.IGNORECASE,
)
MAX_COUNT = 2**31 - 1  # tokens of one answer; a number beyond it is noise, and too large a one has no rate


class AskError(Exception):
    """There is no answer to one row; the message is the cause that the report counts."""


class MalformedError(AskError):
    """The endpoint sent something that is no whole chat completion."""


def parse_completion(completion: Any, *, renderer: PromptRenderer, end_ids: frozenset[int]) -> Answer:
    """The client checks nothing of what arrives. Raises MalformedError.

    Thinking may come in a field of its own, `reasoning_content` or `reasoning`, or within the content. `end_ids` are
    the target's ends of a turn.
    """
    choices: Any = completion.choices if isinstance(completion, ChatCompletion) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if not isinstance(message, ChatCompletionMessage):
        raise MalformedError("malformed answer: no chat completion")
    content = message.content or ""
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if not isinstance(content, str) or not isinstance(reasoning, str | None):
        raise MalformedError("malformed answer: content that is no text")
    has_ended = _has_ended(choice)
    ids, prompt_ids = _read_ids(completion, choice)
    ends = {*end_ids, _stop_reason(choice)}
    texts = [reasoning or "", content]
    if ids is not None and not _are_answer(ids, texts, has_ended=has_ended, end_ids=ends, renderer=renderer):
        ids = prompt_ids = None
    return Answer(
        content=content,
        reasoning=reasoning,
        is_complete=has_ended,
        fault="the server's filter cut the answer" if _finish(choice) in FILTERED else None,
        calls_tool=bool(message.tool_calls),
        num_tokens=_count(completion.usage, "completion_tokens") or len(ids or ()),
        num_prompt_tokens=_count(completion.usage, "prompt_tokens"),
        ids=ids,
        prompt_ids=prompt_ids,
        is_exact=ids is not None,
    )


def _finish(choice: Any) -> str | None:
    return choice.finish_reason.lower() if isinstance(choice.finish_reason, str) else None


def _stop_reason(choice: Any) -> Any:
    """vLLM's: the text or the token of the request that stopped it, None for the target's own end."""
    return getattr(choice, "stop_reason", None)


def _has_ended(choice: Any) -> bool:
    """Whether the target ended the answer itself; False where it was cut. Raises MalformedError for any other end."""
    finish = _finish(choice)
    if finish not in ENDED | CUT | FILTERED:
        raise MalformedError(f"answer broken off: finish_reason {str(choice.finish_reason)[:40]!r}")
    return finish in ENDED and not isinstance(_stop_reason(choice), str)


def _read_ids(completion: Any, choice: Any) -> tuple[list[int] | None, list[int] | None]:
    """(the answer's ids, its prompt's), if the server gives both. The names are vLLM's (`return_token_ids`)."""
    ids = getattr(choice, "token_ids", None)
    prompt_ids = getattr(completion, "prompt_token_ids", None) or getattr(choice, "prompt_token_ids", None)
    return (ids, prompt_ids) if _are_ids(ids) and _are_ids(prompt_ids) else (None, None)


def _are_answer(
    ids: list[int], texts: list[str], *, has_ended: bool, end_ids: set[Any], renderer: PromptRenderer
) -> bool:
    """Whether ids are this answer, thinking and text, and nothing else: one of `end_ids`, last, if it has ended."""
    said = ids[:-1] if has_ended else ids
    if (has_ended and ids[-1] not in end_ids) or not end_ids.isdisjoint(said):
        return False
    parts = [part for text in texts if (part := _squeeze(text))]
    return any(_is_made_of(_squeeze(spelled), parts) for spelled in renderer.spell(said))


def _is_made_of(said: str, parts: list[str]) -> bool:
    """Whether a text is these parts in their order, with nothing but markup around them."""
    if not parts:
        return len(said) <= MAX_MARKUP and _MARKUP.fullmatch(said) is not None
    start, limit = -1, MAX_MARKUP + len(parts[0])
    while (start := said.find(parts[0], start + 1, limit)) >= 0:
        if _MARKUP.fullmatch(said, 0, start) and _is_made_of(said[start + len(parts[0]) :], parts[1:]):
            return True
    return False


def _are_ids(ids: Any) -> TypeGuard[list[int]]:
    return isinstance(ids, list) and bool(ids) and all(type(token) is int and 0 <= token <= MAX_COUNT for token in ids)


def _squeeze(text: str) -> str:
    """Without what servers strip from an answer, and what stands for the halves of a character."""
    return "".join(text.replace("\ufffd", "").split())


def _count(usage: Any, name: str) -> int | None:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) and 0 <= count <= MAX_COUNT else None
