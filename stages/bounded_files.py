"""Small files that others may have damaged, read whole but never beyond a bound: a file may claim any size."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_RECORD_BYTES = 32 << 20
MAX_LINE_BYTES = 32 << 20


def read_bounded(file: Path, *, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """All bytes of a plain file. Raises OSError, also for one that is no plain file (pipes block) or too large."""
    with open_plain(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        data = stream.read(max_bytes + 1) if size <= max_bytes else b""
        if size > max_bytes or len(data) > max_bytes:
            size = max(size, len(data))
            reason = f"has {size:,} bytes, expected {max_bytes:,} at most; it is damaged, or no file of ours"
            raise OSError(errno.EFBIG, reason, str(file))
        return data


def read_text_bounded(file: Path) -> str:
    """The same as text. Raises OSError, UnicodeDecodeError."""
    return read_bounded(file).decode("utf-8")


def open_plain(file: Path) -> BinaryIO:
    """Open for reading. Raises OSError, also for what is no plain file."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a plain file", str(file))
    return os.fdopen(descriptor, "rb")


def bounded_lines(stream: BinaryIO, *, max_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """The stream's lines, each with its newline; a longer one comes in pieces, of which the last alone has it."""
    while line := stream.readline(max_bytes):
        yield line
