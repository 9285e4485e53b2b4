"""The journal of a regeneration: one line for each outcome, appended and synced, so that a kill loses seconds at most.

A line is a crc32c, a space and the outcome as JSON. What a kill or a power cut leaves of the last lines is recognised,
cut off, and asked again. Of several lines for one row the last counts: a failed row that was asked again.
"""

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.bounded_files import bounded_lines
from stages.regenerate.dialogue import Outcome
from stages.regenerate.disk import disk_errors
from stages.regeneration_record import RegenerationError
from storage.errors import CacheReadError
from storage.files import crc32c_hex
from storage.locks import lock

MAX_LINE_BYTES = 1 << 26  # of one outcome: some ten million words
SYNC_SECONDS = 1.0  # what a power cut may cost; a killed process loses nothing that was appended

logger = logging.getLogger(__name__)


class Journal:
    """Outcomes on disk, by row. One process at a time, where the file system has locks."""

    def __init__(self, file: Path) -> None:
        """Open or create; a torn end is cut off. Raises RegenerationError if a line before the end is damaged."""
        self._file = file
        if file.exists() and not file.is_file():  # a pipe would block
            raise RegenerationError(f"{file}: is not a plain file; move it away")
        with disk_errors(file):
            self._stream = file.open("a+b")
        self._places: dict[int, int] = {}  # row -> offset of the line that counts
        self._kinds: dict[int, str] = {}
        self._synced_at = time.monotonic()
        try:
            self._lock()
            self._read()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self.sync()
        finally:
            with disk_errors(self._file):
                self._stream.close()

    def is_finished(self, row: int) -> bool:
        """Whether the row is never asked again: it was answered, or what was answered is of no use."""
        return self._kinds.get(row) in ("answered", "dropped")

    @property
    def num_known(self) -> int:
        """Rows with an outcome of any kind."""
        return len(self._kinds)

    @property
    def num_finished(self) -> int:
        """Rows that are never asked again."""
        return sum(kind != "failed" for kind in self._kinds.values())

    def append(self, outcomes: Iterable[Outcome]) -> None:
        """Write all of them in one go, and sync now and then. Raises RegenerationError for a disk that refuses."""
        offset, lines = self._stream.seek(0, os.SEEK_END), []
        for outcome in outcomes:
            line = _render(outcome)
            if len(line) > MAX_LINE_BYTES:
                raise RegenerationError(
                    f"{self._file}: row {outcome.row} has {len(line):,} bytes, expected {MAX_LINE_BYTES:,} at most; "
                    "shorten that prompt, or leave it out"
                )
            lines.append(line)
            self._places[outcome.row], self._kinds[outcome.row] = offset, outcome.kind
            offset += len(line)
        with disk_errors(self._file):
            self._stream.write(b"".join(lines))
            self._stream.flush()
        if time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        with disk_errors(self._file):
            os.fsync(self._stream.fileno())
        self._synced_at = time.monotonic()

    def outcomes(self) -> Iterator[Outcome]:
        """Every row's outcome, in the order of the rows."""
        for row in sorted(self._places):
            self._stream.seek(self._places[row])
            outcome = _parse(self._stream.readline(MAX_LINE_BYTES))
            if outcome is None:
                raise RegenerationError(f"{self._file}: row {row} has changed since it was written; check the disk")
            yield outcome

    def _lock(self) -> None:
        try:
            got = lock(self._stream.fileno(), self._file)
        except CacheReadError as error:
            raise RegenerationError(str(error)) from error
        if got == "busy":
            raise RegenerationError(f"{self._file}: another process is regenerating into this folder")

    def _read(self) -> None:
        self._stream.seek(0)
        offset = 0
        for number, line in enumerate(bounded_lines(self._stream, max_bytes=MAX_LINE_BYTES), start=1):
            outcome = _parse(line)
            if outcome is None:
                self._cut(offset, number=number)
                return
            self._places[outcome.row], self._kinds[outcome.row] = offset, outcome.kind
            offset += len(line)

    def _cut(self, offset: int, *, number: int) -> None:
        """Drop a torn end. A sound line behind a bad one shows other damage, which is not ours to remove."""
        if any(_parse(line) is not None for line in bounded_lines(self._stream, max_bytes=MAX_LINE_BYTES)):
            raise RegenerationError(
                f"{self._file}: line {number} is damaged, though not the last; remove that line and its row is asked "
                "again, or put the file back"
            )
        logger.warning("%s: a torn end at line %d is cut off; its rows are asked again", self._file, number)
        with disk_errors(self._file):
            self._stream.truncate(offset)


def _render(outcome: Outcome) -> bytes:
    body = json.dumps(outcome.model_dump(), separators=(",", ":")).encode("ascii")
    return crc32c_hex(body).encode("ascii") + b" " + body + b"\n"


def _parse(line: bytes) -> Outcome | None:
    """The outcome of a whole, undamaged line."""
    crc, _, body = line.partition(b" ")
    if not line.endswith(b"\n") or crc != crc32c_hex(body.removesuffix(b"\n")).encode("ascii"):
        return None
    try:
        return Outcome.model_validate(json.loads(body))  # pydantic's own JSON refuses lone surrogates
    except (ValueError, RecursionError):
        return None
