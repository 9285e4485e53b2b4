"""Inner chunks to stored bytes and back: blosc without loss, or one byte a value with scales.

Pure functions of their arguments. R rows (tokens) of a chunk, L layers, D hidden size, N groups of C channels.
"""

import struct
from collections.abc import Iterator

import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import torch

from storage.encodings import INNER_TOKENS, Scaling

# Blosc's own threads keep global state that does not survive a fork; we decode several chunks at once instead.
numcodecs.blosc.use_threads = False

# 1.45x on bf16 states at about 350 MB/s in and 1,350 MB/s out a core (measured); larger blocks gain nothing.
BLOSC_LEVEL = 1
BLOSC_BLOCK_BYTES = 1 << 20
BLOSC_MAX_OVERHEAD = numcodecs.blosc.MAX_OVERHEAD
_BLOSC_HEADER = struct.Struct("<BBBBIII")  # version, version of the codec, flags, typesize, nbytes, blocksize, cbytes

# Values that are decoded at a time: 4 MB in float32, which stay in a core's own cache (measured: 7.8 GB/s, not 3.8).
_BLOCK_VALUES = 1 << 20


def blosc_metadata(itemsize: int) -> dict[str, object]:
    """The codec as ``zarr.json`` names it."""
    configuration = {
        "typesize": itemsize,
        "cname": "zstd",
        "clevel": BLOSC_LEVEL,
        "shuffle": "shuffle",
        "blocksize": BLOSC_BLOCK_BYTES,
    }
    return {"name": "blosc", "configuration": configuration}


def compress(data: npt.NDArray[np.uint8], itemsize: int) -> bytes:
    """One inner chunk, compressed. The result depends on the release of blosc, what it decodes to does not."""
    result = numcodecs.blosc.compress(
        data, b"zstd", BLOSC_LEVEL, numcodecs.blosc.SHUFFLE, BLOSC_BLOCK_BYTES, typesize=itemsize
    )
    return bytes(result)


def decompress(source: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> None:
    """Decode one inner chunk into ``out``, which must have its exact size. Raises ValueError for anything else."""
    header = _BLOSC_HEADER.unpack(source[: _BLOSC_HEADER.size].data) if source.size >= _BLOSC_HEADER.size else (0,) * 7
    if (header[4], header[6]) != (out.size, source.size):  # what blosc would believe without looking
        raise ValueError(f"expected a blosc chunk of {source.size} bytes that holds {out.size}")
    try:
        numcodecs.blosc.decompress(source, out)
    except RuntimeError as error:
        raise ValueError(f"blosc cannot decode it: {error}") from error


def quantize(rows: torch.Tensor, *, scaling: Scaling, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk [R, ..., D] as ``dtype`` and its bf16 scales [R, ..., N]; not finite values become 0.

    Where a scale serves the whole chunk, there is one row of scales; where it serves all channels, no axis N. A scale
    is the largest magnitude it serves over ``scaling.largest``, rounded up, so nothing is clipped but what is within a
    rounding of the largest bfloat16.
    """
    hidden_size = rows.shape[-1]
    values = torch.nan_to_num(rows.float(), nan=0.0, posinf=0.0, neginf=0.0)
    groups = _as_groups(values, scaling)  # [R, ..., N, C]
    largest = groups.abs().amax(-1)
    if scaling.tokens > 1:
        largest = largest.amax(0, keepdim=True)
    scales = _round_up(largest / scaling.largest).clamp_(max=_largest_scale(scaling))
    scaled = groups / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    if dtype == torch.int8:
        scaled.round_()
    elements = scaled.clamp_(-scaling.largest, scaling.largest).to(dtype).flatten(-2)[..., :hidden_size]
    return elements, (scales.squeeze(-1) if scaling.channels is None else scales).bfloat16()


def dequantize(
    values: torch.Tensor, scales: torch.Tensor, *, scaling: Scaling, start: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows [T, ..., D] from row ``start`` of a shard on, in ``dtype``; ``scales`` are those of the chunks or rows."""
    out = torch.empty(values.shape, dtype=dtype)
    if scaling.channels is None:
        scales = scales.unsqueeze(-1)
    for rows, scale_rows in _blocks(values, scaling, start=start):
        _multiply(values[rows], scales[scale_rows].float(), scaling, out=out[rows])
    return out


def _as_groups(values: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """[..., D] as [..., N, C]; zeros fill the last group."""
    size = scaling.channels or values.shape[-1]
    filled = torch.nn.functional.pad(values, (0, -values.shape[-1] % size))
    return filled.view(*filled.shape[:-1], -1, size)


def _largest_scale(scaling: Scaling) -> float:
    """Rounded down to a bfloat16, so that the largest decoded state is finite."""
    bits = torch.tensor(torch.finfo(torch.bfloat16).max / scaling.largest).view(torch.int32) & ~0xFFFF
    return float(bits.view(torch.float32))


def _blocks(values: torch.Tensor, scaling: Scaling, *, start: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of the rows, and the rows of scales that serve each; none crosses an inner chunk."""
    step = max(_BLOCK_VALUES // max(values[0].numel(), 1), 1) if len(values) else 1
    first = start // INNER_TOKENS
    place = 0
    while place < len(values):
        chunk = (start + place) // INNER_TOKENS
        stop = min(place + step, (chunk + 1) * INNER_TOKENS - start, len(values))
        yield slice(place, stop), slice(place, stop) if scaling.tokens == 1 else slice(chunk - first, chunk - first + 1)
        place = stop


def _multiply(values: torch.Tensor, scales: torch.Tensor, scaling: Scaling, *, out: torch.Tensor) -> None:
    """Elements [R, ..., D] times scales [R or 1, ..., N] in float32, rounded into ``out``."""
    decoded = widen_e4m3(values) if values.dtype == torch.float8_e4m3fn else values.float()
    size = scaling.channels or values.shape[-1]
    whole = values.shape[-1] // size  # groups, but for a smaller last one
    decoded[..., : whole * size].view(*values.shape[:-1], whole, size).mul_(scales[..., :whole, None])
    decoded[..., whole * size :].mul_(scales[..., whole:])
    out.copy_(decoded)


def widen_e4m3(values: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn as float32, in a sixth of the time of ``values.float()``. NaN, which is never stored, becomes 480.

    Exponent and mantissa of e4m3 are those of a binary16 whose exponent bias is 8 more, subnormals included.
    """
    bits = values.view(torch.uint8).to(torch.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.view(torch.float16).float().mul_(2.0**8)


def _round_up(values: torch.Tensor) -> torch.Tensor:
    """The smallest bfloat16 that is not below each (not negative, finite) value, as float32."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
