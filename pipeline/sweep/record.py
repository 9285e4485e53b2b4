"""`trial.json` in a trial's run folder: what it was made from and how it ended. Sweeps write it, reports read it."""

import json
from pathlib import Path
from typing import Any, Final

from stages.bounded_files import read_text_bounded
from stages.whole_files import write_json

RECORD_FILE = "trial.json"
FORMAT_VERSION: Final = 1


def write_trial(run_dir: Path, fields: dict[str, Any]) -> None:
    """Write or replace the record, whole or not at all.

    number, values   the trial's number in its sweep, from 1, and its config values by key
    state            "started" (or interrupted), "complete", "pruned", "failed"
    reason, step     why and behind which step it was pruned, or why it failed
    origin           `describe_origin`'s
    """
    write_json(run_dir / RECORD_FILE, {"format_version": FORMAT_VERSION, **fields})


def read_trial(run_dir: Path) -> dict[str, Any] | None:
    """The record; None for a run that no sweep made, or whose record is damaged."""
    try:
        fields = json.loads(read_text_bounded(run_dir / RECORD_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and fields.get("format_version") == FORMAT_VERSION else None
