"""What is kept of a step whose loss or gradient is NaN or infinite, and how to run it again.

RUN/nonfinite/step_00000012.safetensors   arguments of the first micro-batch whose loss was not finite; where only the
                                          gradient was not, of the last one. Of several ranks, each has its own
RUN/nonfinite/step_00000012.json          its samples, the step, and which arguments are not finite themselves

The weights of that step are those of a run that is started again with `train.checkpoint_every=1`: it comes by the same
step, and its last checkpoint is the one before.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stages.errors import StageError
from stages.train.batches import PlannedBatch, gather_batch
from stages.train.feed import BatchFeed, PlannedStep
from stages.train.module import DSparkStepMetrics, DSparkTrainerModule
from storage import CacheError

logger = logging.getLogger(__name__)


class NonFiniteLossError(StageError, RuntimeError):
    """The loss or the gradient became NaN or infinite; the message names the samples. No weight was changed.

    `batch` is the micro-batch to look at, None where another rank has it.
    """

    def __init__(self, message: str, *, batch: PlannedBatch | None) -> None:
        super().__init__(message)
        self.batch = batch


def find_culprit(losses: list[torch.Tensor], batches: list[PlannedBatch], *, or_last: bool) -> PlannedBatch | None:
    """The first of this rank's micro-batches whose loss, a scalar each, is not finite.

    If all are finite, another rank has it, or only a gradient is not: which one's cannot be told. `or_last` then takes
    the last micro-batch.
    """
    bad = (~torch.stack(losses).isfinite()).nonzero()
    if len(bad):
        return batches[int(bad[0])]
    return next((batch for batch in reversed(batches) if batch.indices), None) if or_last else None


@contextmanager
def keep_batch(feed: BatchFeed, step: PlannedStep, *, folder: Path) -> Iterator[None]:
    """Save the micro-batch of a NonFiniteLossError in `folder` and say so in its message."""
    try:
        yield
    except NonFiniteLossError as error:
        if error.batch is None:
            raise
        name = f"step_{step.step + 1:08d}" + (f".rank{feed.rank}" if feed.world > 1 else "")
        try:
            file = save_batch(feed, step, error.batch, file=folder / f"{name}.safetensors", problem=str(error))
        except (OSError, SafetensorError, CacheError) as disk:
            raise NonFiniteLossError(
                f"{error}. The micro-batch could not be saved: {disk}", batch=error.batch
            ) from error
        raise NonFiniteLossError(f"{error}. Their micro-batch is saved in {file}", batch=error.batch) from error


def save_batch(feed: BatchFeed, step: PlannedStep, batch: PlannedBatch, *, file: Path, problem: str) -> Path:
    """Gather the batch from the cache once more and write it, with a description in JSON beside it."""
    arguments = gather_batch(feed.reader, batch, device=torch.device("cpu"))
    description: dict[str, Any] = {
        "step": step.step + 1,
        "epoch": step.epoch,
        "sample_ids": batch.sample_ids,
        "problem": problem,
        "non_finite_arguments": [name for name, tensor in arguments.items() if not bool(tensor.isfinite().all())],
        "cache": str(feed.reader.place),
        "replay": f"stages.train.nonfinite.replay(Path({str(file)!r}), DSparkTrainerModule(Qwen3DSparkModel."
        "from_pretrained(CHECKPOINT)))",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temp = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        save_file(arguments, temp)
        temp.replace(file)
    finally:
        temp.unlink(missing_ok=True)
    file.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return file


def replay(file: Path, module: DSparkTrainerModule) -> DSparkStepMetrics:
    """The losses of a saved micro-batch, with gradients; in float32, unless the caller sets autocast."""
    device = next(module.parameters()).device
    return module(**load_file(file, device=str(device)))  # type: ignore[no-any-return]
