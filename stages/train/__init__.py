"""Stage two: train a DSpark draft from a cache of target states."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.train.config import build_draft_config
    from stages.train.model import Qwen3DSparkModel
    from stages.train.module import DSparkStepMetrics, DSparkTrainerModule

__all__ = ["DSparkTrainerModule", "DSparkStepMetrics", "Qwen3DSparkModel", "build_draft_config"]

_HOMES = {
    "DSparkTrainerModule": "module",
    "DSparkStepMetrics": "module",
    "Qwen3DSparkModel": "model",
    "build_draft_config": "config",
}


def __getattr__(name: str) -> Any:
    """The public names are imported when they are first asked for: a config section needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
