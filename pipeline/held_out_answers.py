"""Prompts of the cache's validation split, and what the cache says of the answers behind them.

Prompts are taken from the cache and not rendered anew: they are the very tokens that were held out, whatever the chat
template says by now, and each comes with an answer that the cache's estimate can be made for.

Shape suffixes: T tokens of a sample, I anchors, N tokens that slots predict, K slots, D hidden.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stages.errors import SettingError
from stages.evaluate.replay import AnswerScores
from stages.extract.capture import Capture
from stages.train import DSparkTrainerModule
from storage import CacheReader

LOGIT_ROWS = 256  # of the whole vocabulary at a time


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The tokens of a sample up to its last answer. The answer lies behind them, up to `answer_end`."""

    index: int
    sample_id: int
    tokens: tuple[int, ...]
    answer_end: int


def find_last_answer(loss_mask_T: torch.Tensor) -> tuple[int, int]:
    """[start, end) of the last run of supervised tokens; (0, 0) where none is supervised."""
    mask = [0, *loss_mask_T.ne(0).tolist()]
    end = max((place for place, value in enumerate(mask) if value), default=0)
    start = max(place for place in range(end + 1) if not mask[place])
    return start, end


def take_prompts(reader: CacheReader, indices: Iterable[int], *, num_prompts: int) -> tuple[list[Prompt], int]:
    """(the first prompts, samples that were passed over for having none). Raises SettingError where there is none."""
    prompts: list[Prompt] = []
    num_skipped = 0
    for index in map(int, indices):
        if len(prompts) == num_prompts:
            break
        input_ids, loss_mask = reader.read_tokens(index)
        start, end = find_last_answer(loss_mask)
        if start == 0:
            num_skipped += 1
            continue
        tokens = tuple(input_ids[:start].tolist())
        sample_id = int(reader.sample_ids[index])
        prompts.append(Prompt(index=index, sample_id=sample_id, tokens=tokens, answer_end=end))
    if not prompts:
        raise SettingError(
            f"{reader.place}: nothing to decode: none of the {num_skipped} validation samples has a prompt before its "
            "answer; raise data.validation_fraction, or use data with prompts"
        )
    return prompts, num_skipped


def score_answer(
    module: DSparkTrainerModule, reader: CacheReader, prompt: Prompt, *, max_new_tokens: int
) -> AnswerScores:
    """The blocks of the cache's answer to the prompt, of its first `max_new_tokens` tokens."""
    sample, first = reader[prompt.index], len(prompt.tokens)
    end = min(prompt.answer_end, first + max_new_tokens)
    return _score_blocks(
        module, sample.input_ids, sample.hidden_states, sample.last_hidden_states, first=first, last=end - 1
    )


def score_decoded(module: DSparkTrainerModule, capture: Capture, prompt: Prompt, answer: Sequence[int]) -> AnswerScores:
    """The blocks of an answer that was decoded just now; `capture` gives the states, as stage one does."""
    input_ids = np.array([*prompt.tokens, *answer], dtype=np.int32)
    states = capture([input_ids])
    return _score_blocks(
        module,
        torch.from_numpy(input_ids),
        states.hidden_states,
        states.last_hidden_states,
        first=len(prompt.tokens),
        last=len(input_ids) - 1,
    )


@torch.inference_mode()
def _score_blocks(
    module: DSparkTrainerModule,
    ids_T: torch.Tensor,
    hidden_TLD: torch.Tensor,
    last_TD: torch.Tensor,
    *,
    first: int,
    last: int,
) -> AnswerScores:
    """Every block of the answer that lies at positions `first` to `last`, at temperature 1."""
    model = module.draft_model
    device = model.fc.weight.device
    accept_IK = torch.zeros(max(last - first, 0), model.block_size, dtype=torch.float64)
    keep_IK = accept_IK.clone()
    if last > first:
        ids_T, hidden_TLD, last_TD = ids_T.to(device), hidden_TLD.to(device), last_TD.to(device)
        mask_T = torch.zeros_like(ids_T)
        mask_T[first : last + 1] = 1
        anchors_I = torch.arange(first, last, device=device)
        scores = module.score(
            ids_T[None], hidden_TLD.flatten(1)[None], mask_T[None], last_TD[None], anchor_positions=anchors_I[None]
        )
        anchor, slot = scores.anchor.cpu(), scores.slot.cpu()
        own_N = _log_chances(module, last_TD[first:last], ids_T[first + 1 : last + 1].long())
        accept_IK[anchor, slot] = scores.accept_rate.cpu().double()
        keep_IK[anchor, slot] = (-scores.cross_entropy.cpu().double() - own_N[anchor + slot]).exp().clamp_max(1)
    return AnswerScores(accept_rate=accept_IK.numpy(), keep_chance=keep_IK.numpy())


def _log_chances(module: DSparkTrainerModule, last_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """log p_target of each label, from the state before it: float64 on the CPU."""
    parts = []
    for start in range(0, len(labels_N), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        log_chances = module.draft_model.base_logits(last_ND[rows]).log_softmax(-1)
        parts.append(log_chances.gather(1, labels_N[rows, None]).squeeze(1))
    return torch.cat(parts).cpu().double()
