"""One sharded Zarr v3 array, written by appending whole inner chunks.

The directory holds ``zarr.json`` and one chunk file: the inner chunks in order without gaps, the last one padded with
zeros to full size, then the index (offset and size of each inner chunk, uint64 little-endian) and its crc32c. Of an
array that is not compressed every byte but the payload follows from the shape, and the payload is the plain C-order
array from byte 0.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage import layout
from storage.codecs import BLOSC_MAX_OVERHEAD, blosc_metadata
from storage.encodings import BFLOAT16, INNER_TOKENS, Element, Scaling
from storage.errors import CacheCorruptError, CacheUsageError
from storage.files import Bytes, crc32c_hex, disk_errors, sync_directory, write_all, write_durable
from storage.manifest import CacheHeader


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """An array [num_rows, *row_shape], cut into inner chunks of ``chunk_rows`` rows.

    ``scaling`` is that of an array of states which has an array of scales.
    """

    name: str
    num_rows: int
    row_shape: tuple[int, ...]
    dimension_names: tuple[str, ...]
    element: Element
    chunk_rows: int = INNER_TOKENS
    compressed: bool = False
    scaling: Scaling | None = None
    attributes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise CacheUsageError(f"{self.name}: a shard holds at least one token, got {self.num_rows}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, decoded."""
        return math.prod(self.row_shape) * self.element.torch_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk, decoded."""
        return self.chunk_rows * self.row_bytes

    @property
    def num_chunks(self) -> int:
        """Number of inner chunks."""
        return -(-self.num_rows // self.chunk_rows)

    @property
    def footer_bytes(self) -> int:
        """Bytes of the index of inner chunks and its crc32c."""
        return 16 * self.num_chunks + 4

    @property
    def max_file_bytes(self) -> int:
        """Size of the chunk file: exact where it is not compressed, else what it cannot exceed."""
        overhead = BLOSC_MAX_OVERHEAD if self.compressed else 0
        return self.num_chunks * (self.chunk_bytes + overhead) + self.footer_bytes

    @property
    def data_name(self) -> str:
        """The chunk file, relative to the shard's directory."""
        return layout.array_data_name(self.name, 1 + len(self.row_shape))

    def fits(self, file_bytes: int) -> bool:
        """Whether the chunk file may have that size."""
        if self.compressed:
            return self.footer_bytes < file_bytes <= self.max_file_bytes
        return file_bytes == self.max_file_bytes

    def render_footer(self, chunk_sizes: Sequence[int]) -> bytes:
        """The index of inner chunks of these stored sizes, in bytes, and its crc32c."""
        index = np.empty((self.num_chunks, 2), dtype="<u8")
        index[:, 1] = chunk_sizes
        index[:, 0] = np.cumsum(index[:, 1]) - index[:, 1]
        data = index.tobytes()
        return data + int(crc32c_hex(data), 16).to_bytes(4, "little")

    def parse_footer(self, data: bytes, *, file_bytes: int, where: str) -> npt.NDArray[np.int64]:
        """Where each inner chunk starts and the last one ends [num_chunks + 1], from a chunk file's last bytes."""
        index = np.frombuffer(data[:-4], dtype="<u8").reshape(-1, 2)
        sizes = index[:, 1].astype(np.int64)
        fits = bool(np.all((index[:, 1] > 0) & (index[:, 1] <= self.chunk_bytes + BLOSC_MAX_OVERHEAD)))
        whole = fits and int(sizes.sum()) == file_bytes - self.footer_bytes
        if not (whole and (self.compressed or set(sizes.tolist()) == {self.chunk_bytes})):
            raise CacheCorruptError(f"{where}: the index of inner chunks does not fit a file of {file_bytes} bytes")
        if self.render_footer(sizes.tolist()) != data:
            raise CacheCorruptError(f"{where}: the index of inner chunks is damaged")
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def metadata(self) -> bytes:
        """The bytes of the array's ``zarr.json``."""
        inner = [self.chunk_rows, *self.row_shape]
        outer = [self.num_chunks * self.chunk_rows, *self.row_shape]
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        # Zarr gives types of one byte no byte order.
        itemsize = self.element.torch_dtype.itemsize
        serial = little if itemsize > 1 else {"name": "bytes"}
        sharding = {
            "chunk_shape": inner,
            "codecs": [serial, blosc_metadata(itemsize)] if self.compressed else [serial],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        logical = {"logical_dtype": self.element.logical_dtype} if self.element.logical_dtype else {}
        return _render(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [self.num_rows, *self.row_shape],
                "data_type": self.element.zarr_type,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": self.element.fill_value,
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "attributes": {**logical, **self.attributes},
                "dimension_names": list(self.dimension_names),
            }
        )


def plan_arrays(header: CacheHeader, num_tokens: int) -> tuple[ArraySpec, ...]:
    """The arrays of a shard: hidden_states [T, L, D], last_hidden_states [T, D], and the scales of both, if any."""
    layers, hidden_size = header.identity.layers, header.hidden_size
    hidden = _plan_states(
        layout.HIDDEN_STATES,
        header,
        num_tokens=num_tokens,
        axes={"layer": len(layers), "hidden": hidden_size},
        attributes={"layers": list(layers)},
        scaling=header.encoding.scaling,
    )
    last = _plan_states(
        layout.LAST_HIDDEN_STATES,
        header,
        num_tokens=num_tokens,
        axes={"hidden": hidden_size},
        attributes={},
        scaling=header.encoding.last_scaling,
    )
    return hidden, last, *(_plan_scales(spec, spec.scaling) for spec in (hidden, last) if spec.scaling)


def _plan_states(
    name: str,
    header: CacheHeader,
    *,
    num_tokens: int,
    axes: Mapping[str, int],
    attributes: Mapping[str, object],
    scaling: Scaling | None,
) -> ArraySpec:
    encoding = header.encoding
    scales: dict[str, object] = {}
    if scaling is not None:
        scales = {"scale": layout.scale_name(name), "tokens_per_scale": scaling.tokens}
        if scaling.channels is not None and scaling.channels > 1:
            scales["channels_per_scale"] = scaling.channels
    return ArraySpec(
        name=name,
        num_rows=num_tokens,
        row_shape=tuple(axes.values()),
        dimension_names=("token", *axes),
        element=encoding.element,
        compressed=encoding.compressed,
        scaling=scaling,
        attributes={**attributes, **scales},
    )


def _plan_scales(states: ArraySpec, scaling: Scaling) -> ArraySpec:
    *row_shape, hidden_size = states.row_shape
    *names, hidden_name = states.dimension_names[1:]
    if scaling.channels is not None:
        row_shape.append(scaling.num_groups(hidden_size))
        names.append(hidden_name if scaling.channels == 1 else "group")
    by_chunk = scaling.tokens == INNER_TOKENS
    return ArraySpec(
        name=layout.scale_name(states.name),
        num_rows=states.num_chunks if by_chunk else states.num_rows,
        row_shape=tuple(row_shape),
        dimension_names=("chunk" if by_chunk else "token", *names),
        element=BFLOAT16,
        chunk_rows=1 if by_chunk else INNER_TOKENS,
    )


def group_metadata() -> bytes:
    """The bytes of a shard's own ``zarr.json``."""
    return _render({"zarr_format": 3, "node_type": "group", "attributes": {}})


def _render(fields: Mapping[str, object]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode("ascii")


class ArrayWriter:
    """Appends inner chunks to a new array and takes the crc32c of each on the way."""

    def __init__(self, group: Path, spec: ArraySpec) -> None:
        self.spec = spec
        self.chunk_crc32c: list[str] = []
        self._chunk_sizes: list[int] = []
        self._path = group / spec.data_name
        self._path.parent.mkdir(parents=True)
        write_durable(group / layout.array_metadata_name(spec.name), spec.metadata())
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    @property
    def file_bytes(self) -> int:
        """Size of the chunk file once it is finished."""
        return sum(self._chunk_sizes) + self.spec.footer_bytes

    def append(self, chunk: Bytes) -> None:
        """Write the next inner chunk, given as it is stored."""
        with disk_errors(self._path):
            write_all(self._fd, chunk)
        self.chunk_crc32c.append(crc32c_hex(chunk))
        self._chunk_sizes.append(len(chunk))

    def finish(self) -> None:
        """Write the index."""
        with disk_errors(self._path):
            write_all(self._fd, self.spec.render_footer(self._chunk_sizes))

    def sync(self) -> None:
        """Make the array durable, up to its own directory."""
        with disk_errors(self._path):
            os.fsync(self._fd)
        array = self._path.parents[len(self.spec.row_shape) + 1]
        directory = self._path.parent
        while directory != array.parent:
            sync_directory(directory)
            directory = directory.parent

    def close(self) -> None:
        """Release the file, whether or not it is finished."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
