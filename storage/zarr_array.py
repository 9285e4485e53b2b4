"""One sharded Zarr v3 array, written by appending: the payload is the plain C-order array from byte 0.

The directory holds ``zarr.json`` and one chunk file: inner chunks of 256 tokens in order, the last one padded with
zeros to full size, then the index (offset and size of each inner chunk, uint64 little-endian) and its crc32c.
Metadata and index follow from the shape alone, so a reader compares them instead of believing them.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage import layout
from storage.encodings import Encoding
from storage.errors import CacheUsageError
from storage.files import crc32c_hex, disk_errors, extend_crc32c, sync_directory, write_all, write_durable
from storage.manifest import CacheHeader

# Tokens of one inner chunk: the unit of checksums. 7.9 MB at 6 states of 2,560 bf16 values, under 1 ms of crc32c.
INNER_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """An array [tokens, *row_shape] of which every byte outside the payload is known in advance."""

    name: str
    num_tokens: int
    row_shape: tuple[int, ...]
    dimension_names: tuple[str, ...]
    encoding: Encoding
    attributes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise CacheUsageError(f"{self.name}: a shard holds at least one token, got {self.num_tokens}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return math.prod(self.row_shape) * self.encoding.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk."""
        return INNER_TOKENS * self.row_bytes

    @property
    def num_chunks(self) -> int:
        """Number of inner chunks."""
        return -(-self.num_tokens // INNER_TOKENS)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tokens, without padding."""
        return self.num_tokens * self.row_bytes

    @property
    def file_bytes(self) -> int:
        """Exact size of the chunk file."""
        return self.num_chunks * (self.chunk_bytes + 16) + 4

    @property
    def data_name(self) -> str:
        """The chunk file, relative to the shard's directory."""
        return layout.array_data_name(self.name, 1 + len(self.row_shape))

    def footer(self) -> bytes:
        """The index of inner chunks and its crc32c, at the end of the chunk file."""
        index = np.empty((self.num_chunks, 2), dtype="<u8")
        index[:, 0] = np.arange(self.num_chunks, dtype=np.uint64) * np.uint64(self.chunk_bytes)
        index[:, 1] = self.chunk_bytes
        data = index.tobytes()
        return data + int(crc32c_hex(data), 16).to_bytes(4, "little")

    def metadata(self) -> bytes:
        """The bytes of the array's ``zarr.json``."""
        inner = [INNER_TOKENS, *self.row_shape]
        outer = [self.num_chunks * INNER_TOKENS, *self.row_shape]
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": inner,
            "codecs": [little],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return _render(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [self.num_tokens, *self.row_shape],
                "data_type": self.encoding.zarr_type,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": self.encoding.fill_value,
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "attributes": {**self.encoding.attributes, **self.attributes},
                "dimension_names": list(self.dimension_names),
            }
        )


def plan_arrays(header: CacheHeader, num_tokens: int) -> tuple[ArraySpec, ArraySpec]:
    """The two arrays of a shard: hidden_states [T, L, D] and last_hidden_states [T, D]."""
    layers, hidden_size = header.identity.layers, header.hidden_size
    hidden = ArraySpec(
        name=layout.HIDDEN_STATES,
        num_tokens=num_tokens,
        row_shape=(len(layers), hidden_size),
        dimension_names=("token", "layer", "hidden"),
        encoding=header.encoding,
        attributes={"layers": list(layers)},
    )
    last = ArraySpec(
        name=layout.LAST_HIDDEN_STATES,
        num_tokens=num_tokens,
        row_shape=(hidden_size,),
        dimension_names=("token", "hidden"),
        encoding=header.encoding,
    )
    return hidden, last


def group_metadata() -> bytes:
    """The bytes of a shard's own ``zarr.json``."""
    return _render({"zarr_format": 3, "node_type": "group", "attributes": {}})


def _render(fields: Mapping[str, object]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode("ascii")


class ArrayWriter:
    """Appends rows to a new array and takes the crc32c of each inner chunk on the way."""

    def __init__(self, group: Path, spec: ArraySpec) -> None:
        self.spec = spec
        self.chunk_crc32c: list[str] = []
        self._written = 0
        self._crc = 0
        self._path = group / spec.data_name
        self._path.parent.mkdir(parents=True)
        write_durable(group / layout.array_metadata_name(spec.name), spec.metadata())
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def append(self, rows: npt.NDArray[np.uint8]) -> None:
        """Write the next rows, given as their contiguous bytes. More rows than planned are an error."""
        if self._written + rows.size > self.spec.payload_bytes:
            raise CacheUsageError(f"{self._path}: more rows than the {self.spec.num_tokens} planned ones")
        self._append(rows)

    def finish(self) -> None:
        """Pad, write the index, sync the files and directories of the array. Fewer rows than planned are an error."""
        if self._written != self.spec.payload_bytes:
            num_rows = self._written // self.spec.row_bytes
            raise CacheUsageError(f"{self._path}: {num_rows} rows were appended, {self.spec.num_tokens} are planned")
        padding = self.spec.num_chunks * self.spec.chunk_bytes - self._written
        self._append(np.zeros(padding, dtype=np.uint8))
        with disk_errors(self._path):
            write_all(self._fd, self.spec.footer())

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

    def _append(self, data: npt.NDArray[np.uint8]) -> None:
        with disk_errors(self._path):
            write_all(self._fd, data)
        while data.size:
            room = self.spec.chunk_bytes - self._written % self.spec.chunk_bytes
            piece, data = data[:room], data[room:]
            self._crc = extend_crc32c(self._crc, piece)
            self._written += piece.size
            if self._written % self.spec.chunk_bytes == 0:
                self.chunk_crc32c.append(f"{self._crc:08x}")
                self._crc = 0
