"""The target in this process: conversations in batches, each turn sampled with numbers of its own.

Batches are a function of the prompts alone, never of what is left of them: a batch's rounding is the same whether or
not the run was interrupted, so the answers are the same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from stages.regenerate.dialogue import Answer, Dialogue
from stages.regenerate.prompts import Prompt, seed_of
from stages.regenerate.render import NO_ROOM, PromptRenderer, RenderError, plan_tokens
from stages.regenerate.sampling import RowLimits, SeededSampler, draw_uniforms
from stages.regenerate.settings import RegenerateSection
from stages.regenerate.work import Work
from stages.regeneration_record import RegenerationError

BATCHES_SORTED = 16  # so many batches of prompts are sorted by length together: little padding, little memory


@dataclass(frozen=True, kw_only=True)
class LocalTarget:
    """A loaded model in evaluation mode and what it takes to ask it. `end_ids` end an answer."""

    model: Any
    device: torch.device
    renderer: PromptRenderer
    end_ids: frozenset[int]
    section: RegenerateSection
    max_length: int


class StopAskedError(Exception):
    """The batch in progress is given up, since the run is to stop."""


def run_local(target: LocalTarget, prompts: Iterable[Prompt], work: Work) -> None:
    """The back end. A batch is recorded as a whole, and on a stop those of its rows that are finished; one with an
    unfinished row is computed again."""
    for batch in plan_batches(target.renderer, prompts, batch_size=target.section.batch_size, is_done=work.is_finished):
        if work.is_stopped():
            return
        dialogues = [Dialogue(prompt, keep_truncated=target.section.truncated == "keep") for prompt in batch]
        try:
            answer_batch(target, dialogues, is_stopped=work.is_stopped, work=work)
        except StopAskedError:
            dialogues = [dialogue for dialogue in dialogues if not dialogue.is_open]
        done = {prompt.row for prompt in batch if work.is_finished(prompt)}
        work.record([dialogue.outcome() for dialogue in dialogues if dialogue.row not in done])


def plan_batches(
    renderer: PromptRenderer, prompts: Iterable[Prompt], *, batch_size: int, is_done: Callable[[Prompt], bool]
) -> Iterator[list[Prompt]]:
    """Prompts of similar length together, the same batches in every run; those whose rows are all done are left out."""
    source = iter(prompts)
    while chunk := list(islice(source, batch_size * BATCHES_SORTED)):
        if all(map(is_done, chunk)):
            continue
        chunk.sort(key=lambda prompt: (_count_first_tokens(renderer, prompt), prompt.row))
        for start in range(0, len(chunk), batch_size):
            batch = chunk[start : start + batch_size]
            if not all(map(is_done, batch)):
                yield batch


def _count_first_tokens(renderer: PromptRenderer, prompt: Prompt) -> int:
    try:
        return len(renderer(Dialogue(prompt, keep_truncated=True).messages, tools=prompt.tools))
    except RenderError:
        return 0


def answer_batch(
    target: LocalTarget, dialogues: list[Dialogue], *, is_stopped: Callable[[], bool], work: Work | None = None
) -> None:
    """Answer all turns of all dialogues, those that are open together; `work` is told how far they are.

    Raises RegenerationError, and StopAskedError once what was finished by then is in the dialogues.
    """
    while any(dialogue.is_open for dialogue in dialogues):
        asked = [(dialogue, ids) for dialogue in dialogues if (ids := _render_next(target, dialogue)) is not None]
        if not asked:
            continue
        tell = None if work is None else partial(_tell, work, dialogues, asked)
        said, was_stopped = generate(target, asked, is_stopped=is_stopped, tell=tell)
        for (dialogue, prompt_ids), turn in zip(asked, said, strict=True):
            if turn.is_over:
                dialogue.take(_read_answer(target, turn, prompt_ids=prompt_ids), rendered=prompt_ids)
        if was_stopped:
            raise StopAskedError


@dataclass(frozen=True, kw_only=True)
class SaidTurn:
    """The new token ids of a row so far. `is_over`: it has ended, or reached its limit."""

    ids: list[int]
    has_ended: bool
    is_over: bool


Tell = Callable[[Callable[[], list[SaidTurn]]], None]


def _tell(
    work: Work, dialogues: list[Dialogue], asked: list[tuple[Dialogue, list[int]]], read: Callable[[], list[SaidTurn]]
) -> None:
    """Say how far a batch is, if it is time to; `read` gives the turns that are being said."""
    if not work.is_due():
        return
    said = read()
    over = [(dialogue, turn) for (dialogue, _), turn in zip(asked, said, strict=True) if turn.is_over]
    work.tell(
        num_rows=sum(d.share_done for d in dialogues) + sum(d.share_of_a_turn for d, _ in over),
        num_tokens=sum(d.num_tokens for d in dialogues) + sum(len(turn.ids) for turn in said),
        num_unfinished=sum(d.num_unfinished for d in dialogues) + sum(not turn.has_ended for _, turn in over),
    )


def _render_next(target: LocalTarget, dialogue: Dialogue) -> list[int] | None:
    """Prompt tokens of the next turn; None, and the dialogue is over, where it cannot be asked for."""
    if not dialogue.is_open:
        return None
    try:
        ids = target.renderer(dialogue.messages, tools=dialogue.tools)
    except RenderError as error:
        dialogue.fail(str(error))
        return None
    if _limit(target, ids) < 1:
        dialogue.end(NO_ROOM)
        return None
    return ids


def _limit(target: LocalTarget, ids: list[int]) -> int:
    return plan_tokens(len(ids), max_tokens=target.section.max_tokens, max_length=target.max_length)


def _read_answer(target: LocalTarget, turn: SaidTurn, *, prompt_ids: list[int]) -> Answer:
    return Answer(
        content=target.renderer.decode(turn.ids[:-1] if turn.has_ended else turn.ids),
        is_complete=turn.has_ended,
        num_tokens=len(turn.ids),
        ids=turn.ids,
        prompt_ids=prompt_ids,
        is_exact=True,
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts padded on the left to T tokens, with each row's limit of new tokens and its random numbers.

    input_ids, attention_mask [B, T] int64; limits [B] int64; uniforms [B, N] float64, N the largest limit.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    limits: torch.Tensor
    uniforms: torch.Tensor

    @property
    def num_prompt_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def max_new_tokens(self) -> int:
        return self.uniforms.shape[1]


def pad_prompts(target: LocalTarget, asked: list[tuple[Dialogue, list[int]]]) -> Batch:
    """The batch of these dialogues' next turns, on the target's device."""
    limits = [_limit(target, ids) for _, ids in asked]
    shape = (len(asked), max(len(ids) for _, ids in asked))
    input_ids, attention_mask = torch.full(shape, min(target.end_ids)), torch.zeros(shape, dtype=torch.long)
    uniforms = torch.zeros((len(asked), max(limits)), dtype=torch.float64)
    for index, ((dialogue, ids), limit) in enumerate(zip(asked, limits, strict=True)):
        input_ids[index, -len(ids) :] = torch.tensor(ids)
        attention_mask[index, -len(ids) :] = 1
        seed = seed_of(target.section.seed, row=dialogue.row, turn=dialogue.turn)
        uniforms[index, :limit] = draw_uniforms(seed, limit)
    return Batch(
        input_ids=input_ids.to(target.device),
        attention_mask=attention_mask.to(target.device),
        limits=torch.tensor(limits, device=target.device),
        uniforms=uniforms.to(target.device),
    )


@torch.inference_mode()
def generate(
    target: LocalTarget,
    asked: list[tuple[Dialogue, list[int]]],
    *,
    is_stopped: Callable[[], bool],
    tell: Tell | None = None,
) -> tuple[list[SaidTurn], bool]:
    """What every row says, and whether a stop was asked for before all of them were over.

    `tell` is called for each token with what reads the rows as they are then.
    """
    batch = pad_prompts(target, asked)

    def watch(output: torch.Tensor) -> bool:
        if tell is not None:
            tell(lambda: _read_rows(target, batch, output))
        return is_stopped()

    limiter = RowLimits(batch.limits, num_prompt_tokens=batch.num_prompt_tokens, is_stopped=watch)
    # The model's own generation config would add its penalties and cuts to what was asked for.
    target.model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=batch.max_new_tokens,
        eos_token_id=sorted(target.end_ids),
        pad_token_id=min(target.end_ids),
    )
    try:
        output = target.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_processor=_make_processors(target.section, batch),
            stopping_criteria=StoppingCriteriaList([limiter]),
        )
    except torch.OutOfMemoryError as error:
        raise RegenerationError(
            f"{len(asked)} conversations of up to {batch.num_prompt_tokens + batch.max_new_tokens:,} tokens do not fit "
            "into the device's memory; lower regenerate.batch_size or regenerate.max_tokens"
        ) from error
    return _read_rows(target, batch, output), limiter.was_stopped


def _read_rows(target: LocalTarget, batch: Batch, output: torch.Tensor) -> list[SaidTurn]:
    """New token ids of every row, up to its first end-of-turn token or its limit."""
    rows = zip(output[:, batch.num_prompt_tokens :].tolist(), batch.limits.tolist(), strict=True)
    turns = []
    for ids, limit in rows:
        own = _cut(ids[:limit], target.end_ids)
        has_ended = bool(own) and own[-1] in target.end_ids
        turns.append(SaidTurn(ids=own, has_ended=has_ended, is_over=has_ended or len(own) == limit))
    return turns


def _make_processors(section: RegenerateSection, batch: Batch) -> LogitsProcessorList:
    """Temperature, then top_p, then the rows' own numbers; none of them for the most likely token."""
    processors = LogitsProcessorList()
    if section.temperature == 0:
        return processors
    if section.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(section.temperature))
    if section.top_p < 1.0:
        processors.append(TopPLogitsWarper(section.top_p))
    processors.append(SeededSampler(batch.uniforms, num_prompt_tokens=batch.num_prompt_tokens))
    return processors


def _cut(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: end + 1]
