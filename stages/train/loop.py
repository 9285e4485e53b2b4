"""The steps of a training: which samples, forward, backward, the optimizer, and the row that says how it went."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.errors import StageError
from stages.train.anchors import anchor_candidates
from stages.train.batches import PlannedBatch, gather_batch, plan_batches
from stages.train.metrics import MetricsLog, StepTotals
from stages.train.module import DSparkTrainerModule
from stages.train.order import Schedule, digest_order, learning_rate, plan_windows
from stages.train.settings import TrainSection
from storage import CacheReader

Validate = Callable[[DSparkTrainerModule], dict[str, Any]]

REPORT_SECONDS = 20  # a step that takes longer says how far it is

logger = logging.getLogger(__name__)


class NonFiniteLossError(StageError, RuntimeError):
    """The loss became NaN or infinite; the message names the samples of the step."""


class NothingSupervisedError(StageError, ValueError):
    """No sample of the training split has a slot to learn from."""


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """What a step works on. `step` changes the module's weights and the optimizer's state, and nothing else."""

    module: DSparkTrainerModule
    optimizer: torch.optim.Optimizer
    reader: CacheReader
    train: TrainSection

    def step(self, indices: np.ndarray, *, epoch: int, lr: float) -> dict[str, Any]:
        """One optimizer step over the samples at `indices`; the row to log. Raises NonFiniteLossError."""
        module, train = self.module, self.train
        device = next(module.parameters()).device
        batches = self.plan(indices, epoch=epoch)
        # The denominator is the step's, not the micro-batch's; it needs masks and anchors only, not the model.
        denominator = sum(
            float(module.loss_denominator(batch.loss_mask, batch.anchor_positions, batch.seq_lens)) for batch in batches
        )
        totals = StepTotals()
        module.train()
        reported = time.monotonic()
        for number, batch in enumerate(batches, start=1):
            with compute_dtype(device, train.dtype):
                metrics = module(**gather_batch(self.reader, batch, device=device))
            (metrics.loss_num / max(denominator, 1e-30)).backward()
            totals.add(metrics)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                logger.info("  micro-batch %d of %d of this step", number, len(batches))
        row = totals.ratios()
        norm = torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], train.clip_norm)
        if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
            samples = [sample_id for batch in batches for sample_id in batch.sample_ids]
            raise NonFiniteLossError(
                f"the loss is {row['loss']} and the gradient's norm {float(norm)} in epoch {epoch} on samples "
                f'{samples}; no weight was changed by this step. Lower train.lr, or try train.dtype = "float32"'
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        num_tokens = sum(batch.num_tokens for batch in batches)
        return {**row, "lr": lr, "grad_norm": float(norm), "num_tokens": num_tokens, "num_micro_batches": len(batches)}

    def plan(self, indices: np.ndarray, *, epoch: int) -> list[PlannedBatch]:
        """The micro-batches of a step over the samples at `indices`."""
        batches = plan_batches(
            self.reader,
            indices.tolist(),
            max_batch_tokens=self.train.max_batch_tokens,
            num_anchors=self.module.draft_model.config.num_anchors,
            seed=self.train.seed,
            epoch=epoch,
        )
        return list(batches)


def run_steps(
    stepper: Stepper, *, schedule: Schedule, start: int, log: MetricsLog, validate: Validate | None
) -> Iterator[int]:
    """Do the steps from `start` on, log each, and yield after each how many are done, for the caller to save them.

    Validation comes every `train.validate_every` steps (default: once an epoch) and after the last.
    Raises NothingSupervisedError before the first step.
    """
    train, reader = stepper.train, stepper.reader
    indices = reader.split_indices("train")
    # Ends at the first sample of nearly every split; without any anchor the loss would be 0 in every step.
    if not any(len(anchor_candidates(reader.read_tokens(index)[1])) for index in indices):
        raise NothingSupervisedError(
            f"{reader.path}: none of the {len(indices)} samples of the training split has two supervised tokens in a "
            "row, which every anchor needs; look at the loss masks of the data, and at data.supervise"
        )
    epoch, order = -1, indices
    validate_every = train.validate_every or schedule.steps_per_epoch
    logger.info(
        "%d conversations, %d of them a step: %d steps an epoch, %d steps in all",
        len(indices), train.global_batch_size, schedule.steps_per_epoch, schedule.num_steps,
    )  # fmt: skip
    pace = _Pace(num_steps=schedule.num_steps, start=start)
    for step in range(start, schedule.num_steps):
        if schedule.epoch(step) != epoch:
            epoch = schedule.epoch(step)
            window = train.shuffle_window or 0
            order = indices[plan_windows(reader.shards[indices], window=window, seed=train.seed, epoch=epoch)]
            first = step % schedule.steps_per_epoch * schedule.global_batch_size
            reader.plan_reads(order[first:], **({"num_ahead": window} if window else {}))
            logger.info("epoch %d: order %s", epoch, digest_order(reader.sample_ids[order])[:16])
        lr = learning_rate(step, num_steps=schedule.num_steps, peak=train.lr, warmup_fraction=train.warmup_fraction)
        row = stepper.step(schedule.batch(step, order), epoch=epoch, lr=lr)
        done = step + 1
        row = {"step": done, "epoch": epoch, **row, **pace.after_step(row["num_tokens"])}
        log.write("train", row)
        logger.info("%s", format_step(row, num_steps=schedule.num_steps))
        with pace.paused():
            if validate is not None and (done % validate_every == 0 or done == schedule.num_steps):
                result = {"step": done, **validate(stepper.module)}
                log.write("validation", result)
                logger.info("step %6d  validation  tau %.3f", done, result["tau"])
            yield done


@contextmanager
def compute_dtype(device: torch.device, dtype: str) -> Iterator[None]:
    """bfloat16 autocast over float32 weights, or nothing for float32."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


def format_step(row: dict[str, Any], *, num_steps: int) -> str:
    """The fixed-width progress line of a step."""
    accept = row["accept_rate_per_pos"]
    eta = time.strftime("%H:%M:%S", time.gmtime(row["eta_seconds"]))
    return (
        f"step {row['step']:6d}/{num_steps}  epoch {row['epoch']:3d}  loss {row['loss']:7.4f}  tau {row['tau']:6.3f}  "
        f"accept {accept[0]:5.3f}..{accept[-1]:5.3f}  lr {row['lr']:8.2e}  norm {row['grad_norm']:8.3f}  "
        f"{row['tokens_per_second']:9,.0f} tok/s  ETA {eta}"
    )


class _Pace:
    """Tokens a second and time to go, from the steps of this process; validation and checkpoints do not count."""

    def __init__(self, *, num_steps: int, start: int) -> None:
        self._num_steps = num_steps
        self._done = start
        self._last = time.monotonic()
        self._seconds_per_step: float | None = None

    def after_step(self, num_tokens: int) -> dict[str, float]:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._done += 1
        # A moving average that forgets the slow first step within some ten.
        old = self._seconds_per_step
        self._seconds_per_step = seconds if old is None else 0.8 * old + 0.2 * seconds
        eta = (self._num_steps - self._done) * self._seconds_per_step
        return {"seconds": seconds, "tokens_per_second": num_tokens / seconds, "eta_seconds": eta}

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._last += time.monotonic() - started
