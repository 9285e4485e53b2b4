"""Rejection sampling of one drafted block: the tokens that come out are distributed as the target's own
(Leviathan et al., arXiv 2211.17192, theorem 1).

At temperature 0 all distributions are one-hot, which makes the same rules an exact match of argmaxes.

Shape suffixes: K drafted tokens (at most the block size), V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws tokens at a temperature, from a generator on the device of the logits."""

    temperature: float
    generator: torch.Generator

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """softmax(logits / temperature), or one-hot argmax at 0: float64, so that p/q and p-q lose nothing."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        return (logits.double() / self.temperature).softmax(-1)

    def draw(self, weights_V: torch.Tensor) -> int:
        """A token, in proportion to the weights."""
        return int(torch.multinomial(weights_V, 1, generator=self.generator))

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self.generator, device=self.generator.device, dtype=torch.float64))


def verify_block(
    tokens: Sequence[int], draft_KV: torch.Tensor, target_V: torch.Tensor, *, sampler: Sampler
) -> tuple[int, int]:
    """(number of accepted tokens, the token behind them).

    Token i, drawn from `draft_KV[i]`, is accepted with probability min(1, p/q), p being `target_V[i]`. Behind the first
    rejected one comes a draw from norm(max(0, p - q)); behind a block accepted whole, one from the target, whose
    distributions `target_V` are [K + 1, V].
    """
    for place, token in enumerate(tokens):
        draft_V, own_V = draft_KV[place], target_V[place]
        if sampler.uniform() >= float(own_V[token] / draft_V[token]):
            return place, sampler.draw(residual(own_V, draft_V))
    return len(tokens), sampler.draw(target_V[len(tokens)])


def residual(target_V: torch.Tensor, draft_V: torch.Tensor) -> torch.Tensor:
    """max(0, p - q), not normed: what the target gives more often than accepted drafts do."""
    rest_V = (target_V - draft_V).clamp_min(0)
    return rest_V if float(rest_V.sum()) > 0 else target_V  # p = q up to rounding: any token of the target's is right


def accept_chances(tokens: Sequence[int], draft_KV: torch.Tensor, target_V: torch.Tensor) -> list[float]:
    """min(1, p/q) of each drafted token."""
    return [min(1.0, float(target_V[i, token] / draft_KV[i, token])) for i, token in enumerate(tokens)]


def expected_tokens(
    tokens: Sequence[int], draft_KV: torch.Tensor, target_V: torch.Tensor, *, stop_ids: Collection[int]
) -> float:
    """Tokens that a round yields in expectation over its verification and over each slot's last draw.

    1 + Σ_k Π_{i<k} min(1, p_i/q_i)(token i) · Σ_v min(p_k, q_k)(v), v no stop token, since nothing follows one. Its
    mean over drafts is the mean number of tokens a round, with less noise than counting them (Rao-Blackwell). `tokens`
    end at the first stop token.
    """
    if not tokens:
        return 1.0
    overlap_KV = torch.minimum(draft_KV[: len(tokens)], target_V[: len(tokens)])
    go_on_K = overlap_KV.sum(-1) - overlap_KV[:, sorted(stop_ids)].sum(-1)
    total, survival = 1.0, 1.0
    for chance, go_on in zip(accept_chances(tokens, draft_KV, target_V), go_on_K.tolist(), strict=True):
        total += survival * go_on
        survival *= chance
    return total
