"""One forward pass of the target, with the states of the chosen layers.

Shape suffixes: B sequences, T tokens (padded), N tokens (unpadded, all sequences end to end), L layers, D hidden.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.errors import StageError
from stages.extract.model_files import TargetError, first_line
from stages.extract.target import TargetParts

TRIED_TOKENS = 8

logger = logging.getLogger(__name__)

TOO_LARGE = "finite state above 65,504, the largest number of fp16"


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """Sequences, right-padded: input_ids and attention_mask [B, T] int64.

    `real_places` [N]: where their tokens lie in the flattened [B*T]; None where none is padded.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    real_places: torch.Tensor | None
    num_tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CapturedBatch:
    """States of one batch, unpadded, as stored and on the CPU: hidden_states [N, L, D], last_hidden_states [N, D]."""

    hidden_states: torch.Tensor
    last_hidden_states: torch.Tensor
    num_tokens: tuple[int, ...]
    copied: torch.cuda.Event | None = None

    def wait(self) -> "CapturedBatch":
        """Return once the states have arrived from the device: before that they must not be read."""
        if self.copied is not None:
            self.copied.synchronize()
        return self


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
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the target computes in; the captured states may be stored in another dtype."""
        return self._parts.dtype

    def __call__(self, input_ids: Sequence[np.ndarray]) -> CapturedBatch:
        """One batch of sequences of int32 ids, right-padded to the longest."""
        return self.launch(pad_batch(input_ids)).wait()

    @torch.inference_mode()
    def launch(self, batch: PaddedBatch) -> CapturedBatch:
        """Run one batch. On CUDA it returns while the device still computes and copies; see `CapturedBatch.wait`.

        Raises TargetError when the batch does not fit into the device's memory, and when the target does not run.
        """
        num_tokens, hidden_size = sum(batch.num_tokens), self._parts.embed_tokens.weight.shape[1]
        hidden_NLD = torch.empty(num_tokens, len(self._layers), hidden_size, dtype=self._dtype, device=self._device)
        last_ND = torch.empty(num_tokens, hidden_size, dtype=self._dtype, device=self._device)
        real_N = None if batch.real_places is None else batch.real_places.to(self._device, non_blocking=True)
        places = {layer: hidden_NLD[:, place] for place, layer in enumerate(self._layers)}
        # Padding is on the right and attention is causal, so a batch without any needs no mask at all.
        mask = None if real_N is None else batch.attention_mask.to(self._device, non_blocking=True)
        try:
            with keep_states(self._parts, places, last_ND=last_ND, real_N=real_N):
                ids = batch.input_ids.to(self._device, non_blocking=True)
                self._parts.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        except torch.OutOfMemoryError as error:
            raise TargetError(
                f"the device ran out of memory in a batch of {batch.input_ids.numel():,} tokens, padding included; "
                "lower extract.max_batch_tokens (it decides which samples are batched, so plan the cache anew)"
            ) from error
        except StageError:
            raise
        except Exception as error:  # kernels that this device lacks, a config that the class trips over late
            raise TargetError(
                f"{type(self._parts.model).__name__} does not run on {self._device}: {type(error).__name__}: "
                f"{first_line(error)}; see whether transformers runs this target, or take another device or dtype"
            ) from error
        return self._bring_home(hidden_NLD, last_ND, batch.num_tokens)

    def _bring_home(
        self, hidden_NLD: torch.Tensor, last_ND: torch.Tensor, num_tokens: tuple[int, ...]
    ) -> CapturedBatch:
        """Start the copies to pinned memory on a stream of their own, so that the next forward need not wait."""
        if self._copies is None:
            return CapturedBatch(hidden_states=hidden_NLD, last_hidden_states=last_ND, num_tokens=num_tokens)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            home = [torch.empty_like(states, device="cpu", pin_memory=True) for states in (hidden_NLD, last_ND)]
            for here, states in zip(home, (hidden_NLD, last_ND), strict=True):
                here.copy_(states, non_blocking=True)
                states.record_stream(self._copies)
            copied.record(self._copies)
        hidden, last = home
        return CapturedBatch(hidden_states=hidden, last_hidden_states=last, num_tokens=num_tokens, copied=copied)


@contextmanager
def keep_states(
    parts: TargetParts,
    places: dict[int, torch.Tensor],
    *,
    last_ND: torch.Tensor | None = None,
    real_N: torch.Tensor | None = None,
) -> Iterator[None]:
    """While entered, each block writes its real rows where they belong, [N, D], as soon as it has computed them.

    `places`: layer id -> where its states go; `last_ND`: where the final norm's output goes; `real_N`: as
    `real_places`.
    """

    kept: set[int] = set()  # the ids of what was written

    def keep(into_ND: torch.Tensor, states_BTD: Any) -> None:
        _check_states(states_BTD, hidden_size=into_ND.shape[1], parts=parts)
        states = states_BTD.flatten(0, 1)
        states = states if real_N is None else states.index_select(0, real_N.to(states.device))
        into_ND.copy_(convert_states(states, into_ND.dtype))
        kept.add(id(into_ND))

    def keep_output(into_ND: torch.Tensor) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            keep(into_ND, output[0] if isinstance(output, tuple) else output)

        return hook

    def keep_input(into_ND: torch.Tensor) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            keep(into_ND, args[0] if args else kwargs["hidden_states"])

        return hook

    blocks = parts.blocks
    handles = [
        blocks[0].register_forward_pre_hook(keep_input(into_ND), with_kwargs=True)
        if layer == -1
        else blocks[layer].register_forward_hook(keep_output(into_ND))
        for layer, into_ND in places.items()
    ]
    if last_ND is not None:
        handles.append(parts.final_norm.register_forward_hook(keep_output(last_ND)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    _check_kept([f"block {layer}" for layer, into_ND in places.items() if id(into_ND) not in kept], parts)
    _check_kept(["the final norm"] if last_ND is not None and id(last_ND) not in kept else [], parts)


def _check_states(states: Any, *, hidden_size: int, parts: TargetParts) -> None:
    """Raises TargetError unless these are states [B, T, D], one for each token."""
    if not isinstance(states, torch.Tensor) or states.dim() != 3 or states.shape[2] != hidden_size:
        found = list(states.shape) if isinstance(states, torch.Tensor) else type(states).__name__
        raise TargetError(
            f"{type(parts.model).__name__}: its blocks give {found}, expected one state of {hidden_size} values for "
            "each token, which is what drafts read; such a target cannot be cached"
        )


def _check_kept(missing: Sequence[str], parts: TargetParts) -> None:
    """Raises TargetError where a block was passed over, as those that read images alone are."""
    if missing:
        raise TargetError(
            f"{type(parts.model).__name__}: {', '.join(missing)} did not run on text, so there is no state to keep; "
            "leave such layers out of cache.layers"
        )


@torch.inference_mode()
def check_blocks(parts: TargetParts, *, layers: Sequence[int]) -> None:
    """Run the stack of a target without weights, to see whether these blocks give states that can be kept.

    Raises TargetError where they do not. A stack that does not run without numbers is judged when it has them.
    """
    hidden_size = parts.embed_tokens.weight.shape[1]
    ids_1N = torch.zeros(1, TRIED_TOKENS, device="meta", dtype=torch.long)
    states = {layer: torch.empty(TRIED_TOKENS, hidden_size, device="meta", dtype=parts.dtype) for layer in layers}
    for mask in (torch.ones_like(ids_1N), None):  # each has stacks that look at numbers with it
        try:
            with keep_states(parts, states, last_ND=torch.empty_like(next(iter(states.values())))):
                parts.decoder(input_ids=ids_1N, attention_mask=mask, use_cache=False)
        except TargetError:
            raise
        except Exception as error:
            logger.debug("%s does not run without weights: %s", type(parts.model).__name__, error)
        else:
            return


def pad_batch(input_ids: Sequence[np.ndarray]) -> PaddedBatch:
    """Pad with id 0 on the right: nothing ever attends to it."""
    num_tokens = tuple(len(ids) for ids in input_ids)
    ids_BT = torch.zeros(len(input_ids), max(num_tokens), dtype=torch.long)
    mask_BT = torch.zeros(len(input_ids), max(num_tokens), dtype=torch.long)
    for row, ids in enumerate(input_ids):
        ids_BT[row, : len(ids)] = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        mask_BT[row, : len(ids)] = 1
    real_N = None if min(num_tokens) == max(num_tokens) else mask_BT.flatten().nonzero().squeeze(1)
    return PaddedBatch(input_ids=ids_BT, attention_mask=mask_BT, real_places=real_N, num_tokens=num_tokens)


def convert_states(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """States as a cache in `dtype` has them.

    float16 has the smallest range: there, infinity then means finite but too large, and what is not finite is NaN.
    """
    if dtype == torch.float16:
        states = torch.where(states.isfinite(), states, torch.nan)
    return states.to(dtype)


def find_non_finite(batch: CapturedBatch, *, layers: Sequence[int]) -> Iterator[tuple[int, int | None, str]]:
    """(position in the batch, layer or None for the last state, reason) of every sequence with a NaN or infinity.

    The reason is TOO_LARGE where the layer's own states are finite and only the cache's float16 cannot hold them.
    """
    finite_N = _are_finite(batch.hidden_states.flatten(1)) & _are_finite(batch.last_hidden_states)
    if bool(finite_N.all()):
        return
    start = 0
    for position, num_tokens in enumerate(batch.num_tokens):
        rows = slice(start, start + num_tokens)
        start += num_tokens
        if bool(finite_N[rows].all()):
            continue
        states = [*batch.hidden_states[rows].unbind(1), batch.last_hidden_states[rows]]
        layer, bad = next(
            found for found in zip([*layers, None], states, strict=True) if not bool(found[1].isfinite().all())
        )
        is_large = bad.dtype == torch.float16 and not bool(bad.isnan().any())
        yield position, layer, TOO_LARGE if is_large else "non-finite state"


def _are_finite(rows_NX: torch.Tensor) -> torch.Tensor:
    """Whether every value of a row is finite [N]: no exponent has all its bits set. A tenth of `isfinite`'s time."""
    bits = torch.int32 if rows_NX.dtype == torch.float32 else torch.int16
    exponent = torch.tensor(float("inf"), dtype=rows_NX.dtype).view(bits)
    return (rows_NX.view(bits) & exponent).amax(1) != exponent
