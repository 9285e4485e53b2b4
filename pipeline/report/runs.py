"""What reports read of a run: its config, how it was trained and measured, and what it took. Nothing is written."""

import json
import logging
import math
import os
import struct
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.report.words import readable
from pipeline.sweep.record import RECORD_FILE, read_trial
from stages.bounded_files import open_plain, read_text_bounded
from stages.errors import SettingError
from stages.evaluate.evaluation import Evaluation, read_evaluation
from stages.evaluate.records import EvaluationError
from stages.extract.run import read_plan
from stages.target_head import TARGET_TENSORS
from stages.train.metrics import read_metrics
from storage import CacheError

RUN_FILES = ("config.toml", "metrics.jsonl", "evaluation.json")
# What makes a draft what it is, and how it was measured; how its data came about is the cache's business.
COMPARED_SECTIONS = {"target", "data", "cache", "draft", "objective", "train", "evaluate"}
UNCOMPARED_KEYS = {"train.run_dir", "train.device", "cache.staging", "cache.path"}  # where it was, not what it is
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder tells it."""

    folder: Path
    name: str
    """The folder, from the one that all runs of the report have in common."""
    config: dict[str, Any] = field(default_factory=dict)
    """`section.key` -> value, of the resolved config."""
    evaluation: Evaluation | None = None
    measured_on: str | None = None
    """The day on which its evaluation was written, as 2026-01-31, UTC."""
    problem: str | None = None
    """Why there is no evaluation."""
    train_rows: tuple[dict[str, Any], ...] = ()
    validation_rows: tuple[dict[str, Any], ...] = ()
    trial: dict[str, Any] = field(default_factory=dict)
    """Its record, if a sweep made it."""
    num_parameters: int | None = None
    """Trained parameters of the draft, without the target's embedding and head; None while there is no draft."""
    draft_bytes: int | None = None
    cache_bytes: int | None = None
    """None where the cache is not at hand."""

    @property
    def seconds(self) -> float:
        """Seconds of the steps that led to the draft, without validations and checkpoints."""
        taken = (row.get("seconds") for row in self.train_rows)
        return sum(value for value in taken if isinstance(value, float) and math.isfinite(value))

    @property
    def num_steps(self) -> int:
        return max((row["step"] for row in self.train_rows), default=0)

    @property
    def is_useless(self) -> bool:
        """Whether its own scheduling outlook sees no gain on decoding without a draft; False where there is none."""
        scheduling = self.evaluation and self.evaluation.scheduling
        return bool(scheduling and scheduling.outlook.is_useless)

    @property
    def tau(self) -> float:
        """For the order: runs without an evaluation come last."""
        return -math.inf if self.evaluation is None else self.evaluation.tau


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the given folders, each of which is a run or has runs in it (a sweep); the best tau first.

    A run that is named twice, or by a link, counts once. Raises SettingError for a folder that is neither.
    """
    found: dict[Path, Path] = {}
    for folder in (folder for path in paths for folder in find_runs(path)):
        found.setdefault(folder.resolve(), folder)
    folders = list(found.values())
    base = common_folder(folders)
    return sorted((_read_run(folder, base=base) for folder in folders), key=lambda run: -run.tau)


def find_runs(path: Path) -> list[Path]:
    """The trials right below a sweep's folder; else the folder itself, if it is a run; else the runs right below it.

    Raises SettingError where there is none.
    """
    if not path.is_dir():
        raise SettingError(f"{path}: no such run; name folders that dspark train or dspark sweep made")
    below = sorted(folder for folder in path.iterdir() if folder.is_dir() and _is_run(folder))
    if _is_run(path) and not any((folder / RECORD_FILE).is_file() for folder in below):
        return [path]
    found = below
    if not found:
        raise SettingError(
            f"{path}: neither a run nor a sweep: neither it nor a folder in it has one of {', '.join(RUN_FILES)}"
        )
    return found


def common_folder(folders: Sequence[Path]) -> Path:
    """The deepest folder that all of them lie in; for one, the folder that it lies in."""
    return Path(os.path.commonpath([folder.absolute().parent for folder in folders]))


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Config keys that do not have the same value in all runs, in the order of the config, the draft's own first."""
    found = dict.fromkeys(key for run in runs for key in run.config if key.partition(".")[0] in COMPARED_SECTIONS)
    keys = sorted(found, key=lambda key: key.partition(".")[0] not in ("draft", "objective", "train"))
    texts = {key: {json.dumps(run.config.get(key), default=str) for run in runs if run.config} for key in keys}
    return [key for key in keys if key not in UNCOMPARED_KEYS and len(texts[key]) > 1]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def _read_run(folder: Path, *, base: Path) -> Run:
    """The run, or a run without anything but the reason why it cannot be read."""
    name = readable(str(folder.absolute().relative_to(base)))
    try:
        return _read_files(folder, name=name)
    except OSError as error:
        return Run(folder=folder, name=name, problem=f"cannot be read: {readable(str(error))}")


def _read_files(folder: Path, *, name: str) -> Run:
    evaluation, problem = None, None
    try:
        evaluation = read_evaluation(folder / "evaluation.json")
    except EvaluationError as error:
        problem = str(error) if (folder / "evaluation.json").exists() else "not evaluated"
    trial = read_trial(folder) or {}
    if evaluation is None and trial.get("state") in ("pruned", "failed"):
        problem = f"{trial['state']}: {trial.get('reason')}"
    config = _read_config(folder)
    metrics = read_metrics(folder)
    draft = folder / "draft" / "model.safetensors"
    measured_on = None
    if evaluation is not None:
        measured_on = f"{datetime.fromtimestamp((folder / 'evaluation.json').stat().st_mtime, UTC):%Y-%m-%d}"
    return Run(
        folder=folder,
        name=name,
        config=config,
        evaluation=evaluation,
        measured_on=measured_on,
        problem=None if problem is None else readable(problem),
        train_rows=tuple(row for row in metrics if row.get("kind") == "train"),
        validation_rows=tuple(row for row in metrics if row.get("kind") == "validation"),
        trial=trial,
        num_parameters=_count_trained(draft),
        draft_bytes=draft.stat().st_size if draft.is_file() else None,
        cache_bytes=measure_cache(str(config.get("cache.path", ""))),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """The run's resolved config, flat; empty where it cannot be read."""
    try:
        tables = tomllib.loads(read_text_bounded(folder / "config.toml"))
        json.dumps(tables, default=str)  # refuses numbers of thousands of digits
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s: %s; what differs from the other runs is not known", folder / "config.toml", error)
        return {}
    foreign = [section for section, table in tables.items() if not isinstance(table, dict)]
    if foreign:
        logger.warning("%s: %s: expected sections alone; left out", folder / "config.toml", ", ".join(foreign))
        tables = {section: table for section, table in tables.items() if section not in foreign}
    return {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}


def _count_trained(file: Path) -> int | None:
    """Parameters in a safetensors file that are not the target's, from its header alone."""
    try:
        with open_plain(file) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        return sum(int(math.prod(shape)) for name, shape in shapes.items() if name not in TARGET_TENSORS)
    except (OSError, ValueError, OverflowError, RecursionError, struct.error, TypeError, KeyError, AttributeError):
        return None


@cache
def measure_cache(path: str) -> int | None:
    """Bytes of a local cache's states and plan; None where it is not at hand."""
    try:
        plan = read_plan(Path(path)) if path and Path(path).is_dir() else None
        return None if plan is None else plan.measure_states() + plan.plan_file_bytes()
    except (CacheError, OSError):
        return None
