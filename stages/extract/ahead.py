"""A thread between two steps of a pipeline: the step before works on the next item while this one is used.

Steps are generators that take from each other, so an error in one of them comes out at the end of the chain as itself,
and closing the end closes every step before it.
"""

import queue
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Ended:
    """The last thing that a thread puts: the error that ended it, if any."""

    error: BaseException | None


class _Stopped(BaseException):
    """Unwinds a step that takes items while the whole pipeline is being left."""


@contextmanager
def ahead(
    source: Generator[Item, None, None], *, max_alive: int, stopped: threading.Event
) -> Generator[Generator[Item, None, None], None, None]:
    """The items of `source`, made by a thread; on leaving, the thread has ended and `source` is closed.

    `stopped` is shared by the steps of a pipeline: once it is set, each ends with the item that it is at. At most
    `max_alive` items exist at a time, the one being made and the one being used included. An error of `source` is
    raised where its next item would have come.
    """
    items: queue.SimpleQueue[Item | _Ended] = queue.SimpleQueue()
    room = threading.Semaphore(max_alive)

    def produce() -> None:
        error: BaseException | None = None
        try:
            while room.acquire() and not stopped.is_set():
                items.put(next(source))
        except StopIteration:
            pass
        except BaseException as raised:  # for whoever takes the items
            error = raised
        finally:
            source.close()
            items.put(_Ended(error))

    def consume() -> Generator[Item, None, None]:
        while not isinstance(item := items.get(), _Ended):
            if stopped.is_set():
                raise _Stopped
            yield item
            del item  # it must not be alive while the next one is waited for
            room.release()
        if item.error is not None:
            raise item.error

    thread = threading.Thread(target=produce, name=getattr(source, "__name__", None), daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stopped.set()
        room.release()
        thread.join()
