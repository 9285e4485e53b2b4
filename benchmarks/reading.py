"""Random sample reads, cold and warm, against `pread` of the same bytes.

The samples are those of a large target (2,560 x 6 states), log-normal in length with mean 600. Both ways end with the
sample's bytes in one reused buffer: `pread` puts them there, of the reader's sample they are copied. "In place" also
takes the largest value of the bytes instead of the copy, after the `pread` or on the mapping itself. Cold: the pages of
the files are dropped first, and the reader checks crc32c. Warm: they are in memory and were checked.
Lossless: useful bytes a second of one thread's processor time, and decoded bytes, whole chunks counted.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import make_cache, make_cold, ratio, scratch_folder, seconds

from storage import CacheReader
from storage.encodings import INNER_TOKENS

HIDDEN, LAYERS = 2560, 5
TOKENS = 48_000
ROUNDS = 5

Use = Callable[[torch.Tensor], object]


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(600) - 0.32, 0.8, 1000).astype(int), 16, 4096)
    lengths = lengths[np.cumsum(lengths) <= TOKENS].tolist()
    with scratch_folder() as folder:
        for encoding in ("bf16", "bf16-lossless"):
            path = Path(folder) / encoding
            make_cache(path, lengths, hidden_size=HIDDEN, num_layers=LAYERS, encoding=encoding, shard_bytes=256_000_000)
        bench_mapped(Path(folder) / "bf16", rng)
        bench_lossless(Path(folder) / "bf16-lossless", rng)


class Pread:
    """Samples by `pread` into a buffer."""

    def __init__(self, path: Path, places: list[list[tuple[str, int, int]]], buffer: torch.Tensor) -> None:
        self._places = places
        self._buffer = buffer
        self._view = buffer.view(torch.uint8).numpy()
        self._files = {name: os.open(path / name, os.O_RDONLY) for spans in places for name, _, _ in spans}

    def __call__(self, use: Use) -> None:
        for spans in self._places:
            done = 0
            for name, start, stop in spans:
                end = done + stop - start
                while done < end:
                    done += os.preadv(self._files[name], [self._view[done:end].data], stop - end + done)
            use(self._buffer[: done // 2])

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)


def bench_mapped(path: Path, rng: np.random.Generator) -> None:
    reader = CacheReader(path)
    order = rng.permutation(len(reader))
    buffer = torch.empty(int(reader.num_tokens.max()) * HIDDEN * (LAYERS + 1), dtype=torch.bfloat16)
    places = [place_of(reader, index) for index in order]
    total = sum(stop - start for spans in places for _, start, stop in spans)
    pread = Pread(path, places, buffer)

    def read(use: Use, reader: CacheReader) -> None:
        for index in order:
            sample = reader[index]
            use(sample.hidden_states.reshape(-1))
            use(sample.last_hidden_states.reshape(-1))

    def copy(states: torch.Tensor) -> object:
        return buffer[: states.numel()].copy_(states)

    def time_cold(action: Callable[[], object]) -> float:
        make_cold(path)
        return seconds(action)

    print(
        f"reading {len(order)} samples, {total / 1e9:.2f} GB, of {HIDDEN} x {LAYERS + 1} bf16, random order, one thread"
    )
    cold, warm, place = ([[], []] for _ in range(3))
    for _ in range(ROUNDS):  # a reader that is still open would keep its pages in memory
        cold[0].append(time_cold(lambda: pread(nothing)))
        cold[1].append(time_cold(lambda: read(copy, CacheReader(path))))
    read(copy, reader)
    for _ in range(ROUNDS):
        warm[0].append(seconds(lambda: pread(nothing)))
        warm[1].append(seconds(lambda: read(copy, reader)))
        place[0].append(seconds(lambda: pread(largest)))
        place[1].append(seconds(lambda: read(largest, reader)))
    for name, times in (("cold, into a buffer", cold), ("warm, into a buffer", warm), ("warm, in place", place)):
        rates = f"{total / min(times[1]) / 1e9:6.2f} GB/s, pread {total / min(times[0]) / 1e9:6.2f}"
        print(f"  {name:20} {rates}   / pread {ratio(times[0], times[1])}", flush=True)
    pread.close()


def largest(states: torch.Tensor) -> object:
    return states.view(torch.int16).max()


def nothing(_: torch.Tensor) -> None:
    pass


def place_of(reader: CacheReader, index: int) -> list[tuple[str, int, int]]:
    """(file, first byte, last byte) of both arrays of a sample."""
    plan_index = reader._plan.index
    start, count = int(plan_index.token_offsets[index]), int(plan_index.num_tokens[index])
    shard = f"shards/{plan_index.shards[index]:05d}.zarr"
    spans = []
    for name, row_bytes in (("hidden_states/c/0/0/0", LAYERS * HIDDEN * 2), ("last_hidden_states/c/0/0", HIDDEN * 2)):
        spans.append((f"{shard}/{name}", start * row_bytes, (start + count) * row_bytes))
    return spans


def bench_lossless(path: Path, rng: np.random.Generator) -> None:
    reader = CacheReader(path)
    order = rng.permutation(len(reader))
    index = reader._plan.index
    row_bytes = HIDDEN * (LAYERS + 1) * 2
    useful = int(index.num_tokens.sum()) * row_bytes
    firsts = index.token_offsets // INNER_TOKENS
    lasts = -(-(index.token_offsets + index.num_tokens) // INNER_TOKENS)
    decoded = int((lasts - firsts).sum()) * INNER_TOKENS * row_bytes
    list(reader)
    walls, cores = [], []
    for _ in range(3):
        started, cpu = time.perf_counter(), time.process_time()
        for row in order:
            reader[row]
        walls.append(time.perf_counter() - started)
        cores.append(time.process_time() - cpu)
    raw = sum(file.stat().st_size for file in (path / "shards").rglob("*") if file.is_file())
    print(f"  bf16-lossless, warm  {useful / min(walls) / 1e9:6.2f} GB/s of useful bytes on all cores", end="; ")
    print(f"a core: {useful / min(cores) / 1e9:.2f} useful, {decoded / min(cores) / 1e9:.2f} decoded GB/s", end="; ")
    print(f"files / raw {raw / useful:.3f}")


if __name__ == "__main__":
    main()
