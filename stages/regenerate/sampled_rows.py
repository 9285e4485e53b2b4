"""From answered turns to rows of the published files: the token ids that were sampled, each behind those it was shown.

A chat template may render an answer otherwise once it is no longer the last, and text that is tokenised again may give
other ids than were sampled. So turns share a row as long as the next prompt begins with the ids of the row so far; the
turn that breaks this begins a row of its own, with its prompt as context.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from storage.sealed import Record


@dataclass(frozen=True, kw_only=True)
class AnsweredTurn:
    """A turn and the ids that it was sampled from and as; None where nobody knows them: the text has to do.

    `num_messages` counts the conversation's messages up to this answer, which is the last of them. `has_thinking`: its
    text has, which templates mostly leave out once another question follows.
    """

    num_messages: int
    has_thinking: bool = False
    prompt_ids: list[int] | None
    ids: list[int] | None


class SampledRow(Record):
    """One row: the first `num_messages` messages, and their ids with the mask of what was sampled.

    Without ids extraction renders and tokenises the messages; those at `unsupervised` stand in rows of their own.
    """

    num_messages: int
    input_ids: list[int] | None = None
    loss_mask: list[int] | None = None
    unsupervised: list[int] = Field(default_factory=list)


def plan_rows(turns: list[AnsweredTurn]) -> list[SampledRow]:
    """Rows in which every turn is supervised once: with its ids where they are known, else in one row of text.

    A text with thinking is shown whole only while it is the last: then each turn of text has a row that ends with it.
    """
    texts = [turn.num_messages for turn in turns if turn.ids is None]
    if not texts:
        return _join_turns(turns)
    if any(turn.has_thinking for turn in turns if turn.ids is None):
        ends = [(end, {end}) for end in texts]
    else:
        ends = [(texts[-1], set(texts))]
    rows = [
        SampledRow(
            num_messages=end,
            unsupervised=[t.num_messages - 1 for t in turns if t.num_messages <= end and t.num_messages not in own],
        )
        for end, own in ends
    ]
    return _join_turns(turns) + rows


def _join_turns(turns: list[AnsweredTurn]) -> list[SampledRow]:
    rows: list[SampledRow] = []
    for turn in turns:
        if turn.prompt_ids is None or turn.ids is None:
            continue
        mask: list[int] = []
        if rows and turn.prompt_ids[: len(rows[-1].input_ids or ())] == rows[-1].input_ids:
            mask = rows.pop().loss_mask or []
        mask = [*mask, *[0] * (len(turn.prompt_ids) - len(mask)), *[1] * len(turn.ids)]
        rows.append(SampledRow(num_messages=turn.num_messages, input_ids=[*turn.prompt_ids, *turn.ids], loss_mask=mask))
    return rows


def render_row(row: SampledRow, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The row's columns. Messages stand beside ids for people; `weight` 0 keeps a turn out of the loss."""
    shown = [
        {**message, "weight": 0} if index in row.unsupervised else message
        for index, message in enumerate(messages[: row.num_messages])
    ]
    ids = {} if row.input_ids is None else {"input_ids": row.input_ids, "loss_mask": row.loss_mask}
    return {"messages": shown, **ids}
