"""A target's embedding and output head in a safetensors file: stored once where they are one tensor.

Extraction writes them into the cache, training takes them from there and keeps them with the run, since its
checkpoints leave them out.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
TARGET_TENSORS = (EMBEDDING, HEAD)
"""What a draft has from its target, unchanged; a server has it already."""


class TargetHead(NamedTuple):
    """Embedding and head, both [V, D]; `lm_head` None: the embedding is the head too."""

    embed_tokens: torch.Tensor
    lm_head: torch.Tensor | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        return {EMBEDDING: self.embed_tokens} | ({} if self.lm_head is None else {HEAD: self.lm_head})


def join_head(embed_tokens: torch.Tensor, lm_head: torch.Tensor) -> TargetHead:
    """The pair, as one tensor where both are, or hold the same numbers."""
    is_alike = lm_head.shape == embed_tokens.shape and lm_head.dtype == embed_tokens.dtype
    is_one = lm_head is embed_tokens or (is_alike and torch.equal(lm_head.to(embed_tokens.device), embed_tokens))
    return TargetHead(embed_tokens, None if is_one else lm_head)


def is_stored_once(file: Path) -> bool:
    """Whether the file says that the embedding is the head. Raises OSError and SafetensorError."""
    with safe_open(file, framework="pt") as tensors:
        return HEAD not in tensors.keys()  # noqa: SIM118 (it is no dict)


def read_head(file: Path) -> TargetHead:
    """The pair in `file`; older caches have it twice where it is one. Raises OSError and SafetensorError."""
    with safe_open(file, framework="pt") as tensors:
        embed_tokens = tensors.get_tensor(EMBEDDING)
        lm_head = embed_tokens if is_stored_once(file) else tensors.get_tensor(HEAD)
    return join_head(embed_tokens, lm_head)
