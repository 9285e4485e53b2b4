"""What scheduling by confidence would yield on a server, simulated over the blocks of held-out samples.

The scheduler is the hardware-aware prefix scheduler of DSpark (arXiv 2607.05147, algorithm 1): of all requests' draft
tokens, the likeliest to survive go into the verify step, as long as expected tokens a second rise. It decides by
confidences; what a decision yields is computed from the true accept rates.
Shape suffixes: M blocks, K slots of a block, G verify steps, R requests in each.
"""

import numpy as np

from stages.evaluate.blocks import Blocks
from stages.evaluate.throughput import Throughput
from storage.sealed import Record

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ORDER_SEED = 0
USEFUL_GAIN = 0.01  # assumption: what the simulation leaves out is worth more than a hundredth


class Yield(Record):
    """What a way to choose verify lengths comes to."""

    tokens_per_second: float
    """Σ expected emitted tokens / Σ seconds over all verify steps and requests."""
    verified: float
    """Draft tokens that a request has verified in a step, in the mean."""
    emitted: float
    """Tokens that a request gets in a step, the bonus token included, in the mean."""


class Concurrency(Record):
    """Ways to choose verify lengths at one number of concurrent requests."""

    num_requests: int
    num_steps: int
    fixed: tuple[Yield, ...]
    """Every request has its first n slots verified, n = 0..K."""
    scheduled: Yield
    """The scheduler with calibrated confidences."""
    scheduled_uncalibrated: Yield

    @property
    def best_length(self) -> int:
        """The fixed length that turned out best, which nobody knows beforehand."""
        return max(range(len(self.fixed)), key=lambda length: self.fixed[length].tokens_per_second)

    @property
    def gain(self) -> float:
        """Tokens a second of the scheduler over those of the best fixed length, minus 1."""
        return self.scheduled.tokens_per_second / self.fixed[self.best_length].tokens_per_second - 1

    @property
    def gain_on_no_draft(self) -> float:
        """Tokens a second of the scheduler over those of steps without any draft token, minus 1."""
        return self.scheduled.tokens_per_second / self.fixed[0].tokens_per_second - 1


class Outlook(Record):
    """The simulation, a row for each concurrency whose greatest step the table has."""

    throughput: Throughput
    num_blocks: int
    concurrencies: tuple[Concurrency, ...]

    @property
    def is_useless(self) -> bool:
        """Whether the draft gains less than USEFUL_GAIN on no draft at every concurrency, both ways of verifying."""
        gains = [
            way.tokens_per_second / row.fixed[0].tokens_per_second - 1
            for row in self.concurrencies
            for way in (row.scheduled, row.fixed[row.best_length])
        ]
        return bool(gains) and max(gains) < USEFUL_GAIN


def simulate(confidence_MK: np.ndarray, calibrated_MK: np.ndarray, blocks: Blocks, table: Throughput) -> Outlook:
    """Serve the blocks at every concurrency.

    A block is one round of one request; which blocks meet in a step is drawn once, so all ways serve the same steps.
    Only supervised slots are drafted: what a draft does behind the end of an answer is not simulated.
    """
    order_M = np.random.default_rng(ORDER_SEED).permutation(len(blocks))
    rows = []
    for num_requests in CONCURRENCIES:
        if not table.has(num_requests=num_requests, num_tokens=num_requests * (1 + blocks.block_size)):
            break
        # The last step is filled up with the first blocks again.
        order_GR = np.resize(order_M, (-(-len(blocks) // num_requests), num_requests))
        rows.append(_serve(order_GR, confidence_MK, calibrated_MK, blocks, table))
    return Outlook(throughput=table, num_blocks=len(blocks), concurrencies=tuple(rows))


def _serve(
    order_GR: np.ndarray, confidence_MK: np.ndarray, calibrated_MK: np.ndarray, blocks: Blocks, table: Throughput
) -> Concurrency:
    length_GR = blocks.length[order_GR]
    num_steps, num_requests = order_GR.shape
    # [M, 1 + K]: tokens that a request gets if so many slots are verified.
    emitted_ML = np.cumsum(np.concatenate([np.ones((len(blocks), 1)), blocks.survival], axis=1), axis=1)

    def measure(verified_GR: np.ndarray) -> Yield:
        emitted_GR = emitted_ML[order_GR, verified_GR]
        seconds_G = 1 / table.steps_at(num_requests + verified_GR.sum(axis=1), num_requests=num_requests)
        return Yield(
            tokens_per_second=float(emitted_GR.sum() / seconds_G.sum()),
            verified=float(verified_GR.mean()),
            emitted=float(emitted_GR.mean()),
        )

    def schedule(predicted_MK: np.ndarray) -> Yield:
        return measure(schedule_steps(np.cumprod(predicted_MK, axis=1)[order_GR], length_GR, table))

    return Concurrency(
        num_requests=num_requests,
        num_steps=num_steps,
        fixed=tuple(measure(np.minimum(length_GR, length)) for length in range(blocks.block_size + 1)),
        scheduled=schedule(calibrated_MK),
        scheduled_uncalibrated=schedule(confidence_MK),
    )


def schedule_steps(survival_GRK: np.ndarray, length_GR: np.ndarray, table: Throughput) -> np.ndarray:
    """How many slots of each request to verify, [G, R]: algorithm 1 for each step.

    `survival_GRK` is the predicted survival, which never rises along K; a request has its first `length_GR` slots to
    offer. Every request has one token in the step that needs no luck: its bonus token.
    """
    num_steps, num_requests, block_size = survival_GRK.shape
    offered_GRK = np.arange(block_size) < length_GR[..., None]
    # Slot by slot, so that of equal survivals the earlier slot comes first, and a request's slots stay in their order.
    offers_GC = np.where(offered_GRK, survival_GRK, -1.0).transpose(0, 2, 1).reshape(num_steps, -1)
    by_survival_GC = np.argsort(-offers_GC, axis=1, kind="stable")
    sorted_GC = np.take_along_axis(offers_GC, by_survival_GC, axis=1)
    expected_GC = num_requests + np.cumsum(np.maximum(sorted_GC, 0), axis=1)
    num_tokens_C = num_requests + np.arange(1 + sorted_GC.shape[1])
    rates_C = table.steps_at(num_tokens_C, num_requests=num_requests)
    throughput_GC, alone = expected_GC * rates_C[1:], num_requests * rates_C[0]
    before_GC = np.concatenate([np.full((num_steps, 1), alone), throughput_GC[:, :-1]], axis=1)
    admitted_GC = np.logical_and.accumulate((throughput_GC > before_GC) & (sorted_GC >= 0), axis=1)
    chosen_GC = np.zeros_like(admitted_GC)
    np.put_along_axis(chosen_GC, by_survival_GC, admitted_GC, axis=1)
    lengths_GR: np.ndarray = chosen_GC.reshape(num_steps, block_size, num_requests).sum(axis=1)
    return lengths_GR
