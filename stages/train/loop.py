"""The steps of a training: which samples, forward, backward, the optimizer, and the row that says how it went."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from stages.errors import StageError
from stages.train.anchors import anchor_candidates
from stages.train.batches import PlannedBatch
from stages.train.coverage import count_slots
from stages.train.feed import BatchFeed, FedBatch, PlannedStep
from stages.train.interrupt import StopRequest
from stages.train.metrics import MetricsLog, StepTotals
from stages.train.nonfinite import NonFiniteLossError, find_culprit, keep_batch
from stages.train.order import Schedule, digest_order, learning_rate, plan_windows
from stages.train.parallel import Ranks, last_backward, unwrap, whole
from stages.train.profiling import StepProfiler
from stages.train.settings import TrainSection
from stages.train.validation import Validate, Validation
from storage import CacheReader
from storage.progress import Position, log_position

REPORT_SECONDS = 20  # a step that takes longer says how far it is

logger = logging.getLogger(__name__)


class NothingSupervisedError(StageError, ValueError):
    """No sample of the training split has a slot to learn from."""


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """What a step works on. `step` changes the module's weights and the optimizer's state, and nothing else."""

    module: torch.nn.Module
    """What `parallel.wrap` returned."""
    optimizer: torch.optim.Optimizer
    train: TrainSection
    ranks: Ranks
    stop: StopRequest = field(default_factory=StopRequest)

    def step(self, batches: Iterable[FedBatch], *, lr: float) -> dict[str, Any]:
        """One optimizer step over this rank's micro-batches; the row to log. Raises NonFiniteLossError.

        Sums are differentiated, and divided by the step's denominator once it is known: when all ranks have done their
        micro-batches. The same reduction tells whether a rank was asked to stop (`stop.agreed`).
        """
        totals = StepTotals()
        self.module.train()
        losses, planned, waited = list[torch.Tensor](), list[PlannedBatch](), 0.0
        reported = time.monotonic()
        for batch in batches:
            with compute_dtype(self.ranks.device, self.train.dtype), last_backward(self.module, batch.is_last):
                metrics = self.module(**batch.arguments)
                metrics.loss_num.backward()
            totals.add(metrics)
            totals.count(**count_slots(batch.planned, block_size=unwrap(self.module).draft_model.block_size))
            totals.count(num_tokens=batch.planned.num_tokens if batch.planned.indices else 0)
            losses.append(metrics.loss_num.detach())
            planned.append(batch.planned)
            waited += batch.waited_seconds
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                logger.info("  micro-batch %d of %d of this step", batch.number, batch.num_batches)
        totals.count(num_asked_to_stop=int(self.stop.asked_by is not None))
        totals.reduce(self.ranks)
        sums, row = totals.sums(), totals.ratios()
        self.stop.learn(float(sums["num_asked_to_stop"]))
        norm = self._scale_gradients(float(sums["loss_den"]))
        if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            only_gradient = math.isfinite(row["loss"])
            culprit = find_culprit(losses, planned, or_last=only_gradient and self.ranks.rank == 0)
            raise NonFiniteLossError(
                f"the loss is {row['loss']} and the gradient's norm {norm} on samples "
                f"{list(culprit.sample_ids) if culprit else 'of another rank'}; no weight was changed by this step. "
                'Lower train.lr, or try train.dtype = "float32"',
                batch=culprit,
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **row,
            "lr": lr,
            "grad_norm": norm,
            "num_micro_batches": batch.num_batches,
            "waited_seconds": waited,
        }

    def _scale_gradients(self, denominator: float) -> float:
        """Divide the gradients by the denominator and clip them; their norm before clipping."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(whole(torch.nn.utils.get_total_norm(gradients))) / max(denominator, 1e-30)
        torch._foreach_mul_(gradients, min(1.0, self.train.clip_norm / (norm + 1e-6)) / max(denominator, 1e-30))
        return norm


def plan_steps(reader: CacheReader, train: TrainSection, *, schedule: Schedule, start: int) -> Iterator[PlannedStep]:
    """The steps from `start` on, each epoch in its own order; has a remote cache fetch what they will read."""
    indices = reader.split_indices("train")
    epoch, order, digest = -1, indices, ""
    for step in range(start, schedule.num_steps):
        if schedule.epoch(step) != epoch:
            epoch = schedule.epoch(step)
            window = train.shuffle_window or 0
            order = indices[plan_windows(reader.shards[indices], window=window, seed=train.seed, epoch=epoch)]
            first = step % schedule.steps_per_epoch * schedule.global_batch_size
            reader.plan_reads(order[first:], **({"num_ahead": window} if window else {}))
            digest = digest_order(reader.sample_ids[order])
        yield PlannedStep(step=step, epoch=epoch, indices=schedule.batch(step, order), order=digest)


def run_steps(
    stepper: Stepper,
    feed: BatchFeed,
    *,
    schedule: Schedule,
    start: int,
    log: MetricsLog | None,
    validate: Validate | None,
    profiler: StepProfiler | None = None,
) -> Iterator[int]:
    """Do the steps from `start` on, log each, and yield after each how many are done, for the caller to save them.

    `log` is rank 0's. Validation comes every `train.validate_every` steps (default: once an epoch) and after the last.
    Ends early once `stepper.stop` is agreed on. Raises NonFiniteLossError, and before the first step
    NothingSupervisedError.
    """
    train, reader, stop = stepper.train, feed.reader, stepper.stop
    check_supervision(reader)
    every = train.validate_every or schedule.steps_per_epoch
    validation = Validation(validate=validate, every=every, num_steps=schedule.num_steps, log=log, stop=stop)
    if start < schedule.num_steps:
        logger.info(
            "training on %d conversations, %d a step: steps an epoch: %d, in all: %d",
            schedule.num_samples, schedule.global_batch_size, schedule.steps_per_epoch, schedule.num_steps,
        )  # fmt: skip
    if stepper.ranks.on_first(lambda: validation.is_missing(start)):
        validation.run(stepper.module, start)
    if stop.agree(stepper.ranks):
        return
    pace = _Pace(num_steps=schedule.num_steps, start=start)
    for planned, batches in feed.run(plan_steps(reader, train, schedule=schedule, start=start)):
        _note_epoch(planned, is_first=planned.step in (start, planned.epoch * schedule.steps_per_epoch))
        lr = learning_rate(
            planned.step, num_steps=schedule.num_steps, peak=train.lr, warmup_fraction=train.warmup_fraction
        )
        with keep_batch(feed, planned, folder=train.run_dir / "nonfinite"):
            row = stepper.step(batches, lr=lr)
        done = planned.step + 1
        row = {"step": done, "epoch": planned.epoch, **row, **pace.after_step(row["num_tokens"])}
        row["wait_share"] = row["waited_seconds"] / row["seconds"]
        if log is not None:
            log.write("train", row)
        position = Position(name="train", done=done, total=schedule.num_steps, eta_seconds=row["eta_seconds"])
        log_position(logger, position, format_step(row, num_steps=schedule.num_steps))
        with pace.paused():
            if profiler is not None:
                profiler.after_step(done, num_micro_batches=row["num_micro_batches"])
            yield done
            if stop.agreed:
                return
            if validation.is_due(done):
                validation.run(stepper.module, done)
                if stop.agree(stepper.ranks):
                    return


def _note_epoch(planned: PlannedStep, *, is_first: bool) -> None:
    if is_first:
        logger.info("epoch %d: order %s", planned.epoch, planned.order[:16])


def check_supervision(reader: CacheReader) -> None:
    """Raise NothingSupervisedError where no sample of the training split can have an anchor."""
    indices = reader.split_indices("train")
    # Ends at the first sample of nearly every split; without any anchor the loss would be 0 in every step.
    if not any(len(anchor_candidates(reader.read_tokens(index)[1])) for index in indices):
        raise NothingSupervisedError(
            f"{reader.path}: none of the {len(indices)} samples of the training split has two supervised tokens in a "
            "row, which every anchor needs; look at the loss masks of the data, and at data.supervise"
        )


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
        f"{row['tokens_per_second']:9,.0f} tok/s  wait {row['wait_share']:4.0%}  ETA {eta}"
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
