"""What the target is shown when it is asked for a turn, by its own chat template."""

import json
from typing import Any

from stages.chat_template import ChatTemplate, ChatTooLargeError
from stages.regenerate.prompts import Message
from stages.regeneration_record import RegenerationError
from stages.thinking import name_thinking

NO_ROOM = "the prompt leaves no room in data.max_length"
MAX_TOO_LARGE = 8  # renderings one after the other that take too much: the template's fault, not the rows'


class RenderError(ValueError):
    """A conversation that cannot be shown to the target; the message is the reason that the report counts."""


class PromptRenderer:
    """Token ids of a conversation with the template's generation prompt behind it.

    `variables` are names that the template may read. Time and memory of a rendering are bounded; where one after the
    other takes too much, RegenerationError ends the run, which would take days otherwise.
    """

    def __init__(self, tokenizer: Any, *, variables: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._variables = variables
        self._plain = PromptRenderer(tokenizer, variables={}) if variables else None
        self._num_too_large = 0

    def __call__(self, messages: list[Message], *, tools: list[Any] | None) -> list[int]:
        """Raises RenderError."""
        return self.encode(self._render(messages, tools=tools, ask=True))

    def shows(self, messages: list[Message], text: str, *, tools: list[Any] | None) -> bool:
        """Whether the template renders a text that some message of the conversation carries. Raises RenderError."""
        return text.strip() in self._render(messages, tools=tools)

    def knows_more(self, messages: list[Message], *, tools: list[Any] | None) -> bool:
        """Whether the variables change the prompt: extraction, which has none, shows another. Raises RenderError."""
        if self._plain is None:
            return False
        return self._plain._render(messages, tools=tools, ask=True) != self._render(messages, tools=tools, ask=True)

    def find_end(
        self, messages: list[Message], text: str, *, tools: list[Any] | None, end_ids: frozenset[int]
    ) -> int | None:
        """The token that ends the last message where the template shows its `text`; None if there is none.

        Raises RenderError."""
        _, found, rest = self._render(messages, tools=tools).rpartition(text.strip())
        return next((token for token in self.encode(rest) if found and token in end_ids), None)

    def _render(self, messages: list[Message], *, tools: list[Any] | None, ask: bool = False) -> str:
        """With the thinking of earlier turns under the template's name for it; one without a name shows none."""
        named = name_thinking(messages, lambda some: self._render_as_is(some, tools=tools))
        return self._render_as_is(named or messages, tools=tools, ask=ask)

    def _render_as_is(self, messages: list[Message], *, tools: list[Any] | None, ask: bool = False) -> str:
        try:
            row = self._template.open_row(messages, tools=tools, variables=self._variables)
            text = row.render(row.messages, ask=ask)
        except ValueError as error:  # the template's, and that there is none
            self._count_too_large(error)
            raise RenderError(f"chat template: {(str(error).splitlines() or ['?'])[0][:120]}") from error
        self._num_too_large = 0
        return text

    def _count_too_large(self, error: ValueError) -> None:
        self._num_too_large = self._num_too_large + 1 if isinstance(error, ChatTooLargeError) else 0
        if self._num_too_large == MAX_TOO_LARGE:
            raise RegenerationError(
                f"the target's chat template {error}, for {MAX_TOO_LARGE} conversations in a row; name another one in "
                "data.chat_template"
            ) from error

    def decode(self, ids: list[int]) -> str:
        """Text of answer tokens, markers of thinking and of tool calls included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def spell(self, ids: list[int]) -> tuple[str, str]:
        """The text of an answer's tokens as a server may give it: with and without markers."""
        return self.decode(ids), str(
            self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of an answer that is known as text alone."""
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]


def plan_tokens(num_prompt_tokens: int, *, max_tokens: int | None, max_length: int) -> int:
    """Tokens that an answer may have; not more than the cache would keep of it. None left: 0 or less."""
    room = max_length - num_prompt_tokens
    return room if max_tokens is None else min(room, max_tokens)


def to_request(message: Message) -> Message:
    """A message as OpenAI's API takes it: arguments of tool calls as JSON text, and nothing said of the loss."""
    fields = {key: value for key, value in message.items() if key not in ("weight", "tool_calls")}
    calls = [_encode_arguments(call) for call in message.get("tool_calls", ())]
    return fields | ({"tool_calls": calls} if calls else {})


def _encode_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"] if isinstance(call.get("function"), dict) else call
    encoded = {**function, "arguments": json.dumps(function.get("arguments", {}), ensure_ascii=False)}
    return encoded if function is call else {**call, "function": encoded}
