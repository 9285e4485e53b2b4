"""Every lock of the project: one `flock`, and one policy for what a file system may say to it.

Held, busy, or "no locks here" (ENOLCK and its like: NFS without a lock server, FUSE): then the work goes on without,
with one line of warning. Anything else, such as a lock file that cannot be opened, is an error that says so: a lock
that cannot be had is not a free one. The system lets go of a lock when its process ends.
"""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from storage import layout
from storage.errors import CacheBusyError, CacheReadError
from storage.files import disk_errors

# What flock(2) gives where a file system has no locks.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

Got = Literal["held", "busy", "unsupported"]

logger = logging.getLogger(__name__)
_warned: set[int] = set()  # devices without locks that were named already


def lock(fd: int, where: Path, *, shared: bool = False, wait: bool = False) -> Got:
    """Lock an open file; without `wait`, "busy" where another holds it. Raises CacheReadError naming `where`."""
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(fd, operation)
    except BlockingIOError:
        return "busy"
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise CacheReadError(f"{where}: cannot be locked: {error.strerror}") from error
        _warn(fd, where)
        return "unsupported"
    return "held"


def unlock(fd: int) -> None:
    """Let go of a lock and its file. A close alone leaves the lock to a child that was forked meanwhile."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def open_lock(path: Path, *, create: bool = True) -> int:
    """Open a lock file, through no link: one that cannot be opened is not free.

    Raises CacheWriteError where the disk may not be written to, CacheReadError for any other refusal.
    """
    # For writing, though nothing is written: NFS gives an exclusive lock on no other file.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            with disk_errors(path):
                raise
        raise CacheReadError(
            f"{path}: cannot be opened to lock it: {error.strerror}; see to the disk and to limits, then run the same "
            "command again"
        ) from error


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = False, create: bool = True) -> Iterator[bool]:
    """Hold the lock of a file; gives False where another process has it. Raises CacheReadError."""
    fd = open_lock(path, create=create)
    try:
        yield lock(fd, path, wait=wait) != "busy"
    finally:
        unlock(fd)


@contextlib.contextmanager
def locked_shard(root: Path, shard: int, *, wait: bool = False) -> Iterator[None]:
    """Keep writers away from a shard: the lock of its samples file, which is there and never changes.

    Held by whoever writes, fetches or repairs the shard. Raises CacheBusyError if one is at work, CacheReadError.
    """
    with exclusive(root / layout.samples_name(shard), wait=wait, create=False) as is_held:
        if not is_held:
            raise CacheBusyError(
                f"{root / layout.shard_name(shard)}: another process is writing this shard; go on with the next"
            )
        yield


def _warn(fd: int, where: Path) -> None:
    device = os.fstat(fd).st_dev
    if device not in _warned:
        _warned.add(device)
        logger.warning(
            "%s: this file system has no locks; nothing keeps a second process from the same work, see that none runs",
            where,
        )
