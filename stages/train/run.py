"""Stage two from end to end: a cache in, a trained draft out."""

import fcntl
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from stages.device import choose_device
from stages.errors import StageError
from stages.train.batches import gather_batch, plan_batches
from stages.train.checkpoint import (
    CheckpointError,
    TrainerState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_draft,
)
from stages.train.config import build_draft_config
from stages.train.metrics import MetricsLog, StepTotals
from stages.train.model import Qwen3DSparkModel
from stages.train.module import DSparkTrainerModule
from stages.train.order import Schedule, digest_order, learning_rate, plan_epoch, plan_schedule
from stages.train.settings import DraftSection, ObjectiveSection, TrainSection
from storage import CacheReader

Validate = Callable[[DSparkTrainerModule], dict[str, Any]]

# Settings that may differ between a run and its resume: they change no weight.
FREE_TRAIN_KEYS = {"run_dir", "device", "validate_every", "checkpoint_every", "keep_last"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where the draft lies, how many steps made it, and whether this call did any of them."""

    draft_dir: Path
    num_steps: int
    was_complete: bool


class NonFiniteLossError(StageError, RuntimeError):
    """The loss became NaN or infinite; the message names the samples of the step."""


def build_draft(draft: DraftSection, reader: CacheReader, *, seed: int) -> Qwen3DSparkModel:
    """A new draft for the cache's target, with the target's embedding and head in place. Raises ValueError.

    Initial weights are a function of the seed and of the draft's config.
    """
    from transformers import AutoConfig

    target_config = AutoConfig.from_pretrained(reader.target_dir)
    config = build_draft_config(
        target_config,
        num_draft_layers=draft.num_layers,
        block_size=draft.block_size,
        target_layer_ids=reader.layers,
        mask_token_id=reader.manifest.header.mask_token_id if draft.mask_token_id is None else draft.mask_token_id,
        num_anchors=draft.num_anchors,
        markov_rank=draft.markov_rank,
        markov_head_type=draft.markov_head_type,
        enable_confidence_head=draft.enable_confidence_head,
        confidence_head_with_markov=draft.confidence_head_with_markov,
        intermediate_size=draft.intermediate_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3DSparkModel(config)
    with safe_open(reader.target_dir / "head.safetensors", framework="pt") as head:
        model.load_target_head(head.get_tensor("embed_tokens.weight"), head.get_tensor("lm_head.weight"))
    return model


def train(
    *,
    reader: CacheReader,
    draft: DraftSection,
    objective: ObjectiveSection,
    train: TrainSection,
    validate: Validate | None = None,
) -> TrainResult:
    """Train a draft, or finish the training that `train.run_dir` holds.

    `reader` gives the layers that the draft sees. `validate` is called with the module at intervals, and what it returns
    is logged. The draft that servers load is written to RUN/draft when the last step is done.

    Raises ValueError for settings that do not fit the cache, CheckpointError for a run made from other settings,
    CacheError for a damaged cache, NonFiniteLossError.
    """
    # 1. The cache, the schedule, and what this run is made from.
    indices = reader.split_indices("train")
    schedule = plan_schedule(train, num_samples=len(indices))
    made_from = describe_inputs(reader, draft=draft, objective=objective, train=train)
    with _exclusive(train.run_dir):
        # 2. Model, optimizer, and the newest checkpoint.
        device = choose_device(train.device)
        model = build_draft(draft, reader, seed=train.seed).to(device)
        module = DSparkTrainerModule(model, **objective_arguments(objective))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
        start = _resume(train.run_dir, made_from=made_from, model=model, optimizer=optimizer)
        draft_dir = train.run_dir / "draft"
        if start == schedule.num_steps and draft_dir.is_dir():
            return TrainResult(draft_dir=draft_dir, num_steps=start, was_complete=True)
        # 3. Steps.
        log = MetricsLog(train.run_dir, resume_step=start)
        try:
            _run_steps(
                module, optimizer, reader=reader, indices=indices, schedule=schedule, start=start,
                train=train, made_from=made_from, log=log, validate=validate,
            )  # fmt: skip
        finally:
            log.close()
        # 4. The draft that servers load.
        save_draft(draft_dir, draft_model=model, dtype=getattr(torch, train.dtype))
    return TrainResult(draft_dir=draft_dir, num_steps=schedule.num_steps, was_complete=False)


def objective_arguments(objective: ObjectiveSection) -> dict[str, Any]:
    """`DSparkTrainerModule`'s keyword arguments; an infinite gamma means equal weights."""
    arguments = objective.model_dump()
    if arguments["loss_decay_gamma"] is not None and math.isinf(arguments["loss_decay_gamma"]):
        arguments["loss_decay_gamma"] = None
    return arguments


def describe_inputs(
    reader: CacheReader, *, draft: DraftSection, objective: ObjectiveSection, train: TrainSection
) -> dict[str, Any]:
    """Everything that a resumed run must have in common with the run that it continues, as plain JSON values."""
    knobs = {key: value for key, value in train.model_dump(mode="json").items() if key not in FREE_TRAIN_KEYS}
    return {
        "cache.identity": reader.identity.digest(),
        "cache.plan": reader.manifest.plan_digest,
        **{f"draft.{key}": value for key, value in draft.model_dump(mode="json").items()},
        **{f"objective.{key}": value for key, value in objective.model_dump(mode="json").items()},
        **{f"train.{key}": value for key, value in knobs.items()},
    }


def _resume(
    run_dir: Path, *, made_from: dict[str, Any], model: Qwen3DSparkModel, optimizer: torch.optim.Optimizer
) -> int:
    """Load the newest whole checkpoint, if there is one; the number of steps that are done."""
    found = find_checkpoint(run_dir / "checkpoints")
    if found is None:
        return 0
    folder, state = found
    keys = sorted(set(made_from) | set(state.made_from))
    differing = [key for key in keys if made_from.get(key) != state.made_from.get(key)]
    if differing:
        lines = [f"  {key}: the run has {state.made_from.get(key)}, now {made_from.get(key)}" for key in differing]
        raise CheckpointError(
            "\n".join([f"{run_dir} holds a run made from something else:", *lines])
            + "\nset train.run_dir to a new folder, or restore these settings to continue"
        )
    load_checkpoint(folder, draft_model=model, optimizer=optimizer)
    logger.info("continuing at step %d from %s", state.step, folder)
    return state.step


def _run_steps(
    module: DSparkTrainerModule,
    optimizer: torch.optim.Optimizer,
    *,
    reader: CacheReader,
    indices: np.ndarray,
    schedule: Schedule,
    start: int,
    train: TrainSection,
    made_from: dict[str, Any],
    log: MetricsLog,
    validate: Validate | None,
) -> None:
    epoch, order = -1, indices
    validate_every = train.validate_every or schedule.steps_per_epoch
    pace = _Pace(num_steps=schedule.num_steps, start=start)
    for step in range(start, schedule.num_steps):
        if schedule.epoch(step) != epoch:
            epoch = schedule.epoch(step)
            order = indices[plan_epoch(len(indices), seed=train.seed, epoch=epoch)]
            logger.info("epoch %d: order %s", epoch, digest_order(reader.sample_ids[order])[:16])
        lr = learning_rate(step, num_steps=schedule.num_steps, peak=train.lr, warmup_fraction=train.warmup_fraction)
        row = _step(
            module, optimizer, reader=reader, indices=schedule.batch(step, order), epoch=epoch, train=train, lr=lr
        )
        done = step + 1
        row = {"step": done, "epoch": epoch, **row, **pace.after_step(row["num_tokens"])}
        log.write("train", row)
        logger.info("%s", format_step(row, num_steps=schedule.num_steps))
        if validate is not None and (done % validate_every == 0 or done == schedule.num_steps):
            with pace.paused():
                result = {"step": done, **validate(module)}
            log.write("validation", result)
            logger.info("step %6d  validation  tau %.3f", done, result["tau"])
        if done % train.checkpoint_every == 0 or done == schedule.num_steps:
            with pace.paused():
                state = TrainerState(step=done, made_from=made_from)
                folder = train.run_dir / "checkpoints"
                save_checkpoint(
                    folder, state=state, draft_model=module.draft_model, optimizer=optimizer, keep_last=train.keep_last
                )


def _step(
    module: DSparkTrainerModule,
    optimizer: torch.optim.Optimizer,
    *,
    reader: CacheReader,
    indices: np.ndarray,
    epoch: int,
    train: TrainSection,
    lr: float,
) -> dict[str, Any]:
    """One optimizer step over the samples at `indices`; the row that is logged."""
    device = next(module.parameters()).device
    batches = list(
        plan_batches(
            reader, indices.tolist(), max_batch_tokens=train.max_batch_tokens,
            num_anchors=module.draft_model.config.num_anchors, seed=train.seed, epoch=epoch,
        )
    )  # fmt: skip
    # The denominator is the step's, not the micro-batch's; it needs masks and anchors only, not the model.
    denominator = sum(
        float(module.loss_denominator(batch.loss_mask, batch.anchor_positions, batch.seq_lens)) for batch in batches
    )
    totals = StepTotals()
    module.train()
    for batch in batches:
        with compute_dtype(device, train.dtype):
            metrics = module(**gather_batch(reader, batch, device=device))
        (metrics.loss_num / max(denominator, 1e-30)).backward()
        totals.add(metrics)
    row = totals.ratios()
    if not math.isfinite(row["loss"]):
        samples = [sample_id for batch in batches for sample_id in batch.sample_ids]
        raise NonFiniteLossError(
            f"the loss is {row['loss']} in epoch {epoch} on samples {samples}; no weight was changed by this step. "
            "Lower train.lr, or look at these samples with `dspark inspect`"
        )
    norm = torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], train.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    num_tokens = sum(batch.num_tokens for batch in batches)
    return {**row, "lr": lr, "grad_norm": float(norm), "num_tokens": num_tokens, "num_micro_batches": len(batches)}


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


@contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """Keep a second training out of the run's folder. Raises CheckpointError while another process holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(f"another process is training in {run_dir}; set train.run_dir to a new folder") from error
    try:
        yield
    finally:
        os.close(descriptor)
