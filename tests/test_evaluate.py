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
from stages.evaluate.bootstrap import (
    BOOTSTRAP_ROUNDS,
    BOOTSTRAP_SEED,
    bootstrap_mean,
    bootstrap_ratio,
    estimate_difference,
    estimate_ratio,
)
from stages.evaluate.cached import evaluate_scores
from stages.evaluate.reliability import CALIBRATION_BINS, bin_slots, calibration_error, weighted_auc
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
    greedy_accept_rate: np.ndarray
    cross_entropy: np.ndarray
    confidence: np.ndarray | None


def make_scores(lengths: list[int], rng: np.random.Generator, *, confidence: bool = True) -> Scores:
    """One sample whose blocks have that many supervised slots each."""
    slot = np.concatenate([np.arange(length) for length in lengths]) if lengths else np.empty(0, int)
    count = len(slot)
    accept_rate = rng.random(count)
    return Scores(
        row=np.zeros(count, int),
        anchor=np.repeat(np.arange(len(lengths)), lengths),
        slot=slot,
        accept_rate=accept_rate,
        top1_agree=rng.random(count) < 0.5,
        cross_entropy=rng.random(count) * 3,
        confidence=rng.random(count) if confidence else None,
        greedy_accept_rate=(7919 * accept_rate) % 1,  # another number between 0 and 1
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
    greedy_taus, greedy_per_slot = [], [[] for _ in range(K)]
    reached, survived = [0.0] * K, [[] for _ in range(K)]
    for (_, scores), lengths in zip(batches, samples, strict=True):
        position = 0
        for length in lengths:
            survival, tau = 1.0, 1.0
            greedy_survival, greedy_tau = 1.0, 1.0
            for slot in range(length):
                greedy_per_slot[slot].append(float(scores.greedy_accept_rate[position]))
                greedy_survival *= greedy_per_slot[slot][-1]
                greedy_tau += greedy_survival
                accept = float(scores.accept_rate[position])
                reached[slot] += survival
                survival *= accept
                survived[slot].append(survival)
                tau += survival
                per_slot[slot].append(accept)
                agree.append(bool(scores.top1_agree[position]))
                entropy.append(float(scores.cross_entropy[position]))
                position += 1
            taus.append(tau)
            greedy_taus.append(greedy_tau)
    assert result.tau == pytest.approx(sum(taus) / len(taus))
    assert result.tau_greedy == pytest.approx(sum(greedy_taus) / len(greedy_taus))
    expected = [sum(rates) / len(rates) if rates else 0.0 for rates in greedy_per_slot]
    assert result.greedy_accept_rate_per_pos == pytest.approx(expected)
    expected = [sum(rates) / len(rates) if rates else 0.0 for rates in per_slot]
    assert result.accept_rate_per_pos == pytest.approx(expected)
    assert result.num_blocks_per_pos == tuple(map(len, per_slot))
    assert result.survival_per_pos == pytest.approx([sum(x) / len(x) if x else 0.0 for x in survived])
    conditional = [sum(survived[k]) / reached[k] if survived[k] else 0.0 for k in range(K)]
    assert result.conditional_accept_per_pos == pytest.approx(conditional)
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


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_bins_hold_every_slot_once(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, observed = rng.random(count), rng.random(count)
    bins = bin_slots(predicted, observed)
    members: list[list[int]] = [[] for _ in range(CALIBRATION_BINS)]
    for index in range(count):
        members[min(int(predicted[index] * CALIBRATION_BINS), CALIBRATION_BINS - 1)].append(index)
    assert bins.count == tuple(map(len, members))
    for values, means in ((predicted, bins.mean_predicted), (observed, bins.mean_observed)):
        expected = [sum(values[i] for i in own) / len(own) if own else 0.0 for own in members]
        assert means == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.booleans(), st.integers(0, 2**32 - 1))
def test_auc_equals_a_loop_over_pairs_of_events(count: int, coarse: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, observed = rng.random(count), rng.random(count)
    if coarse:  # ties, and events that are certain
        predicted, observed = predicted.round(1), observed.round()
    right = total = 0.0
    for i in range(count):
        for j in range(count):
            weight = observed[i] * (1 - observed[j])
            total += weight
            right += weight * (1.0 if predicted[i] > predicted[j] else 0.5 if predicted[i] == predicted[j] else 0.0)
    assert weighted_auc(predicted, observed) == (pytest.approx(right / total) if total else None)


def test_auc_of_certain_events_is_the_usual_one() -> None:
    assert weighted_auc(np.array([0.1, 0.9]), np.array([0.0, 1.0])) == 1.0
    assert weighted_auc(np.array([0.9, 0.1]), np.array([0.0, 1.0])) == 0.0
    assert weighted_auc(np.array([0.2, 0.9]), np.array([1.0, 1.0])) is None, "nothing was rejected"


def test_a_confidence_of_one_falls_into_the_last_bin() -> None:
    assert calibration_error(np.array([1.0, 1.0]), np.array([1.0, 0.5])) == pytest.approx(0.25)


def test_the_bootstrap_resamples_groups() -> None:
    values = np.repeat([1.0, 2.0], 500)  # two groups, each without any spread inside
    low, high = bootstrap_mean(values, groups=np.repeat([0, 1], 500))
    assert (low, high) == (1.0, 2.0)
    low, high = bootstrap_mean(values, groups=np.arange(1000))
    assert 1.45 < low < 1.5 < high < 1.55


def test_the_bootstrap_of_a_ratio_draws_samples_and_divides_sums() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(5, size=40) * 10  # sample ids are no positions
    top, bottom = rng.random(40), rng.random(40)
    names = sorted(set(groups.tolist()))
    generator, ratios = np.random.default_rng(BOOTSTRAP_SEED), []
    for _ in range(BOOTSTRAP_ROUNDS):
        drawn = [names[i] for i in generator.integers(len(names), size=len(names))]
        pairs = [(top[i], bottom[i]) for name in drawn for i in range(40) if groups[i] == name]
        ratios.append(sum(t for t, _ in pairs) / sum(b for _, b in pairs))
    assert bootstrap_ratio(top, bottom, groups=groups) == pytest.approx(np.quantile(ratios, [0.025, 0.975]))


def test_intervals_of_slots_are_those_of_their_own_blocks() -> None:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, K + 1, size=4).tolist() for _ in range(6)]
    batches = [(index * 7, make_scores(own, rng)) for index, own in enumerate(lengths)]
    result = evaluate_scores(batches, block_size=K)
    starts = [(sample_id, scores, start) for sample_id, scores in batches for start in np.flatnonzero(scores.slot == 0)]
    groups = np.array([sample_id for sample_id, _, _ in starts])
    for slot in range(K):
        columns = []
        for _, scores, start in starts:
            own = scores.accept_rate[start : start + slot + 1]
            has_slot = start + slot < len(scores.slot) and scores.slot[start + slot] == slot
            columns.append((own[-1], 1.0, np.prod(own), np.prod(own[:-1])) if has_slot else (0.0, 0.0, 0.0, 0.0))
        rate, counted, through, before = np.array(columns).T
        found = (result.accept_rate_low_per_pos[slot], result.accept_rate_high_per_pos[slot])
        assert found == pytest.approx(bootstrap_ratio(rate, counted, groups=groups))
        found = (result.conditional_accept_low_per_pos[slot], result.conditional_accept_high_per_pos[slot])
        assert found == pytest.approx(bootstrap_ratio(through, before, groups=groups))


def test_scores_out_of_order_are_our_own_mistake() -> None:
    scores = make_scores([2, 3], np.random.default_rng(0))
    scores.slot[[1, 2]] = scores.slot[[2, 1]]
    with pytest.raises(AssertionError, match="not ordered"):
        evaluate_scores([(0, scores)], block_size=K)


def test_no_confidence_head_gives_no_calibration() -> None:
    scores = make_scores([2, 3], np.random.default_rng(0), confidence=False)
    assert evaluate_scores([(0, scores)], block_size=K).confidence_ece is None


@pytest.mark.parametrize("markov_rank", [0, 8])
def test_a_real_draft_scored_twice_and_against_the_definition(tmp_path: Path, markov_rank: int) -> None:
    """Both taus of a trained draft equal those computed from its logits, block by block, without the module.

    The Markov head's bias comes from the data's token before the slot, whatever the draft proposed there.
    """
    config = make_config(
        tmp_path, train__max_steps=3, draft__markov_rank=markov_rank, draft__enable_confidence_head=False
    )
    extract(settings_of(config))
    draft_dir = train_draft(config).draft_dir
    result = evaluate_draft(config, draft_dir=draft_dir)
    assert result == evaluate_draft(config, draft_dir=draft_dir), "the anchors are fixed"
    model = Qwen3DSparkModel.from_pretrained(draft_dir).eval()
    reader = open_cache(config, layers=None)
    taus, greedy_taus, rates = [], [], []
    for index in reader.split_indices("validation"):
        sample = reader[index]
        anchors = choose_anchors(sample.loss_mask, 4, seed=0, epoch=0, sample_id=sample.sample_id)
        with torch.no_grad():
            h_AKD = model(
                sample.input_ids[None].long(),
                sample.hidden_states.reshape(1, sample.num_tokens, -1).float(),
                anchors[None],
            )[0]
            logits = h_AKD @ model.lm_head.weight.T
            if markov_rank:
                tokens = sample.input_ids.long()
                before = tokens[(anchors[:, None] + torch.arange(logits.shape[1])).clamp_max(len(tokens) - 1)]
                w1, w2 = (getattr(model.markov_head, f"markov_w{number}").weight for number in (1, 2))
                logits = logits + w1[before] @ w2.T
            draft = logits.softmax(-1)
            target = (sample.last_hidden_states.float() @ model.lm_head.weight.T).softmax(-1)
        for block, anchor in enumerate(anchors.tolist()):
            survival, tau = 1.0, 1.0
            greedy_survival, greedy_tau = 1.0, 1.0
            for slot in range(model.config.block_size):
                position = anchor + slot + 1
                if position >= sample.num_tokens or not sample.loss_mask[position]:
                    break
                accept = float(torch.minimum(draft[block, slot], target[position - 1]).sum())
                rates.append(accept)
                survival *= accept
                tau += survival
                greedy_survival *= float(target[position - 1][draft[block, slot].argmax()])
                greedy_tau += greedy_survival
            taus.append(tau)
            greedy_taus.append(greedy_tau)
    assert result.num_slots == len(rates)
    assert result.tau == pytest.approx(np.mean(taus), rel=1e-4)
    assert result.tau_greedy == pytest.approx(np.mean(greedy_taus), rel=1e-4)
    assert result.tau_greedy != pytest.approx(result.tau, rel=1e-3), "two quantities"


def test_a_missing_draft_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no draft here"):
        evaluate_draft(make_config(tmp_path), draft_dir=tmp_path / "nothing")


@pytest.mark.parametrize("num_samples", [1, 2])
def test_an_interval_contains_its_value_also_where_all_conversations_are_alike(num_samples: int) -> None:
    """Sums in another order differ in the last bit, which would put the value outside of an interval without width."""
    for seed in range(20):
        scores = make_scores([3] * 11, np.random.default_rng(seed))
        found = evaluate_scores([(index, scores) for index in range(num_samples)], block_size=3)
        assert found.tau_low <= found.tau <= found.tau_high
        for name in ("accept_rate", "conditional_accept"):
            low, value, high = (getattr(found, f"{name}{end}_per_pos") for end in ("_low", "", "_high"))
            assert all(a <= b <= c for a, b, c in zip(low, value, high, strict=True))


def test_the_interval_of_an_estimate_contains_its_value() -> None:
    numbers = np.array([1, 3, 7, 11, 13])
    for rate in np.random.default_rng(0).random(50):
        found = estimate_ratio(rate * numbers, numbers)
        assert found.low <= found.value <= found.high
        found = estimate_difference(rate * numbers, numbers, rate * numbers[::-1], numbers[::-1])
        assert found.low <= found.value <= found.high
