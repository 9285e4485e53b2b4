"""Rows to planned samples: parse, tokenise, cut or drop, split; and the count of everything that was left out."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stages.extract.conversations import NO_ANSWER, parse_row
from stages.extract.ordered import map_ordered
from stages.extract.rows import BadRowError, DataError, Row
from stages.extract.settings import DataSection
from stages.extract.tokenize import SampleTokenizer
from stages.prompt_hash import COLUMN, HASH_BYTES, hash_prompt
from storage import PlannedSample, Split
from storage.progress import Meter
from storage.text import redact

EXAMPLES_PER_REASON = 3
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "test"), "validation"),
}
HELD_OUT = "its prompt is in data.validation_files"
REGENERATE = "dspark regenerate lets the target answer them; name its files in data.files then"
MIN_ROWS_TO_JUDGE = 1000  # before that many rows the share of bad ones says little, and the verdict waits for the end

logger = logging.getLogger(__name__)


class PromptsOnlyError(DataError):
    """The rows are questions that nobody has answered yet."""


@dataclass
class SampleCounts:
    """What became of the rows so far. `bad` rows could not be read; `dropped` ones were readable, but are no use."""

    num_rows: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_truncated: int = 0
    split_samples: Counter[Split] = field(default_factory=Counter)
    split_tokens: Counter[Split] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unseen_tokens: set[int] = field(default_factory=set)
    """Of the ids that stand here at the start, those that no sample contains."""

    def record(self, kind: Counter[str], *, reason: str, row: Row) -> None:
        kind[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(f"{row.file} row {row.row}")

    def add(self, sample: PlannedSample) -> None:
        self.num_samples += 1
        self.num_tokens += sample.num_tokens
        self.num_supervised += sample.num_supervised
        self.split_samples[sample.split] += 1
        if self.unseen_tokens:
            self.unseen_tokens.difference_update(np.unique(sample.input_ids).tolist())
        self.split_tokens[sample.split] += sample.num_tokens

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
    """What became of a row: a sample and its prompt's hash, or the reason why there is none.

    `bad`: unreadable, `dropped`: of no use.
    """

    row: Row
    sample: PlannedSample | None = None
    prompt: bytes = b""
    bad: str | None = None
    dropped: str | None = None
    is_truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class RowPlanner:
    """One row, numbered in the order of the source, to its outcome: a pure function, so that processes can share it.

    A row that contains the mask token is bad: to the draft that token means a slot to be filled. So is one with a token
    that the target's embedding of `vocab_size` rows does not have. `data` names its files one by one.
    """

    tokenizer: SampleTokenizer
    data: DataSection
    mask_token_id: int | None
    vocab_size: int

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
        if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.vocab_size:
            raise BadRowError(f"a token id outside the target's embedding of {self.vocab_size} rows")
        if self.mask_token_id is not None and self.mask_token_id in input_ids:
            raise BadRowError(f"contains the mask token {self.mask_token_id}; choose another draft.mask_token_id")
        prompt = _parse_prompt_hash(row.value.get(COLUMN)) or hash_first_prompt(input_ids, loss_mask)
        sample = PlannedSample(
            sample_id=sample_id,
            source_file=redact(row.file),
            source_row=row.row,
            input_ids=input_ids,
            loss_mask=loss_mask,
            split=split_by_row(row, data) or choose_split(prompt, validation_fraction=data.validation_fraction),
        )
        return Outcome(row=place, sample=sample, prompt=prompt, is_truncated=is_truncated)


def plan_samples(rows: Iterable[Row], *, planner: RowPlanner, counts: SampleCounts) -> Iterator[PlannedSample]:
    """The samples of `rows` in their order, a pure function of the rows; `counts` is updated on the way.

    Rows of `data.validation_files` come first. Many rows are tokenised by `data.num_processes` processes. Warns of a
    split without a sample. Raises DataError when more than `data.max_bad_fraction` of the rows are bad, or when nothing
    is left at the end.
    """
    data = planner.data
    held_out: set[bytes] = set()
    num_taken = 0
    meter = Meter(logger, "planning", total=None, unit="rows")
    with closing(map_ordered(planner, enumerate(rows), num_processes=data.num_processes)) as outcomes:
        for outcome in outcomes:
            _count_row(outcome, counts, data)
            meter.advance()
            sample = outcome.sample
            if sample is None:
                continue
            is_from_validation_file = outcome.row.file in data.validation_files
            if is_from_validation_file:
                held_out.add(outcome.prompt)
            elif outcome.prompt in held_out:
                counts.record(counts.dropped, reason=HELD_OUT, row=outcome.row)
                continue
            counts.add(sample)
            yield sample
            num_taken += not is_from_validation_file
            if num_taken == data.max_samples:
                break
    _check_bad_fraction(counts, data)
    if not counts.num_samples:
        raise DataError("\n".join(["no sample is left to train on", *counts.describe()]))
    _warn_of_empty_split(counts)


def _count_row(outcome: Outcome, counts: SampleCounts, data: DataSection) -> None:
    counts.num_rows += 1
    counts.num_truncated += outcome.is_truncated
    if outcome.dropped is not None:
        counts.record(counts.dropped, reason=outcome.dropped, row=outcome.row)
    if outcome.bad is not None:
        counts.record(counts.bad, reason=outcome.bad, row=outcome.row)
        if counts.num_rows >= MIN_ROWS_TO_JUDGE:
            _check_bad_fraction(counts, data)


def _warn_of_empty_split(counts: SampleCounts) -> None:
    if not counts.split_samples["validation"]:
        logger.warning(
            "no sample is held out, so train cannot measure its draft and sweep refuses the cache; set "
            "data.validation_fraction (with few prompts a larger one) or data.validation_files, or give rows a column "
            "split"
        )
    if not counts.split_samples["train"]:
        logger.warning("every sample is held out, so train refuses the cache; lower data.validation_fraction")


def split_by_row(row: Row, data: DataSection) -> Split | None:
    """What the row's file or its column `split` says of it; `data` names its files one by one. Raises BadRowError."""
    said = _parse_split((row.value or {}).get("split"))
    if row.file not in data.validation_files:
        return said
    if said == "train":
        raise BadRowError("split: is train in a file of data.validation_files")
    return "validation"


def _parse_split(value: Any) -> Split | None:
    if value is None:
        return None
    split = SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise BadRowError(f"split: expected one of {', '.join(SPLIT_NAMES)}, got {str(value)[:40]!r}")
    return split


def choose_split(prompt: bytes, *, validation_fraction: float) -> Split:
    """By the hash of a prompt."""
    return "validation" if int.from_bytes(prompt, "little") < validation_fraction * 2**64 else "train"


def hash_first_prompt(input_ids: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """Of the tokens before the first supervised one; of all tokens, if that is the first."""
    first = int(np.argmax(loss_mask))
    return hash_prompt(input_ids[:first] if first else input_ids)


def _parse_prompt_hash(value: Any) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str) or re.fullmatch(rf"[0-9a-f]{{{2 * HASH_BYTES}}}", value) is None:
        raise BadRowError(f"{COLUMN}: expected {2 * HASH_BYTES} hexadecimal digits, got {str(value)[:40]!r}")
    return bytes.fromhex(value)


def _check_bad_fraction(counts: SampleCounts, data: DataSection) -> None:
    if counts.num_bad <= data.max_bad_fraction * counts.num_rows:
        return
    num_prompts = counts.bad[NO_ANSWER]
    if not counts.num_samples and num_prompts >= (1 - data.max_bad_fraction) * counts.num_rows:
        raise PromptsOnlyError(
            f"{num_prompts:,} of the first {counts.num_rows:,} rows are prompts that nobody has answered; {REGENERATE}"
        )
    advice = [f"{num_prompts:,} rows are prompts that nobody has answered; {REGENERATE}"] if num_prompts else []
    raise DataError(
        "\n".join(
            [
                f"{counts.num_bad:,} of the first {counts.num_rows:,} rows are bad, more than "
                f"data.max_bad_fraction = {data.max_bad_fraction}; mend them or raise the limit",
                *counts.describe(),
                *advice,
            ]
        )
    )
