"""One conversation while it is answered: what to ask next, what an answer changes, and what became of it."""

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from stages.prompt_hash import hash_prompt
from stages.regenerate.prompts import Message, Prompt
from stages.regenerate.sampled_rows import AnsweredTurn, SampledRow, plan_rows
from storage.sealed import Record

THINKING_START, THINKING_END = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the target said. `is_complete`: it ended by itself. `fault`: why it is of no use, whatever it says.

    `ids` are the answer's tokens, the end-of-turn token that was sampled included, and `prompt_ids` those that it was
    shown; both or neither. `is_exact`: they are what was sampled, not a text tokenised again. `num_prompt_tokens`: an
    endpoint's count, if any.
    """

    content: str
    is_complete: bool
    fault: str | None = None
    ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    is_exact: bool = False
    reasoning: str | None = None
    calls_tool: bool = False
    num_tokens: int = 0
    num_prompt_tokens: int | None = None


class Outcome(Record):
    """What became of a prompt, as the journal keeps it.

    `answered`: `messages` is the conversation, at least one turn of it new; `reason` says why it ends early, if it
    does. `dropped`: what the target said is of no use. `failed`: there is no answer, and a later run asks again.
    `reason` is a kind of trouble, then perhaps a colon and details; `source` says where a row without an answer is.
    `rows` are what is published of an answered one; none, in journals of earlier versions: the messages. `has_text`: an
    answer of it is known as text alone. `num_truncated` counts cut answers that are kept, `num_unfinished` all of them.
    `prompt` is the first one's hash in hexadecimal, `split` what the source says; each is a column of the rows.
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
    num_unfinished: int = 0
    rows: list[SampledRow] = Field(default_factory=list)
    has_text: bool = True
    prompt: str | None = None
    split: str | None = None


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
        self._num_truncated = self._num_mismatches = 0
        self._answered: list[AnsweredTurn] = []
        self._has_text = False
        self._first_prompt: str | None = None
        self._num_gaps = sum(message is None for message in prompt.messages)
        self.num_tokens = self.num_unfinished = 0
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

    @property
    def share_done(self) -> float:
        """Of the turns that are asked for, from 0 to 1."""
        return self.turn / self._num_gaps if self.is_open else 1.0

    @property
    def share_of_a_turn(self) -> float:
        """What one more answer adds to `share_done`."""
        return 1 / self._num_gaps

    def take(self, answer: Answer, *, rendered: list[int]) -> None:
        """Put an answer into the gap, or end here if it is of no use; `rendered` is the prompt by our template."""
        self._first_prompt = self._first_prompt or hash_prompt(rendered).hex()
        self.num_tokens += answer.num_tokens
        self.num_unfinished += not answer.is_complete and answer.fault is None
        self._num_mismatches += _differs(answer, rendered)
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
        self._answered.append(
            AnsweredTurn(
                num_messages=self._num_sound,
                has_thinking=bool(answer.reasoning) or THINKING_END in answer.content,
                prompt_ids=answer.prompt_ids,
                ids=answer.ids,
            )
        )
        self._has_text = self._has_text or not answer.is_exact
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
            num_tokens=self.num_tokens,
            num_truncated=self._num_truncated if is_answered else 0,
            num_mismatches=self._num_mismatches,
            num_unfinished=self.num_unfinished,
            rows=plan_rows(self._answered) if is_answered else [],
            has_text=is_answered and self._has_text,
            prompt=self._first_prompt if is_answered else None,
            split=self._prompt.split if is_answered else None,
        )

    def _go_to_gap(self) -> None:
        while self._rest and self._rest[0] is not None:
            self.messages.append(self._rest.popleft() or {})

    def _find_fault(self, answer: Answer) -> str | None:
        if answer.fault is not None:
            return answer.fault
        if answer.calls_tool:
            return "the target called a tool, and none is run here"
        if not answer.is_complete and not self._keep_truncated:
            return "the answer did not end within its tokens"
        if not answer.content.strip():
            return "empty answer"
        if _has_lone_surrogate(answer.content + (answer.reasoning or "")):
            return "text with a lone surrogate, which no encoding has"
        return None


def _differs(answer: Answer, rendered: list[int]) -> bool:
    """Whether the target was shown another prompt than our template gives, as far as is known."""
    if answer.prompt_ids is not None:
        return answer.prompt_ids != rendered
    return answer.num_prompt_tokens not in (None, len(rendered))


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
