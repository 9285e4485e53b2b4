"""What a lossy encoding does to the target's distribution: measured on what was written, kept in the shard's commit.

Shape suffixes: P positions, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from storage import CacheHeader, PlannedSample

POSITIONS_PER_SHARD = 32  # a thousand shards give the 99th percentile of 32,000 positions
VOCABULARY_SLICE = 16384  # columns of the head that are in float32 at a time


def choose_positions(samples: Sequence[PlannedSample]) -> list[int]:
    """Rows of a shard whose last state predicts a supervised token, evenly spread, at most `POSITIONS_PER_SHARD`."""
    loss_mask = np.concatenate([np.append(sample.loss_mask[1:], 0) for sample in samples])
    rows = np.flatnonzero(loss_mask)
    places = np.linspace(0, len(rows) - 1, min(POSITIONS_PER_SHARD, len(rows))).astype(int)
    return [int(row) for row in rows[np.unique(places)]]


@torch.inference_mode()
def total_variation(
    exact_PD: torch.Tensor, decoded_PD: torch.Tensor, *, head_VD: torch.Tensor, header: CacheHeader
) -> list[float]:
    """½·‖p_exact - p_decoded‖₁ at each position, p = softmax of the target's logits in float32."""
    exact, decoded = (_probabilities(states, head_VD, header) for states in (exact_PD, decoded_PD))
    return [float(value) for value in (exact - decoded).abs().sum(-1) / 2]


def _probabilities(states_PD: torch.Tensor, head_VD: torch.Tensor, header: CacheHeader) -> torch.Tensor:
    states = states_PD.to(head_VD.device).float()
    logits_PV = torch.cat([states @ part.float().T for part in torch.split(head_VD, VOCABULARY_SLICE)], dim=-1)
    if header.logit_scale is not None:
        logits_PV *= header.logit_scale
    if header.logit_softcap is not None:
        logits_PV = torch.tanh(logits_PV / header.logit_softcap) * header.logit_softcap
    return logits_PV.softmax(-1)
