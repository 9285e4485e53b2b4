"""What was once found out about files, as long as they have not changed: sweeps ask for each of their trials."""

import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

V = TypeVar("V")
Signature = tuple[tuple[str, *tuple[int, ...]], ...]


def sign_files(files: Iterable[str | Path]) -> Signature:
    """Absolute path, device, inode, size and both times of each file; of one that is not there the path alone."""
    return tuple(map(_sign, files))


def _sign(file: str | Path) -> tuple[str, *tuple[int, ...]]:
    path = os.path.abspath(file)
    try:
        found = os.stat(path)
    except OSError:
        return (path,)
    return path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Memory(Generic[V]):
    """Results of this process by key; `key` must say all that decides a result, the files' signature among it."""

    def __init__(self) -> None:
        self._known: dict[Hashable, V] = {}

    def recall(self, key: Callable[[], Hashable], compute: Callable[[], V]) -> V:
        """The result for the key; computed if there is none. Files that change meanwhile leave nothing behind."""
        before = key()
        if before not in self._known:
            value = compute()
            if key() != before:
                return value
            self._known[before] = value
        return self._known[before]
