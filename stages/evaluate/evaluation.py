"""`evaluation.json`: everything that the held-out split says of a draft, with the numbers behind every plot.

Written by `dspark evaluate`, read by reports and comparisons.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from pydantic import model_validator

from stages.evaluate.blocks import Blocks, SlotScores, gather_blocks
from stages.evaluate.cached import CacheEvaluation, block_taus, measure_blocks
from stages.evaluate.calibration import (
    Calibration,
    Origin,
    calibrate,
    scale_confidence,
    split_halves,
    upgrade_calibration,
)
from stages.evaluate.outlook import Outlook, simulate
from stages.evaluate.records import read_record, write_record
from stages.evaluate.reliability import Bins, Reliability, measure_reliability
from stages.evaluate.thresholds import ThresholdCurve, trace_thresholds
from stages.evaluate.throughput import Throughput
from storage.sealed import Record

FORMAT_VERSION: Final = 2

logger = logging.getLogger(__name__)


class SampleTau(Record):
    """One conversation: what paired comparisons of two drafts resample."""

    sample_id: int
    num_blocks: int
    tau: float
    """Mean over its blocks."""


class Scheduling(Record):
    """What the confidence is good for, on the half of the samples that the temperatures were not fitted on."""

    calibration: Calibration
    reliability_before: Reliability
    reliability_after: Reliability
    thresholds_before: ThresholdCurve
    thresholds_after: ThresholdCurve
    outlook: Outlook

    @model_validator(mode="after")
    def _check(self) -> Self:
        for curve in (self.thresholds_before, self.thresholds_after):
            if not len(curve.threshold) == len(curve.verified) == len(curve.accepted):
                raise ValueError("threshold curve: expected as many of verified and accepted as of threshold")
        for bins in (kind for both in (self.reliability_before, self.reliability_after) for kind in _bins_of(both)):
            if not len(bins.count) == len(bins.mean_predicted) == len(bins.mean_observed):
                raise ValueError("reliability: expected as many of mean_predicted and mean_observed as of count")
        if not all(row.fixed for row in self.outlook.concurrencies):
            raise ValueError("outlook: expected fixed lengths at every concurrency")
        if not all(way.tokens_per_second > 0 for row in self.outlook.concurrencies for way in row.fixed):
            raise ValueError("outlook: expected more than 0 tokens a second at every fixed length")
        return self


class Evaluation(CacheEvaluation):
    """`evaluation.json`."""

    format_version: Literal[2] = FORMAT_VERSION
    weights_digest: str | None
    """Of the draft that was scored, as `digest_draft` makes it; None in files that did not say."""
    computed_in: str | None
    """dtype that it was scored in; None in files that did not say."""
    block_size: int
    origin: Origin
    """Drafts with equal origins have the same blocks in a sample; comparable are those that have equal samples, too."""
    samples: tuple[SampleTau, ...]
    """In the order of sample ids; samples without a block are left out."""
    reliability: Reliability | None
    """Of the confidence as it is, on all samples; None without a confidence head."""
    scheduling: Scheduling | None
    """None without a confidence head, or with fewer than two samples."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {self.block_size}")
        for name in (name for name in type(self).model_fields if name.endswith("_per_pos")):
            values = getattr(self, name)
            if values is not None and len(values) != self.block_size:
                raise ValueError(f"{name}: expected {self.block_size} slots, got {len(values)}")
        return self


def evaluate_fully(
    batches: Iterable[tuple[int, SlotScores]],
    *,
    block_size: int,
    origin: Origin,
    table: Throughput,
    weights_digest: str | None = None,
    computed_in: str | None = None,
) -> Evaluation:
    """As `evaluate_scores`, with calibration, threshold curves and scheduling outlook where there is a confidence."""
    blocks = gather_blocks(batches, block_size=block_size)
    confidence_MK = blocks.confidence
    return Evaluation(
        **vars(measure_blocks(blocks)),
        weights_digest=weights_digest,
        computed_in=computed_in,
        block_size=block_size,
        origin=origin,
        samples=_sample_taus(blocks),
        reliability=None if confidence_MK is None else measure_reliability(confidence_MK, blocks),
        scheduling=_evaluate_scheduling(blocks, origin=origin, table=table),
    )


def write_evaluation(file: Path, evaluation: Evaluation) -> None:
    """Write or replace the file, whole or not at all."""
    write_record(file, evaluation)


def read_evaluation(file: Path) -> Evaluation:
    """The evaluation in the file. Raises EvaluationError for one that is not there, damaged, or of another form."""
    return read_record(file, Evaluation, version=FORMAT_VERSION, upgrade=_from_version_1)


def _from_version_1(fields: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew nothing of greedy drafts, nor which weights it was of."""
    names = ("tau_greedy", "tau_greedy_low", "tau_greedy_high", "greedy_accept_rate_per_pos")
    fields = dict.fromkeys((*names, "weights_digest", "computed_in")) | fields | {"format_version": FORMAT_VERSION}
    scheduling = fields.get("scheduling")
    if isinstance(scheduling, dict) and isinstance(scheduling.get("calibration"), dict):
        fields["scheduling"] = scheduling | {"calibration": upgrade_calibration(scheduling["calibration"])}
    return fields


def _bins_of(reliability: Reliability) -> tuple[Bins, ...]:
    per_pos = (*reliability.confidence_per_pos, *reliability.survival_per_pos)
    return (reliability.confidence, reliability.survival, *per_pos)


def _sample_taus(blocks: Blocks) -> tuple[SampleTau, ...]:
    sample_ids, position_M = np.unique(blocks.sample, return_inverse=True)
    counts = np.bincount(position_M)
    taus = np.bincount(position_M, weights=block_taus(blocks)) / counts
    columns = zip(sample_ids.tolist(), counts.tolist(), taus.tolist(), strict=True)
    return tuple(SampleTau(sample_id=sample_id, num_blocks=count, tau=tau) for sample_id, count, tau in columns)


def _evaluate_scheduling(blocks: Blocks, *, origin: Origin, table: Throughput) -> Scheduling | None:
    if blocks.confidence is None:
        logger.info("the draft has no confidence head: no calibration, no threshold curve, no scheduling outlook")
        return None
    fitted, measured = split_halves(blocks)
    if not len(measured) or measured.confidence is None:
        logger.info("one conversation cannot be split to calibrate: no threshold curve, no scheduling outlook")
        return None
    calibration = calibrate(fitted, measured, origin=origin)
    before_MK = measured.confidence
    after_MK = scale_confidence(before_MK, calibration.temperatures)
    return Scheduling(
        calibration=calibration,
        reliability_before=measure_reliability(before_MK, measured),
        reliability_after=measure_reliability(after_MK, measured),
        thresholds_before=trace_thresholds(before_MK, measured),
        thresholds_after=trace_thresholds(after_MK, measured),
        outlook=simulate(before_MK, after_MK, measured, table),
    )
