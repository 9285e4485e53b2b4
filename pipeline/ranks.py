"""One rank of a torchrun extraction as a child process, so that its death does not end the other ranks.

torchrun stops every rank as soon as one fails. What it starts here is therefore only a keeper, which leaves the work to
a child. When the child dies, the other ranks go on and take over its shards; its keeper fails only after they have
ended, and not at all if the cache is complete by then.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from storage import CacheError, CacheWriter
from storage.errors import CacheReadError
from storage.locks import lock

logger = logging.getLogger(__name__)


def leave_to_child(cache: Path) -> None:
    """Under torchrun, return in a child process; the keeper never returns. Elsewhere, return at once."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    cache.mkdir(parents=True, exist_ok=True)
    is_alive, keeper = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(keeper)
        threading.Thread(target=_end_with_keeper, args=(is_alive,), daemon=True).start()
        return
    os.close(is_alive)
    sys.exit(_keep(child, cache))


def _end_with_keeper(is_alive: int) -> None:
    """End this process when its keeper has gone: nobody would stop it any more."""
    os.read(is_alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _keep(child: int, cache: Path) -> int:
    """Wait for the child; the keeper's exit status."""
    keepers = os.open(cache, os.O_RDONLY)  # each keeper holds the folder's lock with the others while it lives
    _lock(keepers, cache, shared=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(child, received))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return 0
    rank = os.environ["RANK"]
    how = f"signal {-code}" if code < 0 else f"status {code}"
    logger.error("rank %s ended with %s", rank, how)
    if _count_missing(cache) is None:  # the others wait for a plan that this rank may have been to write
        logger.error("rank %s: the cache is not planned; run the same command again", rank)
        return 1
    logger.warning("rank %s: the others go on and take over its shards", rank)
    _lock(keepers, cache, shared=False)  # given once every other keeper has ended or given up
    missing = _count_missing(cache)
    if missing == 0:
        logger.warning("rank %s had ended early, and the others have completed the cache", rank)
        return 0
    logger.error("rank %s: %s shards are missing; run the same command again to finish", rank, missing)
    return 1


def _lock(folder: int, cache: Path, *, shared: bool) -> None:
    """Wait for the folder's lock; where there is none to be had, this rank's end is the end of all of them."""
    with contextlib.suppress(CacheReadError):  # NFS locks nothing exclusively that is open for reading alone
        lock(folder, cache, shared=shared, wait=True)


def _count_missing(cache: Path) -> int | None:
    try:
        return len(CacheWriter(cache).missing_shards())
    except (CacheError, OSError):
        return None
