"""The torch device that a config names."""

import torch

from stages.errors import SettingError
from stages.torchrun import read_local_rank


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Under torchrun `auto` and `cuda` are the rank's own device.

    Raises SettingError for a device that torch cannot use here.
    """
    local_rank = read_local_rank()
    if name == "auto":
        name = f"cuda:{local_rank or 0}" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"device: {name!r} was asked for, but torch sees no CUDA device; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            f"device: {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices; under torchrun start "
            "no more processes on a machine than it has devices"
        )
    return device
