"""The replay and the estimates before it, against decoding whose every outcome is summed up."""

import itertools
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest

from stages.evaluate.bootstrap import estimate_difference, estimate_ratio
from stages.evaluate.replay import (
    AnswerScores,
    bridge,
    drafted_tokens,
    ended_tokens,
    published_tokens,
    replay,
    round_starts,
)

VOCAB, K = 3, 2


class Tables:
    """Draft and target as tables of the next token given the last one; token 0 comes first in every answer."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.draft, self.target = (rng.dirichlet(np.ones(VOCAB), size=VOCAB) for _ in range(2))

    def chance(self, table: np.ndarray, tokens: tuple[int, ...]) -> float:
        return float(np.prod([table[before, token] for before, token in itertools.pairwise(tokens)]))

    def answers(self, num_tokens: int) -> Iterator[tuple[float, AnswerScores]]:
        """Every answer of `num_tokens` tokens behind the first, its probability and its scores."""
        overlap = np.minimum(self.draft, self.target).sum(1)
        keep = np.minimum(1, self.draft / self.target)
        for rest in itertools.product(range(VOCAB), repeat=num_tokens):
            tokens = (0, *rest)
            accept_IK, keep_IK = np.zeros((num_tokens, K)), np.zeros((num_tokens, K))
            for anchor in range(num_tokens):
                for slot in range(min(K, num_tokens - anchor)):
                    accept_IK[anchor, slot] = overlap[tokens[anchor + slot]]
                    keep_IK[anchor, slot] = keep[tokens[anchor + slot], tokens[anchor + slot + 1]]
            scores = AnswerScores(accept_rate=accept_IK, keep_chance=keep_IK)
            yield self.chance(self.target, tokens), scores

    def rounds(self, anchor: int, num_slots: int) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Every (probability, tokens) that rejection sampling of one block behind `anchor` can emit."""
        for block in itertools.product(range(VOCAB), repeat=num_slots):
            happens, last = self.chance(self.draft, (anchor, *block)), anchor
            for place, token in enumerate(block):
                accepted = min(1.0, self.target[last, token] / self.draft[last, token])
                rest = np.maximum(self.target[last] - self.draft[last], 0)
                if rest.sum() > 0:
                    for other in range(VOCAB):
                        yield happens * (1 - accepted) * rest[other] / rest.sum(), (*block[:place], other)
                happens *= accepted
                last = token
            for other in range(VOCAB):
                yield happens * self.target[last, other], (*block, other)

    @cache  # noqa: B019 (a test's tables live as long as the test)
    def expected_rounds(self, anchor: int, left: int) -> float:
        """Until `left` tokens have come."""
        if left == 0:
            return 0.0
        return 1 + sum(
            chance * self.expected_rounds(tokens[-1], left - len(tokens))
            for chance, tokens in self.rounds(anchor, min(K, left - 1))
        )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5])
def test_replayed_rounds_are_those_of_decoding(seed: int, num_tokens: int) -> None:
    """Over the target's own answers, the mean of the expected rounds is decoding's, to the last bit of the floats."""
    tables = Tables(seed)
    mean = 0.0
    for chance, scores in tables.answers(num_tokens):
        tokens, rounds = replay([scores])
        assert tokens.tolist() == [num_tokens]
        mean += chance * rounds[0]
    assert mean == pytest.approx(tables.expected_rounds(0, num_tokens), abs=1e-12)


def test_round_starts_of_an_answer_by_listing_what_is_accepted() -> None:
    keep = np.random.default_rng(0).random((5, K))

    def list_starts(anchor: int, chance: float, starts: np.ndarray) -> None:
        if anchor >= 5:
            return
        starts[anchor] += chance
        for slot in range(K):
            if anchor + slot >= 5:
                return  # the answer's end was drafted and accepted
            list_starts(anchor + slot + 1, chance * (1 - keep[anchor, slot]), starts)
            chance *= keep[anchor, slot]
        list_starts(anchor + K + 1, chance, starts)

    expected = np.zeros(5)
    list_starts(0, 1.0, expected)
    assert round_starts(keep) == pytest.approx(expected)
    assert round_starts(np.zeros((4, K))).tolist() == [1, 1, 1, 1]
    assert round_starts(np.ones((7, K))).tolist() == [1, 0, 0, 1, 0, 0, 1]
    assert len(round_starts(np.zeros((0, K)))) == 0


@pytest.mark.parametrize(("measure", "num_slots"), [(drafted_tokens, K), (ended_tokens, K)])
def test_tokens_of_a_round_far_from_the_end(measure: Callable[[AnswerScores], np.ndarray], num_slots: int) -> None:
    tables = Tables(2)
    mean = sum(chance * measure(scores)[0] for chance, scores in tables.answers(K + 1))
    expected = sum(chance * len(tokens) for chance, tokens in tables.rounds(0, num_slots))
    assert mean == pytest.approx(expected, abs=1e-12)


def test_tokens_of_a_round_at_the_end() -> None:
    """One token is left: any round yields it alone, where the other estimates count one behind it."""
    tables = Tables(2)
    for _, scores in tables.answers(1):
        assert ended_tokens(scores).tolist() == [1.0]
        assert drafted_tokens(scores)[0] > 1


def test_the_published_estimate_is_a_product_along_the_answer() -> None:
    accept = np.array([[0.5, 0.5], [0.25, 0.0]])
    scores = AnswerScores(accept_rate=accept, keep_chance=np.zeros((2, 2)))
    assert published_tokens(scores).tolist() == [1.75, 1.25]
    steps = bridge([scores, scores], max_blocks=1)
    assert len({step.name for step in steps}) == 5
    assert [step.estimate.value for step in steps] == [1.5, 1.5, 1 + (0.5 + 0.25) / 2, 1.0, 1.0]


def test_a_limit_of_blocks_weighs_short_answers_as_long_ones() -> None:
    long = AnswerScores(accept_rate=np.zeros((8, K)), keep_chance=np.zeros((8, K)))
    short = AnswerScores(accept_rate=np.ones((2, K)), keep_chance=np.ones((2, K)))
    steps = bridge([long, short], max_blocks=2)
    assert steps[0].estimate.value == pytest.approx((1.0 + 3.0) / 2)
    assert steps[1].estimate.value == pytest.approx((8 * 1.0 + 2 * 3.0) / 10)


def test_a_difference_over_the_same_groups_is_sharper_than_the_ratios() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(2, 0.5, 100)
    ones = np.ones(100)
    noisy = level + rng.normal(0, 0.01, 100)
    difference = estimate_difference(noisy + 0.1, ones, level, ones)
    assert difference.low < 0.1 + (noisy - level).mean() < difference.high
    assert difference.high - difference.low < 0.01
    ratio = estimate_ratio(level, ones)
    assert ratio.low < ratio.value < ratio.high
    assert ratio.value == pytest.approx(level.mean())
    assert ratio.high - ratio.low > 0.1


def test_a_group_without_rounds_is_no_division_by_zero() -> None:
    ratio = estimate_ratio(np.array([0.0, 6.0]), np.array([0.0, 3.0]))
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
