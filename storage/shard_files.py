"""Rows of one shard's arrays: mapped, or read in large requests; checked, decoded, and handed out as tensors.

Opening compares sizes with the commit. With ``check`` each inner chunk's crc32c is compared when its first row is asked
for; a compressed one always, since it is decoded each time. Whoever touches a page of a mapping whose file has been cut
since is killed by SIGBUS, so bytes are touched here by ``pread`` alone, and a view is given only of a file that has its
size at that moment. A file that is cut between that look and the use of the view still kills; who must not be killed
reads with ``io="pread"``.
"""

import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from storage import layout
from storage.codecs import decompress, dequantize
from storage.commit import REMEDY, ArrayRecord, CommitRecord, PlannedShard
from storage.encodings import Encoding, Scaling
from storage.errors import CacheCorruptError, CacheFormatError, CacheReadError
from storage.files import crc32c_hex, extend_crc32c, open_inside, read_inside
from storage.zarr_array import ArraySpec

# Of one read where bytes are looked at and not kept: fits the second-level cache of a core (assumption).
SCRATCH_BYTES = 1 << 20

# Untouched pages of a private mapping must not count against the machine's commit limit. Linux only.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)


@dataclass(frozen=True, kw_only=True)
class Access:
    """How files are read: mapped or by ``pread``, with checksums or without; ``pool`` decompresses side by side."""

    mapped: bool
    check: bool
    pool: Executor | None = None


class States(Protocol):
    """An array of states, opened."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [stop - start, *row_shape] in the encoding's dtype; every byte they come from has been checked."""


class ShardFile(Protocol):
    """A chunk file whose size has been checked."""

    path: Path
    is_mapped: bool

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes start to stop, as views where the file is mapped."""

    def copy(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """A copy of bytes start to stop, for which no page of a mapping is touched."""

    def crc32c(self, start: int, stop: int) -> str:
        """Of bytes start to stop, for which no page of a mapping is touched."""


class PositionedFile:
    """Bytes are copies, fetched by ``pread`` in requests as large as what is asked for."""

    is_mapped = False

    def __init__(self, root: Path, name: str, *, num_bytes: int, hint: str) -> None:
        self.path = root / name
        self._hint = hint
        self._num_bytes = num_bytes
        self._file = os.fdopen(_open(root, name, num_bytes=num_bytes, hint=hint), "rb", buffering=0)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """A copy."""
        return self.copy(start, stop)

    def copy(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """A copy. Raises CacheCorruptError where the file has been cut, CacheReadError."""
        data = np.empty(stop - start, dtype=np.uint8)
        self._read_into(data, start)
        return data

    def crc32c(self, start: int, stop: int) -> str:
        """Of bytes start to stop, read into a piece of memory that stays in the processor's cache."""
        scratch = np.empty(min(stop - start, SCRATCH_BYTES), dtype=np.uint8)
        crc = 0
        for place in range(start, stop, SCRATCH_BYTES):
            piece = scratch[: stop - place]
            self._read_into(piece, place)
            crc = extend_crc32c(crc, piece)
        return f"{crc:08x}"

    def _read_into(self, data: npt.NDArray[np.uint8], start: int) -> None:
        done = 0
        while done < len(data):
            try:
                count = os.preadv(self._file.fileno(), [data.data[done:]], start + done)
            except OSError as error:
                raise CacheReadError(f"{self.path}: cannot read: {error.strerror}") from error
            if count == 0:
                raise self._resized()
            done += count

    def _resized(self) -> CacheCorruptError:
        size = os.fstat(self._file.fileno()).st_size
        return CacheCorruptError(
            f"{self.path}: has {size} bytes, had {self._num_bytes} when it was opened; {self._hint}"
        )


class MappedFile(PositionedFile):
    """Bytes are views of the page cache, none is copied.

    No advice is given: MADV_WILLNEED before a chunk is first touched made cold reads slower (0.8 of the rate,
    measured), MADV_RANDOM far slower. The mapping is private and copy-on-write, so that torch gets the writable memory
    that it wants and no write can reach the file; it lives as long as a tensor made from it.
    """

    is_mapped = True

    def __init__(self, root: Path, name: str, *, num_bytes: int, hint: str) -> None:
        super().__init__(root, name, num_bytes=num_bytes, hint=hint)
        try:
            mapping = mmap.mmap(
                self._file.fileno(), num_bytes,
                flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )  # fmt: skip
        except OSError as error:
            raise CacheReadError(f"{self.path}: cannot map: {error.strerror}; use io='pread'") from error
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """A view. Raises CacheCorruptError where the file has been cut."""
        if os.fstat(self._file.fileno()).st_size != self._num_bytes:
            raise self._resized()
        return self._bytes[start:stop]


class StoredArray:
    """The rows of one chunk file as they are stored, decompressed where need be."""

    def __init__(self, file: ShardFile, spec: ArraySpec, record: ArrayRecord, access: Access, *, hint: str) -> None:
        self._file = file
        self._spec = spec
        self._expected = record.chunk_crc32c
        self._unchecked = np.full(spec.num_chunks, access.check, dtype=np.bool_)
        self._pool = access.pool
        self._hint = hint
        self._offsets = np.arange(spec.num_chunks + 1, dtype=np.int64) * spec.chunk_bytes
        if spec.compressed:
            footer = file.copy(record.file_bytes - spec.footer_bytes, record.file_bytes).tobytes()
            try:
                self._offsets = spec.parse_footer(footer, file_bytes=record.file_bytes, where=str(file.path))
            except CacheCorruptError as error:
                raise CacheCorruptError(f"{error}; {hint}") from error

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [stop - start, *row_shape] of the element's dtype."""
        spec = self._spec
        chunks = range(start // spec.chunk_rows, -(-stop // spec.chunk_rows))
        if spec.compressed:
            return self._as_rows(self._read_compressed(chunks, start, stop))
        unchecked = [chunk for chunk in chunks if self._unchecked[chunk]]
        if unchecked and not self._file.is_mapped:
            return self._as_rows(self._read_and_check(chunks, unchecked, start, stop))
        for chunk in unchecked:
            first, last = self._offsets[chunk : chunk + 2].tolist()
            self._compare(chunk, self._file.crc32c(first, last))
        return self._as_rows(self._file.read(start * spec.row_bytes, stop * spec.row_bytes))

    def _read_and_check(self, chunks: range, unchecked: Sequence[int], start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows of chunks that are read whole, in one request."""
        spec, first = self._spec, chunks.start * self._spec.chunk_rows
        data = self._copy_chunks(chunks)
        for chunk in unchecked:
            place = chunk - chunks.start
            self._check(chunk, data[place * spec.chunk_bytes : (place + 1) * spec.chunk_bytes])
        return data[(start - first) * spec.row_bytes : (stop - first) * spec.row_bytes]

    def _copy_chunks(self, chunks: range) -> npt.NDArray[np.uint8]:
        return self._file.copy(int(self._offsets[chunks.start]), int(self._offsets[chunks.stop]))

    def _read_compressed(self, chunks: range, start: int, stop: int) -> npt.NDArray[np.uint8]:
        spec = self._spec
        data = self._copy_chunks(chunks)
        base = int(self._offsets[chunks.start])
        out = np.empty((stop - start) * spec.row_bytes, dtype=np.uint8)

        def decode(chunk: int) -> None:
            first, last = (self._offsets[chunk : chunk + 2] - base).tolist()
            self._check(chunk, data[first:last])
            place = (chunk * spec.chunk_rows - start) * spec.row_bytes  # of the chunk's first byte in `out`
            whole = place >= 0 and place + spec.chunk_bytes <= out.size
            into = out[place : place + spec.chunk_bytes] if whole else np.empty(spec.chunk_bytes, dtype=np.uint8)
            try:
                decompress(data[first:last], into)
            except ValueError as error:
                raise CacheCorruptError(f"{self._file.path}: inner chunk {chunk}: {error}; {self._hint}") from error
            if not whole:
                kept = slice(max(-place, 0), min(out.size - place, spec.chunk_bytes))
                out[place + kept.start : place + kept.stop] = into[kept]

        if len(chunks) == 1 or self._pool is None:
            for chunk in chunks:
                decode(chunk)
        else:
            decoding = [self._pool.submit(decode, chunk) for chunk in chunks]
            wait(decoding)  # also where one has failed: no thread reads the file once the caller has the error
            for done in decoding:
                done.result()
        return out

    def _check(self, chunk: int, data: npt.NDArray[np.uint8]) -> None:
        self._compare(chunk, crc32c_hex(data))

    def _compare(self, chunk: int, found: str) -> None:
        if found != self._expected[chunk]:
            raise CacheCorruptError(
                f"{self._file.path}: inner chunk {chunk} (rows from {chunk * self._spec.chunk_rows}) has crc32c "
                f"{found}, expected {self._expected[chunk]}; {self._hint}"
            )
        self._unchecked[chunk] = False

    def _as_rows(self, data: npt.NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(data).view(self._spec.element.torch_dtype).view(-1, *self._spec.row_shape)


class ScaledStates:
    """States that are stored as one byte a value and scales."""

    def __init__(self, values: StoredArray, scales: StoredArray, *, scaling: Scaling, dtype: torch.dtype) -> None:
        self._values = values
        self._scales = scales
        self._scaling = scaling
        self._dtype = dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows of a sample, decoded."""
        tokens = self._scaling.tokens
        return dequantize(
            self._values.read(start, stop),
            self._scales.read(start // tokens, -(-stop // tokens)),
            scaling=self._scaling,
            start=start,
            dtype=self._dtype,
        )


def open_arrays(planned: PlannedShard, record: CommitRecord, access: Access) -> tuple[States, States]:
    """Open hidden_states and last_hidden_states of a committed shard."""
    for spec in planned.arrays:
        _check_metadata(planned, spec)
    folder, hint = planned.root / layout.shard_name(planned.shard), REMEDY
    hidden, last = (
        open_states(folder, planned.specs_of(name), record.arrays, planned.encoding, access, hint=hint)
        for name in (layout.HIDDEN_STATES, layout.LAST_HIDDEN_STATES)
    )
    return hidden, last


def open_states(
    folder: Path,
    specs: Sequence[ArraySpec],
    records: Mapping[str, ArrayRecord],
    encoding: Encoding,
    access: Access,
    *,
    hint: str,
) -> States:
    """One array of states of the shard in ``folder``, with its scales where it has any; ``hint``: if it is damaged."""
    scaling = specs[0].scaling
    is_plain = not encoding.compressed and scaling is None  # or its bytes are not what is handed out
    kind = MappedFile if access.mapped and is_plain else PositionedFile
    arrays = []
    for spec in specs:
        record = records[spec.name]
        file = kind(folder, spec.data_name, num_bytes=record.file_bytes, hint=hint)
        arrays.append(StoredArray(file, spec, record, access, hint=hint))
    if scaling is None:
        return arrays[0]
    return ScaledStates(arrays[0], arrays[1], scaling=scaling, dtype=encoding.torch_dtype)


def _open(root: Path, name: str, *, num_bytes: int, hint: str) -> int:
    """Open a chunk file; its size must be the committed one."""
    try:
        fd = open_inside(root, name)
    except FileNotFoundError as error:
        raise CacheCorruptError(f"{root / name}: is gone, but committed; {hint}") from error
    size = os.fstat(fd).st_size
    if size != num_bytes:
        os.close(fd)
        raise CacheCorruptError(
            f"{root / name}: has {size} bytes, expected {num_bytes} (truncated or overwritten); {hint}"
        )
    return fd


def _check_metadata(planned: PlannedShard, spec: ArraySpec) -> None:
    name = f"{layout.shard_name(planned.shard)}/{layout.array_metadata_name(spec.name)}"
    try:
        found = read_inside(planned.root, name, max_bytes=len(spec.metadata()))
    except FileNotFoundError as error:
        raise CacheCorruptError(f"{planned.root / name}: is gone, but committed; {REMEDY}") from error
    except CacheFormatError:
        found = b""  # more bytes than it can have
    if found != spec.metadata():
        raise CacheCorruptError(
            f"{planned.root / name}: is not the metadata of {spec.num_rows} rows of {list(spec.row_shape)} in "
            f"{planned.encoding.name}; {REMEDY}"
        )
