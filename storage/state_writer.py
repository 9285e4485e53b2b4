"""Rows of states to inner chunks on disk: one `StateWriter` writes one state array, and its scales where it has any."""

from collections.abc import Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from storage.codecs import compress, quantize
from storage.encodings import INNER_TOKENS, Encoding
from storage.errors import CacheUsageError
from storage.zarr_array import ArraySpec, ArrayWriter


class StateWriter:
    """Appends rows [T, *row_shape] to a new array; ``pool`` compresses several inner chunks at once."""

    def __init__(
        self, group: Path, specs: tuple[ArraySpec, ...], *, encoding: Encoding, pool: Executor | None = None
    ) -> None:
        self.arrays = [ArrayWriter(group, spec) for spec in specs]
        self._spec = specs[0]
        self._encoding = encoding
        self._pool = pool
        self._num_rows = 0
        self._pending = torch.empty(0)
        self._num_pending = 0

    def append(self, rows: torch.Tensor) -> None:
        """Write the next rows; the caller may reuse their memory afterwards. More than planned are an error."""
        spec = self._spec
        if tuple(rows.shape[1:]) != spec.row_shape:
            expected = ", ".join(map(str, spec.row_shape))
            raise CacheUsageError(f"{spec.name}: expected rows [T, {expected}], got {list(rows.shape)}")
        if self._num_rows + len(rows) > spec.num_rows:
            raise CacheUsageError(f"{spec.name}: more rows than the {spec.num_rows} planned ones")
        self._num_rows += len(rows)
        self._write(self._cut(rows.detach().to(device="cpu", dtype=self._encoding.torch_dtype).contiguous()))

    def finish(self) -> None:
        """Pad the last chunk with zeros and write the indexes. Fewer rows than planned are an error."""
        if self._num_rows != self._spec.num_rows:
            raise CacheUsageError(
                f"{self._spec.name}: {self._num_rows} rows were appended, {self._spec.num_rows} are planned"
            )
        if self._num_pending:
            self._pending[self._num_pending :] = 0
            self._write(iter([self._pending]))
        for array in self.arrays:
            array.finish()

    def _cut(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Whole chunks of 256 rows: views of ``rows``, copied only where they reach over two calls."""
        while len(rows):
            if not self._num_pending and len(rows) >= INNER_TOKENS:
                yield rows[:INNER_TOKENS]
                rows = rows[INNER_TOKENS:]
                continue
            if not self._num_pending:
                self._pending = torch.empty(INNER_TOKENS, *self._spec.row_shape, dtype=rows.dtype)
            count = min(INNER_TOKENS - self._num_pending, len(rows))
            self._pending[self._num_pending : self._num_pending + count] = rows[:count]
            self._num_pending += count
            rows = rows[count:]
            if self._num_pending == INNER_TOKENS:
                self._num_pending = 0
                yield self._pending

    def _write(self, chunks: Iterator[torch.Tensor]) -> None:
        encoding = self._encoding
        if encoding.compressed:
            work = partial(compress, itemsize=encoding.element.torch_dtype.itemsize)
            for data in (self._pool.map if self._pool else map)(work, map(_bytes, chunks)):
                self.arrays[0].append(data)
        elif self._spec.scaling is None:
            for chunk in chunks:
                self.arrays[0].append(_bytes(chunk))
        else:
            for chunk in chunks:
                pair = quantize(chunk, scaling=self._spec.scaling, dtype=encoding.element.torch_dtype)
                for array, part in zip(self.arrays, pair, strict=True):
                    array.append(_bytes(part))


def _bytes(rows: torch.Tensor) -> npt.NDArray[np.uint8]:
    return rows.contiguous().reshape(-1).view(torch.uint8).numpy()
