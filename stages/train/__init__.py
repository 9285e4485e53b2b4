"""Stage two: train a DSpark draft from a cache of target states."""

from stages.train.config import build_draft_config
from stages.train.model import Qwen3DSparkModel
from stages.train.module import DSparkStepMetrics, DSparkTrainerModule

__all__ = ["DSparkTrainerModule", "DSparkStepMetrics", "Qwen3DSparkModel", "build_draft_config"]
