"""The target as a server runs it: with a KV cache that grows token by token and shrinks where drafts are rejected.

Shape suffixes: N new tokens, L layers, D hidden, X the layers side by side (L*D), V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from stages.extract.capture import keep_states
from stages.extract.model_files import TargetError
from stages.extract.target import TargetParts

# Rounding differs between shapes of batches, the state of another prefix by far more: relative to the largest logit.
MAX_CACHE_ERROR = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True, kw_only=True)
class TargetStep:
    """What one forward says: the model's own logits of its last tokens, and the states of all of them."""

    logits: torch.Tensor  # [N, V], at least float32
    context: torch.Tensor  # [N, X] in the target's dtype, layers in ascending id order


class CachedTarget:
    """One sequence, whose first `num_tokens` tokens the target has seen.

    `layers` are captured as the cache of stage one has them: id k is the output of block k, -1 the embeddings.

    The KV cache is told nothing of the target's sliding windows, so that it keeps every token and can be cut back to
    any length; the windows are in the attention masks all the same.
    """

    def __init__(self, parts: TargetParts, *, layers: Sequence[int] = ()) -> None:
        self._parts = parts
        self._layers = tuple(layers)
        self._can_limit_logits = "logits_to_keep" in inspect.signature(parts.model.forward).parameters
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where logits and states are."""
        return self._parts.device

    def reset(self) -> None:
        """Start a new sequence."""
        self._cache = DynamicCache()
        self.num_tokens = 0

    @torch.inference_mode()
    def extend(self, input_ids: Sequence[int], *, num_logits: int) -> TargetStep:
        """Append N tokens and run them; logits of the last `num_logits` of them."""
        ids_1N = torch.tensor([list(input_ids)], device=self.device)
        hidden_size = self._parts.embed_tokens.weight.shape[1]
        hidden_NLD = torch.empty(
            len(input_ids), len(self._layers), hidden_size, dtype=self._parts.dtype, device=self.device
        )
        places = {layer: hidden_NLD[:, place] for place, layer in enumerate(self._layers)}
        limit: dict[str, Any] = {"logits_to_keep": num_logits} if self._can_limit_logits else {}
        with keep_states(self._parts, places):
            output = self._parts.model(input_ids=ids_1N, past_key_values=self._cache, use_cache=True, **limit)
        self.num_tokens += len(input_ids)
        logits_NV = output.logits[0, -num_logits:].to(self.device)
        if logits_NV.dtype in (torch.float16, torch.bfloat16):
            logits_NV = logits_NV.float()
        return TargetStep(logits=logits_NV, context=hidden_NLD.flatten(1))

    def forget(self, num_tokens: int) -> None:
        """Take the last tokens back."""
        if num_tokens:
            self._cache.crop(-num_tokens)
            self.num_tokens -= num_tokens


def check_cropping(parts: TargetParts, *, input_ids: Sequence[int]) -> None:
    """Tokens that were taken back leave no trace: the logits behind them are those of a run that never saw them.

    Raises TargetError for targets whose KV cache cannot do that, such as those with recurrent states.
    """
    name = type(parts.model).__name__
    last = input_ids[-1:]
    try:
        target = CachedTarget(parts)
        target.extend([*input_ids, *input_ids], num_logits=1)
        target.forget(len(input_ids))
        resumed_NV = target.extend(last, num_logits=1).logits
    except Exception as error:  # caches of other kinds fail in ways of their own
        raise TargetError(
            f"{name}: its KV cache cannot be cut back, which decoding with a draft needs: "
            f"{type(error).__name__}: {error}; decode only targets whose layers are all attention"
        ) from error
    target.reset()
    fresh_NV = target.extend([*input_ids, *last], num_logits=1).logits
    error_size = float((resumed_NV - fresh_NV).abs().max() / fresh_NV.abs().max().clamp_min(1e-30))
    if not error_size <= MAX_CACHE_ERROR[parts.dtype]:
        raise TargetError(
            f"{name}: with a KV cache that was cut back, logits differ by {error_size:.3f} of the largest from those "
            f"of a fresh run, expected at most {MAX_CACHE_ERROR[parts.dtype]}; decode only targets whose layers are "
            "all attention"
        )
