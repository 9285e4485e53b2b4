"""What lies around a draft or checkpoint in its run's folder: config, steps, cache, held-out numbers.

A model card is made of it. All of it is optional: a folder may have been moved away from its run. What is there but
cannot be used is said in a warning and left out, since it is no reason to write no draft.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pipeline.config import Config, ConfigError, load_config
from stages.bounded_files import read_bounded, read_text_bounded
from stages.evaluate.cached import ROUNDING, check_taus
from stages.evaluate.calibration import CALIBRATION_FILE, Calibration, read_calibration
from stages.evaluate.records import EvaluationError, read_fields
from stages.extract.run import read_plan
from stages.train.checkpoint import STATE_FILE, CheckpointError, TrainerState, read_state
from stages.train.draft_folder import digest_draft
from storage import CacheError
from storage.layout import TARGET
from storage.manifest import Manifest

logger = logging.getLogger(__name__)


class HeldOut(BaseModel):
    """The numbers of an `evaluation.json` that a card shows; others may stand beside them."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)
    tau: float
    tau_low: float
    tau_high: float
    tau_greedy: float | None = None
    tau_greedy_low: float | None = None
    tau_greedy_high: float | None = None
    accept_rate_per_pos: list[float]
    greedy_accept_rate_per_pos: list[float] | None = None
    weights_digest: str | None = None
    num_samples: int
    num_blocks: int

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_taus(self)
        rates = (*self.accept_rate_per_pos, *(self.greedy_accept_rate_per_pos or ()))
        if not all(-ROUNDING <= rate <= 1 + ROUNDING for rate in rates):
            raise ValueError("expected acceptance rates from 0 to 1")
        return self


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of the training that a draft came from; None where it is not."""

    config: Config | None = None
    step: int | None = None
    cache_digest: str | None = None
    manifest: Manifest | None = None
    target_architectures: tuple[str, ...] = ()
    held_out: HeldOut | None = None
    calibration: Calibration | None = None


def read_run_facts(draft: Path) -> RunFacts:
    """The facts about a run's `draft/`, or one of its `checkpoints/`, or any other folder with a draft."""
    draft = draft.resolve()
    run = _run_folder(draft)
    if run is None:
        return RunFacts(held_out=_read_held_out(draft, draft=draft), calibration=_read_calibration(draft))
    config = _read_config(run)
    state = _read_state(_step_folder(draft, run))
    digest = None if state is None else state.made_from.get("cache.identity")
    manifest = None if config is None else _read_manifest(config, digest=digest)
    return RunFacts(
        config=config,
        step=None if state is None else state.step,
        cache_digest=digest,
        manifest=manifest,
        target_architectures=() if config is None or manifest is None else _read_architectures(config.cache.folder),
        held_out=_read_held_out(draft, draft=draft)
        or (_read_held_out(run, draft=run / "draft") if _is_final(draft, run) else None),
        calibration=_read_calibration(run / "draft" if _is_final(draft, run) and not _has_own(draft) else draft),
    )


def _run_folder(draft: Path) -> Path | None:
    if draft.name == "draft":
        return draft.parent
    return draft.parent.parent if draft.parent.name == "checkpoints" else None


def _step_folder(draft: Path, run: Path) -> Path | None:
    """The checkpoint that the draft is, or was made from: a run writes its draft with the last one."""
    if draft.name != "draft":
        return draft
    return max((run / "checkpoints").glob("step_*"), default=None, key=lambda folder: folder.name)


def _is_final(draft: Path, run: Path) -> bool:
    """Whether `RUN/evaluation.json` is about these weights: it is about those of the finished run."""
    return draft.name == "draft" or ((run / "draft").is_dir() and draft == _step_folder(run / "draft", run))


def _read_config(run: Path) -> Config | None:
    file = run / "config.toml"
    if not os.path.lexists(file):
        return None
    try:
        read_bounded(file)
        return load_config(file)
    except (ConfigError, OSError) as error:
        logger.warning("the model card says nothing of the run's config: %s", error)
        return None


def _read_state(folder: Path | None) -> TrainerState | None:
    if folder is None or not os.path.lexists(folder / STATE_FILE):
        return None
    try:
        return read_state(folder)
    except CheckpointError as error:
        logger.warning("the model card says nothing of the run's steps: %s", error)
        return None


def _read_manifest(config: Config, *, digest: str | None) -> Manifest | None:
    """The manifest of the cache that the run was trained from, where it is in a folder here, and is that very one."""
    if not isinstance(config.cache.path, Path) or digest is None:
        return None
    try:
        plan = read_plan(config.cache.path)
    except (CacheError, OSError) as error:
        logger.warning("the model card says nothing of the cache: %s", error)
        return None
    if plan is None:
        logger.info("the model card says little of the cache, which is not at %s", config.cache.path)
        return None
    if plan.manifest.identity.digest() != digest:
        logger.warning("the model card says little of the cache: that in %s is another one", config.cache.path)
        return None
    return plan.manifest


def _read_architectures(cache: Path) -> tuple[str, ...]:
    fields = _read_json(cache / TARGET / "config.json") or {}
    names = fields.get("architectures")
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _read_held_out(folder: Path, *, draft: Path) -> HeldOut | None:
    """The numbers in the folder, if they are of the weights in `draft`, as far as they say of which they are."""
    file = folder / "evaluation.json"
    if not os.path.lexists(file):
        return None
    try:
        found = HeldOut.model_validate(read_fields(file))
        if found.weights_digest is None or found.weights_digest == digest_draft(draft):
            return found
        reason: Exception | str = f"it was measured on other weights than those in {draft}; run dspark evaluate again"
    except (EvaluationError, ValidationError, OSError) as error:
        reason = error
    logger.warning("the model card says nothing of %s: %s", file, reason)
    return None


def _has_own(draft: Path) -> bool:
    return os.path.lexists(draft / CALIBRATION_FILE)


def _read_calibration(draft: Path) -> Calibration | None:
    if not _has_own(draft):
        return None
    try:
        return read_calibration(draft)
    except EvaluationError as error:
        logger.warning("the export goes without the calibration of the confidence: %s", error)
        return None


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        fields = json.loads(read_text_bounded(file))
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("the model card says nothing of %s: %s", file, error)
        return None
    if not isinstance(fields, dict):
        logger.warning("the model card says nothing of %s: expected a JSON object", file)
        return None
    return fields
