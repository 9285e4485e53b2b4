"""Rows to planned samples: parse, tokenise, cut or drop, split; and the count of everything that was left out."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from stages.extract.conversations import parse_row
from stages.extract.ordered import map_ordered
from stages.extract.rows import BadRowError, DataError, Row
from stages.extract.settings import DataSection
from stages.extract.tokenize import SampleTokenizer
from storage import PlannedSample, Split
from storage.text import redact

EXAMPLES_PER_REASON = 3
MIN_ROWS_TO_JUDGE = 1000  # before that many rows the share of bad ones says little, and the verdict waits for the end


@dataclass
class SampleCounts:
    """What became of the rows so far. `bad` rows could not be read; `dropped` ones were readable, but are no use."""

    num_rows: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_truncated: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def record(self, kind: Counter[str], *, reason: str, row: Row) -> None:
        kind[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(f"{row.file} row {row.row}")

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())

    def all_reasons(self) -> dict[str, int]:
        """Reason -> number of rows, for everything that changed or left out a row."""
        truncated = {"truncated to data.max_length": self.num_truncated} if self.num_truncated else {}
        return (
            {f"bad row: {reason}": count for reason, count in sorted(self.bad.items())}
            | {f"dropped: {reason}": count for reason, count in sorted(self.dropped.items())}
            | truncated
        )

    def describe(self) -> list[str]:
        """One line a reason, with places to look at."""
        lines = []
        for title, kind in (("bad row", self.bad), ("dropped", self.dropped)):
            for reason, count in kind.most_common():
                lines.append(f"{title}: {count:,} x {reason} ({'; '.join(self.examples[reason])})")
        if self.num_truncated:
            lines.append(f"truncated to data.max_length: {self.num_truncated:,}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a row: a sample, or the reason why there is none (`bad`: unreadable, `dropped`: of no use)."""

    row: Row
    sample: PlannedSample | None = None
    bad: str | None = None
    dropped: str | None = None
    is_truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class RowPlanner:
    """One row, numbered in the order of the source, to its outcome: a pure function, so that processes can share it.

    A row that contains the mask token is bad: to the draft that token means a slot to be filled.
    """

    tokenizer: SampleTokenizer
    data: DataSection
    mask_token_id: int

    def __call__(self, numbered: tuple[int, Row]) -> Outcome:
        sample_id, row = numbered
        place = replace(row, value=None)  # what travels back says where the row was, not what was in it
        try:
            return self._plan(row, sample_id, place)
        except BadRowError as error:
            return Outcome(row=place, bad=str(error))

    def _plan(self, row: Row, sample_id: int, place: Row) -> Outcome:
        if row.value is None:
            raise BadRowError(row.error or "unreadable")
        data = self.data
        assert data.max_length is not None, "filled in by whoever knows the target"
        tokens = self.tokenizer(parse_row(row.value))
        input_ids, loss_mask = tokens.input_ids, tokens.loss_mask
        is_truncated = len(input_ids) > data.max_length
        if is_truncated and data.overlong == "drop":
            return Outcome(row=place, dropped="longer than data.max_length")
        input_ids, loss_mask = input_ids[: data.max_length], loss_mask[: data.max_length]
        if int(loss_mask.sum()) < data.min_supervised_tokens:
            reason = "fewer supervised tokens than data.min_supervised_tokens"
            return Outcome(row=place, dropped=reason, is_truncated=is_truncated)
        if self.mask_token_id in input_ids:
            raise BadRowError(f"contains the mask token {self.mask_token_id}; choose another draft.mask_token_id")
        sample = PlannedSample(
            sample_id=sample_id,
            source_file=redact(row.file),
            source_row=row.row,
            input_ids=input_ids,
            loss_mask=loss_mask,
            split=choose_split(input_ids, loss_mask, validation_fraction=data.validation_fraction),
        )
        return Outcome(row=place, sample=sample, is_truncated=is_truncated)


def plan_samples(
    rows: Iterable[Row], *, tokenizer: SampleTokenizer, data: DataSection, mask_token_id: int, counts: SampleCounts
) -> Iterator[PlannedSample]:
    """The samples of `rows` in their order, a pure function of the rows; `counts` is updated on the way.

    Many rows are tokenised by `data.num_processes` processes. Raises DataError when more than `data.max_bad_fraction`
    of the rows are bad, or when nothing is left at the end.
    """
    planner = RowPlanner(tokenizer=tokenizer, data=data, mask_token_id=mask_token_id)
    for outcome in map_ordered(planner, enumerate(rows), num_processes=data.num_processes):
        counts.num_rows += 1
        counts.num_truncated += outcome.is_truncated
        if outcome.bad is not None:
            counts.record(counts.bad, reason=outcome.bad, row=outcome.row)
            if counts.num_rows >= MIN_ROWS_TO_JUDGE:
                _check_bad_fraction(counts, data)
        elif outcome.dropped is not None:
            counts.record(counts.dropped, reason=outcome.dropped, row=outcome.row)
        elif outcome.sample is not None:
            counts.num_samples += 1
            counts.num_tokens += outcome.sample.num_tokens
            counts.num_supervised += outcome.sample.num_supervised
            yield outcome.sample
    _check_bad_fraction(counts, data)
    if not counts.num_samples:
        raise DataError("\n".join(["no sample is left to train on", *counts.describe()]))


def choose_split(input_ids: np.ndarray, loss_mask: np.ndarray, *, validation_fraction: float) -> Split:
    """By a hash of the tokens before the first supervised one; of all tokens, if that is the first."""
    first = int(np.argmax(loss_mask))
    prompt = input_ids[:first] if first else input_ids
    digest = hashlib.blake2b(np.ascontiguousarray(prompt, dtype="<i4").tobytes(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < validation_fraction * 2**64 else "train"


def _check_bad_fraction(counts: SampleCounts, data: DataSection) -> None:
    if counts.num_bad > data.max_bad_fraction * counts.num_rows:
        raise DataError(
            "\n".join(
                [
                    f"{counts.num_bad:,} of the first {counts.num_rows:,} rows are bad, more than "
                    f"data.max_bad_fraction = {data.max_bad_fraction}; mend them or raise the limit",
                    *counts.describe(),
                ]
            )
        )
