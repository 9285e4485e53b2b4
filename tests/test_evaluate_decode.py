"""Speculative decoding of a real tiny target with a real tiny draft, held against the target alone."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from stages.evaluate.decode import Answer, Limits, Round, decode_plainly, decode_speculatively
from stages.evaluate.rejection import Sampler
from stages.extract.cached_target import CachedTarget, TargetStep
from stages.extract.capture import Capture
from stages.extract.target import TargetParts, find_parts
from stages.train import Qwen3DSparkModel, build_draft_config
from stages.train.drafting import BlockDrafter
from test_evaluate_rejection import p_value

LAYERS = [-1, 1]
PROMPT = [1, 2, 3]
NUM_DRAWS = 1000


def make_target(vocab_size: int, *, spread: float = 0.5, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=spread, max_position_embeddings=256, **changes,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


def make_other_target(name: str) -> Any:
    torch.manual_seed(0)
    if name == "GPT2":
        gpt2 = transformers.GPT2Config(
            bos_token_id=None, eos_token_id=None, vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=64
        )
        return transformers.GPT2LMHeadModel(gpt2).eval()
    windows = {"Gemma2": {"sliding_window": 6, "final_logit_softcapping": 2.0}, "Mistral": {"sliding_window": 6}}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.5, attn_implementation="eager", **windows.get(name, {}),
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def make_draft(model: Any, *, block_size: int = 4, noise: float = 0.3, **changes: Any) -> Qwen3DSparkModel:
    """A random draft with the target's head, so that some of its tokens are accepted."""
    torch.manual_seed(1)
    vocab_size = model.config.vocab_size
    config = build_draft_config(
        model.config, mask_token_id=vocab_size - 1, num_draft_layers=1, block_size=block_size, target_layer_ids=LAYERS,
        markov_rank=4, **changes,
    )  # fmt: skip
    draft = Qwen3DSparkModel(config)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.copy_((1.0 if "norm" in name else 0.0) + noise * torch.randn_like(parameter))
    draft.load_target_head(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return draft.eval()


def make_pair(vocab_size: int, **changes: Any) -> tuple[CachedTarget, BlockDrafter, TargetParts]:
    model = make_target(vocab_size)
    parts = find_parts(model)
    return CachedTarget(parts, layers=LAYERS), BlockDrafter(make_draft(model, **changes)), parts


class RememberingTarget(CachedTarget):
    """Runs each step once: thousands of short answers to one prompt have few different ones."""

    def reset(self) -> None:
        super().reset()
        self._seen: tuple[int, ...] = ()
        self._steps: dict[tuple[tuple[int, ...], ...], TargetStep] = getattr(self, "_steps", {})

    def extend(self, input_ids: Sequence[int], *, num_logits: int) -> TargetStep:
        seen, new = self._seen, tuple(input_ids)
        if (seen, new) not in self._steps:
            super().reset()
            if seen:
                super().extend(seen, num_logits=1)
            self._steps[seen, new] = super().extend(new, num_logits=num_logits)
        self._seen = seen + new
        return self._steps[seen, new]

    def forget(self, num_tokens: int) -> None:
        self._seen = self._seen[: len(self._seen) - num_tokens]


def make_sampler(temperature: float, *, seed: int = 0) -> Sampler:
    return Sampler(temperature=temperature, generator=torch.Generator().manual_seed(seed))


def check_rounds(answer: Answer, *, block_size: int) -> None:
    assert sum(done.num_emitted for done in answer.rounds) == len(answer.tokens) - 1
    for done in answer.rounds:
        assert 0 <= done.num_accepted <= done.num_drafted <= block_size
        assert done.num_emitted in (done.num_accepted, done.num_accepted + 1)
        assert 0.999 < done.expected_tokens < block_size + 1.001


@pytest.mark.parametrize("markov_head_type", ["vanilla", "rnn"])
def test_greedy_output_is_the_targets_own(markov_head_type: str) -> None:
    target, drafter, parts = make_pair(24, markov_head_type=markov_head_type)
    limits = Limits(max_new_tokens=30, stop_ids=frozenset())
    accepted = 0
    for first in range(6):
        prompt = [first, *PROMPT]
        answer = decode_speculatively(prompt, target=target, drafter=drafter, limits=limits, sampler=make_sampler(0.0))
        plain = decode_plainly(prompt, target=target, limits=limits, sampler=make_sampler(0.0))
        generated = parts.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=30, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert answer.tokens == plain.tokens == tuple(generated[0, len(prompt) :].tolist())
        assert all(done.expected_tokens == done.num_emitted for done in answer.rounds), "nothing is left to chance"
        check_rounds(answer, block_size=4)
        accepted += sum(done.num_accepted for done in answer.rounds)
    assert accepted > 3, "the draft is accepted now and then, so that both caches are really cut back and reused"


class RecordingDrafter(BlockDrafter):
    """Keeps what it is shown, and the anchors with how much it had been shown by then."""

    def reset(self) -> None:
        super().reset()
        self.shown: list[torch.Tensor] = []
        self.anchors: list[tuple[int, int]] = []

    def see(self, context_NX: torch.Tensor) -> None:
        super().see(context_NX)
        self.shown.append(context_NX)

    def propose(self, anchor_token: int, *, num_slots: int, choose: Callable[[torch.Tensor], int]) -> list[int]:
        self.anchors.append((self.num_tokens, anchor_token))
        return super().propose(anchor_token, num_slots=num_slots, choose=choose)


def test_the_draft_sees_the_targets_states_of_all_tokens_before_the_anchor() -> None:
    """Losslessness holds for any draft; that a draft proposes as it was trained to depends on this."""
    model = make_target(24)
    parts = find_parts(model)
    target, drafter = CachedTarget(parts, layers=LAYERS), RecordingDrafter(make_draft(model))
    limits = Limits(max_new_tokens=40, stop_ids=frozenset())
    answer = decode_speculatively(PROMPT, target=target, drafter=drafter, limits=limits, sampler=make_sampler(1.0))
    ids = [*PROMPT, *answer.tokens]
    assert len(drafter.anchors) == len(answer.rounds)
    assert all(ids[place] == token for place, token in drafter.anchors)
    assert any(done.num_accepted > 0 for done in answer.rounds)
    captured = Capture(parts, layers=LAYERS, dtype=torch.float32)([np.array(ids, dtype=np.int32)])
    shown = torch.cat(drafter.shown)
    torch.testing.assert_close(shown, captured.hidden_states.flatten(1)[: len(shown)], rtol=1e-4, atol=1e-4)
    assert len(ids) - len(shown) == 1, "only the last token is unseen"


class KnowingDrafter:
    """Proposes what the target is about to say, wrongly one time in four: blocks are cut back at every length."""

    block_size = 4

    def __init__(self, answer: list[int], *, seed: int) -> None:
        self._answer, self._rng = answer, random.Random(seed)

    def reset(self) -> None:
        self._num_seen = 0

    def see(self, context: torch.Tensor) -> None:
        self._num_seen += len(context)

    def propose(self, anchor_token: int, *, num_slots: int, choose: Callable[[torch.Tensor], int]) -> list[int]:
        place = self._num_seen - len(PROMPT) + 1  # the anchor is the answer's token before
        right = self._answer[place : place + num_slots]
        tokens = [token if self._rng.random() < 0.75 else (token + 1) % 24 for token in right]
        return [choose(torch.eye(24)[token]) for token in tokens]


def test_a_stop_token_ends_the_answer_wherever_it_comes_up() -> None:
    """Among accepted drafts too, and then nothing is added behind it."""
    target, real, _ = make_pair(24)
    free = Limits(max_new_tokens=30, stop_ids=frozenset())
    whole = decode_plainly(PROMPT, target=target, limits=free, sampler=make_sampler(0.0)).tokens
    ends = set()
    for stop, drafter in itertools.product(set(whole), (real, KnowingDrafter(list(whole), seed=0))):
        limits = replace(free, stop_ids=frozenset({stop}))
        answer = decode_speculatively(PROMPT, target=target, drafter=drafter, limits=limits, sampler=make_sampler(0.0))
        assert answer.tokens == whole[: whole.index(stop) + 1]
        check_rounds(answer, block_size=4)
        ends.update(done.num_emitted == done.num_accepted for done in answer.rounds[-1:])
    assert ends == {True, False}


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral", "GPT2"])
def test_greedy_output_of_other_architectures(name: str) -> None:
    """Soft-capped logits, learned positions, and windows shorter than the answers."""
    model = make_other_target(name)
    target = CachedTarget(find_parts(model), layers=LAYERS)
    limits = Limits(max_new_tokens=30, stop_ids=frozenset())
    ids = list(PROMPT)
    with torch.no_grad():
        while len(ids) < len(PROMPT) + 30:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    own = ids[len(PROMPT) :]
    accepted = Counter[int]()
    for seed in range(4):
        drafter = KnowingDrafter(own, seed=seed)
        answer = decode_speculatively(PROMPT, target=target, drafter=drafter, limits=limits, sampler=make_sampler(0.0))
        assert list(answer.tokens) == own
        accepted.update(done.num_accepted for done in answer.rounds)
    assert set(accepted) == {0, 1, 2, 3, 4}


def test_gaps_are_the_targets_two_largest_logits_apart() -> None:
    target, _, parts = make_pair(24)
    limits = Limits(max_new_tokens=5, stop_ids=frozenset())
    plain = decode_plainly(PROMPT, target=target, limits=limits, sampler=make_sampler(0.0))
    with torch.no_grad():
        logits = parts.model(torch.tensor([[*PROMPT, *plain.tokens]])).logits[0, len(PROMPT) - 1 : -1]
    largest = logits.sort(descending=True).values
    assert plain.gaps == pytest.approx((largest[:, 0] - largest[:, 1]).tolist(), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_new_tokens", range(1, 9))
def test_the_limit_is_exact(temperature: float, max_new_tokens: int) -> None:
    target, drafter, _ = make_pair(24)
    limits = Limits(max_new_tokens=max_new_tokens, stop_ids=frozenset())
    for seed in range(4):
        sampler = make_sampler(temperature, seed=seed)
        answer = decode_speculatively(PROMPT, target=target, drafter=drafter, limits=limits, sampler=sampler)
        assert len(answer.tokens) == max_new_tokens
        check_rounds(answer, block_size=4)


def exact_chances(
    parts: TargetParts, *, num_tokens: int, temperature: float, stop: int
) -> dict[tuple[int, ...], float]:
    """The target's own probability of every answer of at most `num_tokens` tokens, from forwards without a cache."""
    vocab_size = parts.model.config.vocab_size
    whole = list(itertools.product(range(vocab_size), repeat=num_tokens))
    ids = torch.tensor([[*PROMPT, *tokens] for tokens in whole])
    with torch.no_grad():
        logits = parts.model(ids, use_cache=False).logits[:, len(PROMPT) - 1 : -1]
    steps = (logits.double() / temperature).softmax(-1).gather(2, ids[:, len(PROMPT) :, None]).squeeze(2)
    chances: dict[tuple[int, ...], float] = {}
    for tokens, step in zip(whole, steps.tolist(), strict=True):
        length = tokens.index(stop) + 1 if stop in tokens else num_tokens
        chance = 1.0
        for part in step[:length]:
            chance *= part
        chances[tokens[:length]] = chance
    return chances


@pytest.mark.parametrize(("temperature", "min_confidence"), [(1.0, 0.0), (0.7, 0.3)])
def test_sampled_answers_are_distributed_as_the_targets(temperature: float, min_confidence: float) -> None:
    """Chi-square over all answers of at most four tokens; and tokens a round have the expected mean."""
    model = make_target(5)
    parts = find_parts(model)
    target = RememberingTarget(parts, layers=LAYERS)
    drafter = BlockDrafter(make_draft(model, block_size=3), min_confidence=min_confidence)
    limits = Limits(max_new_tokens=4, stop_ids=frozenset({2}))
    sampler = make_sampler(temperature)
    answers = [
        decode_speculatively(PROMPT, target=target, drafter=drafter, limits=limits, sampler=sampler)
        for _ in range(NUM_DRAWS)
    ]
    chances = exact_chances(parts, num_tokens=4, temperature=temperature, stop=2)
    assert sum(chances.values()) == pytest.approx(1.0)
    assert p_value(Counter(answer.tokens for answer in answers), chances, NUM_DRAWS) > 1e-3
    rounds: list[Round] = [done for answer in answers for done in answer.rounds]
    assert 0.1 < sum(done.num_accepted for done in rounds) / sum(done.num_drafted for done in rounds) < 0.95
    differences = torch.tensor([done.num_emitted - done.expected_tokens for done in rounds])
    assert abs(differences.mean()) < 4 * differences.std() / len(rounds) ** 0.5
