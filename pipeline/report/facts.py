"""What the runs of a report have in common, or do not: target, data, steps, block size, date."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.report.runs import Run
from pipeline.report.words import join_names, readable
from pipeline.show import count_of


def describe_facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(name, values) of what is known of the runs; where they differ, every value once."""
    found: list[tuple[str, Callable[[Run], str]]] = [
        ("target", _target),
        ("data", lambda run: _files(run.config.get("data.files"))),
        ("cache", lambda run: str(run.config.get("cache.path") or "")),
        ("measured on", _measured_on),
        ("steps", lambda run: f"{run.num_steps:,}" if run.num_steps else ""),
        ("block size", _block_size),
        ("date", lambda run: run.measured_on or ""),
    ]
    named = [(name, list(dict.fromkeys(filter(None, map(read, runs))))) for name, read in found]
    return [(name, readable(join_names(values))) for name, values in named if values]


def _target(run: Run) -> str:
    model, revision = (run.config.get(f"target.{key}") for key in ("model", "revision"))
    return f"{model or ''}" + (f" ({revision})" if model and revision else "")


def _files(files: Any) -> str:
    return join_names([str(file) for file in files]) if isinstance(files, list) else ""


def _measured_on(run: Run) -> str:
    found = run.evaluation
    if found is None:
        return ""
    blocks = count_of(found.num_blocks, "block")
    return f"{count_of(found.num_samples, 'held-out conversation')}, {blocks}"


def _block_size(run: Run) -> str:
    if run.evaluation is not None:
        return str(run.evaluation.block_size)
    return str(run.config.get("draft.block_size") or "")
