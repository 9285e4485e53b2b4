"""Tokens a round that decoding would reach, from the cache alone: decoding replayed on answers that it may give.

An answer sampled from the target itself is an outcome of speculative decoding, too. Given that outcome, the drafted
token of a slot was accepted with probability min(p, q)(x) / p(x) = min(1, q/p)(x), x being the answer's token;
otherwise x came from the residual, and the round ended there. So the chance that a round starts at a token follows from
the rounds before, without drawing anything, and the answer's tokens over its expected rounds are tokens a round.

The published estimate (`cached.py`) multiplies accept rates along the answer, at a limited number of anchors anywhere.
It differs from what decoding reaches in four ways, which `bridge` takes back one by one.

Shape suffixes: I anchors, those of an answer but its last token; K slots; G answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stages.evaluate.bootstrap import Estimate, estimate_ratio


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Slot k of the block at the answer's token i predicts its token i+k+1. Both [I, K], 0 where that is not there."""

    accept_rate: np.ndarray
    """Σ_v min(p, q)(v)."""
    keep_chance: np.ndarray
    """min(1, q/p) of the answer's own token."""

    def __post_init__(self) -> None:
        if self.accept_rate.shape != self.keep_chance.shape or self.accept_rate.ndim != 2:
            raise AssertionError(f"{self.accept_rate.shape} and {self.keep_chance.shape} are no [I, K]")


@dataclass(frozen=True, kw_only=True)
class BridgeStep:
    """One estimate on the way from the published one to decoding's."""

    name: str
    estimate: Estimate


def bridge(answers: Sequence[AnswerScores], *, max_blocks: int) -> list[BridgeStep]:
    """The estimates from the published one, on these answers, to the replay; intervals over answers.

    `max_blocks`: anchors that the published estimate draws in a conversation at most, so that short ones, which tend to
    be easier, weigh as much as long ones.
    """
    steps = (
        (
            f"accept rates multiplied along the answer, {max_blocks} blocks of it",
            _limited(answers, max_blocks=max_blocks),
        ),
        ("all of its blocks: long answers weigh more", _per_answer(answers, published_tokens)),
        ("weighed by the chance that the draft proposed the tokens before", _per_answer(answers, drafted_tokens)),
        ("no token counted behind the answer's end", _per_answer(answers, ended_tokens)),
        ("at the starts of rounds only: the replay", replay(answers)),
    )
    return [BridgeStep(name=name, estimate=estimate_ratio(num_G, den_G)) for name, (num_G, den_G) in steps]


def replay(answers: Sequence[AnswerScores]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens behind the first one, expected rounds) of each answer, both [G]."""
    tokens = np.array([len(answer.keep_chance) for answer in answers], dtype=np.float64)
    return tokens, np.array([round_starts(answer.keep_chance).sum() for answer in answers])


def round_starts(keep_IK: np.ndarray) -> np.ndarray:
    """The chance that a round starts at each anchor, [I]; at the first one it does."""
    num_anchors, block_size = keep_IK.shape
    starts_I = np.zeros(num_anchors)
    starts_I[:1] = 1.0
    for anchor in range(num_anchors):
        reach = starts_I[anchor]  # that the round is still going on
        for slot in range(min(block_size, num_anchors - anchor)):
            behind = anchor + slot + 1
            if behind < num_anchors:
                starts_I[behind] += reach * (1 - keep_IK[anchor, slot])
            reach *= keep_IK[anchor, slot]
        if anchor + block_size + 1 < num_anchors:  # the token behind a block accepted whole starts the next round
            starts_I[anchor + block_size + 1] += reach
    return starts_I


def published_tokens(answer: AnswerScores) -> np.ndarray:
    """1 + Σ_k Π_{i<=k} accept rate i, at each anchor [I]."""
    tokens: np.ndarray = 1 + answer.accept_rate.cumprod(axis=1).sum(axis=1)
    return tokens


def drafted_tokens(answer: AnswerScores) -> np.ndarray:
    """1 + Σ_k (Π_{i<k} keep chance i) · accept rate k, at each anchor [I].

    Over answers from the target its mean is that of 1 + Σ_k P(the first k drafted tokens are accepted): where the draft
    is right about one token it tends to be right about the next, which a product of rates leaves out.
    """
    before_IK = np.concatenate(
        [np.ones((len(answer.keep_chance), 1)), answer.keep_chance.cumprod(axis=1)[:, :-1]], axis=1
    )
    tokens: np.ndarray = 1 + (before_IK * answer.accept_rate).sum(axis=1)
    return tokens


def ended_tokens(answer: AnswerScores) -> np.ndarray:
    """Tokens that a round yields up to the answer's end, in expectation given the answer, at each anchor [I]."""
    num_anchors = len(answer.keep_chance)
    reach_IK = answer.keep_chance.cumprod(axis=1)
    # The token of slot k+1 comes if those of slots 0..k were accepted; none comes behind the answer's last.
    left_I = num_anchors - np.arange(num_anchors)
    is_followed_IK = np.arange(1, reach_IK.shape[1] + 1) < left_I[:, None]
    tokens: np.ndarray = 1 + (reach_IK * is_followed_IK).sum(axis=1)
    return tokens


def _limited(answers: Sequence[AnswerScores], *, max_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Published tokens, in expectation over the anchors drawn, and their number: (sum, count) of each answer [G]."""
    tokens_G, count_G = _per_answer(answers, published_tokens)
    drawn_G = np.minimum(count_G, max_blocks)
    return tokens_G * drawn_G / np.maximum(count_G, 1), drawn_G


def _per_answer(
    answers: Sequence[AnswerScores], measure: Callable[[AnswerScores], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(sum over anchors, number of anchors) of each answer, both [G]."""
    values = [measure(answer) for answer in answers]
    return np.array([value.sum() for value in values]), np.array([len(value) for value in values])
