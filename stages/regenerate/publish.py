"""From the journal to what is read: conversations in the order of the rows, failures, and the manifest last.

OUT/conversations-00000.jsonl   rows 0 to 9,999 of the source, those that were answered, one line or several for each
OUT/regeneration.json           what they were made by, counts, and the files' sizes
OUT/work/outcomes.log           the journal
OUT/work/failures.jsonl         rows without a conversation: row, kind, reason
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO

from stages.bounded_files import read_bounded
from stages.prompt_hash import COLUMN
from stages.regenerate.dialogue import Outcome
from stages.regenerate.disk import disk_errors
from stages.regenerate.sampled_rows import SampledRow, render_row
from stages.regeneration_record import (
    MANIFEST,
    RegenerationCounts,
    RegenerationError,
    RegenerationIdentity,
    RegenerationManifest,
    parse_manifest,
)
from storage.files import sync_directory
from storage.layout import parse_temp
from storage.temps import remove_stale_temps, temp_path

ROWS_A_FILE = 10_000
WORK = "work"
JOURNAL = f"{WORK}/outcomes.log"
FAILURES = f"{WORK}/failures.jsonl"


def prepare_folder(folder: Path, manifest: RegenerationManifest) -> None:
    """Make the folder ours: a new or empty one, or one of the same identity. Raises RegenerationError otherwise."""
    found = read_manifest(folder)
    if found is None:
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        # A run that was killed before its manifest had its name leaves a temporary one.
        foreign = sorted(name for name in names if name != WORK and parse_temp(name) is None)
        if foreign:
            raise RegenerationError(
                f"{folder}: holds {', '.join(foreign[:5])}, but no {MANIFEST}; name a new or empty folder"
            )
        with disk_errors(folder / WORK):
            (folder / WORK).mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
    else:
        _check_identity(found.identity, manifest.identity, folder=folder)
    remove_stale_temps([folder, folder / WORK])


def read_manifest(folder: Path) -> RegenerationManifest | None:
    """None where there is none yet. Raises RegenerationError for one that is damaged."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        return parse_manifest(read_bounded(file), where=str(file))
    except OSError as error:
        raise RegenerationError(f"{file}: cannot be read: {error.strerror}; put a copy back") from error


def write_manifest(folder: Path, manifest: RegenerationManifest) -> None:
    with _published(folder / MANIFEST) as stream:
        stream.write(manifest.render())


def publish(folder: Path, outcomes: Iterable[Outcome], *, manifest: RegenerationManifest) -> RegenerationManifest:
    """Write every file anew from all outcomes, in the order of their rows; each is replaced whole."""
    counter = _Counter()
    files: dict[str, int] = {}
    with _published(folder / FAILURES) as failures:
        for number, group in groupby(outcomes, key=lambda outcome: outcome.row // ROWS_A_FILE):
            file = folder / f"conversations-{number:05d}.jsonl"
            with _published(file) as stream:
                for outcome in group:
                    counter.count(outcome)
                    if outcome.kind == "answered":
                        stream.writelines(_render_conversation(outcome))
                    else:
                        failures.write(_render_failure(outcome))
            files[file.name] = file.stat().st_size
    for empty in [name for name, size in files.items() if not size]:
        (folder / empty).unlink()
        del files[empty]
    published = manifest.model_copy(update={"counts": counter.counts(), "files": files})
    write_manifest(folder, published)
    return published


def is_published(folder: Path, manifest: RegenerationManifest) -> bool:
    """Whether what the manifest names is there, in its size."""
    sizes = {name: (folder / name).stat().st_size for name in manifest.files if (folder / name).is_file()}
    return manifest.counts is not None and sizes == manifest.files


def _check_identity(found: RegenerationIdentity, wanted: RegenerationIdentity, *, folder: Path) -> None:
    differences = found.differences(wanted)
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        raise RegenerationError(
            f"{folder}: these answers were made otherwise:{lines}\nSet these back, or name another folder."
        )


def _render_conversation(outcome: Outcome) -> Iterator[bytes]:
    """A line for each of the conversation's rows."""
    shared = {"split": outcome.split, COLUMN: outcome.prompt, "tools": outcome.tools or None}
    shared = {name: value for name, value in shared.items() if value is not None}
    for row in outcome.rows or [SampledRow(num_messages=len(outcome.messages))]:
        fields = {"row": outcome.row, **render_row(row, outcome.messages), **shared}
        yield (json.dumps(fields, ensure_ascii=True) + "\n").encode("ascii")


def _render_failure(outcome: Outcome) -> bytes:
    fields = {"row": outcome.row, "source": outcome.source, "kind": outcome.kind, "reason": outcome.reason}
    return (json.dumps(fields) + "\n").encode("ascii")


class _Counter:
    """Sums of outcomes."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    def count(self, outcome: Outcome) -> None:
        self._sums["tokens"] += outcome.num_tokens
        self._sums["prompt_mismatches"] += outcome.num_mismatches
        self._sums["unfinished"] += outcome.num_unfinished
        if outcome.kind == "answered":
            self._sums["answered"] += 1
            self._sums["turns"] += outcome.num_turns
            self._sums["truncated"] += outcome.num_truncated
            self._sums["cut"] += outcome.reason is not None
            self._sums["text"] += outcome.has_text
            self._sums["id_rows"] += sum(row.input_ids is not None for row in outcome.rows)
        else:
            reasons = self._dropped if outcome.kind == "dropped" else self._failed
            reasons[(outcome.reason or "unknown").partition(": ")[0]] += 1

    def counts(self) -> RegenerationCounts:
        names = (
            "answered",
            "turns",
            "tokens",
            "truncated",
            "cut",
            "prompt_mismatches",
            "unfinished",
            "text",
            "id_rows",
        )
        return RegenerationCounts(
            **{f"num_{name}": self._sums[name] for name in names},
            dropped=dict(self._dropped),
            failed=dict(self._failed),
        )


@contextmanager
def _published(file: Path) -> Iterator[IO[bytes]]:
    """A file that is there whole under its name, or not at all: temporary name, sync, rename, sync the folder.

    Raises RegenerationError for a disk that refuses.
    """
    temp = temp_path(file)
    with disk_errors(file):
        try:
            with temp.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temp.rename(file)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        sync_directory(file.parent)
