"""The batches of each step, gathered from the cache in the order of the plan."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from stages.train.batches import PlannedBatch, gather_batch, plan_batches
from stages.train.settings import TrainSection
from storage import CacheReader


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """Which samples an optimizer step sees, all ranks together."""

    step: int
    epoch: int
    indices: np.ndarray


@dataclass(frozen=True, kw_only=True)
class FedBatch:
    """A micro-batch of this rank, ready on the device. `arguments` are `DSparkTrainerModule.forward`'s."""

    planned: PlannedBatch
    arguments: dict[str, torch.Tensor]
    number: int
    """From 1."""
    num_batches: int
    """Micro-batches of this rank in the step; the same on every rank."""
    waited_seconds: float
    """How long the step stood still for this batch."""

    @property
    def is_last(self) -> bool:
        """Whether it is the last of its step."""
        return self.number == self.num_batches


@dataclass(frozen=True, kw_only=True)
class BatchFeed:
    """This rank's micro-batches."""

    reader: CacheReader
    train: TrainSection
    num_anchors: int
    device: torch.device
    rank: int = 0
    world: int = 1

    def plan(self, step: PlannedStep) -> list[PlannedBatch]:
        """This rank's micro-batches of a step, without their states."""
        batches = plan_batches(
            self.reader,
            step.indices.tolist(),
            max_batch_tokens=self.train.max_batch_tokens,
            num_anchors=self.num_anchors,
            seed=self.train.seed,
            epoch=step.epoch,
            rank=self.rank,
            world=self.world,
        )
        return list(batches)

    def run(self, steps: Iterable[PlannedStep]) -> Iterator[tuple[PlannedStep, Iterator[FedBatch]]]:
        """Each step with its batches. A batch's tensors are valid until the next one is asked for."""
        for step in steps:
            yield step, self._gather(self.plan(step))

    def _gather(self, planned: list[PlannedBatch]) -> Iterator[FedBatch]:
        for number, batch in enumerate(planned, start=1):
            started = time.monotonic()
            arguments = gather_batch(self.reader, batch, device=self.device)
            yield FedBatch(
                planned=batch,
                arguments=arguments,
                number=number,
                num_batches=len(planned),
                waited_seconds=time.monotonic() - started,
            )
