"""Functions that torch.compile fuses, with their plain form where it cannot."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R], *, backend: str | Callable[..., Any] = "inductor") -> Callable[P, R]:
    """`function` compiled for any sizes. Once the compiler has failed, as without triton, the plain one: slower."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second, and is not needed on a CPU

    fused: Callable[P, R] | None = torch.compile(function, dynamic=True, backend=backend)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal fused
        if fused is not None:
            try:
                return fused(*args, **kwargs)
            except TorchDynamoException as error:
                fused = None
                cause = " ".join(str(error).strip().partition("\n\n")[0].split())
                logger.warning(f"{function.__name__} cannot be compiled here: it runs slower, in more memory ({cause})")
        return function(*args, **kwargs)

    return call
