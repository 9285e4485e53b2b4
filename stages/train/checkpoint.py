"""Checkpoints of a run: written whole or not at all, resumed exactly, and loadable by `from_pretrained`.

RUN/checkpoints/step_00000300/
  config.json, model.safetensors   the draft in float32, in the form that servers load
  optimizer.safetensors            AdamW's averages by parameter name, float32
  trainer_state.json               written last: step, what the run was made from, size and crc32c of the other files
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors.torch import load_file, save_file

from stages.errors import StageError
from stages.train.model import Qwen3DSparkModel

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
ADAMW_KEYS = ("step", "exp_avg", "exp_avg_sq")
CRC_CHUNK_BYTES = 1 << 22
_STEP_NAME = re.compile(r"step_(\d{8})")

logger = logging.getLogger(__name__)


class CheckpointError(StageError, ValueError):
    """A run cannot be continued from what lies in its folder."""


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """`step` optimizer steps are done; `made_from` names everything that must be equal for a resume."""

    step: int
    made_from: dict[str, Any]


def save_checkpoint(
    checkpoints: Path,
    *,
    state: TrainerState,
    draft_model: Qwen3DSparkModel,
    optimizer: torch.optim.Optimizer,
    keep_last: int,
) -> Path:
    """Write the checkpoint of `state.step` atomically and delete all but the last `keep_last`."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    final = checkpoints / f"step_{state.step:08d}"
    partial = checkpoints / f".{final.name}.{os.getpid()}.partial"
    for leftover in checkpoints.glob(".step_*.partial"):
        shutil.rmtree(leftover)
    draft_model.save_pretrained(partial)
    save_file(_optimizer_tensors(draft_model, optimizer), partial / OPTIMIZER_FILE)
    files = {file.name: describe_file(file) for file in sorted(partial.iterdir())}
    (partial / STATE_FILE).write_text(json.dumps({**asdict(state), "files": files}, indent=2))
    _publish(partial, final)
    for old in sorted(_step_folders(checkpoints))[:-keep_last]:
        shutil.rmtree(old)
    return final


def save_draft(folder: Path, *, draft_model: Qwen3DSparkModel, dtype: torch.dtype) -> None:
    """Write the draft as servers load it, its weights in `dtype`; whole or not at all. The model is not cast."""
    partial = folder.with_name(f".{folder.name}.partial")
    with torch.device("meta"):
        copy = type(draft_model)(draft_model.config)
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in draft_model.state_dict().items()}
    copy.load_state_dict(tensors, assign=True)
    shutil.rmtree(partial, ignore_errors=True)
    copy.save_pretrained(partial)
    _publish(partial, folder)


def find_checkpoint(checkpoints: Path) -> tuple[Path, TrainerState] | None:
    """The newest checkpoint whose files are whole; damaged ones are passed over with a warning.

    Raises CheckpointError when there are checkpoints, but not one of them is whole.
    """
    folders = sorted(_step_folders(checkpoints), reverse=True)
    for folder in folders:
        problem, state = _read_state(folder)
        if state is not None:
            return folder, state
        logger.warning("checkpoint %s is damaged (%s); trying the one before", folder, problem)
    if folders:
        raise CheckpointError(
            f"{checkpoints}: none of the {len(folders)} checkpoints is whole; delete the folder to train anew"
        )
    return None


def load_checkpoint(folder: Path, *, draft_model: Qwen3DSparkModel, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimizer state of a checkpoint that `find_checkpoint` returned into the given objects."""
    draft_model.load_state_dict(load_file(folder / "model.safetensors"))
    tensors = load_file(folder / OPTIMIZER_FILE)
    for name, parameter in _trained_parameters(draft_model):
        keys = [key for key in ADAMW_KEYS if f"{name}.{key}" in tensors]  # none for a head whose loss weight is 0
        if keys:
            optimizer.state[parameter] = {key: _place(tensors[f"{name}.{key}"], key, parameter) for key in keys}


def describe_file(file: Path) -> dict[str, int]:
    """Size and crc32c."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CRC_CHUNK_BYTES):
            crc = google_crc32c.extend(crc, chunk)
    return {"bytes": file.stat().st_size, "crc32c": crc}


def _read_state(folder: Path) -> tuple[str, TrainerState | None]:
    try:
        raw = json.loads((folder / STATE_FILE).read_text())
        files = raw.pop("files")
        state = TrainerState(**raw)
        for name, expected in files.items():
            found = describe_file(folder / name)
            if found != expected:
                return f"{name}: expected {expected}, got {found}", None
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}", None
    return "", state


def _optimizer_tensors(draft_model: Qwen3DSparkModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in _trained_parameters(draft_model):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
    return tensors


def _place(tensor: torch.Tensor, key: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    return tensor if key == "step" else tensor.to(parameter.device)  # AdamW keeps its step counter on the CPU


def _trained_parameters(draft_model: Qwen3DSparkModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in draft_model.named_parameters() if parameter.requires_grad)


def _step_folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return [folder for folder in checkpoints.iterdir() if _STEP_NAME.fullmatch(folder.name)]


def _publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name, in one rename, once its files are on disk."""
    for file in partial.iterdir():
        _fsync(file)
    _fsync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
