"""Source files to rows: JSONL and Parquet, local or remote, one `Row` for every line whether it can be read or not."""

import glob
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import fsspec
import pyarrow.parquet as pq

from stages.errors import StageError
from stages.unchanged import Memory, sign_files
from storage.progress import Meter

PARQUET_BATCH_ROWS = 1024
HASH_CHUNK_BYTES = 1 << 22
# Of JSON; Arrow has the same bound. Some hundreds more, and no process can send the row to another.
MAX_DEPTH = 100
TOO_DEEP = f"nested too deeply: more than {MAX_DEPTH} objects and lists in each other"

logger = logging.getLogger(__name__)
_DIGESTS: Memory[bytes] = Memory()


class DataError(StageError, ValueError):
    """The data as a whole cannot be used: no file, unreadable file, too many bad rows."""


class BadRowError(ValueError):
    """One row cannot be used; the message is the reason that the report counts."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a source file: `value` is its content, or `error` says why there is none."""

    file: str
    row: int
    value: dict[str, Any] | None
    error: str | None = None


def find_files(patterns: Iterable[str], validation_patterns: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files of `data.files` and of `data.validation_files`. Raises DataError, also for a file that is in both."""
    files = tuple(expand_files(patterns))
    held_out = tuple(expand_files(validation_patterns, key="data.validation_files"))
    both = sorted(set(files) & set(held_out))
    if both:
        raise DataError(f"data.validation_files: in data.files too: {', '.join(both)}; name each file once")
    return files, held_out


def expand_files(patterns: Iterable[str], *, key: str = "data.files") -> list[str]:
    """All files that the patterns of a config key name, in the order given and sorted within a pattern.

    Raises DataError for a pattern without a match and for a file that is named twice.
    """
    files: list[str] = []
    for pattern in patterns:
        found = _expand_address(pattern, key=key) if "://" in pattern else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"{key}: nothing matches {pattern!r}; give a file, a glob or an fsspec address")
        files.extend(found)
    for file in files:
        try:
            file.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{key}: the name {file!r} is not UTF-8, and the cache records it; rename it") from error
    twice = sorted({file for file in files if files.count(file) > 1})
    if twice:
        raise DataError(f"{key}: named more than once: {', '.join(twice)}; every file is read once")
    return files


def _expand_address(pattern: str, *, key: str) -> list[str]:
    try:
        return sorted(file.full_name for file in fsspec.open_files(pattern, mode="rb"))
    except Exception as error:  # each file system has error families of its own: no network, no permission, no package
        raise DataError(f"{key}: {pattern!r} cannot be listed: {error}") from error


def digest_files(files: Iterable[str]) -> str:
    """sha256 over the contents of all files in order; their names are no part of it.

    A local file is read once a process, as long as it does not change.
    """
    total = hashlib.sha256()
    for file in files:
        if "://" in file:
            total.update(_digest_file(file))
        else:
            total.update(_DIGESTS.recall(partial(sign_files, [file]), partial(_digest_file, file)))
    return total.hexdigest()


def _digest_file(file: str) -> bytes:
    digest = hashlib.sha256()
    meter = Meter(logger, "hashing data", total=None, unit="MiB")
    with _open(file, decompress=False) as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            meter.advance(HASH_CHUNK_BYTES >> 20)
    return digest.digest()


def read_rows(files: Iterable[str]) -> Iterator[Row]:
    """Every row of every file. A broken line is a row with `error`; a file that is no table at all raises DataError."""
    for file in files:
        if file.endswith((".parquet", ".pq")):
            yield from _read_parquet(file)
        else:
            yield from _read_jsonl(file)


def _open(file: str, *, decompress: bool = True) -> IO[bytes]:
    try:
        stream: IO[bytes] = fsspec.open(file, "rb", compression="infer" if decompress else None).open()
    except Exception as error:  # as above
        raise DataError(f"{file}: cannot be opened: {error}") from error
    return stream


def _read_jsonl(file: str) -> Iterator[Row]:
    with _open(file) as stream:
        lines = iter(stream)
        index = -1
        while True:
            try:
                line = next(lines, None)
            except Exception as error:  # cut or damaged: each decompressor has error families of its own
                raise DataError(f"{file}: row {index + 1}: the file cannot be read further: {error}") from error
            if line is None:
                return
            index += 1
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except BadRowError as error:
                yield Row(file=file, row=index, value=None, error=str(error))
                continue
            except ValueError as error:  # also invalid UTF-8, and numbers of thousands of digits
                detail = (getattr(error, "msg", None) or type(error).__name__).removesuffix(" at")
                yield Row(file=file, row=index, value=None, error=f"broken JSON: {detail}")
                continue
            if isinstance(value, dict):
                yield Row(file=file, row=index, value=value)
            else:
                yield Row(file=file, row=index, value=None, error=f"expected a JSON object, got {type(value).__name__}")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """What the text says; `options` are json.loads'. Raises ValueError; BadRowError for what is nested too deeply."""
    num_brackets = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise BadRowError(TOO_DEEP) from None
    if num_brackets > MAX_DEPTH and _is_too_deep(value):
        raise BadRowError(TOO_DEEP)
    return value


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _read_parquet(file: str) -> Iterator[Row]:
    index = 0
    try:
        with _open(file) as stream, pq.ParquetFile(stream) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for position in range(batch.num_rows):
                    yield _parquet_row(batch, position, file=file, row=index)
                    index += 1
    except DataError:
        raise
    except Exception as error:  # Arrow's own, the file system's, and what damaged metadata leads to
        raise DataError(f"{file}: row {index}: not a readable Parquet file: {error}") from error


def _parquet_row(batch: Any, position: int, *, file: str, row: int) -> Row:
    try:
        (value,) = batch.slice(position, 1).to_pylist()
    except UnicodeDecodeError as error:
        return Row(file=file, row=row, value=None, error=f"invalid UTF-8: {error.reason}")
    return Row(file=file, row=row, value=_drop_nulls(value))


def _drop_nulls(value: Any) -> Any:
    """Without null fields, however deep: Arrow fills every struct up to the fields of all, so a null means absent.

    Items of lists stay as they are, and so does JSON text.
    """
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value
