"""Being asked to stop: the first SIGTERM or Ctrl-C is a request, a second one ends the process."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Launchers pass on what a terminal sends to all processes at once, so that one Ctrl-C may come twice (torchrun).
REPEAT_SECONDS = 1.0


@contextmanager
def ask_on_signals(ask: Callable[[str], None], *, notice: str) -> Iterator[None]:
    """Give the name of the first SIGTERM or SIGINT to `ask`, and say `notice`; a second one, `REPEAT_SECONDS` later or
    more, ends the process.

    In the main thread only, since no other may have handlers; those from before are put back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked_at: float | None = None

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        name = signal.Signals(number).name
        if asked_at is None:
            ask(name)
            asked_at = time.monotonic()
            _say(f"{name}: {notice}; once more ends at once\n")
        elif time.monotonic() - asked_at > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as for a job in the background
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _say(text: str) -> None:
    """Write to standard error past its buffer, which the interrupted code may be writing to."""
    with suppress(OSError):  # closed: nobody reads it
        os.write(2, text.encode())
