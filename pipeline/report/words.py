"""Numbers of a report in words, the same on the page and in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Difference:
    """tau of the best run minus that of another, over the blocks that both have; `low`, `high`: 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the best is ahead beyond chance: the whole interval is in its favour."""
        return self.low > 0


def format_difference(difference: Difference | None) -> str:
    """How far behind the best: mean and interval."""
    if difference is None:
        return ""
    return f"{-difference.mean:+.3f} ({-difference.high:+.3f} to {-difference.low:+.3f})"


def join_names(names: Sequence[str]) -> str:
    """The first three, and how many there are besides."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def format_value(value: Any) -> str:
    """A config value in few characters."""
    if value is None:
        return "default"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_seconds(seconds: float) -> str:
    """Seconds, minutes or hours, three digits."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def readable(text: str) -> str:
    """The text as any terminal or file takes it: "?" for what is no character, as in names that are not UTF-8."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
