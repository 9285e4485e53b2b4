"""Asking a training to stop: a signal sets a flag, the ranks agree on it, and the steps end with a checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch

from stages.train.parallel import Ranks

# Launchers pass on what a terminal sends to all processes at once, so that one Ctrl-C may come twice (torchrun).
REPEAT_SECONDS = 1.0


class StopAskedError(Exception):
    """Work that can be done again was given up, since the training is to stop."""


class StopRequest:
    """Whether a training is to stop after the step in progress.

    `asked_by` names the signal that this process got, or who gave the training up, which nobody means to continue then.
    `agreed` is what all ranks know: some rank was asked.
    """

    def __init__(self) -> None:
        self.asked_by: str | None = None
        self.agreed = False
        self.is_given_up = False

    def ask(self, reason: str) -> None:
        """Ask for the stop; the first reason stays."""
        self.asked_by = self.asked_by or reason

    def give_up(self, reason: str) -> None:
        """Ask for the stop since the training is not worth finishing."""
        self.is_given_up = self.asked_by is None
        self.ask(reason)

    def check(self, ranks: Ranks) -> None:
        """Raise StopAskedError on all ranks if one of them was asked. All of them must call it."""
        if self.agree(ranks):
            raise StopAskedError(self.asked_by or "another rank")

    def learn(self, num_asked: float) -> bool:
        """Take over how many ranks were asked, as a sum over them says; whether to stop."""
        self.agreed = self.agreed or num_asked > 0
        return self.agreed

    def agree(self, ranks: Ranks) -> bool:
        """Ask all ranks, where no step's sums do: a reduction of its own. All of them must call it."""
        flag = torch.tensor([float(self.asked_by is not None)], device=ranks.device)
        return self.learn(float(ranks.sum_(flag)))


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a StopRequest; a second one, a second later or more, ends the process.

    In the main thread only, since no other may have handlers; those from before are put back at the end.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    asked_at = 0.0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        name = signal.Signals(number).name
        if stop.asked_by is None:
            stop.ask(name)
            asked_at = time.monotonic()
            _say(f"{name}: the step in progress is finished and a checkpoint written; once more ends at once\n")
        elif time.monotonic() - asked_at > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as for a job in the background
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _say(text: str) -> None:
    """Write to standard error past its buffer, which the interrupted code may be writing to."""
    with suppress(OSError):  # closed: nobody reads it
        os.write(2, text.encode())
