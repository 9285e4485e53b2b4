"""How hidden states are stored: exactly, compressed without loss, or rounded to one byte with scales beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from storage.errors import CacheFormatError
from storage.sealed import FORMAT_VERSION

# Tokens of one inner chunk: the unit of checksums and of compression. 7.9 MB at 6 states of 2,560 bf16 values: under
# 1 ms of crc32c, 6 ms of decompression on one core.
INNER_TOKENS = 256

# Channels of a token that share a scale in int8's layers. Real targets have channels of 300 times the others' size in
# some tokens: such a value may cost the precision of its own group, in its own token, and of nothing else.
INT8_GROUP = 64


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
class Scaling:
    """Which elements of a layer share a scale: ``tokens`` rows of an inner chunk by ``channels`` of the hidden axis.

    ``tokens`` is 1 or INNER_TOKENS. ``channels`` None are all of them; the last group may have fewer. ``largest`` is
    the magnitude of an element that stands for the largest of its group.
    """

    tokens: int
    channels: int | None
    largest: float

    def num_groups(self, hidden_size: int) -> int:
        """Scales of one token and layer."""
        return -(-hidden_size // (self.channels or hidden_size))


BY_GROUP = Scaling(tokens=1, channels=INT8_GROUP, largest=127.0)  # of int8, kept symmetric
BY_CHANNEL = Scaling(tokens=INNER_TOKENS, channels=1, largest=127.0)
BY_TOKEN = Scaling(tokens=1, channels=None, largest=448.0)  # of float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """``torch_dtype`` is what a reader gives, ``element`` what lies on disk; state = element x scale.

    ``scaling`` is that of the layers, ``last_scaling`` that of the last state: both or none. An encoding that is
    neither compressed nor scaled is mapped: the payload is the plain array.
    """

    name: str
    torch_dtype: torch.dtype
    element: Element
    compressed: bool = False
    scaling: Scaling | None = None
    last_scaling: Scaling | None = None

    @property
    def lossy(self) -> bool:
        """Whether states are rounded to something coarser than the target's own precision."""
        return self.scaling is not None

    def bytes_per_token(self, *, num_layers: int, hidden_size: int) -> int:
        """Payload bytes of one token, rounded up: every stored layer and the last state, scales included.

        Of a compressed encoding this is the size before compression.
        """
        scales = sum(  # of all tokens of an inner chunk
            num_states * scaling.num_groups(hidden_size) * (INNER_TOKENS // scaling.tokens)
            for num_states, scaling in ((num_layers, self.scaling), (1, self.last_scaling))
            if scaling is not None
        )
        num_values = (num_layers + 1) * hidden_size
        return (
            num_values * self.element.torch_dtype.itemsize + -(-scales // INNER_TOKENS) * BFLOAT16.torch_dtype.itemsize
        )


BFLOAT16 = Element(torch_dtype=torch.bfloat16, zarr_type="uint16", logical_dtype="bfloat16")  # Zarr has no bfloat16
INT8 = Element(torch_dtype=torch.int8, zarr_type="int8")

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
        element=INT8,
        scaling=BY_GROUP,
        # No token's state is far larger than the others' after the norm, but some channels are in all tokens: the total
        # variation is 0.012 on SmolLM2-135M, where groups would give 0.027 (measured).
        last_scaling=BY_CHANNEL,
    ),
    Encoding(
        name="fp8",
        torch_dtype=torch.bfloat16,
        element=Element(torch_dtype=torch.float8_e4m3fn, zarr_type="uint8", logical_dtype="float8_e4m3fn"),
        scaling=BY_TOKEN,
        last_scaling=BY_TOKEN,
    ),
)
ENCODINGS: Mapping[str, Encoding] = MappingProxyType({encoding.name: encoding for encoding in _ENCODINGS})

# What the names meant in a cache of version 1, whose int8 had one scale per channel for each inner chunk throughout.
ENCODINGS_V1: Mapping[str, Encoding] = MappingProxyType(
    {
        **ENCODINGS,
        "int8": Encoding(
            name="int8",
            torch_dtype=torch.bfloat16,
            element=INT8,
            scaling=BY_CHANNEL,
            last_scaling=BY_CHANNEL,
        ),
    }
)


def parse_encoding(name: str, *, format_version: int) -> Encoding:
    """What the name stands for in a cache of that version; an unknown one is an error that lists the known."""
    encodings = ENCODINGS_V1 if format_version == 1 else ENCODINGS
    if name not in encodings:
        raise CacheFormatError(f"encoding {name!r} is not one that this code reads: {', '.join(encodings)}")
    return encodings[name]


def bytes_per_token(*, num_layers: int, hidden_size: int, encoding: str) -> int:
    """Payload bytes of one token in a new cache; see ``Encoding.bytes_per_token``."""
    parsed = parse_encoding(encoding, format_version=FORMAT_VERSION)
    return parsed.bytes_per_token(num_layers=num_layers, hidden_size=hidden_size)
