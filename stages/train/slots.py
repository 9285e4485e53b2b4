"""The supervised slots of a batch: where they lie, what they weigh, and tau of their blocks.

Shape suffixes: B rows, S tokens, A anchors, K slots, N supervised slots, M blocks that have one.
"""

from dataclasses import dataclass

import torch

from stages.train.anchors import supervised_slots


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The N supervised slots in order of row, anchor position and slot, and their M blocks in the same order; all long.

    `position` a+k is the token that the slot continues: its successor is predicted, and the target's last state there
    gives the target's distribution.
    """

    row: torch.Tensor  # [N]
    anchor: torch.Tensor  # [N], index in the row's anchors
    slot: torch.Tensor  # [N]
    position: torch.Tensor  # [N], in the row
    block: torch.Tensor  # [N], index of the slot's block, 0 .. M-1
    block_anchors: torch.Tensor  # [M], positions of the blocks' anchors in all rows laid end to end
    num_tokens: int  # of a row
    block_size: int

    def __len__(self) -> int:
        return len(self.row)

    @property
    def num_blocks(self) -> int:
        """M."""
        return len(self.block_anchors)

    @property
    def flat_position(self) -> torch.Tensor:
        """`position` in all rows laid end to end, [N]."""
        return self.row * self.num_tokens + self.position


def find_slots(
    loss_mask_BS: torch.Tensor, anchor_positions_BA: torch.Tensor, seq_lens: torch.Tensor | None, *, block_size: int
) -> Slots:
    """The supervised slots of a batch."""
    supervised_BAK = supervised_slots(loss_mask_BS, anchor_positions_BA, seq_lens, block_size)
    row_M, anchor_M = supervised_BAK[..., 0].nonzero(as_tuple=True)  # a slot is supervised only if those before it are
    num_tokens = loss_mask_BS.shape[1]
    block_anchors, order_M = (row_M * num_tokens + anchor_positions_BA[row_M, anchor_M]).sort(stable=True)
    row_M, anchor_M = row_M[order_M], anchor_M[order_M]
    block, slot = supervised_BAK[row_M, anchor_M].nonzero(as_tuple=True)
    return Slots(
        row=row_M[block],
        anchor=anchor_M[block],
        slot=slot,
        position=block_anchors[block] - row_M[block] * num_tokens + slot,
        block=block,
        block_anchors=block_anchors,
        num_tokens=num_tokens,
        block_size=block_size,
    )


def slot_weights(slot_N: torch.Tensor, loss_decay_gamma: float | None) -> torch.Tensor:
    """w_k = exp(-k/gamma), or 1 without gamma: float32 [N]. In between float64: a tiny gamma would be 0 in float32."""
    if loss_decay_gamma is None:
        return torch.ones_like(slot_N, dtype=torch.float32)
    return torch.exp(-slot_N.double() / loss_decay_gamma).float()


def expected_tokens(accept_rate_N: torch.Tensor, slots: Slots) -> torch.Tensor:
    """tau of each block, 1 + Σ_k Π_{i<=k} accept_i over its supervised slots: [M]."""
    return 1 + _survival(accept_rate_N, slots).sum(dim=1)


def survival(rate_N: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Π_{i<=k} rate_i over the slots of a block up to each slot's own: [N]."""
    return _survival(rate_N, slots)[slots.block, slots.slot]


def _survival(rate_N: torch.Tensor, slots: Slots) -> torch.Tensor:
    """The products by block and slot [M, K]; 0 where nothing is supervised."""
    rate_MK = rate_N.new_zeros(slots.num_blocks, slots.block_size)
    rate_MK[slots.block, slots.slot] = rate_N
    return rate_MK.cumprod(dim=1)
