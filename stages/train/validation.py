"""When a training is measured on the held-out split, and the row that says how it did."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stages.train.interrupt import StopAskedError, StopRequest
from stages.train.metrics import MetricsLog
from stages.train.module import DSparkTrainerModule
from stages.train.parallel import reshard, unwrap

Judge = Callable[[dict[str, Any]], str | None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Validate:
    """How a training is measured."""

    measure: Callable[[DSparkTrainerModule], dict[str, Any]]
    """The row to log, of which `tau` is shown. All ranks call it."""
    judge: Judge | None = None
    """Given the row that was logged: why the training is to be given up, or None to go on. Called on rank 0, and not
    after the last step, when there is nothing left to give up."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation every `every` steps and after the last; `validate` None: never.

    It comes behind the checkpoint of its step, so a kill may cut it off; the resumed run makes up for it.
    """

    validate: Validate | None
    every: int
    num_steps: int
    log: MetricsLog | None
    """Of rank 0."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Asked by what the judge says. The caller must agree on it with the other ranks."""

    def is_due(self, done: int) -> bool:
        """Whether it follows step number `done`."""
        return self.validate is not None and (done % self.every == 0 or done == self.num_steps)

    def is_missing(self, start: int) -> bool:
        """Whether the run that is continued behind step `start` was cut off before the validation of that step."""
        is_logged = self.log is not None and self.log.has("validation", start)
        return start > 0 and self.is_due(start) and not is_logged

    def run(self, module: nn.Module, done: int) -> None:
        """Validate and log what `parallel.wrap` returned; given up if the training is asked to stop."""
        if self.validate is None:
            raise AssertionError("no validation is due without a way to validate")
        try:
            result = {"step": done, **self.validate.measure(unwrap(module))}
        except StopAskedError:
            logger.info("step %6d  validation given up; it is done when the run is continued", done)
            return
        finally:
            reshard(module)
        if self.log is not None:
            self.log.write("validation", result)
        logger.info("step %6d  validation  tau %.3f", done, result["tau"])
        if self.log is not None and self.validate.judge is not None and done < self.num_steps:
            reason = self.validate.judge(result)
            if reason is not None:
                self.stop.give_up(reason)
