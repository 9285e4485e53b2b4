"""Whether a source's states are those of the target at hand, under the conventions that its format has.

A fresh forward of a few samples tells it before anything is written, and where they are not, what they are instead.

Shape suffixes: N tokens of all samples, T tokens, L layers, D hidden, V vocabulary.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from stages.extract.capture import Capture
from stages.extract.peer_caches import PeerCache, PeerCacheError, PeerStates
from stages.extract.target import TargetParts
from storage import PlannedSample

NUM_CHECKED_SAMPLES = 3
MAX_CHECKED_TOKENS = 1024  # of a sample: whole-vocabulary logits of more would not fit beside a large target
# Median over tokens of the L2 error of a token's state relative to its norm. The median, since a few tokens with huge
# norms would hide a wrong layer. Other kernels in bf16 give about 0.01, e4m3 0.03 (assumption, not measured here).
MAX_STATE_ERROR = 0.1
# A state must also be no nearer to a neighbour: in deep targets a block changes some states by less than that limit.
MAX_NEIGHBOUR_RATIO = 2.0

logger = logging.getLogger(__name__)


@torch.inference_mode()
def norm_last_state(last_TD: torch.Tensor, *, source: PeerCache, parts: TargetParts) -> torch.Tensor:
    """The last state after the final norm [T, D] on the CPU, in the target's dtype where the norm is applied here."""
    if source.last_is_normed:
        return last_TD
    device = parts.final_norm.weight.device
    normed: torch.Tensor = parts.final_norm(last_TD.to(device, parts.dtype)).cpu()
    return normed


def check_source(
    source: PeerCache,
    samples: Sequence[tuple[PlannedSample, PeerStates]],
    *,
    layers: Sequence[int],
    parts: TargetParts,
) -> None:
    """The states of `samples`, which have `layers`, against a fresh forward of the target.

    Raises PeerCacheError with a line for every state that is something else, and what it is.
    """
    last_block = len(parts.blocks) - 1
    captured = sorted({k for layer in layers for k in _near(layer, last_block=last_block)} | {last_block})
    capture = Capture(parts, layers=captured, dtype=torch.float32)
    batches = [capture([sample.input_ids[:MAX_CHECKED_TOKENS]]) for sample, _ in samples]
    hidden_NLD = torch.cat([batch.hidden_states for batch in batches])
    fresh = {k: hidden_NLD[:, place] for place, k in enumerate(captured)}
    problems = []
    for place, layer in enumerate(layers):
        stored_ND = torch.cat([read.hidden_states[:MAX_CHECKED_TOKENS, place] for _, read in samples])
        near = {
            f"block {k}'s output" if k >= 0 else "the embeddings": fresh[k] for k in _near(layer, last_block=last_block)
        }
        problems += _compare(f"layer {layer + source.layer_offset}", stored_ND, near)
    stored_ND = torch.cat([read.last_hidden_states[:MAX_CHECKED_TOKENS] for _, read in samples])
    after_ND = torch.cat([batch.last_hidden_states for batch in batches])
    norms = [("the state after the final norm", after_ND), ("the state before the final norm", fresh[last_block])]
    problems += _compare("the last state", stored_ND, dict(norms if source.last_is_normed else norms[::-1]))
    if problems:
        raise PeerCacheError(
            "\n  ".join([f"{source.path}: its states are not what its format says of this target:", *problems])
            + "\nWhere another block fits, the layer ids are wrong: give others with --layers, or mend the source's "
            "manifest. Where nothing fits, target.model is not what the source was made with."
        )
    _log_agreement(source, samples, parts=parts)


def _near(layer: int, *, last_block: int) -> list[int]:
    """The layer, then its neighbours."""
    return [k for k in (layer, layer - 1, layer + 1) if -1 <= k <= last_block]


def _compare(what: str, stored_ND: torch.Tensor, fresh: Mapping[str, torch.Tensor]) -> list[str]:
    """No line if the stored states are the first of `fresh`, else one that says what they are nearest to."""
    errors = {name: _median_error(stored_ND, fresh_ND) for name, fresh_ND in fresh.items()}
    expected = next(iter(errors))
    nearest = min(errors, key=lambda name: errors[name])
    own, least = errors[expected], errors[nearest]
    logger.info("import check: %s is %s to %.4f", what, expected, own)
    if own <= MAX_STATE_ERROR and own <= MAX_NEIGHBOUR_RATIO * least:
        return []
    verdict = f"but {nearest} (error {least:.3f})" if least <= MAX_STATE_ERROR else "nor anything near it"
    return [f"{what} of the source is not {expected} (error {own:.3f}), {verdict}"]


def _median_error(stored_ND: torch.Tensor, fresh_ND: torch.Tensor) -> float:
    """Infinite where no token has a finite state."""
    difference_N = (stored_ND.float() - fresh_ND).norm(dim=-1) / fresh_ND.norm(dim=-1).clamp_min(1e-30)
    return float(difference_N.nanmedian().nan_to_num(nan=float("inf")))


@torch.inference_mode()
def _log_agreement(
    source: PeerCache, samples: Sequence[tuple[PlannedSample, PeerStates]], *, parts: TargetParts
) -> None:
    """How many supervised tokens are the argmax of `lm_head` on the state before: information, no verdict."""
    weight = parts.lm_head.weight
    hits = []
    for sample, read in samples:
        last_TD = norm_last_state(read.last_hidden_states[:MAX_CHECKED_TOKENS], source=source, parts=parts)
        best_T = parts.lm_head(last_TD.to(weight.device, weight.dtype)).argmax(-1).cpu().numpy()
        supervised = sample.loss_mask[1 : len(best_T)] == 1
        hits.append((best_T[:-1] == sample.input_ids[1 : len(best_T)])[supervised])
    share = float(np.concatenate(hits).mean())
    logger.info("import check: %.1f %% of the supervised tokens are the target's first choice", 100 * share)
