"""What the ranks of a training do together: sums over all of them, gradients, and who writes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process of a training. With a world of 1 every operation is the identity."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's sum over all ranks, in place."""
        return tensor

    def last_backward(self, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: only those of the step's last one reduce gradients."""
        return nullcontext()
