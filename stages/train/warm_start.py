"""Starting a draft from the weights of another one: a checkpoint, or a draft folder.

Weights go over by name. What the new draft has beyond the old one starts fresh: layers behind its last, and heads. Any
other difference is an error, since a draft with half of its weights from somewhere else trains, only badly.
"""

import hashlib
import logging
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import Qwen3Config

from stages.errors import SettingError
from stages.target_head import EMBEDDING, TARGET_TENSORS
from stages.train.draft_files import WEIGHTS_FILE, find_head
from stages.train.draft_folder import check_draft_folder, check_draft_record
from stages.train.meaning import differences
from stages.train.model import Qwen3DSparkModel

CONFIDENCE_WEIGHT = "confidence_head.proj.weight"
COMPARED_ROWS = 256  # of the embeddings of draft and target; no two trained targets share so many
HASH_CHUNK_BYTES = 1 << 22

logger = logging.getLogger(__name__)


def digest_draft(folder: Path) -> str:
    """sha256 of the weights in a draft's folder: what a run that starts from it was made from. Raises SettingError."""
    digest = hashlib.sha256()
    try:
        with _weights_file(folder).open("rb") as stream:
            while chunk := stream.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise SettingError(f"draft.init_from: {folder}: cannot be read: {error}") from error
    return digest.hexdigest()


@torch.no_grad()
def load_initial_weights(model: Qwen3DSparkModel, folder: Path) -> list[str]:
    """Copy the weights of the draft in `folder` into `model`; the names of the tensors that start fresh.

    Raises SettingError, which names every tensor and config field that does not fit; the model is then as it was.
    """
    where = f"draft.init_from: {folder}"
    try:
        config = Qwen3Config.from_pretrained(folder)
        with safe_open(_weights_file(folder), framework="pt") as weights:
            shapes = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            fresh, problems = _compare(model, config, shapes)
            if not problems and not same_rows(_first_rows(folder), model.embed_tokens.weight[:COMPARED_ROWS]):
                problems = ["  embed_tokens.weight: differs: it was trained for another target than the cache's"]
            if problems:
                raise SettingError("\n".join([f"{where}: does not fit the draft of this config:", *problems]))
            taken = {name: weights.get_tensor(name) for name in model.state_dict() if name not in _kept(fresh)}
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{where}: cannot be read as a draft: {error}") from error
    broken = [name for name, tensor in taken.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise SettingError(f"{where}: NaN or infinite weights in {', '.join(broken)}")
    check_draft_record(folder)
    own = model.state_dict()
    for name, tensor in taken.items():
        own[name].copy_(tensor)
    logger.info("weights from %s: %d tensors; fresh: %s", folder, len(taken), _summarize(fresh))
    return fresh


def same_rows(stored: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether two draws of embedding rows are those of one target, up to the rounding of a dtype."""
    return stored.shape == own.shape and torch.allclose(stored.float(), own.float().cpu(), rtol=1e-2, atol=1e-3)


def _first_rows(folder: Path) -> torch.Tensor:
    """Of the embedding that the draft was trained with. [COMPARED_ROWS, D]"""
    with safe_open(find_head(folder) or folder / WEIGHTS_FILE, framework="pt") as weights:
        rows: torch.Tensor = weights.get_slice(EMBEDDING)[:COMPARED_ROWS]
    return rows


def _compare(model: Qwen3DSparkModel, config: Qwen3Config, shapes: dict[str, list[int]]) -> tuple[list[str], list[str]]:
    """Names that start fresh, and a line for each difference that is none by design."""
    fresh, problems = [], differences(config, model.config)
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    sees_other = own.get(CONFIDENCE_WEIGHT) != shapes.get(CONFIDENCE_WEIGHT)  # then its bias means nothing either
    for name, shape in own.items():
        if name in TARGET_TENSORS and name not in shapes:
            continue  # of a checkpoint, in its run's folder; or one tensor is both
        if shapes.get(name) == shape and not (sees_other and name.startswith("confidence_head.")):
            continue
        if name not in TARGET_TENSORS and _may_start_fresh(name, config, shapes):
            fresh.append(name)
        elif shapes.get(name) != shape:
            problems.append(f"  {name}: it has {shapes.get(name, 'none')}, this draft {shape}")
    problems.extend(f"  {name}: it has {shapes[name]}, this draft none" for name in shapes if name not in own)
    return fresh, problems


def _summarize(names: list[str]) -> str:
    """Tensors of a layer as one."""
    parts = Counter(".".join(name.split(".")[:2]) if name.startswith("layers.") else name for name in names)
    return ", ".join(part if count == 1 else f"{part} ({count} tensors)" for part, count in parts.items()) or "none"


def _may_start_fresh(name: str, config: Qwen3Config, shapes: dict[str, list[int]]) -> bool:
    """Layers behind the old draft's last; a head, or a part of it, that it lacks; and a confidence head that now sees
    a Markov embedding which the old draft did not have."""
    kind, _, rest = name.partition(".")
    if kind == "layers":
        return int(rest.partition(".")[0]) >= int(config.num_hidden_layers)
    has_markov = any(other.startswith("markov_head.") for other in shapes)
    if kind == "confidence_head":
        return name not in shapes or not has_markov
    return kind == "markov_head" and name not in shapes


def _kept(fresh: list[str]) -> set[str]:
    """Tensors that are not copied: the fresh ones, and the target's own, which the cache has in full precision."""
    return {*fresh, *TARGET_TENSORS}


def _weights_file(folder: Path) -> Path:
    try:
        check_draft_folder(folder)
    except SettingError as error:
        raise SettingError(f"draft.init_from: {error}") from error
    return folder / WEIGHTS_FILE
