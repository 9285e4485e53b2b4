"""One forward pass of the target, with the states of the chosen layers.

Shape suffixes: B sequences, T tokens (padded), N tokens (unpadded, all sequences end to end), L layers, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.extract.target import TargetParts


@dataclass(frozen=True, kw_only=True)
class CapturedBatch:
    """States of one batch, unpadded, as stored and on the CPU: hidden_states [N, L, D], last_hidden_states [N, D]."""

    hidden_states: torch.Tensor
    last_hidden_states: torch.Tensor
    num_tokens: tuple[int, ...]


class Capture:
    """Runs the target's decoder stack (without `lm_head`) and keeps what its blocks give out, in the cache's dtype.

    Layer id k is the output of block k before any final norm, -1 the input of block 0 (the embeddings as the stack sees
    them); the last state is the final norm's output, which is what `lm_head` multiplies.
    """

    def __init__(self, parts: TargetParts, *, layers: Sequence[int], dtype: torch.dtype) -> None:
        self._parts = parts
        self._layers = tuple(layers)
        self._dtype = dtype
        self._device = parts.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the target computes in; the captured states may be stored in another dtype."""
        return self._parts.dtype

    @torch.inference_mode()
    def __call__(self, input_ids: Sequence[np.ndarray]) -> CapturedBatch:
        """One batch of sequences of int32 ids, right-padded to the longest."""
        lengths = tuple(len(ids) for ids in input_ids)
        ids_BT, mask_BT = pad_batch(input_ids)
        with self._hooks() as states:
            # Padding is on the right and attention is causal, so a batch without any needs no mask at all.
            mask = None if min(lengths) == max(lengths) else mask_BT.to(self._device)
            self._parts.decoder(input_ids=ids_BT.to(self._device), attention_mask=mask, use_cache=False)
        device = states["last"].device
        real_BT = mask_BT.bool().to(device)
        layer_states = [states[layer].to(device)[real_BT].to(self._dtype) for layer in self._layers]
        return CapturedBatch(
            hidden_states=torch.stack(layer_states, dim=1).cpu(),
            last_hidden_states=states["last"][real_BT].to(self._dtype).cpu(),
            num_tokens=lengths,
        )

    @contextmanager
    def _hooks(self) -> Iterator[dict[int | str, torch.Tensor]]:
        states: dict[int | str, torch.Tensor] = {}
        handles = []
        for layer in self._layers:
            if layer == -1:
                handles.append(self._parts.blocks[0].register_forward_pre_hook(_keep_input(states), with_kwargs=True))
            else:
                handles.append(self._parts.blocks[layer].register_forward_hook(_keep_output(states, layer)))
        handles.append(self._parts.final_norm.register_forward_hook(_keep_output(states, "last")))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


def pad_batch(input_ids: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, T] int64 and attention mask [B, T] int64. Padding is id 0: nothing ever attends to it."""
    longest = max(len(ids) for ids in input_ids)
    ids_BT = torch.zeros(len(input_ids), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(input_ids), longest, dtype=torch.long)
    for row, ids in enumerate(input_ids):
        ids_BT[row, : len(ids)] = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        mask_BT[row, : len(ids)] = 1
    return ids_BT, mask_BT


def find_non_finite(batch: CapturedBatch, *, layers: Sequence[int]) -> Iterator[tuple[int, int | None, str]]:
    """(position in the batch, layer or None for the last state, reason) of every sequence with a NaN or infinity."""
    finite_N = batch.hidden_states.isfinite().all(-1).all(-1) & batch.last_hidden_states.isfinite().all(-1)
    if bool(finite_N.all()):
        return
    start = 0
    for position, num_tokens in enumerate(batch.num_tokens):
        rows = slice(start, start + num_tokens)
        start += num_tokens
        if bool(finite_N[rows].all()):
            continue
        bad_layers = [
            layer for index, layer in enumerate(layers) if not bool(batch.hidden_states[rows, index].isfinite().all())
        ]
        yield position, (bad_layers[0] if bad_layers else None), "non-finite state"


def _keep_output(states: dict[int | str, torch.Tensor], key: int | str) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        states[key] = output[0] if isinstance(output, tuple) else output

    return hook


def _keep_input(states: dict[int | str, torch.Tensor]) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        states[-1] = args[0] if args else kwargs["hidden_states"]

    return hook
