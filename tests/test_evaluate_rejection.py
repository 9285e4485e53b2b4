"""Rejection sampling against brute force: every outcome's probability summed over all drafts, and drawn samples."""

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from stages.evaluate import rejection
from stages.evaluate.decode import cut_behind_stop
from stages.evaluate.rejection import Sampler, accept_chances, expected_tokens, residual, verify_block

VOCAB = 4
NUM_DRAWS = 4000


def p_value(counts: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float], num: int) -> float:
    """Of Pearson's chi-square, cells of fewer than five expected draws taken together."""
    rare = [cell for cell, chance in expected.items() if chance * num < 5]
    pairs = [(counts.get(cell, 0), chance * num) for cell, chance in expected.items() if cell not in rare]
    if rare:
        pairs.append((sum(counts.get(cell, 0) for cell in rare), sum(expected[cell] for cell in rare) * num))
    assert sum(seen for seen, _ in pairs) == num, "an outcome that the reference does not know"
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in pairs if mean > 0)
    half_degrees = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


class Chain:
    """Draft and target as tables: the next token's distribution given the last token, for a block of two."""

    def __init__(self, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.draft, self.target = (
            torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64).mul(1.5).softmax(-1) for _ in range(2)
        )

    def rows(self, table: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
        """The distributions behind the anchor, token 0, and behind each of `tokens`."""
        return table[[0, *tokens]]

    def draw_round(self, sampler: Sampler) -> tuple[int, ...]:
        """What one round emits, made up to three tokens by the target alone."""
        first = sampler.draw(self.draft[0])
        block = (first, sampler.draw(self.draft[first]))
        num_accepted, behind = verify_block(
            block, self.rows(self.draft, block), self.rows(self.target, block), sampler=sampler
        )
        emitted = [*block[:num_accepted], behind]
        while len(emitted) < 3:
            emitted.append(sampler.draw(self.target[emitted[-1]]))
        return tuple(emitted)

    def target_chance(self, tokens: tuple[int, ...]) -> float:
        chance = 1.0
        for before, token in itertools.pairwise((0, *tokens)):
            chance *= float(self.target[before, token])
        return chance


def draw_p_value(seed: int) -> float:
    chain, sampler = Chain(seed=seed), Sampler(temperature=1.0, generator=torch.Generator().manual_seed(seed))
    counts = Counter(chain.draw_round(sampler) for _ in range(NUM_DRAWS))
    expected = {cell: chain.target_chance(cell) for cell in itertools.product(range(VOCAB), repeat=3)}
    return p_value(counts, expected, NUM_DRAWS)


@pytest.mark.parametrize("seed", [0, 1])
def test_rounds_are_distributed_as_the_target(seed: int) -> None:
    assert draw_p_value(seed) > 1e-3


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("residual", lambda target_V, _draft_V: target_V),
        ("residual", lambda target_V, draft_V: (target_V - draft_V).abs()),
        ("residual", lambda _target_V, draft_V: draft_V),
    ],
)
def test_a_wrong_residual_is_noticed(
    name: str, wrong: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejection, name, wrong)
    assert draw_p_value(0) < 1e-6


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    chain = Chain(seed=3)
    sampler = Sampler(temperature=1.0, generator=torch.Generator().manual_seed(0))
    rows = chain.rows(chain.target, (1, 2))
    assert all(verify_block((1, 2), rows[:2], rows, sampler=sampler)[0] == 2 for _ in range(200))
    assert torch.equal(residual(rows[0], rows[0]), rows[0])


def brute_force_tokens(chain: Chain, stop_ids: set[int]) -> float:
    """Mean emitted tokens: every draft of two tokens, every outcome of its verification."""
    total = 0.0
    for block in itertools.product(range(VOCAB), repeat=2):
        chance = float(chain.draft[0, block[0]] * chain.draft[block[0], block[1]])
        kept = tuple(cut_behind_stop(block, stop_ids))
        draft, target = chain.rows(chain.draft, kept), chain.rows(chain.target, kept)
        for num_accepted in range(len(kept) + 1):
            happens = chance
            for place in range(num_accepted):
                happens *= min(1.0, float(target[place, kept[place]] / draft[place, kept[place]]))
            if num_accepted < len(kept):
                happens *= 1 - min(
                    1.0, float(target[num_accepted, kept[num_accepted]] / draft[num_accepted, kept[num_accepted]])
                )
            ends = num_accepted > 0 and kept[num_accepted - 1] in stop_ids
            total += happens * (num_accepted + (0 if ends else 1))
    return total


@pytest.mark.parametrize("stop_ids", [set(), {1}, {1, 2}])
def test_expected_tokens_average_to_the_mean_number_of_tokens(stop_ids: set[int]) -> None:
    chain = Chain(seed=5)
    mean = 0.0
    for block in itertools.product(range(VOCAB), repeat=2):
        chance = float(chain.draft[0, block[0]] * chain.draft[block[0], block[1]])
        kept = cut_behind_stop(block, stop_ids)
        rows = [chain.rows(table, tuple(kept)) for table in (chain.draft, chain.target)]
        mean += chance * expected_tokens(kept, *rows, stop_ids=stop_ids)
    assert mean == pytest.approx(brute_force_tokens(chain, stop_ids), abs=1e-12)
    assert expected_tokens([], rows[0], rows[1], stop_ids=stop_ids) == 1.0


def test_at_temperature_zero_only_the_argmax_is_accepted() -> None:
    sampler = Sampler(temperature=0.0, generator=torch.Generator().manual_seed(0))
    draft_KV = sampler.probabilities(torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]]))
    target_V = sampler.probabilities(torch.tensor([[0.0, 9.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    for _ in range(50):
        assert verify_block([1, 0], draft_KV, target_V, sampler=sampler) == (1, 2)
        assert verify_block([1], draft_KV, target_V, sampler=sampler) == (1, 2)
    assert accept_chances([1, 0], draft_KV, target_V) == [1.0, 0.0]
    assert expected_tokens([1, 0], draft_KV, target_V, stop_ids=()) == 2.0


def test_a_temperature_sharpens_as_softmax_does() -> None:
    sampler = Sampler(temperature=0.5, generator=torch.Generator())
    powers = [2.0**2, 3.0**2, 5.0**2]
    expected = torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
    torch.testing.assert_close(sampler.probabilities(torch.tensor([2.0, 3.0, 5.0]).double().log()), expected)
