"""Sampling by numbers that belong to a row: what it says depends neither on its batch nor on who was asked before.

Shapes: B rows, V vocabulary, N new tokens.
"""

from collections.abc import Callable
from typing import Any

import torch


def draw_uniforms(seed: int, count: int) -> torch.Tensor:
    """`count` numbers in [0, 1), float64, a function of the seed alone on any device: [N]."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pick_tokens(logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulated probability passes the row's number: a sample of softmax(logits), [B]."""
    cumulated_BV = logits_BV.double().softmax(-1).cumsum(-1)
    aims_B1 = uniforms_B[:, None] * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, aims_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


class SeededSampler:
    """A logits processor of transformers: leaves to a greedy search only the token that a row's numbers pick."""

    def __init__(self, uniforms_BN: torch.Tensor, *, num_prompt_tokens: int) -> None:
        self._uniforms_BN = uniforms_BN
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self._num_prompt_tokens
        picked_B = pick_tokens(scores, self._uniforms_BN[:, step].to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, picked_B[:, None], 0.0)


class RowLimits:
    """A stopping criterion of transformers: each row's own number of new tokens, and the end of all when stopped.

    `is_stopped` is asked once a token, and shown prompts and answers so far.
    """

    def __init__(
        self, limits_B: torch.Tensor, *, num_prompt_tokens: int, is_stopped: Callable[[torch.Tensor], bool]
    ) -> None:
        self._limits_B = limits_B
        self._num_prompt_tokens = num_prompt_tokens
        self._is_stopped = is_stopped
        self.was_stopped = False

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_options: Any) -> torch.Tensor:
        self.was_stopped = self.was_stopped or self._is_stopped(input_ids)
        return (input_ids.shape[1] - self._num_prompt_tokens >= self._limits_B) | self.was_stopped
