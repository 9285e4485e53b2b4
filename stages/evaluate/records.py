"""JSON files of the evaluation: written whole or not at all, and read back strictly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from stages.errors import StageError
from stages.whole_files import write_json
from storage.sealed import Record, describe

R = TypeVar("R", bound=Record)
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


class EvaluationError(StageError, ValueError):
    """A file of an evaluation is not there, or not what this code writes."""


def write_record(file: Path, record: Record) -> None:
    """Write or replace the file; a crash leaves the old one or the new one."""
    write_json(file, record.model_dump(mode="json"))


def read_record(file: Path, kind: type[R], *, version: int, upgrade: Upgrade) -> R:
    """The file's record. Its `format_version` is looked at first; unknown and missing fields are errors.

    `upgrade` makes the fields of this version of those of the one before. Raises EvaluationError.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise EvaluationError(f"{file}: no such file; dspark evaluate writes it") from error
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{file}: is not JSON; run dspark evaluate again") from error
    found = fields.get("format_version") if isinstance(fields, dict) else None
    if type(found) is int and found == version - 1:
        data = json.dumps(upgrade(fields)).encode()
    elif type(found) is not int or found != version:
        got = "no format_version" if found is None else f"format_version {found!r:.40}"
        raise EvaluationError(f"{file}: expected format_version {version}, got {got}; run dspark evaluate again")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise EvaluationError(f"{file}: {describe(error)}; run dspark evaluate again") from error
