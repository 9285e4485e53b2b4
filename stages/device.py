"""The torch device that a config names."""

import os

import torch

from stages.errors import SettingError


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one (under torchrun, the rank's own), else the CPU.

    Raises SettingError for a device that torch cannot use here.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"device: {name!r} was asked for, but torch sees no CUDA device; use auto or cpu")
    return device
