"""Reading a draft back from its folder, and refusing one that was exported for servers alone.

Whatever trains from a draft, scores it or exports it again reads it here: transformers fills tensors that a file lacks
with random numbers, and such a draft fails in silence.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from stages.bounded_files import read_text_bounded
from stages.errors import SettingError
from stages.train.checkpoint import check_against_state
from stages.train.draft_files import (
    CONFIG_FILE,
    HEAD_FILE,
    WEIGHTS_FILE,
    check_draft_files,
    check_recorded,
    find_head,
    missing_target_tensors,
)
from stages.train.model import Qwen3DSparkModel


def read_draft(folder: Path, *, dtype: torch.dtype = torch.float32) -> Qwen3DSparkModel:
    """The draft in `folder`, in `dtype` on the CPU. Raises SettingError."""
    check_draft_folder(folder)
    try:
        model: Qwen3DSparkModel = Qwen3DSparkModel.from_pretrained(folder, dtype=dtype)
    except Exception as error:  # a config of the wrong types: transformers, torch and Python each refuse it otherwise
        reason = str(error) or type(error).__name__
        raise SettingError(f"{folder}: cannot be read as a draft: {reason}") from error
    check_draft_record(folder)
    return model


def check_draft_record(folder: Path) -> None:
    """Raise SettingError where a byte of the draft is not the one that was written.

    A draft without a record, as earlier versions wrote them, passes with a warning.
    """
    try:
        head = find_head(folder)
        problem = check_against_state(folder, (CONFIG_FILE, WEIGHTS_FILE)) or check_draft_files(folder)
        if problem is None and head is not None:
            problem = check_recorded(head)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    if problem is not None:
        raise SettingError(f"{folder}: is damaged: {problem}; take another checkpoint, or export or train it again")


def check_draft_folder(folder: Path) -> None:
    """Raise SettingError unless the folder holds a draft that this project reads: config, and all weights."""
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise SettingError(
            f"{folder}: no draft here; expected {CONFIG_FILE} and {WEIGHTS_FILE}, as in a run's draft/ or one of its "
            "checkpoints/; train one first, or name its folder"
        )
    if _is_speculators_form(folder):
        raise SettingError(
            f"{folder}: is in the speculators form, which only servers read; name the run's draft/ or the checkpoint "
            "that it was exported from"
        )
    try:
        missing = sorted(missing_target_tensors(folder))
    except (OSError, SafetensorError) as error:
        raise SettingError(f"{folder}: cannot be read as a draft: {WEIGHTS_FILE}: {error}") from error
    if missing:
        raise SettingError(
            f"{folder}: lacks the target's {' and '.join(missing)}, which a server has from its target, and a run in "
            f"{HEAD_FILE}; name the run's draft/ or the checkpoint, in its run's folder, that it was exported from, or "
            "export that without --without-target-weights"
        )


def digest_draft(folder: Path) -> str:
    """sha256 over the draft's config and weights, as their files are: equal digests, equal drafts. Raises OSError."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _is_speculators_form(folder: Path) -> bool:
    try:
        fields = json.loads(read_text_bounded(folder / CONFIG_FILE))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(f"{folder}: cannot be read as a draft: {CONFIG_FILE}: {error}") from error
    if not isinstance(fields, dict):
        raise SettingError(f"{folder}: cannot be read as a draft: {CONFIG_FILE}: expected a JSON object")
    return "speculators_model_type" in fields
