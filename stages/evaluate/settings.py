"""Config section of the evaluation: `[evaluate]`."""

from pathlib import Path

from pydantic import Field

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
    outlook is for; none: an assumed table."""
