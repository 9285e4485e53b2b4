"""Rows of one committed shard: a private mapping, or large reads; checked before they are handed out.

Opening compares metadata and sizes with the plan, so a truncated file is an error and not a SIGBUS. With
``checks="touch"`` each inner chunk's crc32c is compared when its first row is asked for.
"""

import math
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from storage import layout
from storage.commit import ArrayRecord, CommitRecord, PlannedShard, remedy
from storage.errors import CacheCorruptError, CacheReadError
from storage.files import crc32c_hex, open_inside, read_inside
from storage.zarr_array import INNER_TOKENS, ArraySpec

# Untouched pages of a private mapping must not count against the machine's commit limit. Linux only.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)


class ShardArray:
    """One array of a shard, opened. ``read(start, stop)`` gives rows [stop - start, *row_shape]."""

    def __init__(self, planned: PlannedShard, spec: ArraySpec, record: ArrayRecord, *, check: bool) -> None:
        self._shard = planned.shard
        self._spec = spec
        self._name = f"{layout.shard_name(planned.shard)}/{spec.data_name}"
        self._path = planned.root / self._name
        self._expected = record.chunk_crc32c
        self._unchecked = np.full(spec.num_chunks, check, dtype=np.bool_)
        _check_metadata(planned, spec)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows of a sample; every inner chunk that they lie in has matched its crc32c in this process."""
        raise NotImplementedError

    def _open(self, root: Path) -> int:
        """Open the chunk file; its size must be the planned one."""
        try:
            fd = open_inside(root, self._name)
        except FileNotFoundError as error:
            raise CacheCorruptError(f"{self._path}: is gone, but committed; {remedy(self._shard)}") from error
        size = os.fstat(fd).st_size
        if size != self._spec.file_bytes:
            os.close(fd)
            raise CacheCorruptError(
                f"{self._path}: has {size} bytes, expected {self._spec.file_bytes} (truncated or overwritten); "
                f"{remedy(self._shard)}"
            )
        return fd

    def _chunks(self, start: int, stop: int) -> range:
        return range(start // INNER_TOKENS, -(-stop // INNER_TOKENS))

    def _check(self, chunk: int, data: npt.NDArray[np.uint8]) -> None:
        found = crc32c_hex(data)
        if found != self._expected[chunk]:
            raise CacheCorruptError(
                f"{self._path}: inner chunk {chunk} (tokens from {chunk * INNER_TOKENS}) has crc32c {found}, "
                f"expected {self._expected[chunk]}; {remedy(self._shard)}"
            )
        self._unchecked[chunk] = False


class MappedArray(ShardArray):
    """The payload mapped: rows are views of the page cache, no byte is copied.

    The mapping is private and copy-on-write, so that torch gets the writable memory that it wants and no write can
    reach the file; it lives as long as a tensor made from it.
    """

    def __init__(self, planned: PlannedShard, spec: ArraySpec, record: ArrayRecord, *, check: bool) -> None:
        super().__init__(planned, spec, record, check=check)
        fd = self._open(planned.root)
        try:
            mapping = mmap.mmap(
                fd, spec.file_bytes, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError as error:
            raise CacheReadError(f"{self._path}: cannot map: {error.strerror}; use io='pread'") from error
        finally:
            os.close(fd)
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)
        count = spec.num_tokens * math.prod(spec.row_shape)
        flat = torch.frombuffer(mapping, dtype=spec.encoding.torch_dtype, count=count)
        self._rows = flat.view(spec.num_tokens, *spec.row_shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """A view of rows start to stop."""
        size = self._spec.chunk_bytes
        for chunk in self._chunks(start, stop):
            if self._unchecked[chunk]:
                self._check(chunk, self._bytes[chunk * size : (chunk + 1) * size])
        return self._rows[start:stop]


class PositionedArray(ShardArray):
    """The payload read by ``pread``: one large request a sample, whole inner chunks where one is still unchecked."""

    def __init__(self, planned: PlannedShard, spec: ArraySpec, record: ArrayRecord, *, check: bool) -> None:
        super().__init__(planned, spec, record, check=check)
        self._file = os.fdopen(self._open(planned.root), "rb", buffering=0)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """A copy of rows start to stop."""
        chunks = self._chunks(start, stop)
        if not self._unchecked[chunks.start : chunks.stop].any():
            return self._as_rows(self._read_bytes(start * self._spec.row_bytes, stop * self._spec.row_bytes))
        size = self._spec.chunk_bytes
        data = self._read_bytes(chunks.start * size, chunks.stop * size)
        for place, chunk in enumerate(chunks):
            if self._unchecked[chunk]:
                self._check(chunk, data[place * size : (place + 1) * size])
        first = start - chunks.start * INNER_TOKENS
        return self._as_rows(data)[first : first + stop - start]

    def _as_rows(self, data: npt.NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(data).view(self._spec.encoding.torch_dtype).view(-1, *self._spec.row_shape)

    def _read_bytes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        data = np.empty(stop - start, dtype=np.uint8)
        done = 0
        while done < len(data):
            try:
                count = os.preadv(self._file.fileno(), [data.data[done:]], start + done)
            except OSError as error:
                raise CacheReadError(f"{self._path}: cannot read: {error.strerror}") from error
            if count == 0:
                raise CacheCorruptError(f"{self._path}: ends at byte {start + done}; {remedy(self._shard)}")
            done += count
        return data


def open_arrays(
    planned: PlannedShard, record: CommitRecord, *, mapped: bool, check: bool
) -> tuple[ShardArray, ShardArray]:
    """Open hidden_states and last_hidden_states of a committed shard."""
    kind = MappedArray if mapped else PositionedArray
    hidden, last = (kind(planned, spec, record.arrays[spec.name], check=check) for spec in planned.arrays)
    return hidden, last


def _check_metadata(planned: PlannedShard, spec: ArraySpec) -> None:
    name = f"{layout.shard_name(planned.shard)}/{layout.array_metadata_name(spec.name)}"
    try:
        found = read_inside(planned.root, name)
    except FileNotFoundError as error:
        raise CacheCorruptError(f"{planned.root / name}: is gone, but committed; {remedy(planned.shard)}") from error
    if found != spec.metadata():
        raise CacheCorruptError(
            f"{planned.root / name}: is not the metadata of {spec.num_tokens} tokens of {list(spec.row_shape)} in "
            f"{spec.encoding.name}; {remedy(planned.shard)}"
        )
