"""How much of a step's supervised tokens its blocks train, from masks and anchors alone.

Shape suffixes: S tokens of the row, A anchors, K slots, N supervised slots.
"""

import torch

from stages.train.anchors import supervised_slots
from stages.train.batches import PlannedBatch


def count_slots(batch: PlannedBatch, *, block_size: int) -> dict[str, int]:
    """Counts of a planned micro-batch, which add up over those of a step; on the CPU, so no device is waited for.

    `num_blocks` have a supervised slot, `num_slots` are supervised, and of `num_supervised_tokens` with a loss mask of
    1 `num_predicted_tokens` are what at least one supervised slot predicts: coverage is the ratio of the last two.
    """
    counts = {"num_blocks": 0, "num_slots": 0, "num_predicted_tokens": 0}
    counts["num_supervised_tokens"] = int((batch.loss_mask != 0).sum())
    if batch.anchor_positions.numel() == 0:
        return counts
    supervised_1AK = supervised_slots(batch.loss_mask, batch.anchor_positions, batch.seq_lens, block_size)
    predicted_1AK = batch.anchor_positions[..., None] + torch.arange(1, block_size + 1)
    is_predicted_S = torch.zeros(batch.num_tokens, dtype=torch.bool)
    is_predicted_S[predicted_1AK[supervised_1AK]] = True
    counts["num_blocks"] = int(supervised_1AK[..., 0].sum())
    counts["num_slots"] = int(supervised_1AK.sum())
    counts["num_predicted_tokens"] = int(is_predicted_S.sum())
    return counts
