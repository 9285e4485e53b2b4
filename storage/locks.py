"""The lock of a shard: an exclusive flock on its samples file, which is there and never changes.

Held by whoever writes or repairs the shard; the system lets go of it when the process ends.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from storage import layout
from storage.errors import CacheBusyError


@contextlib.contextmanager
def locked_shard(root: Path, shard: int) -> Iterator[None]:
    """Keep writers away from a shard, where the file system has locks. Raises CacheBusyError if one is at work."""
    fd = -1
    try:
        try:
            # Open for writing, though nothing is written: NFS gives an exclusive lock on no other file.
            fd = os.open(root / layout.samples_name(shard), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheBusyError(
                f"{root / layout.shard_name(shard)}: another process is writing this shard; go on with the next"
            ) from error
        except OSError:
            pass  # a file system without locks: there, only a writer's look at the commit before the rename is left
        yield
    finally:
        if fd >= 0:
            os.close(fd)
