"""How many steps a second a server takes, by the number of tokens that a verify step holds."""

import csv
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import ValidationError, model_validator

from stages.errors import SettingError
from storage.sealed import Record, describe

COLUMNS = ["tokens", "steps_per_second"]
# Wider than any server, and narrow enough that seconds, sums and products of them stay finite.
MAX_TOKENS = 1_000_000_000
MIN_RATE, MAX_RATE = 1e-6, 1e9

# The assumed table, no measurement: reading the weights takes 10 ms whatever the batch, and arithmetic takes as long
# once the batch has 300 tokens, as in bfloat16 on a GPU of 990 TFLOP/s and 3.35 TB/s; the two overlap, but not
# perfectly where they are alike (a norm of order 4 of both). Attention and the draft's own time are left out.
WEIGHTS_SECONDS = 0.010
BALANCED_TOKENS = 300
# Eight rows an octave, since straight lines between rows far apart would promise more than the curve.
ASSUMED_TOKENS = (
    1,
    2,
    4,
    *(size * step // 8 for size in (8 << octave for octave in range(11)) for step in range(8, 16)),
)


class ThroughputTable(Record):
    """Steps a second at some numbers of tokens; between them on straight lines, below the first as at the first."""

    file: str | None
    """Where it was read from; None: the assumed table."""
    tokens: tuple[int, ...]
    steps_per_second: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.tokens) != len(self.steps_per_second) or len(self.tokens) < 2:
            raise ValueError("expected at least two rows of tokens and steps_per_second")
        if self.tokens[0] < 1 or any(low >= high for low, high in pairwise(self.tokens)):
            raise ValueError("tokens: expected whole numbers from 1 up, each greater than the one before")
        if self.tokens[-1] > MAX_TOKENS:
            raise ValueError(f"tokens: expected at most {MAX_TOKENS}, got {self.tokens[-1]}")
        for rate in self.steps_per_second:
            if not MIN_RATE <= rate <= MAX_RATE:
                raise ValueError(f"steps_per_second: expected numbers from {MIN_RATE:g} to {MAX_RATE:g}, got {rate}")
        return self

    @property
    def label(self) -> str:
        return "assumed throughput" if self.file is None else f"throughput of {self.file}"

    def steps_at(self, num_tokens: np.ndarray) -> np.ndarray:
        """Steps a second with that many tokens each, at most the table's last number."""
        if num_tokens.size and num_tokens.max() > self.tokens[-1]:
            raise AssertionError(f"the table ends at {self.tokens[-1]} tokens")
        rates: np.ndarray = np.interp(num_tokens, self.tokens, self.steps_per_second)
        return rates


def assumed_table() -> ThroughputTable:
    """A GPU's shape: memory-bound, then compute-bound."""
    seconds = [WEIGHTS_SECONDS * (1 + (tokens / BALANCED_TOKENS) ** 4) ** 0.25 for tokens in ASSUMED_TOKENS]
    return ThroughputTable(
        file=None, tokens=ASSUMED_TOKENS, steps_per_second=tuple(round(1 / second, 4) for second in seconds)
    )


def read_throughput_table(file: Path | None, *, least_tokens: int) -> ThroughputTable:
    """The table of a CSV file with the columns `tokens` and `steps_per_second`, or the assumed one.

    Raises SettingError, also where it ends before `least_tokens`.
    """
    table = assumed_table() if file is None else _read_csv(file)
    if table.tokens[-1] < least_tokens:
        raise SettingError(
            f"evaluate.throughput_table: the {table.label} ends at {table.tokens[-1]} tokens; "
            f"a step of one request has up to {least_tokens}"
        )
    return table


def _read_csv(file: Path) -> ThroughputTable:
    where = f"evaluate.throughput_table: {file}"
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            lines = [(reader.line_num, row) for reader in [csv.reader(stream)] for row in reader if row]
    except FileNotFoundError as error:
        raise SettingError(f"{where}: no such file") from error
    except OSError as error:
        raise SettingError(f"{where}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise SettingError(f"{where}: is not CSV: {error}") from error
    if not lines or [name.strip() for name in lines[0][1]] != COLUMNS:
        raise SettingError(
            f"{where}: expected the header {','.join(COLUMNS)}, got {lines[0][1] if lines else 'nothing'}"
        )
    rows = [_parse_row(row, where=f"{where} line {number}") for number, row in lines[1:]]
    try:
        return ThroughputTable(
            file=str(file), tokens=tuple(tokens for tokens, _ in rows), steps_per_second=tuple(rate for _, rate in rows)
        )
    except ValidationError as error:
        raise SettingError(f"{where}: {describe(error)}") from error


def _parse_row(row: list[str], *, where: str) -> tuple[int, float]:
    try:
        tokens, rate = row
        return int(tokens), float(rate)
    except ValueError as error:
        raise SettingError(f"{where}: expected a whole number and a number, got {','.join(row)!r}") from error
