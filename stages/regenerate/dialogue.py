"""One conversation while it is answered: what to ask next, what an answer changes, and what became of it."""

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from stages.regenerate.prompts import Message, Prompt
from storage.sealed import Record


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the target said. `is_complete`: it ended by itself. `num_prompt_tokens`: an endpoint's count, if any."""

    content: str
    is_complete: bool
    reasoning: str | None = None
    calls_tool: bool = False
    num_tokens: int = 0
    num_prompt_tokens: int | None = None


class Outcome(Record):
    """What became of a prompt, as the journal keeps it.

    `answered`: `messages` is the conversation, at least one turn of it new; `reason` says why it ends early, if it
    does. `dropped`: what the target said is of no use. `failed`: there is no answer, and a later run asks again.
    `reason` is a kind of trouble, then perhaps a colon and details; `source` says where a row without an answer is.
    """

    row: int
    kind: Literal["answered", "dropped", "failed"]
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    reason: str | None
    source: str
    num_turns: int
    num_tokens: int
    num_truncated: int
    num_mismatches: int


class Dialogue:
    """A prompt's gaps filled one after the other. `messages` is the conversation up to the next gap.

    A turn that cannot be used ends the conversation behind the last one that can; without any, the row is dropped.
    """

    def __init__(self, prompt: Prompt, *, keep_truncated: bool) -> None:
        self._prompt = prompt
        self._keep_truncated = keep_truncated
        self._rest = deque(prompt.messages)
        self._num_sound = 0  # messages up to the last new turn
        self._reason: str | None = None
        self._has_failed = False
        self._num_tokens = self._num_truncated = self._num_mismatches = 0
        self.turn = 0
        self.messages: list[Message] = []
        self._go_to_gap()

    @property
    def row(self) -> int:
        return self._prompt.row

    @property
    def tools(self) -> list[Any] | None:
        return self._prompt.tools

    @property
    def is_open(self) -> bool:
        """Whether a turn is still to be asked for."""
        return self._reason is None and bool(self._rest)

    def take(self, answer: Answer, *, num_prompt_tokens: int) -> None:
        """Put an answer into the gap, or end here if it is of no use; the prompt had so many tokens by our template."""
        self._num_tokens += answer.num_tokens
        self._num_mismatches += answer.num_prompt_tokens not in (None, num_prompt_tokens)
        reason = self._find_fault(answer)
        if reason is not None:
            self.end(reason)
            return
        self._num_truncated += not answer.is_complete
        message: Message = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        self.messages.append(message)
        self._num_sound = len(self.messages)
        self.turn += 1
        self._rest.popleft()
        self._go_to_gap()

    def end(self, reason: str) -> None:
        """No more turns: the next one has no usable answer."""
        self._reason = reason

    def fail(self, reason: str) -> None:
        """The next turn was not answered at all; the whole row is asked again by a later run."""
        self._reason, self._has_failed = reason, True

    def outcome(self) -> Outcome:
        is_answered = self.turn > 0 and not self._has_failed
        return Outcome(
            row=self.row,
            kind="failed" if self._has_failed else "answered" if is_answered else "dropped",
            messages=self.messages[: self._num_sound] if is_answered else [],
            tools=self.tools if is_answered else None,
            reason=self._reason,
            source="" if is_answered else self._prompt.source,
            num_turns=self.turn if is_answered else 0,
            num_tokens=self._num_tokens,
            num_truncated=self._num_truncated if is_answered else 0,
            num_mismatches=self._num_mismatches,
        )

    def _go_to_gap(self) -> None:
        while self._rest and self._rest[0] is not None:
            self.messages.append(self._rest.popleft() or {})

    def _find_fault(self, answer: Answer) -> str | None:
        if answer.calls_tool:
            return "the target called a tool, and none is run here"
        if not answer.is_complete and not self._keep_truncated:
            return "the answer did not end within its tokens"
        if not answer.content.strip():
            return "empty answer"
        if _has_lone_surrogate(answer.content + (answer.reasoning or "")):
            return "text with a lone surrogate, which no encoding has"
        return None


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
