"""JSON files of the evaluation: written whole or not at all, with a checksum of their own, and read back strictly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from stages.bounded_files import read_bounded
from stages.errors import StageError
from stages.whole_files import write_whole
from storage.files import crc32c_hex
from storage.sealed import Record, canonical_json, describe
from storage.text import redact_values

MAX_BYTES = 1 << 28  # an evaluation lists its samples: some three million

R = TypeVar("R", bound=Record)
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


class EvaluationError(StageError, ValueError):
    """A file of an evaluation is not there, or not what this code writes."""


def render_record(record: Record) -> bytes:
    """What its file holds: the record's fields, and `crc32c`, which is that of their compact JSON, keys sorted."""
    fields = redact_values(record.model_dump(mode="json"))
    return (json.dumps({**fields, "crc32c": crc32c_hex(canonical_json(fields))}, indent=2) + "\n").encode("ascii")


def write_record(file: Path, record: Record) -> None:
    """Write or replace the file; a crash leaves the old one or the new one."""
    write_whole(file, render_record(record))


def read_record(file: Path, kind: type[R], *, version: int, upgrade: Upgrade) -> R:
    """The file's record. Its `format_version` is looked at first; unknown and missing fields are errors.

    `upgrade` makes the fields of this version of those of the one before. Raises EvaluationError.
    """
    fields = read_fields(file)
    found = fields.get("format_version")
    if type(found) is int and found == version - 1:
        fields = upgrade(fields)
    elif type(found) is not int or found != version:
        got = "no format_version" if found is None else f"format_version {found!r:.40}"
        raise EvaluationError(f"{file}: expected format_version {version}, got {got}; run dspark evaluate again")
    try:
        return kind.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise EvaluationError(f"{file}: {describe(error)}; run dspark evaluate again") from error


def read_fields(file: Path) -> dict[str, Any]:
    """The fields of a record, without the `crc32c` that they have been checked by.

    Files of earlier versions have none. Raises EvaluationError.
    """
    try:
        data = read_bounded(file, max_bytes=MAX_BYTES)
    except FileNotFoundError as error:
        raise EvaluationError(f"{file}: no such file; dspark evaluate writes it") from error
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read: {error.strerror}; run dspark evaluate again") from error
    try:
        fields = json.loads(data)
        named = fields if isinstance(fields, dict) else {}
        compact = canonical_json({key: value for key, value in named.items() if key != "crc32c"})
    except (ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{file}: is not JSON, or has numbers that are none; run dspark evaluate again"
        ) from error
    if "crc32c" in named and named.pop("crc32c") != crc32c_hex(compact):
        raise EvaluationError(
            f"{file}: does not match its own crc32c: it was damaged or edited; run dspark evaluate again"
        )
    return named
