"""Blocks drafted with a KV cache against the draft's training forward, for every kind of heads."""

import random
from typing import Any

import pytest
import torch

from draft_reference import HIDDEN, MASK_ID, VOCAB, tiny_config, tiny_model
from stages.errors import SettingError
from stages.train import Qwen3DSparkModel
from stages.train.drafting import BlockDrafter
from stages.train.objective import confidence_logits

KINDS: list[dict[str, Any]] = [
    {"markov_rank": 0},
    {"markov_head_type": "vanilla"},
    {"markov_head_type": "gated"},
    {"markov_head_type": "rnn"},
]


def trained_logits(
    model: Qwen3DSparkModel, tokens: list[int], hidden: torch.Tensor, block: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [K, V], confidences [K]) of the block behind the last of `tokens`, as the training forward has them."""
    K, anchor = model.block_size, len(tokens) - 1
    ids = torch.tensor([[*tokens, *block, *[0] * K]])[:, : anchor + K + 1]
    padded = torch.zeros(1, ids.shape[1], hidden.shape[1])
    padded[0, :anchor] = hidden[:anchor]
    with torch.no_grad():
        h = model(ids, padded, torch.tensor([[anchor]]))
        logits = model.base_logits(h[0, 0])
        prev = ids[:, None, anchor : anchor + K]
        if model.markov_head is not None:
            logits = logits + model.markov_head.bias(model.markov_head.latent(h, prev))[0, 0]
        confidence = confidence_logits(model, h[0, 0], prev[0, 0])
    return logits, torch.zeros(K) if confidence is None else confidence


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.get("markov_head_type", "none")))
def test_drafted_blocks_are_the_trained_ones(kind: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(**kind)).eval()
    drafter = BlockDrafter(model)
    rng = random.Random(0)
    hidden = torch.randn(40, 2 * HIDDEN, generator=torch.Generator().manual_seed(0))
    tokens = [rng.randrange(MASK_ID) for _ in range(4)]
    drafter.see(hidden[:3])
    for _ in range(6):
        seen: list[torch.Tensor] = []

        def choose(logits: torch.Tensor, seen: list[torch.Tensor] = seen) -> int:
            seen.append(logits)
            return rng.randrange(VOCAB)

        num_slots = rng.randint(0, model.block_size)
        block = drafter.propose(tokens[-1], num_slots=num_slots, choose=choose)
        assert len(block) == len(seen) == num_slots
        expected, _ = trained_logits(model, tokens, hidden, block)
        for slot, logits in enumerate(seen):
            torch.testing.assert_close(logits, expected[slot], rtol=1e-4, atol=1e-4)
        new = rng.randint(1, 4)
        drafter.see(hidden[len(tokens) - 1 : len(tokens) - 1 + new])
        tokens += [rng.randrange(MASK_ID) for _ in range(new)]
        assert drafter.num_tokens == len(tokens) - 1


@pytest.mark.parametrize("temperatures", [None, [2.0, 0.5, 3.0]])
def test_a_block_ends_where_the_product_of_confidences_falls_below(temperatures: list[float] | None) -> None:
    model = tiny_model().eval()
    hidden = torch.randn(20, 2 * HIDDEN, generator=torch.Generator().manual_seed(1))
    lengths = []
    for anchor in range(1, 20):
        tokens = list(range(1, anchor + 2))
        _, logits = trained_logits(model, tokens, hidden, [7, 8, 9])
        products = (logits / torch.tensor(temperatures or [1.0] * 3)).sigmoid().cumprod(0)
        drafter = BlockDrafter(model, min_confidence=0.3, confidence_temperatures=temperatures)
        drafter.see(hidden[:anchor])
        choices = iter([7, 8, 9])
        block = drafter.propose(tokens[-1], num_slots=3, choose=lambda _logits, choices=choices: next(choices))
        below = [slot for slot, product in enumerate(products.tolist()) if product < 0.3]
        assert len(block) == (below[0] if below else 3)
        lengths.append(len(block))
    assert len(set(lengths)) > 1, "the threshold cuts some blocks and not others"


def test_a_threshold_needs_a_confidence_head_and_a_temperature_a_slot() -> None:
    with pytest.raises(SettingError, match="no confidence head"):
        BlockDrafter(tiny_model(tiny_config(enable_confidence_head=False)), min_confidence=0.5)
    with pytest.raises(SettingError, match="expected 3 temperatures, one a slot, got 2"):
        BlockDrafter(tiny_model(), confidence_temperatures=[1.0, 2.0])
