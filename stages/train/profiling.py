"""A torch profiler trace of a few steps of a training, for Perfetto."""

import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

SKIPPED_STEPS = 2  # the first ones compile, allocate and fault pages in
PROFILED_STEPS = 3
# A step of the reference recipe has a hundred micro-batches of some thousand events each: of such steps one is plenty.
PROFILED_MICRO_BATCHES = 32

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles some steps after the first ones of this process, and writes RUN/profile/until_step_N.json.gz.

    Call `after_step` behind each step; leaving the context writes what there is.
    """

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        self._folder = folder
        self._num_profiled: int | None = None  # known once a step has been seen
        self._last_step = 0
        self._file: Path | None = None
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(
            activities=activities, schedule=self._plan, on_trace_ready=self._write, record_shapes=True, acc_events=True
        )

    def __enter__(self) -> Self:
        self._profile.start()
        return self

    def after_step(self, step: int, *, num_micro_batches: int) -> None:
        """Optimizer step number `step` is done."""
        self._last_step = step
        if self._num_profiled is None:
            self._num_profiled = max(1, min(PROFILED_STEPS, PROFILED_MICRO_BATCHES // num_micro_batches))
        self._profile.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.stop()
        if self._file is None:
            logger.warning("nothing was profiled: that needs more than %d steps of this run to be done", SKIPPED_STEPS)

    def _plan(self, step: int) -> ProfilerAction:
        """What the profiler does in this process's step number `step`, from 0."""
        end = SKIPPED_STEPS + (self._num_profiled or PROFILED_STEPS)
        if step < SKIPPED_STEPS - 1 or step >= end:
            return ProfilerAction.NONE
        if step == SKIPPED_STEPS - 1:
            return ProfilerAction.WARMUP
        is_last = step == end - 1
        return ProfilerAction.RECORD_AND_SAVE if is_last else ProfilerAction.RECORD

    def _write(self, profiled: profile) -> None:
        if self._file is not None or not self._last_step:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"until_step_{self._last_step:08d}.json.gz"
        temp = self._folder / f".{os.getpid()}.{file.name}"
        profiled.export_chrome_trace(str(temp))
        temp.replace(file)
        self._file = file
        logger.info("profile: %s; open it at https://ui.perfetto.dev or in chrome://tracing", file)
