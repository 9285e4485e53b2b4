"""Anchors and supervised slots: pure, uniform, and equal to their definition spelled out as loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.train.anchors import anchor_candidates, choose_anchors, sample_anchors, supervised_slots
from stages.train.documents import document_bounds

masks = st.lists(st.integers(0, 1), min_size=1, max_size=40)
packings = st.lists(masks, min_size=1, max_size=4)


def pack_masks(documents: list[list[int]], *, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of documents with an empty one at the end, padded by tokens whose mask is 1."""
    mask = [value for document in documents for value in document] + [1] * padding
    return torch.tensor([mask]), torch.tensor([[len(document) for document in documents] + [0]])


def candidates_by_loop(documents: list[list[int]]) -> list[int]:
    found, start = [], 0
    for document in documents:
        found += [start + a for a in range(len(document) - 1) if document[a] and document[a + 1]]
        start += len(document)
    return found


@given(masks)
def test_candidates_are_pairs_of_supervised_tokens(mask: list[int]) -> None:
    assert anchor_candidates(torch.tensor(mask)).tolist() == candidates_by_loop([mask])


@given(masks, st.integers(0, 12), st.integers(0, 2**32), st.integers(0, 50), st.integers(0, 2**40))
def test_chosen_anchors_are_candidates_in_order_without_repeats(
    mask: list[int], num_anchors: int, seed: int, epoch: int, sample_id: int
) -> None:
    chosen = choose_anchors(torch.tensor(mask), num_anchors, seed=seed, epoch=epoch, sample_id=sample_id)
    candidates = candidates_by_loop([mask])
    assert chosen.dtype == torch.long
    assert len(chosen) == min(num_anchors, len(candidates))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(chosen.tolist()) <= set(candidates)


def test_chosen_anchors_are_a_pure_function_of_their_arguments() -> None:
    mask = torch.ones(200, dtype=torch.uint8)
    chosen = choose_anchors(mask, 8, seed=1, epoch=2, sample_id=3)
    torch.manual_seed(123)
    np.random.seed(5)
    torch.rand(7)
    assert torch.equal(choose_anchors(mask.bool(), 8, seed=1, epoch=2, sample_id=3), chosen)
    others = [{"seed": 2, "epoch": 2, "sample_id": 3}, {"seed": 1, "epoch": 3, "sample_id": 3}]
    others.append({"seed": 1, "epoch": 2, "sample_id": 4})
    assert all(not torch.equal(choose_anchors(mask, 8, **other), chosen) for other in others)
    # Held still: a resumed training must see the anchors of the run that it continues, on any machine.
    assert chosen.tolist() == [1, 26, 46, 80, 92, 98, 164, 175]


def test_too_few_or_wrong_arguments() -> None:
    assert choose_anchors(torch.zeros(9), 4, seed=0, epoch=0, sample_id=0).tolist() == []
    assert choose_anchors(torch.ones(9), 8, seed=0, epoch=0, sample_id=0).tolist() == list(range(8))
    with pytest.raises(ValueError, match="one document"):
        anchor_candidates(torch.ones(2, 3))
    with pytest.raises(ValueError, match="num_anchors"):
        choose_anchors(torch.ones(9), -1, seed=0, epoch=0, sample_id=0)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_chosen_anchors_are_uniform() -> None:
    """3 of 20 candidates in 4,000 draws: the statistic's 99.9 % point at 19 degrees of freedom is 43.8."""
    mask = torch.ones(21)
    draws = [choose_anchors(mask, 3, seed=7, epoch=draw % 10, sample_id=draw // 10) for draw in range(4000)]
    assert chi_square(np.bincount(torch.cat(draws).numpy(), minlength=20)) < 43.8
    pairs = {(int(draw[0]), int(draw[2])) for draw in draws}
    assert len(pairs) > 150  # of 171 possible first and last: the draws are joint, not a sliding window


def test_sampled_anchors_are_uniform_and_follow_torchs_seed() -> None:
    mask = torch.ones(4000, 21, dtype=torch.uint8)
    torch.manual_seed(0)
    sampled = sample_anchors(mask, 3, seq_lens=None)
    assert chi_square(np.bincount(sampled.flatten().numpy(), minlength=20)) < 43.8
    torch.manual_seed(0)
    assert torch.equal(sample_anchors(mask, 3, seq_lens=None), sampled)


@given(packings, st.integers(0, 3), st.integers(1, 12))
def test_sampled_anchors_stay_inside_documents(documents: list[list[int]], padding: int, num_anchors: int) -> None:
    mask, seq_lens = pack_masks(documents, padding=padding)
    (row,) = sample_anchors(mask, num_anchors, seq_lens=seq_lens).tolist()
    chosen = [anchor for anchor in row if anchor >= 0]
    candidates = candidates_by_loop(documents)
    assert len(row) == min(num_anchors, mask.shape[1])
    assert row == sorted(chosen) + [-1] * (len(row) - len(chosen))
    assert len(set(chosen)) == len(chosen) == min(num_anchors, len(candidates))
    assert set(chosen) <= set(candidates)


@settings(max_examples=200)
@given(packings, st.integers(0, 3), st.integers(1, 5))
def test_supervised_slots_equal_their_definition(documents: list[list[int]], padding: int, block_size: int) -> None:
    mask, seq_lens = pack_masks(documents, padding=padding)
    anchors = [-1, *range(mask.shape[1]), -1]
    slots = supervised_slots(mask, torch.tensor([anchors]), seq_lens, block_size)[0].tolist()
    owner = [index for index, document in enumerate(documents) for _ in document] + [None] * padding
    flat = mask[0].tolist()
    for anchor, row in zip(anchors, slots, strict=True):
        expected, alive = [], anchor >= 0 and flat[anchor] == 1 and owner[anchor] is not None
        for slot in range(block_size):
            token = anchor + slot + 1
            alive = alive and token < len(flat) and owner[token] == owner[anchor] and flat[token] == 1
            expected.append(alive)
        assert row == expected, anchor


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 3))
def test_document_bounds(lengths: list[int], padding: int) -> None:
    num_tokens = sum(lengths) + padding
    if num_tokens == 0:
        return
    start, end = document_bounds(torch.tensor([lengths]), torch.zeros(1, num_tokens))
    expected, at = [], 0
    for length in lengths:
        expected += [(at, at + length)] * length
        at += length
    assert list(zip(start[0].tolist(), end[0].tolist(), strict=True)) == expected + [(0, 0)] * padding
