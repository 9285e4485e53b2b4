"""When a training is measured on the held-out split, and the row that says how it did."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from stages.train.interrupt import StopAskedError
from stages.train.metrics import MetricsLog
from stages.train.module import DSparkTrainerModule
from stages.train.parallel import reshard, unwrap

Validate = Callable[[DSparkTrainerModule], dict[str, Any]]

logger = logging.getLogger(__name__)


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
            result = {"step": done, **self.validate(unwrap(module))}
        except StopAskedError:
            logger.info("step %6d  validation given up; it is done when the run is continued", done)
            return
        finally:
            reshard(module)
        if self.log is not None:
            self.log.write("validation", result)
        logger.info("step %6d  validation  tau %.3f", done, result["tau"])
