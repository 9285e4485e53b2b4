"""Checkpoints of a run: written whole or not at all, resumed exactly, and loadable by `from_pretrained`.

RUN/checkpoints/step_00000300/
  config.json, model.safetensors   what is trained of the draft, in float32; the target's embedding and head, which
                                   are not, lie once in RUN/target_head.safetensors
  optimizer.safetensors            AdamW's averages by parameter name, float32
  trainer_state.json               written last: step, what the run was made from, size and crc32c of the other files,
                                   and the crc32c of all that

Nothing in it depends on how many ranks wrote it, or how they share the weights: tensors are whole. Rank 0 writes and
reads; the other ranks take part, since they hold parts of sharded tensors.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stages.bounded_files import read_bounded
from stages.errors import StageError
from stages.target_head import TargetHead, read_head
from stages.train.draft_files import HEAD_FILE, check_recorded, write_draft_files, write_recorded
from stages.train.model import Qwen3DSparkModel, config_fields
from stages.train.parallel import ALONE, Ranks, place_like, whole
from storage.temps import temp_path

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
NEEDED_FILES = {"config.json", "model.safetensors", OPTIMIZER_FILE}
ADAMW_KEYS = ("step", "exp_avg", "exp_avg_sq")
CRC_CHUNK_BYTES = 1 << 22
_STEP_NAME = re.compile(r"step_(\d{8})")

logger = logging.getLogger(__name__)


class CheckpointError(StageError, ValueError):
    """A run cannot be continued from what lies in its folder."""


class NonFiniteWeightsError(CheckpointError, ArithmeticError):
    """The draft's weights are NaN or infinite, so they were not written; the disk has nothing to do with it."""


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """`step` optimizer steps are done; `made_from` names everything that must be equal for a resume."""

    step: int
    made_from: dict[str, Any]


class FileDescription(BaseModel):
    """Size and crc32c of a file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    bytes: int
    crc32c: int


class StateRecord(BaseModel):
    """`trainer_state.json`; its own crc32c is over the compact JSON, keys sorted, of the other fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    step: int = Field(ge=1)
    made_from: dict[str, Any]
    files: dict[str, FileDescription]
    crc32c: int


def save_checkpoint(
    checkpoints: Path,
    *,
    state: TrainerState,
    draft_model: Qwen3DSparkModel,
    optimizer: torch.optim.Optimizer,
    keep_last: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write the checkpoint of `state.step` atomically and delete all but the last `keep_last`. All ranks call it.

    Raises CheckpointError when the disk is full or refuses, NonFiniteWeightsError for weights that are not finite; the
    checkpoints before it are then still there.
    """
    final = checkpoints / f"step_{state.step:08d}"
    partial = checkpoints / f".{final.name}.{os.getpid()}.partial"
    weights = _whole_weights(_trained_parameters(draft_model), dtype=torch.float32, ranks=ranks)
    moments = _optimizer_tensors(draft_model, optimizer, ranks=ranks)
    if not ranks.is_first:
        return final
    _check_finite(weights, where=final)
    with write_errors(final):
        checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in checkpoints.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        with publishing(partial, final):
            fields = config_fields(draft_model.config, dtype=torch.float32)
            write_draft_files(partial, fields=fields, weights=weights)
            save_file(moments, partial / OPTIMIZER_FILE)
            files = {file.name: describe_file(file).model_dump() for file in sorted(partial.iterdir())}
            record = {"step": state.step, "made_from": state.made_from, "files": files}
            (partial / STATE_FILE).write_text(json.dumps({**record, "crc32c": _record_crc32c(record)}, indent=2))
        folders = sorted(_step_folders(checkpoints))
        damaged = [folder for folder in folders if folder > final]  # or the run would have continued from one of them
        for old in damaged + folders[: max(len(folders) - len(damaged) - keep_last, 0)]:
            shutil.rmtree(old)
    return final


def save_draft(folder: Path, *, draft_model: Qwen3DSparkModel, dtype: torch.dtype, ranks: Ranks = ALONE) -> None:
    """Write the draft as servers load it, its weights in `dtype`; whole or not at all. The model is not cast.

    All ranks call it. Raises CheckpointError when the disk is full or refuses, NonFiniteWeightsError for weights that
    are not finite.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    weights = _whole_weights(draft_model.named_parameters(), dtype=dtype, ranks=ranks)
    if not ranks.is_first:
        return
    _check_finite(weights, where=folder)
    with write_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        with publishing(partial, folder):
            fields = config_fields(draft_model.config, dtype=dtype)
            write_draft_files(partial, fields=fields, weights=weights)


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


def load_checkpoint(
    folder: Path, *, draft_model: Qwen3DSparkModel, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE
) -> None:
    """Put weights and optimizer state of a checkpoint that `find_checkpoint` returned into the given objects.

    All ranks call it, rank 0 alone reads. The target's embedding and head are left: the run's cache has the same.
    """
    with ExitStack() as stack:

        def open_(name: str) -> Any:
            return stack.enter_context(safe_open(folder / name, framework="pt")) if ranks.is_first else None

        model_file, optimizer_file = open_("model.safetensors"), open_(OPTIMIZER_FILE)
        stored = ranks.on_first(lambda: set(optimizer_file.keys()))
        for name, parameter in _trained_parameters(draft_model):
            with torch.no_grad():
                parameter.copy_(_read_shared(model_file, name, like=parameter, ranks=ranks))
            keys = [key for key in ADAMW_KEYS if f"{name}.{key}" in stored]  # none for a head whose loss weight is 0
            if keys:
                optimizer.state[parameter] = {
                    key: _read_shared(optimizer_file, f"{name}.{key}", like=_like(parameter, key), ranks=ranks)
                    for key in keys
                }


@contextmanager
def write_errors(where: Path) -> Iterator[None]:
    """Turn the refusals of a disk into a CheckpointError that says so."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{where}: cannot write: {error}; the checkpoints made before are intact. Free some space, or remove what "
            "lies in the way, and run the same train command again to continue"
        ) from error


def describe_file(file: Path) -> FileDescription:
    """Size and crc32c."""
    if not file.is_file():  # a pipe would block
        raise FileNotFoundError(f"{file.name} is gone, or is not a file")
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CRC_CHUNK_BYTES):
            crc = google_crc32c.extend(crc, chunk)
    return FileDescription(bytes=file.stat().st_size, crc32c=crc)


def keep_head(run_dir: Path, source: Path) -> None:
    """Write the target's embedding and head, which `source` holds, beside the run's checkpoints, unless they are there.

    Raises CheckpointError when the disk is full or refuses.
    """
    file, head = run_dir / HEAD_FILE, read_head(source)
    if file.is_file() and _holds(file, head):
        return
    with write_errors(file):
        partial = temp_path(file)
        try:
            write_recorded(partial, head.tensors(), notes={})
            partial.chmod(run_dir.stat().st_mode & 0o666)
            _fsync(partial)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def _holds(file: Path, head: TargetHead) -> bool:
    try:
        if check_recorded(file) is not None:
            return False
        stored, wanted = read_head(file).tensors(), head.tensors()
    except (OSError, SafetensorError):
        return False
    return stored.keys() == wanted.keys() and all(torch.equal(stored[name], wanted[name]) for name in stored)


def read_state(folder: Path) -> TrainerState:
    """What a checkpoint's own record says, its crc32c checked; its other files are not read. Raises CheckpointError."""
    problem, state = _read_state(folder, names=set())
    if state is None:
        raise CheckpointError(f"{folder}: is damaged ({problem})")
    return state


def check_against_state(folder: Path, names: Iterable[str]) -> str | None:
    """What is wrong with these files of a checkpoint by its record; None if nothing is, or if this is no checkpoint."""
    if not (folder / STATE_FILE).exists():
        return None
    return _read_state(folder, names=set(names))[0] or None


def _read_state(folder: Path, *, names: set[str] | None = None) -> tuple[str, TrainerState | None]:
    """What is wrong with a checkpoint, or its state; `names`: of these files alone."""
    try:
        fields = json.loads(read_bounded(folder / STATE_FILE))
        record = StateRecord.model_validate(fields)
        if _record_crc32c({key: value for key, value in fields.items() if key != "crc32c"}) != record.crc32c:
            return f"{STATE_FILE}: does not match its own crc32c", None
        if missing := NEEDED_FILES - record.files.keys():
            return f"{STATE_FILE}: lists no {', '.join(sorted(missing))}", None
        for name, expected in record.files.items():
            if names is not None and name not in names:
                continue
            found = describe_file(folder / name)
            if found != expected:
                return f"{name}: expected {expected}, got {found}", None
    except (OSError, ValueError, RecursionError) as error:
        return f"{type(error).__name__}: {error}", None
    return "", TrainerState(step=record.step, made_from=record.made_from)


def _record_crc32c(record: dict[str, Any]) -> int:
    return int(google_crc32c.value(json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")))


def _whole_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], *, dtype: torch.dtype, ranks: Ranks
) -> dict[str, torch.Tensor]:
    """The tensors by name, on rank 0's CPU; nothing on the other ranks."""
    return _collect(tensors, convert=lambda tensor: tensor.to("cpu", dtype), ranks=ranks)


def _check_finite(weights: dict[str, torch.Tensor], *, where: Path) -> None:
    """Keep broken weights from taking the place of whole ones. Raises NonFiniteWeightsError."""
    broken = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    if broken:
        dtype = next(iter(weights.values())).dtype
        raise NonFiniteWeightsError(
            f"{where}: not written: {broken[0]} and {len(broken) - 1} other tensors are not finite in {dtype}; lower "
            "train.lr or raise train.warmup_fraction in a new train.run_dir, or, of an export, choose another dtype"
        )


def _optimizer_tensors(
    draft_model: Qwen3DSparkModel, optimizer: torch.optim.Optimizer, *, ranks: Ranks
) -> dict[str, torch.Tensor]:
    """AdamW's averages by parameter and key, on rank 0's CPU; nothing on the other ranks."""
    tensors = (
        (f"{name}.{key}", value)
        for name, parameter in _trained_parameters(draft_model)
        for key, value in optimizer.state.get(parameter, {}).items()
    )
    return _collect(tensors, convert=lambda tensor: tensor.cpu().contiguous(), ranks=ranks)


def _collect(
    tensors: Iterable[tuple[str, torch.Tensor]], *, convert: Callable[[torch.Tensor], torch.Tensor], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """Put sharded tensors together, one at a time, so that no device holds more than one of them whole."""
    collected = {}
    for name, tensor in tensors:
        put_together = whole(tensor.detach())
        if ranks.is_first:
            collected[name] = convert(put_together)
    return collected


def _read_shared(file: Any, name: str, *, like: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Rank 0 reads the tensor `name`, the others get it from there; in shape and device as `like`, sharded as it is."""
    if ranks.is_first:
        tensor = file.get_tensor(name).to(like.device)
    else:
        tensor = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return place_like(ranks.broadcast_(tensor), like)


def _like(parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
    return torch.empty(()) if key == "step" else parameter  # AdamW keeps its step counter on the CPU


def _trained_parameters(draft_model: Qwen3DSparkModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in draft_model.named_parameters() if parameter.requires_grad)


def _step_folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.exists():
        return []
    check_folder(checkpoints)
    folders = [folder for folder in checkpoints.iterdir() if _STEP_NAME.fullmatch(folder.name)]
    for folder in folders:
        check_folder(folder)
    return folders


def check_folder(path: Path) -> None:
    """Refuse a file in the place of a folder of ours: it is somebody else's, so it is not replaced."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: expected a folder or nothing, found a file; move it away, or set train.run_dir")


@contextmanager
def publishing(partial: Path, final: Path) -> Iterator[None]:
    """Sync the folder that the body fills and give it its name, in one rename; remove it on any error.

    Whoever may read the folder may read its files.
    """
    try:
        yield
        for file in partial.iterdir():
            file.chmod(partial.stat().st_mode & 0o666)  # safetensors writes for the owner alone
            _fsync(file)
        _fsync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _fsync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
