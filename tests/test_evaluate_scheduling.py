"""Calibration, threshold curves and the scheduling outlook against plain loops, and the files that keep them."""

import itertools
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.errors import SettingError
from stages.evaluate.blocks import Blocks
from stages.evaluate.calibration import (
    CALIBRATION_FILE,
    ERROR_ROUNDS,
    ERROR_SEED,
    TEMPERATURES,
    Origin,
    calibrate,
    few_slots,
    fit_temperatures,
    read_calibration,
    scale_confidence,
    split_halves,
    write_calibration,
)
from stages.evaluate.evaluation import Evaluation, evaluate_fully, read_evaluation, write_evaluation
from stages.evaluate.outlook import CONCURRENCIES, schedule_steps, simulate
from stages.evaluate.records import EvaluationError
from stages.evaluate.reliability import CALIBRATION_BINS, calibration_error
from stages.evaluate.thresholds import THRESHOLDS, trace_thresholds
from stages.evaluate.throughput import Throughput, ThroughputTable, assumed_table, read_throughput_table
from test_evaluate import make_scores

K = 3
ORIGIN = Origin(cache_digest="0" * 64, num_anchors=4, seed=0)
STEEP = ThroughputTable(file="steep.csv", tokens=(1, 4, 8, 2000), steps_per_second=(10.0, 9.0, 5.0, 0.01))


def make_blocks(
    num_blocks: int,
    rng: np.random.Generator,
    *,
    block_size: int = K,
    num_samples: int = 10,
    temperature: float = 1.0,
    noise: float = 0.0,
) -> Blocks:
    """Blocks of any length. The confidence is the accept rate, its logit shifted at random and times `temperature`."""
    length = rng.integers(1, block_size + 1, size=num_blocks)
    supervised = np.arange(block_size) < length[:, None]
    accept = np.clip(rng.beta(2.0, 0.5, size=(num_blocks, block_size)), 0.01, 0.99)
    odds = accept / (1 - accept) * np.exp(noise * rng.normal(size=accept.shape))
    return Blocks(
        num_samples=num_samples,
        sample=np.sort(rng.integers(num_samples, size=num_blocks)) * 3 + 5,
        length=length,
        accept=accept * supervised,
        top1=supervised.astype(float),
        greedy_accept=accept * supervised,
        cross_entropy=rng.random(accept.shape) * supervised,
        confidence=scale_confidence(odds / (1 + odds), 1 / temperature) * supervised,
    )


def rows_of(blocks: Blocks) -> list[list[tuple[float, float]]]:
    """Each block's (confidence, accept rate) pairs, as plain numbers."""
    assert blocks.confidence is not None
    return [
        [(float(blocks.confidence[i, k]), float(blocks.accept[i, k])) for k in range(int(blocks.length[i]))]
        for i in range(len(blocks))
    ]


def scaled(probability: float, temperature: float) -> float:
    return 1 / (1 + math.exp(-math.log(probability / (1 - probability)) / temperature))


def looped_error(pairs: list[tuple[float, float]]) -> float:
    gaps = [0.0] * CALIBRATION_BINS
    for predicted, observed in pairs:
        gaps[min(int(predicted * CALIBRATION_BINS), CALIBRATION_BINS - 1)] += predicted - observed
    return sum(map(abs, gaps)) / len(pairs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("seed", "num_samples"), [(0, 10), (1, 10), (0, 60), (1, 60)])
def test_temperatures_equal_a_plain_search(seed: int, num_samples: int, temperature: float) -> None:
    """Of few samples, a temperature leaves 1 only for a fall of the error by two standard errors of that fall."""
    blocks = make_blocks(
        3 * num_samples + 30, np.random.default_rng(seed), num_samples=num_samples, temperature=temperature, noise=1.0
    )
    rows = rows_of(blocks)
    found: list[float] = []
    smallest: list[float] = []
    for slot in range(K):
        own = [(sample, row) for sample, row in zip(blocks.sample.tolist(), rows, strict=True) if len(row) > slot]

        def predict(row: list[tuple[float, float]], last: float, slot: int = slot) -> tuple[float, float]:
            """Calibrated product of confidences up to the slot, and survival."""
            pairs = zip(row[: slot + 1], [*found, last], strict=True)
            return (
                math.prod(scaled(confidence, temperature) for (confidence, _), temperature in pairs),
                math.prod(accept for _, accept in row[: slot + 1]),
            )

        errors = {t: looped_error([predict(row, t) for _, row in own]) for t in TEMPERATURES.tolist()}
        best = min(errors, key=errors.__getitem__)
        names = sorted({sample for sample, _ in own})

        def draw_errors(
            last: float, own: list[Any] = own, names: list[int] = names, predict: Any = predict
        ) -> np.ndarray:
            generator, drawn_errors = np.random.default_rng(ERROR_SEED), []
            pairs = {name: [predict(row, last) for sample, row in own if sample == name] for name in names}
            for _ in range(ERROR_ROUNDS):
                drawn = [names[i] for i in generator.integers(len(names), size=len(names))]
                drawn_errors.append(looped_error([pair for name in drawn for pair in pairs[name]]))
            return np.array(drawn_errors)

        limit = errors[best] + float(np.std(draw_errors(best)))
        smallest.append(best)
        chosen = min((t for t in errors if errors[t] <= limit), key=lambda t: abs(math.log(t)))
        if len(names) < 30 and chosen != 1:
            noise = float(np.std(draw_errors(1.0) - draw_errors(chosen), ddof=0)) * math.sqrt(
                len(names) / (len(names) - 1)
            )
            chosen = chosen if errors[1.0] - errors[chosen] > 2 * noise else 1.0
        found.append(chosen)
    assert fit_temperatures(blocks) == pytest.approx(found)
    assert found != smallest, "the tolerance has something to say here"


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_known_temperature_is_found_and_the_error_falls_on_the_other_half(temperature: float) -> None:
    blocks = make_blocks(4000, np.random.default_rng(0), num_samples=200, temperature=temperature)
    fitted, measured = split_halves(blocks)
    temperatures = fit_temperatures(fitted)
    assert temperatures == pytest.approx([temperature] * K, rel=0.1)
    assert measured.confidence is not None
    own = measured.supervised
    before = calibration_error(measured.confidence[own], measured.accept[own])
    after = calibration_error(scale_confidence(measured.confidence, temperatures)[own], measured.accept[own])
    assert after < 0.1 * before


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 12])
def test_few_conversations_leave_a_sound_confidence_alone(num_samples: int) -> None:
    """Right confidences, two blocks of each conversation: whatever the error of so few says is chance."""
    moved = 0
    for seed in range(10):
        blocks = make_blocks(2 * num_samples, np.random.default_rng(seed), num_samples=num_samples, noise=1.0)
        fair = replace(blocks, confidence=blocks.accept)  # its errors are 0, so that it moves by chance alone
        assert fit_temperatures(fair) == (1.0,) * K
        moved += sum(temperature != 1 for temperature in fit_temperatures(blocks))
    assert moved <= 0.2 * 10 * K
    assert num_samples > 1 or not moved, "of one conversation no noise is known"


def test_few_conversations_move_a_confidence_that_is_clearly_wrong() -> None:
    """Six conversations of a hundred blocks; and the same blocks as one conversation, whose noise is not known."""
    blocks = make_blocks(600, np.random.default_rng(0), num_samples=6, temperature=2.0)
    assert fit_temperatures(blocks) == pytest.approx([2.0] * K, rel=0.15)
    assert few_slots(blocks) == [0, 1, 2]
    alone = replace(blocks, sample=np.zeros(len(blocks), int), num_samples=1)
    assert fit_temperatures(alone) == (1.0,) * K


def test_a_calibration_says_where_few_conversations_kept_it() -> None:
    rng = np.random.default_rng(0)
    fitted = make_blocks(300, rng, num_samples=40)
    measured = make_blocks(20, rng)
    late = fitted.sample < np.unique(fitted.sample)[10]  # the last slot is left to ten conversations
    fitted = replace(fitted, length=np.where(late, fitted.length, np.minimum(fitted.length, K - 1)))
    calibration = calibrate(fitted, measured, origin=ORIGIN)
    assert len(np.unique(fitted.sample)) == 40
    assert calibration.temperatures == (1.0,) * K
    assert calibration.kept_slots == (K - 1,)
    evaluation = evaluate(60)
    assert evaluation.scheduling is not None
    assert evaluation.scheduling.calibration.kept_slots == ()


def test_a_confidence_that_is_right_keeps_its_temperature() -> None:
    assert fit_temperatures(make_blocks(300, np.random.default_rng(0))) == (1.0,) * K


def test_a_slot_that_no_block_has_keeps_its_temperature() -> None:
    blocks = make_blocks(50, np.random.default_rng(0), temperature=2.0)
    assert fit_temperatures(blocks.select(blocks.length < K))[-1] == 1.0


def test_scaling_takes_certain_confidences_and_leaves_empty_slots() -> None:
    confidence = np.array([0.0, 1.0, 0.25, np.float32(1) - np.finfo(np.float32).eps / 4])
    scaled_confidence = scale_confidence(confidence, 2.0)
    assert scaled_confidence[0] == 0
    assert scaled_confidence[2] == pytest.approx(scaled(0.25, 2.0))
    assert np.isfinite(scaled_confidence).all()
    assert 0.999 < scaled_confidence[1] < 1
    assert scale_confidence(np.array([0.3, 0.7]), 1.0) == pytest.approx([0.3, 0.7])


def test_halves_share_no_sample() -> None:
    blocks = make_blocks(100, np.random.default_rng(0))
    fitted, measured = split_halves(blocks)
    ids = np.unique(blocks.sample)
    assert (np.unique(fitted.sample) == ids[0::2]).all()
    assert (np.unique(measured.sample) == ids[1::2]).all()
    assert len(fitted) + len(measured) == len(blocks)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_the_threshold_curve_equals_a_loop(num_blocks: int, seed: int) -> None:
    blocks = make_blocks(num_blocks, np.random.default_rng(seed), temperature=1.5)
    assert blocks.confidence is not None
    curve = trace_thresholds(blocks.confidence, blocks)
    assert curve.threshold == THRESHOLDS == tuple(i / 20 for i in range(21))
    for place, threshold in enumerate(THRESHOLDS):
        verified = accepted = 0.0
        for row in rows_of(blocks):
            predicted = survival = 1.0
            for confidence, accept in row:
                predicted, survival = predicted * confidence, survival * accept
                if predicted < threshold:
                    break
                verified, accepted = verified + 1, accepted + survival
        assert curve.verified[place] == pytest.approx(verified / num_blocks)
        assert curve.accepted[place] == pytest.approx(accepted / num_blocks)


def test_a_slot_at_the_threshold_is_verified() -> None:
    blocks = make_blocks(3, np.random.default_rng(0)).select(np.array([True, False, False]))
    curve = trace_thresholds(np.array([[0.5, 1.0, 0.5]]), blocks)
    assert curve.verified[10] == min(2, blocks.length[0])
    assert curve.verified[11] == 0


def looped_schedule(survival: list[list[float]], table: ThroughputTable) -> list[int]:
    """Algorithm 1 for one step, request by request."""

    def rate(num_tokens: int) -> float:
        return float(np.interp(num_tokens, table.tokens, table.steps_per_second))

    lengths = [0] * len(survival)
    expected = float(len(survival))
    best = expected * rate(len(survival))
    candidates = [
        (-probability, slot, request) for request, row in enumerate(survival) for slot, probability in enumerate(row)
    ]
    for num_admitted, (negative, slot, request) in enumerate(sorted(candidates), start=1):
        expected -= negative
        throughput = expected * rate(len(survival) + num_admitted)
        if throughput <= best:
            break
        best = throughput
        assert lengths[request] == slot, "a slot was admitted before one that it hangs on"
        lengths[request] += 1
    return lengths


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_scheduler_equals_a_plain_loop(num_requests: int, coarse: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_steps = 3
    length = rng.integers(0, K + 1, size=(num_steps, num_requests))
    survival = np.cumprod(rng.random((num_steps, num_requests, K)), axis=2)
    if coarse:
        survival = (survival * 8).round() / 8  # ties, and tokens without any chance; sums of eighths are exact
    found = schedule_steps(survival, length, STEEP)
    for step in range(num_steps):
        rows = [survival[step, r, : length[step, r]].tolist() for r in range(num_requests)]
        assert found[step].tolist() == looped_schedule(rows, STEEP)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_scheduler_is_the_best_choice_where_throughput_has_one_peak(num_requests: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    survival = np.cumprod(rng.random((num_requests, K)), axis=1)
    greedy = np.concatenate([[0.0], np.cumsum(np.sort(survival.ravel())[::-1])]) + num_requests
    curve = greedy * STEEP.steps_at(num_requests + np.arange(len(greedy)))
    peak = int(curve.argmax())
    assume((np.diff(curve[: peak + 1]) > 0).all())

    def throughput(lengths: tuple[int, ...]) -> float:
        expected = num_requests + sum(survival[r, :n].sum() for r, n in enumerate(lengths))
        return float(expected * STEEP.steps_at(np.array([num_requests + sum(lengths)]))[0])

    best = max(throughput(lengths) for lengths in itertools.product(range(K + 1), repeat=num_requests))
    found = schedule_steps(survival[None], np.full((1, num_requests), K), STEEP)[0]
    assert throughput(tuple(found.tolist())) == pytest.approx(best)


def test_the_scheduler_stops_at_the_first_drop() -> None:
    """A table with a dent: a better choice lies behind it, and is not taken."""
    table = ThroughputTable(file="dent.csv", tokens=(1, 2, 3, 4), steps_per_second=(10.0, 5.0, 9.0, 9.0))
    survival = np.array([[[0.9, 0.8, 0.7]]])
    assert schedule_steps(survival, np.array([[3]]), table).tolist() == [[0]]
    flat = ThroughputTable(file="flat.csv", tokens=(1, 4), steps_per_second=(10.0, 10.0))
    assert schedule_steps(survival, np.array([[3]]), flat).tolist() == [[3]]
    assert schedule_steps(survival, np.array([[2]]), flat).tolist() == [[2]], "only what a request offers"


def looped_yield(
    served: list[list[int]], lengths: list[list[int]], rows: list[list[tuple[float, float]]]
) -> tuple[float, float, float]:
    """Tokens a second, and verified and emitted tokens of a request, if each step verifies so many slots of each."""
    tokens = seconds = verified = 0.0
    for step, chosen in zip(served, lengths, strict=True):
        for block, length in zip(step, chosen, strict=True):
            tokens += 1 + sum(math.prod(accept for _, accept in rows[block][: n + 1]) for n in range(length))
        verified += sum(chosen)
        seconds += 1 / float(STEEP.steps_at(np.array([len(step) + sum(chosen)]))[0])
    count = sum(map(len, served))
    return tokens / seconds, verified / count, tokens / count


@pytest.mark.parametrize("num_blocks", [1, 7])
def test_the_simulation_equals_a_loop(num_blocks: int) -> None:
    rng = np.random.default_rng(num_blocks)
    blocks = make_blocks(num_blocks, rng, temperature=2.0)
    assert blocks.confidence is not None
    calibrated = scale_confidence(blocks.confidence, 2.0)
    found = simulate(blocks.confidence, calibrated, blocks, STEEP)
    assert [row.num_requests for row in found.concurrencies] == list(CONCURRENCIES)
    order = np.random.default_rng(0).permutation(num_blocks).tolist()
    accept = rows_of(blocks)
    for row in found.concurrencies:
        requests = row.num_requests
        steps = -(-num_blocks // requests)
        served = [[order[(step * requests + place) % num_blocks] for place in range(requests)] for step in range(steps)]

        lengths = [[[min(n, len(accept[b])) for b in step] for step in served] for n in range(K + 1)]
        for confidence in (calibrated, blocks.confidence):
            survival = [
                np.cumprod(row[:length]).tolist() for row, length in zip(confidence, blocks.length, strict=True)
            ]
            lengths.append([looped_schedule([survival[block] for block in step], STEEP) for step in served])
        assert len(row.fixed) == K + 1
        for way, chosen in zip((*row.fixed, row.scheduled, row.scheduled_uncalibrated), lengths, strict=True):
            expected = looped_yield(served, chosen, accept)
            assert (way.tokens_per_second, way.verified, way.emitted) == pytest.approx(expected)
        best = max(fixed.tokens_per_second for fixed in row.fixed)
        assert row.fixed[row.best_length].tokens_per_second == best
        assert row.gain == pytest.approx(row.scheduled.tokens_per_second / best - 1)


def test_concurrencies_end_where_the_table_ends() -> None:
    blocks = make_blocks(20, np.random.default_rng(0))
    assert blocks.confidence is not None
    table = ThroughputTable(file="short.csv", tokens=(1, 20), steps_per_second=(10.0, 5.0))
    found = simulate(blocks.confidence, blocks.confidence, blocks, table)
    assert [row.num_requests for row in found.concurrencies] == [1, 2, 4], "a step of 8 has up to 32 tokens"


def test_scheduling_by_a_perfect_confidence_beats_every_fixed_length_under_load() -> None:
    blocks = make_blocks(2000, np.random.default_rng(0), block_size=7)
    found = simulate(blocks.accept, blocks.accept, blocks, assumed_table())
    assert len(found.concurrencies) == len(CONCURRENCIES)
    gains = {row.num_requests: row.gain for row in found.concurrencies}
    assert gains[256] > 0.02
    assert abs(gains[1]) < 0.01, "a step of few tokens is no dearer than one of fewer"


def test_the_assumed_table_is_flat_and_then_falls() -> None:
    table = assumed_table()
    assert table.file is None
    assert "assumed" in table.label
    rates = table.steps_at(np.array([1, 64, 1024, 8192]))
    assert rates[1] > 0.99 * rates[0]
    assert rates[3] < 1.01 * rates[2] / 8, "eight times the tokens, eight times the time"
    assert table.tokens[-1] >= 256 * (1 + 32)


def test_a_throughput_table_is_read_and_interpolated(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("tokens,steps_per_second\n2,10\n\n4,6.5\n")
    table = read_throughput_table(file, least_tokens=4)
    assert table.steps_at(np.array([1, 2, 3, 4])).tolist() == [10.0, 10.0, 8.25, 6.5]
    with pytest.raises(SettingError, match="ends at 4 tokens; a step of one request has up to 5"):
        read_throughput_table(file, least_tokens=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "expected the header tokens,steps_per_second, got nothing"),
        ("tokens,rate\n1,2\n", "expected the header tokens,steps_per_second"),
        ("tokens,steps_per_second\n1,2\n", "at least two rows"),
        ("tokens,steps_per_second\n1,2\n2,x\n", "line 3: expected a whole number and a number, got '2,x'"),
        ("tokens,steps_per_second\n1,2\n2.5,1\n", "line 3: expected a whole number"),
        ("tokens,steps_per_second\n1,2,3\n", "line 2: expected a whole number"),
        ("tokens,steps_per_second\n2,2\n2,1\n", "each greater than the one before"),
        ("tokens,steps_per_second\n0,2\n2,1\n", "from 1 up"),
        ("tokens,steps_per_second\n1,2\n2,0\n", "steps_per_second: expected numbers from 1e-06 to 1e+09, got 0.0"),
        ("tokens,steps_per_second\n1,1e-320\n2,1e-320\n", "expected numbers from 1e-06 to 1e+09, got 1e-320"),
        ("tokens,steps_per_second\n1,2\n2,1e308\n", "expected numbers from 1e-06 to 1e+09, got 1e+308"),
        (f"tokens,steps_per_second\n1,2\n1{'0' * 30},1\n", "tokens: expected at most 1000000000, got 1000"),
        ("tokens,steps_per_second\n1,nan\n2,1\n", "finite"),
    ],
)
def test_a_wrong_throughput_table_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "table.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingError, match=re.escape(message)) as caught:
        read_throughput_table(file, least_tokens=2)
    assert str(file) in str(caught.value)


def test_a_throughput_table_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "table.csv")
    with pytest.raises(SettingError, match=r"table\.csv: cannot be read: is not a plain file"):
        read_throughput_table(tmp_path / "table.csv", least_tokens=2)


DIAGONAL = {"sample_batch_tokens": [8, 16, 32], "sample_steps_per_sec": [100.0, 95, 50.5], "max_batch_tokens": 64}
ADDITIVE = {
    "bias_seconds": 0.01, "bs_probes": [1, 4], "alpha_seconds": [0.0, 0.003],
    "m_probes": [8, 16, 32], "theta_seconds": [0.0, 0.002, 0.01],
}  # fmt: skip


def test_the_cost_table_of_sglang_s_profiler_is_read(tmp_path: Path) -> None:
    """As `sglang.benchmark.dspark_sps_profiler` of SGLang 0.5.23 writes it; what lies past the samples is not known."""
    file = tmp_path / "dspark_sps.json"
    file.write_text(json.dumps(DIAGONAL, separators=(",", ":")))
    table = read_throughput_table(file, least_tokens=8)
    assert table.steps_at(np.array([1, 8, 12, 32]), num_requests=4).tolist() == [100.0, 100.0, 97.5, 50.5]
    assert table.label == f"throughput of {file}"
    assert table.has(num_requests=4, num_tokens=32)
    assert not table.has(num_requests=4, num_tokens=33)
    with pytest.raises(SettingError, match="ends at 32 tokens"):
        read_throughput_table(file, least_tokens=33)


def test_the_cost_table_of_requests_and_tokens_is_read(tmp_path: Path) -> None:
    file = tmp_path / "dspark_sps.json"
    file.write_text(json.dumps(ADDITIVE, indent=1))
    table = read_throughput_table(file, least_tokens=8)
    # seconds: 0.01 + alpha(requests) + theta(tokens), both on straight lines and flat before the first probe
    assert table.steps_at(np.array([2, 8, 12, 32]), num_requests=1) == pytest.approx(
        [1 / 0.01, 1 / 0.01, 1 / 0.011, 1 / 0.02]
    )
    assert table.steps_at(np.array([16, 24]), num_requests=3) == pytest.approx([1 / 0.014, 1 / 0.018])
    blocks = make_blocks(20, np.random.default_rng(0))
    assert blocks.confidence is not None
    found = simulate(blocks.confidence, blocks.confidence, blocks, table)
    assert [row.num_requests for row in found.concurrencies] == [1, 2, 4], "no more than 4 requests were measured"
    alone = found.concurrencies[2].fixed[0]
    assert (alone.tokens_per_second, alone.emitted) == (pytest.approx(4 / 0.013), 1.0)
    assert schedule_steps(np.array([[[0.9, 0.05, 0.01]]]), np.array([[3]]), table).tolist() == [[3]], "all are free"
    evaluation = evaluate(4, table=table)
    write_evaluation(tmp_path / "evaluation.json", evaluation)
    assert read_evaluation(tmp_path / "evaluation.json") == evaluation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (DIAGONAL | {"max_batch_tokens": 16}, "max_batch_tokens: expected at least the largest sample, got 16"),
        (DIAGONAL | {"sample_batch_tokens": [8, 8, 16]}, "each greater than the one before"),
        (DIAGONAL | {"sample_steps_per_sec": [100.0, 95.0]}, "at least two rows"),
        (DIAGONAL | {"sample_steps_per_sec": [100.0, 95.0, "x"]}, "sample_steps_per_sec.2"),
        (DIAGONAL | {"sample_batch_tokens": [8.5, 16, 32]}, "sample_batch_tokens.0"),
        (
            {"sample_batch_tokens": [1], "sample_steps_per_sec": [1.0], "max_batch_tokens": 99},
            "expected at least two rows",
        ),
        ({"sample_batch_tokens": [8, 16]}, "sample_steps_per_sec: Field required"),
        (DIAGONAL | {"theta": 1}, "theta: Extra inputs are not permitted"),
        (ADDITIVE | {"bias_seconds": 0.0}, "bias_seconds: expected more than 0"),
        (ADDITIVE | {"bs_probes": [4, 1]}, "requests: expected whole numbers from 1 up"),
        (ADDITIVE | {"alpha_seconds": []}, "requests: expected as many seconds as numbers"),
        (ADDITIVE | {"theta_seconds": [0.0, -0.02, 0.0]}, "seconds of a step: expected 1e-09 to 1e+06, got -0.01"),
        ("{", "Invalid JSON"),
        ('{"bias_seconds": NaN}', "bias_seconds"),
    ],
)
def test_a_wrong_cost_table_is_refused(tmp_path: Path, fields: object, message: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    with pytest.raises(SettingError, match=re.escape(message)) as caught:
        read_throughput_table(file, least_tokens=2)
    assert str(file) in str(caught.value)


def test_a_folder_is_no_throughput_table(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=re.escape(f"{tmp_path}: cannot be read: is not a plain file")):
        read_throughput_table(tmp_path, least_tokens=2)


def evaluate(num_samples: int = 4, *, confidence: bool = True, table: Throughput | None = None) -> Evaluation:
    rng = np.random.default_rng(0)
    batches = [(index * 2, make_scores([2, 3, 1], rng, confidence=confidence)) for index in range(num_samples)]
    return evaluate_fully(batches, block_size=K, origin=ORIGIN, table=table or assumed_table())


def test_an_evaluation_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    evaluation = evaluate()
    write_evaluation(tmp_path / "evaluation.json", evaluation)
    assert read_evaluation(tmp_path / "evaluation.json") == evaluation
    assert [sample.sample_id for sample in evaluation.samples] == [0, 2, 4, 6]
    assert evaluation.tau == pytest.approx(np.mean([sample.tau for sample in evaluation.samples]))
    assert sum(sample.num_blocks for sample in evaluation.samples) == evaluation.num_blocks
    assert evaluation.scheduling is not None
    calibration = evaluation.scheduling.calibration
    assert (calibration.num_fitted_samples, calibration.num_measured_samples) == (2, 2)
    write_calibration(tmp_path, calibration)
    assert read_calibration(tmp_path) == calibration
    assert sorted(path.name for path in tmp_path.iterdir()) == [CALIBRATION_FILE, "evaluation.json"], "nothing is left"


def test_a_changed_byte_of_a_written_file_is_noticed(tmp_path: Path) -> None:
    """The checksum is that of the compact JSON of the other fields, as anybody would take it."""
    evaluation = evaluate()
    assert evaluation.scheduling is not None
    write_evaluation(tmp_path / "evaluation.json", evaluation)
    write_calibration(tmp_path, evaluation.scheduling.calibration)
    for name, read in (("evaluation.json", lambda: read_evaluation(tmp_path / "evaluation.json")),
                       (CALIBRATION_FILE, lambda: read_calibration(tmp_path))):  # fmt: skip
        file = tmp_path / name
        given = file.read_bytes()
        fields = json.loads(given)
        claimed = fields.pop("crc32c")
        compact = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        assert claimed == f"{google_crc32c.value(compact):08x}"
        for place in range(0, len(given), 97):
            if not chr(given[place]).isdigit():
                continue
            file.write_bytes(given[:place] + (b"7" if given[place : place + 1] != b"7" else b"3") + given[place + 1 :])
            if json.loads(file.read_bytes()) != json.loads(given):  # else a digit beyond what a float holds
                with pytest.raises(EvaluationError, match=r"crc32c|Extra|format_version"):
                    read()
        file.write_bytes(given)
        read()
        assert {"dataset", "num_samples", "ece_before", "ece_after"}.isdisjoint(fields) or name != CALIBRATION_FILE


def test_without_a_confidence_head_or_a_second_sample_nothing_is_calibrated(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level("INFO"):
        headless, alone = evaluate(confidence=False), evaluate(1)
    assert headless.scheduling is headless.reliability is alone.scheduling is None
    assert alone.reliability is not None
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the draft has no confidence head", "one conversation cannot be split to calibrate",
    ]  # fmt: skip
    for evaluation in (headless, alone):
        write_evaluation(tmp_path / "evaluation.json", evaluation)
        assert read_evaluation(tmp_path / "evaluation.json") == evaluation


def change(fields: dict[str, object], **changes: object) -> str:
    return json.dumps({key: value for key, value in {**fields, **changes}.items() if value != "drop"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "drop"}, "expected format_version 2, got no format_version; run dspark evaluate again"),
        ({"format_version": 3}, "expected format_version 2, got format_version 3"),
        ({"format_version": 1, "tau": "drop"}, "tau: Field required"),
        ({"format_version": True}, "got format_version True"),
        ({"tau": "drop"}, "tau: Field required"),
        ({"tau": "1.5"}, "tau: Input should be a valid number"),
        ({"other": 1}, "other: Extra inputs are not permitted"),
        ({"origin": None}, "origin"),
    ],
)
def test_another_form_of_evaluation_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(change(evaluate().to_json(), **changes))
    with pytest.raises(EvaluationError, match=re.escape(message)) as caught:
        read_evaluation(file)
    assert str(file) in str(caught.value)
    assert "dspark evaluate" in str(caught.value)


def test_files_of_version_1_are_read_without_what_they_did_not_know(tmp_path: Path) -> None:
    evaluation = evaluate()
    fields = evaluation.to_json()
    new = {"tau_greedy", "tau_greedy_low", "tau_greedy_high", "greedy_accept_rate_per_pos"}
    new |= {"weights_digest", "computed_in"}
    old = {name: value for name, value in fields.items() if name not in new} | {"format_version": 1}
    old["scheduling"]["calibration"]["format_version"] = 1
    del old["scheduling"]["calibration"]["kept_slots"]
    (tmp_path / "evaluation.json").write_text(json.dumps(old))
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(old["scheduling"]["calibration"]))
    found = read_evaluation(tmp_path / "evaluation.json")
    assert evaluation.scheduling is not None
    kept = evaluation.scheduling.calibration.model_copy(update={"kept_slots": ()})
    scheduling = evaluation.scheduling.model_copy(update={"calibration": kept})
    assert found == evaluation.model_copy(update=dict.fromkeys(new) | {"scheduling": scheduling})
    assert read_calibration(tmp_path) == kept
    for broken in ({"scheduling": 3}, {"scheduling": {"calibration": []}}):
        (tmp_path / "evaluation.json").write_text(json.dumps(old | broken))
        with pytest.raises(EvaluationError, match="scheduling"):
            read_evaluation(tmp_path / "evaluation.json")


@pytest.mark.parametrize("text", [None, "", "[]", "{", '"x"', "[" * 100_000])
def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / CALIBRATION_FILE).write_text(text)
    with pytest.raises(EvaluationError, match="dspark evaluate"):
        read_calibration(tmp_path)


def test_sglang_reads_the_calibration_as_it_is() -> None:
    """Its reader (0.5.23) takes `temperatures`, passes over fields that it does not know, and has a few of its own."""
    scheduling = evaluate().scheduling
    assert scheduling is not None
    fields = scheduling.calibration.model_dump(mode="json")
    assert [type(temperature) for temperature in fields["temperatures"]] == [float] * K
    assert min(fields["temperatures"]) > 0
    assert fields.keys().isdisjoint({"dataset", "num_samples", "ece_before", "ece_after"})


def test_a_calibration_with_a_wrong_temperature_is_refused(tmp_path: Path) -> None:
    evaluation = evaluate()
    assert evaluation.scheduling is not None
    fields = evaluation.scheduling.calibration.model_dump(mode="json")
    (tmp_path / CALIBRATION_FILE).write_text(change(fields, temperatures=[1.0, 0.0, 1.0]))
    with pytest.raises(EvaluationError, match=r"temperatures\.1: Input should be greater than 0"):
        read_calibration(tmp_path)
