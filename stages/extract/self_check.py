"""Checks at the start of a run that the captured states are what the cache's manifest says they are."""

from collections.abc import Sequence

import numpy as np
import torch

from stages.extract.capture import Capture
from stages.extract.model_files import TargetError
from stages.extract.target import TargetParts

MIN_ARGMAX_AGREEMENT = 0.995  # equal but for ties, which low precision makes; a wrong norm or layer gives far less
MAX_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # batched against single, L2
MAX_HEAD_TOKENS = 1024  # whole-vocabulary logits of more would not fit beside a large target


@torch.inference_mode()
def check_head(capture: Capture, *, parts: TargetParts, input_ids: np.ndarray) -> None:
    """`lm_head` on the captured last state gives the argmax of the target's own forward. Raises TargetError."""
    ids = input_ids[:MAX_HEAD_TOKENS]
    captured = capture([ids])
    device = parts.device
    own_logits = parts.model(input_ids=torch.from_numpy(ids)[None].long().to(device), use_cache=False).logits[0]
    head_logits = parts.lm_head(captured.last_hidden_states.to(own_logits.device, parts.dtype))
    agreement = float((head_logits.argmax(-1).cpu() == own_logits.argmax(-1).cpu()).float().mean())
    if agreement < MIN_ARGMAX_AGREEMENT:
        raise TargetError(
            f"self-check: lm_head on the captured last state gives the target's own argmax for {agreement:.1%} of "
            f"{len(ids)} tokens, expected {MIN_ARGMAX_AGREEMENT:.1%} or more; the final norm that was found is not "
            "what the head multiplies, so this architecture cannot be cached correctly"
        )


def check_batching(capture: Capture, *, input_ids: Sequence[np.ndarray]) -> None:
    """The shortest sequence of a padded batch has the states that it has alone, or else raises TargetError."""
    shortest = min(range(len(input_ids)), key=lambda index: len(input_ids[index]))
    batch, alone = capture(input_ids), capture([input_ids[shortest]])
    start = sum(batch.num_tokens[:shortest])
    rows = slice(start, start + batch.num_tokens[shortest])
    limit = max(MAX_RELATIVE_ERROR[dtype] for dtype in (capture.compute_dtype, alone.last_hidden_states.dtype))
    for name in ("hidden_states", "last_hidden_states"):
        batched, single = getattr(batch, name)[rows].float(), getattr(alone, name).float()
        error = float((batched - single).norm() / single.norm().clamp_min(1e-30))
        if error > limit:
            raise TargetError(
                f"self-check: {name} of a sequence differ by {error:.3f} (relative) between a padded batch and the "
                f"sequence alone, expected at most {limit}; the target does not ignore padding on the right"
            )
