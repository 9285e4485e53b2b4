"""How hidden states are stored: exactly, compressed without loss, or rounded to one byte with scales beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from storage.errors import CacheFormatError

# Tokens of one inner chunk: the unit of checksums, of compression and of int8's scales. 7.9 MB at 6 states of 2,560
# bf16 values: under 1 ms of crc32c, 6 ms of decompression on one core.
INNER_TOKENS = 256

Scaling = Literal["none", "chunk", "token"]


@dataclass(frozen=True, kw_only=True)
class Element:
    """One stored value, as torch sees it and as Zarr names it (always little-endian).

    ``logical_dtype`` says what the bits are where Zarr has no type for them.
    """

    torch_dtype: torch.dtype
    zarr_type: str
    fill_value: int | float = 0
    logical_dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """``torch_dtype`` is what a reader gives, ``element`` what lies on disk.

    ``scaling``: "none"; "chunk", one scale per channel for each inner chunk; "token", one per token and layer. State =
    element x scale. An encoding that is neither compressed nor scaled is mapped: the payload is the plain array.
    """

    name: str
    torch_dtype: torch.dtype
    element: Element
    compressed: bool = False
    scaling: Scaling = "none"

    @property
    def lossy(self) -> bool:
        """Whether states are rounded to something coarser than the target's own precision."""
        return self.scaling != "none"


BFLOAT16 = Element(torch_dtype=torch.bfloat16, zarr_type="uint16", logical_dtype="bfloat16")  # Zarr has no bfloat16

_ENCODINGS = (
    Encoding(name="bf16", torch_dtype=torch.bfloat16, element=BFLOAT16),
    Encoding(
        name="fp16",
        torch_dtype=torch.float16,
        element=Element(torch_dtype=torch.float16, zarr_type="float16", fill_value=0.0),
    ),
    Encoding(
        name="fp32",
        torch_dtype=torch.float32,
        element=Element(torch_dtype=torch.float32, zarr_type="float32", fill_value=0.0),
    ),
    Encoding(name="bf16-lossless", torch_dtype=torch.bfloat16, element=BFLOAT16, compressed=True),
    Encoding(
        name="int8",
        torch_dtype=torch.bfloat16,
        element=Element(torch_dtype=torch.int8, zarr_type="int8"),
        scaling="chunk",
    ),
    Encoding(
        name="fp8",
        torch_dtype=torch.bfloat16,
        element=Element(torch_dtype=torch.float8_e4m3fn, zarr_type="uint8", logical_dtype="float8_e4m3fn"),
        scaling="token",
    ),
)
ENCODINGS: Mapping[str, Encoding] = MappingProxyType({encoding.name: encoding for encoding in _ENCODINGS})


def parse_encoding(name: str) -> Encoding:
    """The encoding of that name; an unknown one is an error that lists the known."""
    if name not in ENCODINGS:
        raise CacheFormatError(f"encoding {name!r} is not one that this code reads: {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def bytes_per_token(*, num_layers: int, hidden_size: int, encoding: str) -> int:
    """Payload bytes of one token, rounded up: every stored layer and the last state, scales included.

    Of a compressed encoding this is the size before compression.
    """
    parsed, num_states = parse_encoding(encoding), num_layers + 1
    num_values = num_states * hidden_size
    num_scales = {"none": 0, "chunk": -(-num_values // INNER_TOKENS), "token": num_states}[parsed.scaling]
    return num_values * parsed.element.torch_dtype.itemsize + num_scales * BFLOAT16.torch_dtype.itemsize
