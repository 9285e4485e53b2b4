"""The token that a draft reads as a slot to fill: no sample of the cache may contain it."""

import numpy as np

from stages.errors import SettingError
from storage import CachePlan, CacheReader

ADVICE = "name an id in draft.mask_token_id that the embedding has and no conversation contains"


def choose_mask_token(wanted: int | None, reader: CacheReader) -> int:
    """The id that the config names, else the one that was chosen when the cache was planned.

    Planning left out rows with its own choice; for another id the samples are looked through. Raises SettingError.
    """
    planned, vocab_size = reader.manifest.header.mask_token_id, reader.manifest.header.vocab_size
    chosen = planned if wanted is None else wanted
    if chosen is None:
        raise SettingError(f"draft.mask_token_id: every special token of the target occurs in the cache; {ADVICE}")
    if not 0 <= chosen < vocab_size:
        raise SettingError(f"draft.mask_token_id: expected 0 to {vocab_size - 1}, got {chosen}; {ADVICE}")
    if chosen != planned and (sample := _find_sample(chosen, reader)) is not None:
        raise SettingError(
            f"draft.mask_token_id: {chosen} is in sample {sample} of {reader.path}, where the draft would read it as a "
            f"slot to fill; {ADVICE}"
        )
    return chosen


def _find_sample(token: int, reader: CacheReader) -> int | None:
    """The first sample that contains the token."""
    plan = CachePlan.read(reader.path)
    for shard in range(plan.num_shards):
        for sample in plan.read_samples(shard):
            if np.any(sample.input_ids == token):
                return sample.sample_id
    return None
