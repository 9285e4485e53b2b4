"""Asking a training to stop: a signal sets a flag, the ranks agree on it, and the steps end with a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stages.signals import ask_on_signals
from stages.train.parallel import Ranks


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
    """Turn the first SIGTERM or SIGINT into a StopRequest; a second one, a second later or more, ends the process."""
    stop = StopRequest()
    with ask_on_signals(stop.ask, notice="the step in progress is finished and a checkpoint written"):
        yield stop
