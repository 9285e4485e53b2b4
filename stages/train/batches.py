"""Cached samples to packed batches: documents side by side in one row, no padding, anchors of each document.

A batch is planned from tokens alone; its states are gathered when its turn comes, into memory that is used again.
Shape suffixes: S tokens of the row, A anchors, L layers, D hidden, X = L*D.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from stages.train.anchors import choose_anchors
from stages.train.order import plan_micro_batches
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
    reader: CacheReader, indices: Sequence[int], *, max_batch_tokens: int, num_anchors: int, seed: int, epoch: int
) -> Iterator[PlannedBatch]:
    """The samples at `indices`, in their order, as packed rows of at most `max_batch_tokens` tokens."""
    lengths = reader.num_tokens[list(indices)].tolist()
    sample_ids = reader.sample_ids[list(indices)].tolist()
    for share in plan_micro_batches(lengths, max_batch_tokens=max_batch_tokens):
        rows = slice(share.start, share.stop)
        yield plan_batch(reader, indices[rows], sample_ids[rows], num_anchors=num_anchors, seed=seed, epoch=epoch)


def plan_batch(
    reader: CacheReader, indices: Sequence[int], sample_ids: Sequence[int], *, num_anchors: int, seed: int, epoch: int
) -> PlannedBatch:
    """The samples at `indices`, whose ids are `sample_ids`, as one packed row; without any, `EMPTY_BATCH`.

    Anchors are a function of (seed, epoch, sample id) alone, at most `num_anchors` a sample.
    """
    if not len(indices):
        return EMPTY_BATCH
    documents = [reader.read_tokens(index) for index in indices]
    anchors = []
    start = 0
    for sample_id, (_, loss_mask) in zip(sample_ids, documents, strict=True):
        chosen = choose_anchors(loss_mask, num_anchors, seed=seed, epoch=epoch, sample_id=sample_id)
        anchors.append(chosen + start)
        start += len(loss_mask)
    return PlannedBatch(
        indices=tuple(int(index) for index in indices),
        sample_ids=tuple(sample_ids),
        input_ids=torch.cat([input_ids for input_ids, _ in documents]).long()[None],
        loss_mask=torch.cat([loss_mask for _, loss_mask in documents])[None],
        seq_lens=torch.tensor([[len(loss_mask) for _, loss_mask in documents]]),
        anchor_positions=torch.cat(anchors)[None],
    )


class StagingBuffer:
    """Memory on this side of the device that one batch after another is gathered into.

    It has room for `num_tokens` tokens from its first batch on, and grows for a longer one. For a CUDA device it is
    pinned, so that copies to the device run beside the processor and beside the GPU's work.
    """

    def __init__(self, reader: CacheReader, *, num_tokens: int, device: torch.device) -> None:
        self._reader = reader
        self._num_tokens = num_tokens
        self._device = device
        self._states_SX = self._last_SD = torch.empty(0, dtype=reader.dtype)
        self.copied: torch.cuda.Event | None = None
        """When the newest batch is on the device, of a CUDA device."""

    def gather(self, batch: PlannedBatch) -> dict[str, torch.Tensor]:
        """`DSparkTrainerModule`'s arguments on the device: the planned tensors, and the documents' states end to end.

        target_hidden_states [1, S, L*D] and target_last_hidden_states [1, S, D], in the cache's dtype. On a CPU they
        are views of this buffer, valid until its next batch. On CUDA they are copies that the current stream makes.
        """
        if self.copied is not None:
            self.copied.synchronize()
        if batch.num_tokens > len(self._states_SX):
            self._allocate(max(batch.num_tokens, self._num_tokens))
        states_SX, last_SD = self._states_SX[: batch.num_tokens], self._last_SD[: batch.num_tokens]
        start = 0
        for index in batch.indices:
            sample = self._reader[index]
            rows = slice(start, start + sample.num_tokens)
            states_SX[rows].view(sample.hidden_states.shape).copy_(sample.hidden_states)
            last_SD[rows].copy_(sample.last_hidden_states)
            start = rows.stop
        for rest in (states_SX[start:], last_SD[start:]):  # of EMPTY_BATCH, which has a token and no sample
            rest.zero_()
        arguments = {
            "input_ids": batch.input_ids,
            "target_hidden_states": states_SX[None],
            "loss_mask": batch.loss_mask,
            "target_last_hidden_states": last_SD[None],
            "seq_lens": batch.seq_lens,
            "anchor_positions": batch.anchor_positions,
        }
        return self._send(arguments) if self._device.type == "cuda" else arguments

    def _send(self, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies on the device, and a note of when this memory may be written again."""
        pinned = [tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in arguments.values()]
        sent = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
        self.copied = torch.cuda.current_stream(self._device).record_event()
        return dict(zip(arguments, sent, strict=True))

    def _allocate(self, num_tokens: int) -> None:
        hidden, pinned = self._reader.hidden_size, self._device.type == "cuda"
        width = len(self._reader.layers) * hidden
        self._states_SX, self._last_SD = torch.empty(0), torch.empty(0)  # before the larger ones are there
        self._states_SX, self._last_SD = (
            torch.empty(num_tokens, columns, dtype=self._reader.dtype, pin_memory=pinned) for columns in (width, hidden)
        )


def gather_batch(reader: CacheReader, batch: PlannedBatch, *, device: torch.device) -> dict[str, torch.Tensor]:
    """`StagingBuffer.gather` into memory of its own."""
    return StagingBuffer(reader, num_tokens=batch.num_tokens, device=device).gather(batch)
