"""Where long work stands: log records that carry a position, which whoever shows them may thin out or draw as a bar.

``pipeline.logs`` draws a live bar on a terminal and prints a line every ten seconds elsewhere. Without it every record
is an ordinary message.
"""

import logging
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Position:
    """``done`` of ``total`` parts of the work called ``name``; ``eta_seconds``: the rest takes about that long."""

    name: str
    done: int
    total: int
    eta_seconds: float

    @property
    def is_end(self) -> bool:
        """Whether nothing is left."""
        return self.done >= self.total


def log_position(logger: logging.Logger, position: Position, line: str) -> None:
    """Log ``line``, which says where the work stands, together with the position itself."""
    logger.info("%s", line, extra={"position": position})


def position_of(record: logging.LogRecord) -> Position | None:
    """The position that a record carries, if it was logged with one."""
    position = getattr(record, "position", None)
    return position if isinstance(position, Position) else None
