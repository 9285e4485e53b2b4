"""Prompts of the cache's validation split, and what the cache says of the answers behind them.

Prompts are taken from the cache and not rendered anew: they are the very tokens that were held out, whatever the chat
template says by now, and each comes with an answer that the cache's estimate can be made for.

Shape suffixes: T tokens of a sample, I anchors, N tokens that slots predict, K slots, D hidden.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from stages.errors import SettingError
from stages.evaluate.replay import AnswerScores
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


@torch.inference_mode()
def score_answer(
    module: DSparkTrainerModule, reader: CacheReader, prompt: Prompt, *, max_new_tokens: int
) -> AnswerScores:
    """Every block of the prompt's answer, of its first `max_new_tokens` tokens, at temperature 1."""
    model, sample = module.draft_model, reader[prompt.index]
    device = model.fc.weight.device
    first = len(prompt.tokens)
    last = min(prompt.answer_end, first + max_new_tokens) - 1
    accept_IK = torch.zeros(last - first, model.block_size, dtype=torch.float64)
    keep_IK = accept_IK.clone()
    if last > first:
        mask_T = torch.zeros(sample.num_tokens, dtype=torch.uint8)
        mask_T[first : last + 1] = 1
        scores = module.score(
            sample.input_ids[None].to(device),
            sample.hidden_states.flatten(1)[None].to(device),
            mask_T[None].to(device),
            sample.last_hidden_states[None].to(device),
            anchor_positions=torch.arange(first, last, device=device)[None],
        )
        anchor, slot = scores.anchor.cpu(), scores.slot.cpu()
        labels_N = sample.input_ids[first + 1 : last + 1].long().to(device)
        own_N = _log_chances(module, sample.last_hidden_states[first:last].to(device), labels_N)
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
