"""The draft as a server runs it: one block at a time, over a KV cache of the target's states.

The block at anchor a, `[token a, mask, ..., mask]`, sees the states of the tokens before a and its own slots, as in
training. The backbone runs once for all slots; the heads then fill them from left to right, each knowing the token
drawn for the slot before.

Shape suffixes: N new context tokens, X target layers side by side, K slots, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from stages.errors import SettingError
from stages.train.attention import KeyValue
from stages.train.model import Qwen3DSparkModel, at_least_float32
from stages.train.objective import confidence_logits


class BlockDrafter:
    """Proposes blocks for one sequence.

    `min_confidence`: a block ends before the first slot at which the product of the confidences so far is below it; 0:
    never. `confidence_temperatures [K]` divide the confidence head's logits, as a calibration found them.
    Raises SettingError for a threshold without a confidence head, and for temperatures of another block size.
    """

    def __init__(
        self,
        model: Qwen3DSparkModel,
        *,
        min_confidence: float = 0.0,
        confidence_temperatures: Sequence[float] | None = None,
    ) -> None:
        self.block_size = model.block_size
        if min_confidence > 0 and model.confidence_head is None:
            raise SettingError("decode.confidence_threshold: this draft has no confidence head; leave it out")
        if confidence_temperatures is not None and len(confidence_temperatures) != self.block_size:
            raise SettingError(
                f"calibration: expected {self.block_size} temperatures, one a slot, got {len(confidence_temperatures)}"
            )
        self._model = model
        self._min_confidence = min_confidence
        self._temperatures = confidence_temperatures or [1.0] * self.block_size
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        self._context: list[KeyValue] = []
        self.num_tokens = 0

    @torch.inference_mode()
    def see(self, context_NX: torch.Tensor) -> None:
        """Append the target's states of the next N tokens, layers side by side in ascending id order."""
        device = self._model.fc.weight.device
        positions_1N = torch.arange(self.num_tokens, self.num_tokens + len(context_NX), device=device)[None]
        context_1ND = self._model.project_context(context_NX[None].to(device))
        new = self._model.context_key_values(context_1ND, positions_1N)
        if self._context:
            new = [
                (torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2))
                for (old_key, old_value), (key, value) in zip(self._context, new, strict=True)
            ]
        self._context = new
        self.num_tokens += len(context_NX)

    @torch.inference_mode()
    def propose(self, anchor_token: int, *, num_slots: int, choose: Callable[[torch.Tensor], int]) -> list[int]:
        """At most `num_slots` tokens to follow the anchor, which itself follows the tokens seen.

        `choose` gives the token of a slot from its logits [V]. Whether a slot is filled depends on the tokens before it
        alone, never on what it would hold: a rule that looked at the slot's own token would bend the output.
        """
        if num_slots == 0:
            return []
        h_KD = self._run_block(anchor_token)
        base_KV = self._model.base_logits(h_KD[:num_slots])
        head = self._model.markov_head
        state = None if head is None else h_KD.new_zeros(1, head.rank)
        tokens: list[int] = []
        confidence, prev_1 = 1.0, torch.tensor([anchor_token], device=h_KD.device)
        for slot in range(num_slots):
            h_1D = h_KD[slot : slot + 1]
            if self._min_confidence > 0:
                confidence *= self._confidence(h_1D, prev_1, slot=slot)
                if confidence < self._min_confidence:
                    break
            logits_V = base_KV[slot]
            if head is not None and state is not None:
                state, latent_1R = head.advance(state, h_1D, prev_1)
                logits_V = logits_V + at_least_float32(head.bias(latent_1R))[0]
            tokens.append(choose(logits_V))
            prev_1 = prev_1.new_tensor([tokens[-1]])
        return tokens

    def _run_block(self, anchor_token: int) -> torch.Tensor:
        """h of all slots, [K, D]: each sees the others, so that a shorter block is no part of a longer one."""
        device = self._model.fc.weight.device
        ids_1K = torch.full((1, self.block_size), self._model.config.mask_token_id, device=device)
        ids_1K[0, 0] = anchor_token
        positions_1K = torch.arange(self.num_tokens, self.num_tokens + self.block_size, device=device)[None]
        return self._model.run_blocks(ids_1K, positions_1K, self._context)[0]

    def _confidence(self, h_1D: torch.Tensor, prev_1: torch.Tensor, *, slot: int) -> float:
        logit = confidence_logits(self._model, h_1D, prev_1)
        if logit is None:
            raise AssertionError("a threshold without a confidence head was refused")
        return float((logit / self._temperatures[slot]).sigmoid())
