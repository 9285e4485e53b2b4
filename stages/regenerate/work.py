"""What a back end is given: the rows that are done, where outcomes go, and whether to stop."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from stages.regenerate.dialogue import Outcome
from stages.regenerate.journal import Journal
from stages.regenerate.prompts import Prompt

PROGRESS_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Work:
    """The open rows of a regeneration. `num_total` counts all of them, the finished ones too."""

    def __init__(self, journal: Journal, *, num_total: int, is_stopped: Callable[[], bool]) -> None:
        self._journal = journal
        self._num_total = num_total
        self._num_recorded = self._num_failed = self._num_tokens = 0
        self._started = self._told_at = time.monotonic()
        self.is_stopped = is_stopped

    def is_finished(self, prompt: Prompt) -> bool:
        return self._journal.is_finished(prompt.row)

    @property
    def num_recorded(self) -> int:
        """Rows that this run has an outcome for."""
        return self._num_recorded

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Keep outcomes for good, with a line now and then."""
        self._journal.append(outcomes)
        self._num_recorded += len(outcomes)
        self._num_failed += sum(outcome.kind == "failed" for outcome in outcomes)
        self._num_tokens += sum(outcome.num_tokens for outcome in outcomes)
        now = time.monotonic()
        if now - self._told_at > PROGRESS_SECONDS:
            self._told_at = now
            logger.info("%s", self._describe(seconds=now - self._started))

    def _describe(self, *, seconds: float) -> str:
        done = self._journal.num_finished + self._num_failed
        rate = self._num_recorded / seconds
        left = (self._num_total - done) / rate if rate else 0.0
        return (
            f"row {done:>9,} of {self._num_total:,}  {rate:>8.2f} rows/s  "
            f"{self._num_tokens / seconds:>9,.0f} tokens/s  failed {self._num_failed:>6,}  left {left / 3600:>7.2f} h"
        )


Backend = Callable[[Iterable[Prompt], Work], None]
"""Asks for every prompt that is not finished and records each outcome; returns early when the work is stopped."""
