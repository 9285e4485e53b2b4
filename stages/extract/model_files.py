"""The files of a target: the folder where they lie, its JSON files, and what its weights say of themselves."""

import json
import struct
from pathlib import Path
from typing import Any

from stages.errors import StageError
from stages.extract.settings import TargetSection

GGUF = ".gguf"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


class TargetError(StageError, ValueError):
    """The target cannot be used: files missing, unknown architecture, layer ids out of range."""


def locate_target(target: TargetSection) -> Path:
    """The local folder of the target's files; a Hugging Face repository is downloaded once. Raises TargetError."""
    folder = Path(target.model)
    if folder.suffix == GGUF:
        raise TargetError(f"target.model: {folder} is {_to_convert(folder.parent, folder.name)}")
    if not folder.is_dir():
        if target.model.count("/") != 1 or target.model.startswith((".", "/", "~")):
            raise TargetError(
                f"target.model: no folder {target.model!r}; give a folder or a Hugging Face id owner/name"
            )
        folder = _download(target)
    files = sorted(file.name for file in folder.glob(f"*{GGUF}"))
    has_weights = any(folder.glob("*.safetensors"))
    if files and not has_weights:
        raise TargetError(f"target.model: {folder} holds {_to_convert(folder, files[0])}")
    if not (folder / "config.json").is_file():
        raise TargetError(f"target.model: {folder} has no config.json; expected a transformers model folder")
    return folder


def _to_convert(folder: Path, name: str) -> str:
    return (
        f"a GGUF file ({name}); expected a folder with config.json and *.safetensors. Convert it once: "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, gguf_file={name!r}, "
        "quantization_config=GgufConfig(dequantize=True)).save_pretrained(NEW), and the same of AutoTokenizer "
        "(transformers and the package gguf); then set target.model to NEW"
    )


def _download(target: TargetSection) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(target.model, revision=target.revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub client raises many families: no network, no such repository, no permission
        raise TargetError(
            f"target.model: {target.model!r} is no folder here and cannot be downloaded: {error}"
        ) from error


def first_line(error: Exception) -> str:
    """An error of others in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TargetError(f"{file}: broken JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise TargetError(f"{file}: expected a JSON object, got {type(content).__name__}; fetch it again")
    return content


def list_weights(folder: Path) -> list[Path]:
    """The safetensors files of a model, those of its index if there is one. Raises TargetError where one is missing."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise TargetError(f"{folder}: weights are missing: {', '.join(missing)}, named by {index.name}")
        files = [folder / name for name in sorted(named)]
    if not files:
        raise TargetError(f"{folder}: no *.safetensors weights; convert the model with save_pretrained first")
    return files


def read_header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """A safetensors file's header, as it is and as name to `dtype`, `shape`, `data_offsets`.

    Raises TargetError where it is damaged or the file is not as long as it says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if header_bytes > size - 8:
            raise TargetError(f"{file}: not a safetensors file or cut short at {size} bytes; fetch it again")
        header = stream.read(header_bytes)
    try:
        tensors = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
    except ValueError as error:
        raise TargetError(f"{file}: its safetensors header is damaged: {error}; fetch it again") from error
    payload = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size != 8 + header_bytes + payload:
        raise TargetError(f"{file}: expected {8 + header_bytes + payload} bytes, got {size}; fetch it again")
    return header, tensors
