"""Cached samples to packed batches: documents side by side in one row, no padding, anchors of each document.

A batch is planned from tokens alone, which is cheap, so that a step knows its denominators before the first forward;
its states are gathered when its turn comes, and only then take memory.
Shape suffixes: S tokens of the row, A anchors, L layers, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from stages.train.anchors import choose_anchors
from stages.train.order import plan_rank_batches
from storage import CacheReader


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """One row of documents without their states.

    Shapes: input_ids [1, S] int64, loss_mask [1, S] uint8, seq_lens [1, documents], anchor_positions [1, A].
    `indices` and `sample_ids` have one entry a document.
    """

    indices: tuple[int, ...]
    sample_ids: tuple[int, ...]
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    seq_lens: torch.Tensor
    anchor_positions: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return self.input_ids.numel()


# One token that trains nothing: a rank without a row of its own must still take part in what the ranks do together.
EMPTY_BATCH = PlannedBatch(
    indices=(),
    sample_ids=(),
    input_ids=torch.zeros(1, 1, dtype=torch.long),
    loss_mask=torch.zeros(1, 1, dtype=torch.uint8),
    seq_lens=torch.ones(1, 1, dtype=torch.long),
    anchor_positions=torch.full((1, 1), -1),
)


def plan_batches(
    reader: CacheReader,
    indices: Sequence[int],
    *,
    max_batch_tokens: int,
    num_anchors: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[PlannedBatch]:
    """The samples at `indices`, in their order, as packed rows of at most `max_batch_tokens` tokens.

    Anchors are a function of (seed, epoch, sample id) alone, at most `num_anchors` a sample. Of several ranks each
    takes every `world`-th row, and an empty one where that does not come out even.
    """
    lengths = reader.num_tokens[list(indices)].tolist()
    sample_ids = reader.sample_ids[list(indices)].tolist()
    for positions in plan_rank_batches(lengths, max_batch_tokens=max_batch_tokens, rank=rank, world=world):
        if not positions:
            yield EMPTY_BATCH
            continue
        documents = [reader.read_tokens(indices[position]) for position in positions]
        anchors = []
        start = 0
        for position, (_, loss_mask) in zip(positions, documents, strict=True):
            chosen = choose_anchors(loss_mask, num_anchors, seed=seed, epoch=epoch, sample_id=sample_ids[position])
            anchors.append(chosen + start)
            start += len(loss_mask)
        yield PlannedBatch(
            indices=tuple(int(indices[position]) for position in positions),
            sample_ids=tuple(sample_ids[position] for position in positions),
            input_ids=torch.cat([input_ids for input_ids, _ in documents]).long()[None],
            loss_mask=torch.cat([loss_mask for _, loss_mask in documents])[None],
            seq_lens=torch.tensor([[len(loss_mask) for _, loss_mask in documents]]),
            anchor_positions=torch.cat(anchors)[None],
        )


def gather_batch(reader: CacheReader, batch: PlannedBatch, *, device: torch.device) -> dict[str, torch.Tensor]:
    """`DSparkTrainerModule`'s arguments on `device`: the planned tensors, and the states of the documents end to end.

    target_hidden_states [1, S, L*D] and target_last_hidden_states [1, S, D], in the cache's dtype.
    """
    samples = [reader[index] for index in batch.indices]
    layers, hidden = len(reader.layers), reader.hidden_size
    states_SX = torch.zeros(batch.num_tokens, layers * hidden, dtype=reader.dtype)
    last_SD = torch.zeros(batch.num_tokens, hidden, dtype=reader.dtype)
    start = 0
    for sample in samples:
        rows = slice(start, start + sample.num_tokens)
        states_SX[rows].view(-1, layers, hidden).copy_(sample.hidden_states)
        last_SD[rows].copy_(sample.last_hidden_states)
        start += sample.num_tokens
    arguments = {
        "input_ids": batch.input_ids,
        "target_hidden_states": states_SX[None],
        "loss_mask": batch.loss_mask,
        "target_last_hidden_states": last_SD[None],
        "seq_lens": batch.seq_lens,
        "anchor_positions": batch.anchor_positions,
    }
    return {name: tensor.to(device, non_blocking=True) for name, tensor in arguments.items()}
