"""What a lossy encoding does to the states and to the target's distribution, kept in the shard's commit.

Measured on what was written: exact states of some rows are kept until the decoded ones can be held against them.
Shape suffixes: P positions, L layers, S states (layers and the last one), D hidden, V vocabulary.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from stages.extract.capture import CapturedBatch
from storage import CacheHeader, PlannedSample, ShardWriter

POSITIONS_PER_SHARD = 32  # a thousand shards give the 99th percentile of 32,000 positions
TOKENS_PER_PLACE = 4  # neighbours lie in one inner chunk, which is read back as a whole
TOKENS_PER_SHARD = 128
VOCABULARY_SLICE = 16384  # columns of the head that are in float32 at a time


class ShardError:
    """The error of one shard of a lossy encoding: `keep` each of its batches, in order, then `record`."""

    def __init__(self, samples: Sequence[PlannedSample]) -> None:
        self._positions = choose_positions(samples)
        self._tokens = choose_tokens(sum(sample.num_tokens for sample in samples))
        self._exact_positions: list[torch.Tensor] = []
        self._exact_tokens: list[torch.Tensor] = []
        self._num_rows = 0

    def keep(self, states: CapturedBatch) -> None:
        """Copies of what is looked at of the shard's next rows."""
        start, stop = self._num_rows, self._num_rows + sum(states.num_tokens)
        positions, tokens = (
            [row - start for row in rows if start <= row < stop] for rows in (self._positions, self._tokens)
        )
        self._exact_positions.append(states.last_hidden_states[positions])
        self._exact_tokens.append(_all_states(states.hidden_states[tokens], states.last_hidden_states[tokens]))
        self._num_rows = stop

    def record(self, writer: ShardWriter, *, head_VD: torch.Tensor, header: CacheHeader) -> None:
        """Measure the finished shard and tell its writer, but for rows whose states are not finite."""
        exact_PSD = torch.cat(self._exact_tokens)
        decoded_PSD = _all_states(writer.read_hidden(self._tokens), writer.read_last(self._tokens))
        finite = exact_PSD.isfinite().all(-1).all(-1)
        writer.record_relative_error(relative_error(exact_PSD[finite], decoded_PSD[finite]))
        if not self._positions:
            return
        exact_PD, decoded_PD = torch.cat(self._exact_positions), writer.read_last(self._positions)
        finite = exact_PD.isfinite().all(-1)
        measured = total_variation(exact_PD[finite], decoded_PD[finite], head_VD=head_VD, header=header)
        # States near the largest number make logits that are not finite, of which nothing can be said.
        writer.record_total_variation(value for value in measured if math.isfinite(value))


def choose_positions(samples: Sequence[PlannedSample]) -> list[int]:
    """Rows of a shard whose last state predicts a supervised token, evenly spread, at most `POSITIONS_PER_SHARD`."""
    loss_mask = np.concatenate([np.append(sample.loss_mask[1:], 0) for sample in samples])
    rows = np.flatnonzero(loss_mask)
    places = np.linspace(0, len(rows) - 1, min(POSITIONS_PER_SHARD, len(rows))).astype(int)
    return [int(row) for row in rows[np.unique(places)]]


def choose_tokens(num_tokens: int) -> list[int]:
    """Rows of a shard, ascending: some neighbours at each of some evenly spread places, or all of them if few."""
    num_places = min(TOKENS_PER_SHARD // TOKENS_PER_PLACE, -(-num_tokens // TOKENS_PER_PLACE))
    first = np.linspace(0, max(num_tokens - TOKENS_PER_PLACE, 0), num_places).astype(int)
    rows = np.unique(first[:, None] + np.arange(TOKENS_PER_PLACE))
    return [int(row) for row in rows[rows < num_tokens]]


def relative_error(exact_PSD: torch.Tensor, decoded_PSD: torch.Tensor) -> list[list[float]]:
    """‖decoded - exact‖₂ / ‖exact‖₂ of each of the S states at each position; 0 where a zero state stays zero."""
    exact, decoded = exact_PSD.double(), decoded_PSD.double()
    lost_PS, size_PS = torch.linalg.vector_norm(decoded - exact, dim=-1), torch.linalg.vector_norm(exact, dim=-1)
    errors_PS = lost_PS / torch.where(size_PS > 0, size_PS, 1.0)
    return [[float(value) for value in errors_P] for errors_P in errors_PS.unbind(1)]


def _all_states(hidden_PLD: torch.Tensor, last_PD: torch.Tensor) -> torch.Tensor:
    return torch.cat([hidden_PLD, last_PD.unsqueeze(1)], dim=1)


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
