"""Sequential temperature scaling of the confidence, and `calibration.json`, which lies in the draft's folder.

DSpark, arXiv 2607.05147: for each slot, left to right, the temperature that minimises the calibration error of the
product of confidences up to it, the slots before it already scaled. Few blocks survive to the last slots, where the
smallest error is chance (measured on the embedded default, on the other half of the samples: temperatures of 0.56 to
4.9, and the error of a confidence rises from 0.027 to 0.071). So of the temperatures whose errors cannot be told from
the smallest, the one nearest to 1 is taken (0.88 to 1.02, and 0.024). Temperatures are fitted on one half of the
samples and judged on the other.

Of few samples resampling tells too little noise, of one none: then a temperature leaves 1 only if the error falls by
more than twice the standard error of its fall. Measured on made-up confidences that are right, 2 to 20 samples of two
blocks: without this rule 25 to 41 % of the temperatures left 1, with it 2 to 5 %.
Shape suffixes: M blocks, K slots of a block, S samples, B bins.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field

from stages.evaluate.blocks import Blocks
from stages.evaluate.bootstrap import ENOUGH_GROUPS
from stages.evaluate.records import read_record, write_record
from stages.evaluate.reliability import CALIBRATION_BINS, ConfidenceQuality, bins_of, calibration_error, measure_quality
from storage.sealed import Record

CALIBRATION_FILE = "calibration.json"
FORMAT_VERSION: Final = 2

# 1/8 to 8 in steps of 2.2 %, the nearest to 1 first. The error jumps where a block changes its bin, so all are tried.
TEMPERATURES = np.array(sorted(2.0 ** np.linspace(-3, 3, 193), key=lambda temperature: abs(np.log2(temperature))))
# Confidences are sigmoids in float32, which is 1 from a logit of 17 on: such a logit counts as 16.
SMALLEST_PROBABILITY = 1e-7

ERROR_ROUNDS = 200  # of the bootstrap: a standard error good to 5 %
ERROR_SEED = 0
NOISE_LIMIT = 2.0  # standard errors by which the error of few samples must fall

Temperature = Annotated[float, Field(gt=0)]


class Origin(Record):
    """Which blocks of a sample were scored: equal origins, equal blocks. It does not say which samples were."""

    cache_digest: str
    """sha256 of the cache's identity."""
    num_anchors: int
    seed: int


class Calibration(Record):
    """Temperatures of the confidence, and what they change where they were not fitted.

    The calibrated confidence of slot k is sigmoid(logit / temperatures[k]).
    """

    format_version: Literal[2] = FORMAT_VERSION
    temperatures: tuple[Temperature, ...] = Field(min_length=1)
    kept_slots: tuple[int, ...]
    """Slots, from 0, that fewer than 30 of the fitted samples have and whose temperature is 1: the error does not fall
    beyond noise. Empty in files that did not say."""
    origin: Origin
    num_fitted_samples: int
    num_fitted_blocks: int
    num_measured_samples: int
    num_measured_blocks: int
    before: ConfidenceQuality
    """Of the samples that the temperatures were not fitted on."""
    after: ConfidenceQuality
    """Of the same, scaled."""


def write_calibration(draft_dir: Path, calibration: Calibration) -> None:
    """Write or replace the draft's `calibration.json`."""
    write_record(draft_dir / CALIBRATION_FILE, calibration)


def read_calibration(draft_dir: Path) -> Calibration:
    """The draft's `calibration.json`. Raises EvaluationError."""
    return read_record(draft_dir / CALIBRATION_FILE, Calibration, version=FORMAT_VERSION, upgrade=upgrade_calibration)


def upgrade_calibration(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of this version, of those of version 1."""
    return {"kept_slots": []} | fields | {"format_version": FORMAT_VERSION}


def split_halves(blocks: Blocks) -> tuple[Blocks, Blocks]:
    """Blocks to fit on and blocks to measure on: every other sample in the order of sample ids, the first is fitted."""
    _, rank_M = np.unique(blocks.sample, return_inverse=True)
    return blocks.select(rank_M % 2 == 0), blocks.select(rank_M % 2 == 1)


def calibrate(fitted: Blocks, measured: Blocks, *, origin: Origin) -> Calibration:
    """Fit on the first blocks and measure on the second, of which there is at least one each."""
    if fitted.confidence is None or measured.confidence is None:
        raise AssertionError("nothing to calibrate without a confidence head")
    temperatures = fit_temperatures(fitted)
    return Calibration(
        temperatures=temperatures,
        kept_slots=tuple(slot for slot in few_slots(fitted) if temperatures[slot] == 1),
        origin=origin,
        num_fitted_samples=fitted.num_samples,
        num_fitted_blocks=len(fitted),
        num_measured_samples=measured.num_samples,
        num_measured_blocks=len(measured),
        before=measure_quality(measured.confidence, measured),
        after=measure_quality(scale_confidence(measured.confidence, temperatures), measured),
    )


def few_slots(blocks: Blocks) -> list[int]:
    """Slots that too few samples have for resampling to tell the noise."""
    counts = [len(np.unique(blocks.sample[blocks.length > slot])) for slot in range(blocks.block_size)]
    return [slot for slot, count in enumerate(counts) if count < ENOUGH_GROUPS]


def fit_temperatures(blocks: Blocks) -> tuple[float, ...]:
    """A temperature a slot; 1 for a slot that no block has."""
    if blocks.confidence is None:
        raise AssertionError("nothing to calibrate without a confidence head")
    survival_MK = blocks.survival
    rows, prefix_M, temperatures = np.arange(len(blocks)), np.ones(len(blocks)), []
    for slot in range(blocks.block_size):
        has_slot = blocks.length[rows] > slot
        rows, prefix_M = rows[has_slot], prefix_M[has_slot]
        confidence_M = blocks.confidence[rows, slot]
        temperatures.append(_fit_slot(prefix_M, confidence_M, survival_MK[rows, slot], blocks.sample[rows]))
        prefix_M = prefix_M * scale_confidence(confidence_M, temperatures[-1])
    return tuple(temperatures)


def scale_confidence(confidence: np.ndarray, temperatures: Sequence[float] | float) -> np.ndarray:
    """sigmoid(logit / T) of confidences [..., K], a temperature a slot, or any shape and one temperature.

    0, which stands where a block has no slot, stays 0.
    """
    clipped = np.clip(confidence, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    logits = np.log(clipped) - np.log1p(-clipped)
    scaled: np.ndarray = np.where(confidence == 0, 0.0, 1 / (1 + np.exp(-logits / np.asarray(temperatures))))
    return scaled


def _fit_slot(prefix_M: np.ndarray, confidence_M: np.ndarray, survival_M: np.ndarray, sample_M: np.ndarray) -> float:
    """The temperature of one slot, given the calibrated probability of all slots before it.

    The nearest to 1 whose error exceeds the smallest by at most the smallest's standard error; of few samples 1, unless
    the error falls beyond noise.
    """
    if not len(prefix_M):
        return 1.0

    def predict(temperature: float) -> np.ndarray:
        predicted_M: np.ndarray = prefix_M * scale_confidence(confidence_M, temperature)
        return predicted_M

    errors = np.array([calibration_error(predict(temperature), survival_M) for temperature in TEMPERATURES])
    best = int(np.argmin(errors))
    tolerance = float(np.std(_draw_errors(predict(TEMPERATURES[best]), survival_M, sample_M)))
    place = int(np.flatnonzero(errors <= errors[best] + tolerance)[0])
    temperature, num_samples = float(TEMPERATURES[place]), len(np.unique(sample_M))
    if place == 0 or num_samples >= ENOUGH_GROUPS:
        return temperature
    before, after = (_draw_errors(predict(tried), survival_M, sample_M) for tried in (1.0, temperature))
    is_clear = _is_beyond_noise(errors[0] - errors[place], before - after, num_samples=num_samples)
    return temperature if is_clear else 1.0


def _is_beyond_noise(fall: float, drawn_falls: np.ndarray, *, num_samples: int) -> bool:
    """Whether the error falls by more than chance; resampling S samples sees (S - 1) / S of the variance."""
    if num_samples < 2:
        return False
    standard_error = float(np.std(drawn_falls)) * (num_samples / (num_samples - 1)) ** 0.5
    return bool(fall > NOISE_LIMIT * standard_error)


def _draw_errors(predicted_M: np.ndarray, survival_M: np.ndarray, sample_M: np.ndarray) -> np.ndarray:
    """Calibration errors of the resampled samples, the same draws for every prediction."""
    _, position_M = np.unique(sample_M, return_inverse=True)
    count_S = np.bincount(position_M)
    cell_M = position_M * CALIBRATION_BINS + bins_of(predicted_M)
    size = len(count_S) * CALIBRATION_BINS
    gaps_SB = np.bincount(cell_M, weights=predicted_M - survival_M, minlength=size).reshape(-1, CALIBRATION_BINS)
    generator = np.random.default_rng(ERROR_SEED)
    errors = np.empty(ERROR_ROUNDS)
    for number in range(ERROR_ROUNDS):
        drawn = generator.integers(len(count_S), size=len(count_S))
        errors[number] = np.abs(gaps_SB[drawn].sum(axis=0)).sum() / count_S[drawn].sum()
    return errors
