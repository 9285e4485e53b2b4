"""Small file operations with a promise each: durable, atomic, or confined to the cache directory."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt

from storage import layout
from storage.errors import (
    CacheCorruptError,
    CacheError,
    CacheFormatError,
    CacheReadError,
    CacheSpaceError,
    CacheWriteError,
)
from storage.faults import fault_point
from storage.temps import temp_path

HASH_BYTES = 1 << 24  # read at a time

Bytes = bytes | npt.NDArray[np.uint8]


def extend_crc32c(crc: int, data: Bytes) -> int:
    """Continue a crc32c (Castagnoli) over more bytes; 0 starts one."""
    return int(google_crc32c.extend(crc, data))


def crc32c_hex(data: Bytes) -> str:
    """crc32c as eight hexadecimal digits, the form in which records carry it."""
    return f"{extend_crc32c(0, data):08x}"


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a refusal of the system to write into CacheSpaceError or CacheWriteError."""
    try:
        with space_errors(where):
            yield
    except CacheError:
        raise
    except OSError as error:
        raise CacheWriteError(
            f"{where}: cannot write: {error.strerror}; see to the disk and run the same command again, what "
            "was finished is kept"
        ) from error


@contextlib.contextmanager
def space_errors(where: Path) -> Iterator[None]:
    """Turn "disk full" and "quota exceeded" into an error that says so; leave every other error alone."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CacheSpaceError(
                f"{where}: cannot write: {error.strerror}; free some space and run the same command again, "
                "what was finished is kept"
            ) from error
        raise


def write_all(fd: int, data: Bytes) -> None:
    """Write every byte; the kernel may take fewer at a time."""
    view = memoryview(data) if isinstance(data, bytes) else data.data
    while len(view):
        view = view[os.write(fd, view) :]


def write_durable(path: Path, data: bytes) -> None:
    """Create a new file and sync it. The caller syncs the directory."""
    with disk_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomic(path: Path, data: bytes, *, fault: str) -> None:
    """Publish a file whole: temporary name, write, sync, rename, sync the directory."""
    temp = temp_path(path)
    with disk_errors(path):
        try:
            write_durable(temp, data)
            fault_point(fault)
            temp.rename(path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    sync_file(path, os.O_DIRECTORY)


def sync_file(path: Path, flags: int = 0) -> None:
    """Make a file's bytes durable."""
    with disk_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def check_folders(root: Path) -> None:
    """Refuse a cache whose folders are links, before anything behind one is written. Raises CacheCorruptError."""
    for name in (layout.SHARDS, layout.COMMITS, layout.SAMPLES, layout.TARGET):
        if (root / name).is_symlink():
            raise CacheCorruptError(
                f"{root / name}: is a link, and nothing behind it is removed or written; a cache has no links"
            )


def open_inside(root: Path, name: str) -> int:
    """Open ``root/name`` for reading, through no link below ``root``, and only if it is a regular file.

    Raises FileNotFoundError if it does not exist, CacheCorruptError if a link or something else is in its place,
    CacheReadError for any other refusal.
    """
    parts = name.split("/")
    directory = -1
    try:
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts[:-1]:
            parent, directory = directory, _open_directory_at(directory, part)
            os.close(parent)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(parts[-1], flags, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise CacheCorruptError(
                f"{root / name}: is, or lies behind, a link or a special file; a cache has only plain files"
            ) from error
        raise CacheReadError(f"{root / name}: cannot open: {error.strerror}") from error
    finally:
        if directory >= 0:
            os.close(directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CacheCorruptError(f"{root / name}: is not a regular file")
    return fd


def _open_directory_at(parent: int, part: str) -> int:
    return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def read_inside(root: Path, name: str, *, num_bytes: int | None = None, max_bytes: int | None = None) -> bytes:
    """All bytes of a file; ``num_bytes`` is the size that it must have, or ``max_bytes`` what it must not exceed.

    The size is checked before anything is read. Raises CacheCorruptError, CacheFormatError where it is too large.
    """
    fd = open_inside(root, name)
    with os.fdopen(fd, "rb", buffering=0) as file:
        size = os.fstat(fd).st_size
        if num_bytes is not None and size != num_bytes:
            raise CacheCorruptError(f"{root / name}: has {size} bytes, expected {num_bytes}")
        if max_bytes is not None and size > max_bytes:
            raise CacheFormatError(f"{root / name}: has {size} bytes, expected {max_bytes} at most; it is not read")
        try:
            return _read_to_end(file, size)
        except OSError as error:
            raise CacheReadError(f"{root / name}: cannot read: {error.strerror}") from error


def _read_to_end(file: BinaryIO, size: int) -> bytes:
    """``size`` bytes, and no more though the file may have grown since."""
    pieces = []
    while size > 0 and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def hash_inside(root: Path, name: str, *, num_bytes: int | None = None) -> tuple[int, str]:
    """(size, crc32c) of a file of any size; one that has not ``num_bytes`` is a CacheCorruptError before it is read."""
    size = crc = 0
    with os.fdopen(open_inside(root, name), "rb", buffering=0) as file:
        found = os.fstat(file.fileno()).st_size
        if num_bytes is not None and found != num_bytes:
            raise CacheCorruptError(f"{root / name}: has {found} bytes, expected {num_bytes}")
        try:
            while size < found and (piece := file.read(min(HASH_BYTES, found - size))):  # no more, should it grow
                size += len(piece)
                crc = extend_crc32c(crc, piece)
        except OSError as error:
            raise CacheReadError(f"{root / name}: cannot read: {error.strerror}") from error
    return size, f"{crc:08x}"
