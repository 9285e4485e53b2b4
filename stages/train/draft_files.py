"""The two files of a draft, written and checked: `config.json` and `model.safetensors`.

The weights' file carries a record in its metadata: `crc32c` is that of the whole file with the eight digits of this
very number read as zeros, and `config_crc32c` that of config.json. So one flipped byte in either is found, a draft
stays the two files that servers know, and whatever rewrites the weights drops the record with them.

`tied` in the metadata names the tensor that is the embedding as well, and is not stored again.
"""

import json
import logging
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stages.bounded_files import read_bounded
from stages.target_head import EMBEDDING, HEAD

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
HEAD_FILE = "target_head.safetensors"
"""In a run's folder: what its checkpoints leave out."""
CRC_CHUNK_BYTES = 1 << 22
_NO_CRC, _CRC_KEY = b"0" * 8, b'"crc32c":"'

logger = logging.getLogger(__name__)


def write_draft_files(folder: Path, *, fields: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Write config and weights into `folder`, with their record; an embedding without a head is the head as well.

    Raises OSError and SafetensorError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
    (folder / CONFIG_FILE).write_bytes(config)
    notes = {"config_crc32c": f"{google_crc32c.value(config):08x}"}
    if EMBEDDING in weights and HEAD not in weights:
        notes["tied"] = HEAD
    write_recorded(folder / WEIGHTS_FILE, weights, notes=notes)


def write_recorded(file: Path, tensors: dict[str, torch.Tensor], *, notes: dict[str, str]) -> None:
    """A safetensors file that carries its own checksum. Raises OSError and SafetensorError."""
    metadata = {"crc32c": _NO_CRC.decode(), "format": "pt", **notes}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)
    # The library writes these in an order of chance; equal drafts shall be equal files.
    ordered = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    with file.open("r+b") as stream:
        stream.seek(_find(file, b'"__metadata__":'))
        stream.write(ordered)
    place = _find(file, _CRC_KEY)
    crc = _crc_without(file, place)
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(f"{crc:08x}".encode())


def check_recorded(file: Path) -> str | None:
    """What is wrong with a file of `write_recorded`; None if nothing is, with a warning where it has no record.

    Raises OSError and SafetensorError.
    """
    notes = read_notes(file)
    if not notes.keys() - {"format"}:
        logger.warning("%s: has no record of its checksums, so that damage to it cannot be found", file.parent)
        return None
    place = _find(file, _CRC_KEY)
    found = f"{_crc_without(file, place):08x}" if place else "none"
    expected = notes.get("crc32c")
    return None if found == expected else f"{file.name}: expected the crc32c {expected}, got {found}"


def check_draft_files(folder: Path) -> str | None:
    """The same of a draft's two files; a checkpoint's are looked up in its own record by those who resume it."""
    problem = check_recorded(folder / WEIGHTS_FILE)
    expected = read_notes(folder / WEIGHTS_FILE).get("config_crc32c")
    if problem is not None or expected is None:
        return problem
    found = f"{google_crc32c.value(read_bounded(folder / CONFIG_FILE)):08x}"
    return None if found == expected else f"{CONFIG_FILE}: expected the crc32c {expected}, got {found}"


def read_notes(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises OSError and SafetensorError."""
    with safe_open(file, framework="pt") as tensors:
        return dict(tensors.metadata() or {})


def missing_target_tensors(folder: Path) -> set[str]:
    """Which of the target's tensors a draft has neither in its file nor in that of its run. Raises as `read_notes`."""
    if find_head(folder) is not None:
        return set()
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as tensors:
        names = set(tensors.keys())
    if EMBEDDING in names and read_notes(folder / WEIGHTS_FILE).get("tied") == HEAD:
        return set()
    return {EMBEDDING, HEAD} - names


def find_head(folder: Path) -> Path | None:
    """The target's embedding and head, of a folder with a checkpoint that has neither."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as tensors:
        if {EMBEDDING, HEAD} & set(tensors.keys()):
            return None
    file = folder.absolute().parent.parent / HEAD_FILE
    return file if folder.absolute().parent.name == "checkpoints" and file.is_file() else None


def _find(file: Path, key: bytes) -> int:
    """Where, in the file's header, what follows `key` begins; 0 where it is not there."""
    with file.open("rb") as stream:
        header = stream.read(8 + int.from_bytes(stream.read(8), "little"))
    place = header.find(key)
    return 0 if place < 0 else 8 + place + len(key)


def _crc_without(file: Path, place: int) -> int:
    """crc32c of the file, with the digits at `place` read as zeros."""
    with file.open("rb") as stream:
        crc = google_crc32c.extend(google_crc32c.value(stream.read(place)), _NO_CRC)
        stream.seek(place + len(_NO_CRC))
        while chunk := stream.read(CRC_CHUNK_BYTES):
            crc = google_crc32c.extend(crc, chunk)
    return int(crc)
