"""Where long work stands: log records that carry a position, which whoever shows them may thin out or draw as a bar.

``pipeline.logs`` draws a live bar on a terminal and prints a line every ten seconds elsewhere. Without it every record
is an ordinary message.
"""

import logging
import time
from dataclasses import dataclass

from storage.text import format_duration

QUIET_SECONDS = 2.0  # work that is over by then says nothing


@dataclass(frozen=True, kw_only=True)
class Position:
    """``done`` of ``total`` parts of the work called ``name``; ``eta_seconds``: the rest takes about that long.

    Both are None where nobody knows how much there is.
    """

    name: str
    done: int
    total: int | None
    eta_seconds: float | None

    @property
    def is_end(self) -> bool:
        """Whether nothing is left."""
        return self.total is not None and self.done >= self.total


def log_position(logger: logging.Logger, position: Position, line: str) -> None:
    """Log ``line``, which says where the work stands, together with the position itself."""
    logger.info("%s", line, extra={"position": position})


class Meter:
    """Says how far counted work is, at its mean rate so far, once it takes longer than a moment."""

    def __init__(self, logger: logging.Logger, name: str, *, total: int | None, unit: str) -> None:
        self._logger = logger
        self._name = name
        self._total = total
        self._unit = unit
        self._done = 0
        self._started = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """``count`` more parts are done."""
        self._done += count
        seconds = time.monotonic() - self._started
        if seconds < QUIET_SECONDS:
            return
        left = None if self._total is None else seconds * (self._total - self._done) / self._done
        position = Position(name=self._name, done=self._done, total=self._total, eta_seconds=left)
        standing = f"{self._done:,}" if self._total is None else f"{self._done:,}/{self._total:,}"
        ends = "" if left is None else f"  ETA {format_duration(left)}"
        line = f"{self._name} {standing} {self._unit}  {self._done / seconds:,.1f} a second{ends}"
        log_position(self._logger, position, line)


def position_of(record: logging.LogRecord) -> Position | None:
    """The position that a record carries, if it was logged with one."""
    position = getattr(record, "position", None)
    return position if isinstance(position, Position) else None
