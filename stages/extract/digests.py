"""What identifies a target: digests of its config, weights, tokenizer and chat template."""

import hashlib
import json
from pathlib import Path
from typing import Any

from stages.extract.model_files import list_weights, read_header
from stages.target_config import open_text_config

CONFIG_KEYS_WITHOUT_MEANING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
SAMPLE_BYTES = (
    512  # read at the start, the middle and the end of every tensor: seconds for any model, whatever its size
)


def digest_config(config: Any) -> str:
    """sha256 of the text config without the keys that change no computation."""
    text = open_text_config(config)
    fields = {key: value for key, value in text.to_dict().items() if key not in CONFIG_KEYS_WITHOUT_MEANING}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def digest_weights(folder: Path) -> str:
    """sha256 of every safetensors header and of sampled bytes of every tensor, so that it costs seconds for any model.

    Raises TargetError when there are no safetensors files or when one of the index's files is missing or cut short.
    """
    digest = hashlib.sha256()
    for file in list_weights(folder):
        digest.update(_sample_safetensors(file))
    return digest.hexdigest()


def _sample_safetensors(file: Path) -> bytes:
    """Header and sampled payload of one file, hashed."""
    header, tensors = read_header(file)
    digest = hashlib.sha256(header)
    with file.open("rb") as stream:
        for begin, end in sorted(entry["data_offsets"] for entry in tensors.values()):
            for offset in (begin, (begin + end) // 2, max(end - SAMPLE_BYTES, begin)):
                stream.seek(8 + len(header) + offset)
                digest.update(stream.read(min(SAMPLE_BYTES, end - offset)))
    return digest.digest()


def digest_tokenizer(tokenizer: Any) -> str:
    """sha256 of the fast tokenizer's whole state."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def digest_chat_template(tokenizer: Any) -> str:
    """sha256 of the chat template's text; of nothing where there is none."""
    template = tokenizer.chat_template or ""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
