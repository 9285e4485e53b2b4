"""Config sections of the evaluation: `[evaluate]` and `[decode]`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stages.section import Section


class EvaluateSection(Section):
    """Acceptance from the cache, on the validation split."""

    num_anchors: int = Field(default=64, ge=1)
    """Blocks scored in a sample at most; they are fixed by `seed` and the sample's id."""
    max_samples: int | None = Field(default=None, ge=1)
    """Validation samples at most, the first by sample id; none: all."""
    seed: int = Field(default=0, ge=0)
    """Seeds the anchors; two drafts evaluated with one seed see the same blocks."""
    throughput_table: Path | None = None
    """CSV file with the columns `tokens` (in a verify step) and `steps_per_second` of the server that the scheduling
    outlook is for, or the JSON file of SGLang's profiler; none: an assumed table, and the outlook is not printed."""


# Assumption: below it sampling is greedy but for near-equal logits; logits divided by ever less end in infinity.
MIN_TEMPERATURE = 1e-3


def _parse_temperature(temperature: float) -> float:
    if temperature != 0 and temperature < MIN_TEMPERATURE:
        raise ValueError(f"expected 0 (greedy) or at least {MIN_TEMPERATURE:g}, got {temperature:g}")
    return temperature


Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_parse_temperature)]


class DecodeSection(Section):
    """Speculative decoding with the real target, on the prompts of the validation split (`evaluate --decode`)."""

    temperatures: tuple[Temperature, ...] = Field(default=(0.0, 1.0), min_length=1)
    """What draft and target are sampled at: 0.001 at least, or 0, greedy, which is held token for token against the
    target alone."""
    num_prompts: int = Field(default=32, ge=1)
    """Prompts at most, those of the first samples that `[evaluate]` scores."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer at most, fewer where the target has fewer positions."""
    confidence_threshold: float = Field(default=0.0, ge=0, lt=1)
    """A block ends before the first slot at which the product of the confidences falls below it; 0: never."""
    seed: int = Field(default=0, ge=0)
    """Seeds every draw, together with the sample's id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What target and draft compute in. Half precision lets the shape of a batch decide between near-equal logits."""
