"""How many steps a second a server takes, by the number of tokens that a verify step holds, and of requests in it.

Read from a CSV file, or from a cost table of `sglang.benchmark.dspark_sps_profiler` (SGLang 0.5.23), in either of its
forms.
"""

import csv
import io
import stat
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


class _Throughput(Record):
    """What every kind of table says of itself."""

    file: str | None
    """Where it was read from; None: the assumed table."""

    @property
    def label(self) -> str:
        return "assumed throughput" if self.file is None else f"throughput of {self.file}"


class ThroughputTable(_Throughput):
    """Steps a second at some numbers of tokens; between them on straight lines, below the first as at the first."""

    tokens: tuple[int, ...]
    steps_per_second: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.tokens) != len(self.steps_per_second) or len(self.tokens) < 2:
            raise ValueError("expected at least two rows of tokens and steps_per_second")
        _check_rising("tokens", self.tokens)
        for rate in self.steps_per_second:
            if not MIN_RATE <= rate <= MAX_RATE:
                raise ValueError(f"steps_per_second: expected numbers from {MIN_RATE:g} to {MAX_RATE:g}, got {rate}")
        return self

    def has(self, *, num_requests: int, num_tokens: int) -> bool:
        """Whether a step of so many requests and tokens was measured, or lies before one that was."""
        return num_tokens <= self.tokens[-1]

    def steps_at(self, num_tokens: np.ndarray, *, num_requests: int = 1) -> np.ndarray:
        """Steps a second with that many tokens each, at most the table's last number, whatever the requests."""
        if num_tokens.size and num_tokens.max() > self.tokens[-1]:
            raise AssertionError(f"the table ends at {self.tokens[-1]} tokens")
        rates: np.ndarray = np.interp(num_tokens, self.tokens, self.steps_per_second)
        return rates


class AdditiveCost(_Throughput):
    """Seconds of a step: a constant, a part by its requests and a part by its tokens, both as in `ThroughputTable`."""

    bias_seconds: float
    requests: tuple[int, ...]
    request_seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    token_seconds: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        columns = (("requests", self.requests, self.request_seconds), ("tokens", self.tokens, self.token_seconds))
        for name, numbers, seconds in columns:
            if not numbers or len(numbers) != len(seconds):
                raise ValueError(f"{name}: expected as many seconds as numbers, and at least one")
            _check_rising(name, numbers)
        if not self.bias_seconds > 0:
            raise ValueError(f"bias_seconds: expected more than 0, got {self.bias_seconds}")
        for end in (min, max):
            step = self.bias_seconds + end(self.request_seconds) + end(self.token_seconds)
            if not 1 / MAX_RATE <= step <= 1 / MIN_RATE:
                raise ValueError(f"seconds of a step: expected {1 / MAX_RATE:g} to {1 / MIN_RATE:g}, got {step:g}")
        return self

    def has(self, *, num_requests: int, num_tokens: int) -> bool:
        """Whether a step of so many requests and tokens was measured, or lies before one that was."""
        return num_requests <= self.requests[-1] and num_tokens <= self.tokens[-1]

    def steps_at(self, num_tokens: np.ndarray, *, num_requests: int) -> np.ndarray:
        """Steps a second with that many tokens each."""
        if num_tokens.size and not self.has(num_requests=num_requests, num_tokens=int(num_tokens.max())):
            raise AssertionError(f"the table ends at {self.requests[-1]} requests and {self.tokens[-1]} tokens")
        seconds = np.interp(num_requests, self.requests, self.request_seconds)
        seconds = self.bias_seconds + seconds + np.interp(num_tokens, self.tokens, self.token_seconds)
        rates: np.ndarray = 1 / seconds
        return rates


Throughput = ThroughputTable | AdditiveCost


class _CostTable(Record):
    """SGLang's cost table, as its profiler writes it without `--offdiag`."""

    sample_batch_tokens: tuple[int, ...]
    sample_steps_per_sec: tuple[float, ...]
    max_batch_tokens: int
    """How far its scheduler trusts the last sample. What lies beyond that sample was not measured, and is left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_batch_tokens < max(self.sample_batch_tokens, default=0):
            raise ValueError(f"max_batch_tokens: expected at least the largest sample, got {self.max_batch_tokens}")
        return self

    def to_throughput(self, file: Path) -> Throughput:
        return ThroughputTable(
            file=str(file), tokens=self.sample_batch_tokens, steps_per_second=self.sample_steps_per_sec
        )


class _AdditiveCostTable(Record):
    """SGLang's cost table of two axes: requests (bs) and tokens (m) of a step."""

    bias_seconds: float
    bs_probes: tuple[int, ...]
    alpha_seconds: tuple[float, ...]
    m_probes: tuple[int, ...]
    theta_seconds: tuple[float, ...]

    def to_throughput(self, file: Path) -> Throughput:
        return AdditiveCost(
            file=str(file),
            bias_seconds=self.bias_seconds,
            requests=self.bs_probes,
            request_seconds=self.alpha_seconds,
            tokens=self.m_probes,
            token_seconds=self.theta_seconds,
        )


def _check_rising(name: str, numbers: tuple[int, ...]) -> None:
    if numbers[0] < 1 or any(low >= high for low, high in pairwise(numbers)):
        raise ValueError(f"{name}: expected whole numbers from 1 up, each greater than the one before")
    if numbers[-1] > MAX_TOKENS:
        raise ValueError(f"{name}: expected at most {MAX_TOKENS}, got {numbers[-1]}")


def assumed_table() -> ThroughputTable:
    """A GPU's shape: memory-bound, then compute-bound."""
    seconds = [WEIGHTS_SECONDS * (1 + (tokens / BALANCED_TOKENS) ** 4) ** 0.25 for tokens in ASSUMED_TOKENS]
    return ThroughputTable(
        file=None, tokens=ASSUMED_TOKENS, steps_per_second=tuple(round(1 / second, 4) for second in seconds)
    )


def read_throughput_table(file: Path | None, *, least_tokens: int) -> Throughput:
    """The table of a CSV file with the columns `tokens` and `steps_per_second`, SGLang's in JSON, or the assumed one.

    Raises SettingError, also where it ends before `least_tokens`.
    """
    table = assumed_table() if file is None else _read_table(file)
    if table.tokens[-1] < least_tokens:
        raise SettingError(
            f"evaluate.throughput_table: the {table.label} ends at {table.tokens[-1]} tokens; "
            f"a step of one request has up to {least_tokens}"
        )
    return table


def _read_table(file: Path) -> Throughput:
    where = f"evaluate.throughput_table: {file}"
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # to read a pipe or a device may never end
            raise SettingError(f"{where}: is not a regular file")
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise SettingError(f"{where}: no such file") from error
    except OSError as error:
        raise SettingError(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{where}: is not CSV, nor JSON: {error}") from error
    try:
        return _parse_json(text, file) if text.lstrip().startswith("{") else _parse_csv(text, file, where=where)
    except ValidationError as error:
        raise SettingError(f"{where}: {describe(error)}") from error


def _parse_json(text: str, file: Path) -> Throughput:
    """Told apart as SGLang does: only the additive form has a `bias_seconds`. Raises ValidationError."""
    kind = _AdditiveCostTable if '"bias_seconds"' in text else _CostTable
    return kind.model_validate_json(text).to_throughput(file)


def _parse_csv(text: str, file: Path, *, where: str) -> ThroughputTable:
    """Raises SettingError, ValidationError."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise SettingError(f"{where}: is not CSV: {error}") from error
    if not lines or [name.strip() for name in lines[0][1]] != COLUMNS:
        raise SettingError(
            f"{where}: expected the header {','.join(COLUMNS)}, got {lines[0][1] if lines else 'nothing'}"
        )
    rows = [_parse_row(row, where=f"{where} line {number}") for number, row in lines[1:]]
    return ThroughputTable(
        file=str(file), tokens=tuple(tokens for tokens, _ in rows), steps_per_second=tuple(rate for _, rate in rows)
    )


def _parse_row(row: list[str], *, where: str) -> tuple[int, float]:
    try:
        tokens, rate = row
        return int(tokens), float(rate)
    except ValueError as error:
        raise SettingError(f"{where}: expected a whole number and a number, got {','.join(row)!r}") from error
