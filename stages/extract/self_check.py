"""A check of every shard: states of a batch are those of the target, run on one of its documents alone.

The document's beginning is run through the target as anybody would, without our hooks: whatever the batch did to it
(padding, neighbours, tokens behind it, a rope chosen by the longest), whichever block or norm was taken for another,
and a logit scale that the config does not say, shows as a difference.

Shape suffixes: T tokens, L layers, D hidden, V vocabulary.
"""

from typing import Any

import torch

from stages.extract.capture import CapturedBatch
from stages.extract.model_files import TargetError
from stages.extract.target import TargetParts
from storage import CacheHeader, PlannedSample

MAX_CHECKED_TOKENS = 256  # of a document: under 2 % of a shard's tokens, whatever its length
# Root mean square over tokens of ‖captured - own‖₂ / ‖own‖₂. Measured on the embedded target and seven tiny ones: what
# the shape of a batch rounds is at most 2e-6, 2e-4 and 2e-3; all rounding of targets of 24 to 64 layers is 4e-3 in
# float16 and 0.03 in bfloat16. The next block's states, other positions, a neighbour's recurrent state: 0.12 to 1.6.
MAX_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.inference_mode()
def check_shortest(
    samples: list[PlannedSample], states: CapturedBatch, *, parts: TargetParts, header: CacheHeader
) -> None:
    """Hold the last sample of a batch, which has the most padding, against the target alone. Raises TargetError.

    Of a document, three quarters at most are run, so that what stands behind a token must not change its states.
    A sample with states that are not finite is left to the quarantine.
    """
    sample, end = samples[-1], sum(states.num_tokens)
    num_tokens = min(MAX_CHECKED_TOKENS, sample.num_tokens - sample.num_tokens // 4)
    start = end - sample.num_tokens
    rows = slice(start, start + num_tokens)
    hidden_TLD, last_TD = states.hidden_states[rows], states.last_hidden_states[rows]
    if not (hidden_TLD.isfinite().all() and last_TD.isfinite().all()):
        return
    limit = max(MAX_ERROR[parts.dtype], torch.finfo(last_TD.dtype).eps)  # states are rounded to the cache's dtype
    input_ids = torch.from_numpy(sample.input_ids[:num_tokens])[None].long().to(parts.device)
    output = parts.model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    for name, error in _differences(output, hidden_TLD, last_TD, parts=parts, header=header):
        if not error <= limit:
            raise TargetError(
                f"self-check: {name} of {sample.source_file} row {sample.source_row} differs by {error:.2g} (relative) "
                f"between a batch and the target run on this sample alone, expected at most {limit:g}; this "
                "architecture cannot be cached correctly, so nothing of the shard is kept"
            )


def _differences(
    output: Any, hidden_TLD: torch.Tensor, last_TD: torch.Tensor, *, parts: TargetParts, header: CacheHeader
) -> list[tuple[str, float]]:
    """What is compared, and the error of each. A model that gives no states still gives logits."""
    own = getattr(output, "hidden_states", None)
    errors = []
    if own is not None and len(own) == header.num_target_layers + 1:
        for place, layer in enumerate(header.identity.layers):
            errors.append((f"layer {layer}", _layer_error(hidden_TLD[:, place], own, layer=layer, parts=parts)))
        ends = (own[-1][0], parts.final_norm(own[-1])[0])  # transformers gives the normed state, other code perhaps not
        errors.append(("the last state", min(_relative_error(last_TD, end) for end in ends)))
    logits_TV = parts.lm_head(last_TD.to(output.logits.device, parts.dtype)).float() * (header.logit_scale or 1.0)
    if header.logit_softcap:
        logits_TV = torch.tanh(logits_TV / header.logit_softcap) * header.logit_softcap
    own_TV = output.logits[0].float()
    means = own_TV.mean(-1, keepdim=True), logits_TV.mean(-1, keepdim=True)  # a shift of all logits says nothing
    errors.append(("lm_head on the last state", _relative_error(logits_TV - means[1], own_TV - means[0])))
    return errors


def _layer_error(captured_TD: torch.Tensor, own: tuple[torch.Tensor, ...], *, layer: int, parts: TargetParts) -> float:
    """Entry k+1 is the output of block k, but that the last block's is given after the final norm."""
    error = _relative_error(captured_TD, own[layer + 1][0])
    if layer == len(own) - 2:
        normed_TD = parts.final_norm(captured_TD.to(own[-1].device, parts.dtype)[None])[0]
        error = min(error, _relative_error(normed_TD, own[-1][0]))
    return error


def _relative_error(captured_TX: torch.Tensor, own_TX: torch.Tensor) -> float:
    """Root mean square over tokens of the relative error of a token."""
    own_TX, captured_TX = own_TX.float(), captured_TX.to(own_TX.device).float()
    error_T = (captured_TX - own_TX).norm(dim=-1) / own_TX.norm(dim=-1).clamp_min(1e-30)
    return float(error_T.square().mean().sqrt())
