"""What the target is shown when it is asked for a turn, by its own chat template."""

from typing import Any

from stages.regenerate.prompts import Message
from stages.thinking import name_thinking

NO_ROOM = "the prompt leaves no room in data.max_length"


class RenderError(ValueError):
    """A conversation that cannot be shown to the target; the message is the reason that the report counts."""


class PromptRenderer:
    """Token ids of a conversation with the template's generation prompt behind it."""

    def __init__(self, tokenizer: Any, *, variables: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._variables = variables

    def __call__(self, messages: list[Message], *, tools: list[Any] | None) -> list[int]:
        """Raises RenderError."""
        encoded = self._apply(messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True)
        return [int(token) for token in encoded["input_ids"]]

    def shows(self, messages: list[Message], text: str, *, tools: list[Any] | None) -> bool:
        """Whether the template renders a text that some message of the conversation carries. Raises RenderError."""
        return text.strip() in str(self._apply(messages, tools=tools, tokenize=False))

    def _apply(self, messages: list[Message], *, tools: list[Any] | None, **options: Any) -> Any:
        """With the thinking of earlier turns under the template's name for it; one without a name shows none."""
        named = name_thinking(messages, lambda some: str(self._apply_as_is(some, tools=tools, tokenize=False)))
        return self._apply_as_is(named or messages, tools=tools, **options)

    def _apply_as_is(self, messages: list[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, **options, **self._variables)
        except Exception as error:  # a template is a program: it can raise anything
            raise RenderError(f"chat template: {(str(error).splitlines() or ['?'])[0][:120]}") from error

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
