"""Evaluation metrics against brute-force loops over blocks and slots."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stage_one import settings_of
from pipeline.stage_two import evaluate_draft, open_cache, train_draft
from stages.errors import SettingError
from stages.evaluate.cached import CALIBRATION_BINS, bootstrap_mean, calibration_error, evaluate_scores
from stages.extract.run import extract
from stages.train import Qwen3DSparkModel
from stages.train.anchors import choose_anchors
from tiny_target import make_config

K = 3


@dataclass
class Scores:
    row: np.ndarray
    anchor: np.ndarray
    slot: np.ndarray
    accept_rate: np.ndarray
    top1_agree: np.ndarray
    cross_entropy: np.ndarray
    confidence: np.ndarray | None


def make_scores(lengths: list[int], rng: np.random.Generator, *, confidence: bool = True) -> Scores:
    """One sample whose blocks have that many supervised slots each."""
    slot = np.concatenate([np.arange(length) for length in lengths]) if lengths else np.empty(0, int)
    count = len(slot)
    return Scores(
        row=np.zeros(count, int),
        anchor=np.repeat(np.arange(len(lengths)), lengths),
        slot=slot,
        accept_rate=rng.random(count),
        top1_agree=rng.random(count) < 0.5,
        cross_entropy=rng.random(count) * 3,
        confidence=rng.random(count) if confidence else None,
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, K), max_size=5), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_metrics_equal_a_brute_force_loop(samples: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [(index, make_scores(lengths, rng)) for index, lengths in enumerate(samples)]
    if not any(samples):
        with pytest.raises(SettingError, match="nothing to evaluate"):
            evaluate_scores(batches, block_size=K)
        return
    result = evaluate_scores(batches, block_size=K)
    taus, per_slot, agree, entropy = [], [[] for _ in range(K)], [], []
    for (_, scores), lengths in zip(batches, samples, strict=True):
        position = 0
        for length in lengths:
            survival, tau = 1.0, 1.0
            for slot in range(length):
                accept = float(scores.accept_rate[position])
                survival *= accept
                tau += survival
                per_slot[slot].append(accept)
                agree.append(bool(scores.top1_agree[position]))
                entropy.append(float(scores.cross_entropy[position]))
                position += 1
            taus.append(tau)
    assert result.tau == pytest.approx(sum(taus) / len(taus))
    expected = [sum(rates) / len(rates) if rates else 0.0 for rates in per_slot]
    assert result.accept_rate_per_pos == pytest.approx(expected)
    assert result.top1_agreement == pytest.approx(sum(agree) / len(agree))
    assert result.cross_entropy == pytest.approx(sum(entropy) / len(entropy))
    assert (result.num_blocks, result.num_slots, result.num_samples) == (len(taus), len(agree), len(samples))
    assert result.tau_low - 1e-9 <= result.tau <= result.tau_high + 1e-9 or result.num_samples > 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_calibration_error_equals_a_loop_over_bins(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence, accept = rng.random(count), rng.random(count)
    expected = 0.0
    for bin_index in range(CALIBRATION_BINS):
        members = [
            i
            for i in range(count)
            if bin_index / CALIBRATION_BINS <= confidence[i] < (bin_index + 1) / CALIBRATION_BINS
        ]
        if members:
            gap = abs(np.mean([confidence[i] for i in members]) - np.mean([accept[i] for i in members]))
            expected += len(members) / count * gap
    assert calibration_error(confidence, accept) == pytest.approx(expected, abs=1e-9)


def test_a_confidence_of_one_falls_into_the_last_bin() -> None:
    assert calibration_error(np.array([1.0, 1.0]), np.array([1.0, 0.5])) == pytest.approx(0.25)


def test_the_bootstrap_resamples_groups() -> None:
    values = np.repeat([1.0, 2.0], 500)  # two groups, each without any spread inside
    low, high = bootstrap_mean(values, groups=np.repeat([0, 1], 500))
    assert (low, high) == (1.0, 2.0)
    low, high = bootstrap_mean(values, groups=np.arange(1000))
    assert 1.45 < low < 1.5 < high < 1.55


def test_no_confidence_head_gives_no_calibration() -> None:
    scores = make_scores([2, 3], np.random.default_rng(0), confidence=False)
    assert evaluate_scores([(0, scores)], block_size=K).confidence_ece is None


def test_a_real_draft_scored_twice_and_against_the_definition(tmp_path: Path) -> None:
    """tau of a trained draft equals the one computed from its logits, block by block, without the module."""
    config = make_config(tmp_path, train__max_steps=3, draft__markov_rank=0, draft__enable_confidence_head=False)
    extract(settings_of(config))
    draft_dir = train_draft(config).draft_dir
    result = evaluate_draft(config, draft_dir=draft_dir)
    assert result == evaluate_draft(config, draft_dir=draft_dir), "the anchors are fixed"
    model = Qwen3DSparkModel.from_pretrained(draft_dir).eval()
    reader = open_cache(config, layers=None)
    taus, rates = [], []
    for index in reader.split_indices("validation"):
        sample = reader[index]
        anchors = choose_anchors(sample.loss_mask, 4, seed=0, epoch=0, sample_id=sample.sample_id)
        with torch.no_grad():
            h_AKD = model(
                sample.input_ids[None].long(),
                sample.hidden_states.reshape(1, sample.num_tokens, -1).float(),
                anchors[None],
            )[0]
            draft = (h_AKD @ model.lm_head.weight.T).softmax(-1)
            target = (sample.last_hidden_states.float() @ model.lm_head.weight.T).softmax(-1)
        for block, anchor in enumerate(anchors.tolist()):
            survival, tau = 1.0, 1.0
            for slot in range(model.config.block_size):
                position = anchor + slot + 1
                if position >= sample.num_tokens or not sample.loss_mask[position]:
                    break
                accept = float(torch.minimum(draft[block, slot], target[position - 1]).sum())
                rates.append(accept)
                survival *= accept
                tau += survival
            taus.append(tau)
    assert result.num_slots == len(rates)
    assert result.tau == pytest.approx(np.mean(taus), rel=1e-4)


def test_a_missing_draft_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no draft here"):
        evaluate_draft(make_config(tmp_path), draft_dir=tmp_path / "nothing")
