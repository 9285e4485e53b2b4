"""How hidden states are stored: the mapped encodings, in which the payload is the plain array."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from storage.errors import CacheFormatError


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One element of the payload, as torch sees it and as Zarr names it (always little-endian)."""

    name: str
    torch_dtype: torch.dtype
    zarr_type: str
    fill_value: int | float
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.torch_dtype.itemsize


_ENCODINGS = (
    # zarr-python has no bfloat16: the bits are stored as uint16 and the attribute says what they are.
    Encoding(
        name="bf16",
        torch_dtype=torch.bfloat16,
        zarr_type="uint16",
        fill_value=0,
        attributes=MappingProxyType({"logical_dtype": "bfloat16"}),
    ),
    Encoding(name="fp16", torch_dtype=torch.float16, zarr_type="float16", fill_value=0.0),
    Encoding(name="fp32", torch_dtype=torch.float32, zarr_type="float32", fill_value=0.0),
)
ENCODINGS: Mapping[str, Encoding] = MappingProxyType({encoding.name: encoding for encoding in _ENCODINGS})


def parse_encoding(name: str) -> Encoding:
    """The encoding of that name; an unknown one is an error that lists the known."""
    if name not in ENCODINGS:
        raise CacheFormatError(f"encoding {name!r} is not one that this code reads: {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def bytes_per_token(*, num_layers: int, hidden_size: int, encoding: str) -> int:
    """Payload bytes of one token: the state of every stored layer and the last state."""
    return (num_layers + 1) * hidden_size * parse_encoding(encoding).itemsize
