"""A function over many items in several processes: results in the order of the items, few of them in memory."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

from stages.errors import StageError

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_ITEMS = 128  # sent to a process at a time
CHUNKS_A_PROCESS = 3  # in flight: one at work, two waiting
PARENT_POLL_SECONDS = 0.2
MIN_ITEMS = 4096  # fewer are done in a second or two, which is not worth the processes
# Forked children need no import of ours and no copy of the tokenizer; they run nothing of torch.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

_work: Callable[[Any], Any]


class WorkerError(StageError, RuntimeError):
    """A process that we started has died."""


def map_ordered(
    work: Callable[[Item], Result], items: Iterable[Item], *, num_processes: int | None
) -> Generator[Result, None, None]:
    """`work` of each item, in order. It must be picklable and pure; default: a process for each core.

    What it raises is raised here; WorkerError when a process is killed.
    """
    source = iter(items)
    head = list(islice(source, MIN_ITEMS))
    count = num_processes or os.cpu_count() or 1
    if count == 1 or len(head) < MIN_ITEMS:
        yield from map(work, chain(head, source))
        return
    waiting: deque[Future[list[Any]]] = deque()
    with ProcessPoolExecutor(
        count, get_context(START_METHOD), initializer=_keep_work, initargs=(work, os.getpid())
    ) as pool:
        try:
            for chunk in _chunks(chain(head, source)):
                waiting.append(pool.submit(_do_chunk, chunk))
                if len(waiting) >= CHUNKS_A_PROCESS * count:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerError(
                "a tokenising process was killed, perhaps for memory; lower data.num_processes"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(islice(items, CHUNK_ITEMS)):
        yield chunk


def _keep_work(work: Callable[[Any], Any], parent: int) -> None:
    global _work  # noqa: PLW0603
    _work = work
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: it would wait for ever, and keep what it inherited locked."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def _do_chunk(chunk: list[Any]) -> list[Any]:
    return [_work(item) for item in chunk]
