"""Staging shards ahead of their use: one thread of a reader, which knows the order of the reads to come."""

import os
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from storage.errors import CacheSpaceError
from storage.staging import Lease

# Between two looks for space that another process may have left; what this process leaves wakes the thread at once.
SPACE_PAUSE_SECONDS = 2.0


class ReadAhead:
    """Shards of planned reads, staged in the order of their first read and kept until the reader takes them.

    ``acquire`` stages a shard. ``rows`` are the rows of the index in the order in which they will be read, and
    ``row_shards`` has the shard of every row of the index. For use by any thread of the process that made it.
    """

    def __init__(
        self,
        acquire: Callable[[int], Lease],
        rows: npt.NDArray[np.int64],
        row_shards: npt.NDArray[np.int32],
        *,
        num_ahead: int,
    ) -> None:
        self._acquire = acquire
        self._pending = np.zeros(len(row_shards), dtype=np.bool_)
        self._pending[rows] = True
        self._row_shards = row_shards
        self._num_pending = np.bincount(row_shards[rows], minlength=int(row_shards.max()) + 1)
        self._queue = deque(dict.fromkeys(row_shards[rows].tolist()))
        self._leases: dict[int, Lease] = {}
        self._num_ahead = num_ahead
        self._condition = threading.Condition()
        self._error: BaseException | None = None
        self._gives_way = self._stopped = False
        self._pid = os.getpid()
        threading.Thread(target=self._run, name="read-ahead", daemon=True).start()

    def take(self, shard: int) -> Lease | None:
        """The lease of a shard that is staged already; from now on it is the reader's. Raises the thread's error."""
        with self._condition:
            error, self._error = self._error, None
            if error is not None:
                raise error
            if shard in self._queue:
                self._queue.remove(shard)
            self._gives_way = self._gives_way and not self.needs(shard)
            self._condition.notify()
            return self._leases.pop(shard, None)

    def needs(self, shard: int) -> bool:
        """Whether planned reads of the shard are still to come."""
        return bool(self._num_pending[shard])

    def finish(self, row: int) -> bool:
        """Note that a row was read; whether it was the last planned one of its shard."""
        with self._condition:
            if not self._pending[row]:
                return False
            self._pending[row] = False
            shard = self._row_shards[row]
            self._num_pending[shard] -= 1
            return not self._num_pending[shard]

    def give_back(self) -> bool:
        """Let go of the staged shard that is needed last, for a read that is not planned; False if there is none."""
        with self._condition:
            if not self._leases:
                return False
            shard, lease = self._leases.popitem()
            lease.release()
            self._queue.appendleft(shard)
            self._gives_way = True  # or the thread would take it again at once
            return True

    def wake(self) -> None:
        """Tell the thread that there may be space."""
        with self._condition:
            self._gives_way = False
            self._condition.notify()

    def stop(self) -> None:
        """End the thread after the shard that it is fetching. In a forked child there is no thread to end."""
        if self._pid != os.getpid():
            return
        with self._condition:
            self._stopped = True
            for lease in self._leases.values():
                lease.release()
            self._leases.clear()
            self._condition.notify()

    def _run(self) -> None:
        try:
            while (shard := self._wait_for_work()) is not None:
                try:
                    self._keep(shard, self._acquire(shard))
                except CacheSpaceError:  # if it lasts, the reader meets it on its own
                    with self._condition:
                        self._condition.wait(SPACE_PAUSE_SECONDS)
        except BaseException as error:  # to be raised by the reading thread
            with self._condition:
                self._error = error

    def _wait_for_work(self) -> int | None:
        """The next shard to stage; None when the plan is replaced."""
        with self._condition:
            self._condition.wait_for(self._has_work)
            return None if self._stopped else self._queue[0]

    def _has_work(self) -> bool:
        has_room = len(self._leases) < self._num_ahead and not self._gives_way
        return self._stopped or (bool(self._queue) and has_room)

    def _keep(self, shard: int, lease: Lease) -> None:
        with self._condition:
            if self._stopped or shard not in self._queue:  # the reader was faster
                lease.release()
            else:
                self._queue.remove(shard)
                self._leases[shard] = lease
