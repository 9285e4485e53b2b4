"""What a back end is given: the rows that are done, where outcomes go, and whether to stop."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from stages.regenerate.dialogue import Outcome
from stages.regenerate.journal import Journal
from stages.regenerate.prompts import Prompt
from storage.progress import Position, log_position
from storage.text import format_duration

PROGRESS_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Work:
    """The open rows of a regeneration. `num_total` counts all of them, the finished ones too."""

    def __init__(self, journal: Journal, *, num_total: int, is_stopped: Callable[[], bool]) -> None:
        self._journal = journal
        self._num_total = num_total
        self._num_recorded = self._num_failed = self._num_tokens = self._num_unfinished = 0
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
        self._num_unfinished += sum(outcome.num_unfinished for outcome in outcomes)
        self.tell()

    def is_due(self) -> bool:
        """Whether it is time for a line."""
        return time.monotonic() - self._told_at > PROGRESS_SECONDS

    def tell(self, *, num_rows: float = 0.0, num_tokens: int = 0, num_unfinished: int = 0) -> None:
        """A line, if it is time for one; the arguments are what is under way beside the recorded outcomes."""
        if not self.is_due():
            return
        self._told_at = now = time.monotonic()
        seconds = now - self._started
        rate, num_tokens = (self._num_recorded + num_rows) / seconds, self._num_tokens + num_tokens
        done = self._journal.num_finished + self._num_failed
        left = max(self._num_total - done - num_rows, 0.0) / rate if rate else None
        log_position(
            logger,
            Position(name="regenerate", done=done, total=self._num_total, eta_seconds=left),
            f"row {done:9,} of {self._num_total:,}  {rate:8.2f} rows/s  {num_tokens:9,} tokens  "
            f"{num_tokens / seconds:7,.0f} tokens/s  cut {self._num_unfinished + num_unfinished:6,}  "
            f"failed {self._num_failed:6,}  ETA {'unknown' if left is None else format_duration(left)}",
        )


Backend = Callable[[Iterable[Prompt], Work], None]
"""Asks for every prompt that is not finished and records each outcome; returns early when the work is stopped."""
