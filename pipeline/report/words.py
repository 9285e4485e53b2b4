"""Numbers of a report in words, the same on the page and in the terminal."""

import re
from collections.abc import Sequence
from typing import Any

from pipeline.report.pairing import Difference


def format_difference(difference: Difference | None) -> str:
    """How far behind the best: mean and interval."""
    if difference is None:
        return ""
    return f"{-difference.mean:+.3f} ({-difference.high:+.3f} to {-difference.low:+.3f})"


def join_names(names: Sequence[str]) -> str:
    """The first three, and how many there are besides."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def break_name(name: str, *, width: int) -> str:
    """The name in lines of up to `width` characters, where its punctuation allows it."""
    lines = [""]
    for part in re.split(r"(?<=[,/=])", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def format_value(value: Any) -> str:
    """A config value in few characters."""
    if value is None:
        return "default"
    return f"{value:.4g}" if isinstance(value, float) else readable(str(value))


def describe_seconds(seconds: float) -> str:
    """Seconds, minutes or hours, three digits."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def readable(text: str) -> str:
    """The text as any terminal or file takes it.

    "?" stands for what is no character, as in names that are not UTF-8, and for what steers a terminal.
    """
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
