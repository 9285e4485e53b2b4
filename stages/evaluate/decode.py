"""Decoding with the real target: plainly, and speculatively with a draft. Both give the target's own distribution.

Target and draft are what the caller passes in, since stages do not import each other. A round of speculative decoding
starts at the newest token, which the target has not seen yet, the anchor: the draft proposes a block behind it, the
target runs anchor and block at once, and rejection sampling keeps the first of them and adds one. The first token comes
from the prompt's own forward, as in servers: a draft is trained on blocks whose anchor is in an answer.

Shape suffixes: N tokens, X target layers side by side, K drafted tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stages.evaluate.rejection import Sampler, expected_tokens, verify_block


class Step(Protocol):
    """What the target says of new tokens."""

    @property
    def logits(self) -> torch.Tensor: ...  # [N, V]
    @property
    def context(self) -> torch.Tensor: ...  # [N, X]


class Target(Protocol):
    """A target with a KV cache; `forget` takes its last tokens back."""

    @property
    def device(self) -> torch.device: ...
    def reset(self) -> None: ...
    def extend(self, input_ids: Sequence[int], *, num_logits: int) -> Step: ...
    def forget(self, num_tokens: int) -> None: ...


class Drafter(Protocol):
    """A draft with a KV cache of the target's states of all tokens before the anchor."""

    block_size: int

    def reset(self) -> None: ...
    def see(self, context_NX: torch.Tensor) -> None: ...
    def propose(self, anchor_token: int, *, num_slots: int, choose: Callable[[torch.Tensor], int]) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When an answer ends: behind a stop token, which it includes, or at `max_new_tokens`, which is at least 1."""

    max_new_tokens: int
    stop_ids: frozenset[int]

    def is_over(self, tokens: Sequence[int]) -> bool:
        return len(tokens) >= self.max_new_tokens or (len(tokens) > 0 and tokens[-1] in self.stop_ids)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One pass of the target over a block."""

    num_drafted: int
    """Tokens proposed, none behind a stop token among them."""
    num_accepted: int
    num_emitted: int
    """Accepted ones and the one behind them, which is left out behind a stop token."""
    expected_tokens: float
    """Expectation of `num_emitted` given the draft; see `rejection.expected_tokens`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was decoded behind a prompt."""

    tokens: tuple[int, ...]
    rounds: tuple[Round, ...] = ()
    """Of speculative decoding; the first token comes before them."""
    gaps: tuple[float, ...] = ()
    """Of plain decoding: how far the largest logit lay above the next, at each token."""


def decode_plainly(prompt: Sequence[int], *, target: Target, limits: Limits, sampler: Sampler) -> Answer:
    """One token at a time, the target alone."""
    target.reset()
    new, tokens, gaps = list(prompt), list[int](), list[float]()
    while not limits.is_over(tokens):
        logits_V = target.extend(new, num_logits=1).logits[-1]
        largest = logits_V.topk(2).values
        gaps.append(float(largest[0] - largest[1]))
        tokens.append(sampler.draw(sampler.probabilities(logits_V)))
        new = tokens[-1:]
    return Answer(tokens=tuple(tokens), gaps=tuple(gaps))


def decode_speculatively(
    prompt: Sequence[int], *, target: Target, drafter: Drafter, limits: Limits, sampler: Sampler
) -> Answer:
    """A block a round."""
    target.reset()
    drafter.reset()
    step = target.extend(prompt, num_logits=1)
    drafter.see(step.context)
    tokens = [sampler.draw(sampler.probabilities(step.logits[-1]))]
    rounds = []
    while not limits.is_over(tokens):
        num_slots = min(drafter.block_size, limits.max_new_tokens - len(tokens) - 1)
        done, emitted = _run_round(
            tokens[-1], num_slots, target=target, drafter=drafter, stop_ids=limits.stop_ids, sampler=sampler
        )
        rounds.append(done)
        tokens.extend(emitted)
    return Answer(tokens=tuple(tokens), rounds=tuple(rounds))


def _run_round(
    anchor_token: int, num_slots: int, *, target: Target, drafter: Drafter, stop_ids: Collection[int], sampler: Sampler
) -> tuple[Round, list[int]]:
    """Draft, verify, and leave both caches at the tokens before the new anchor."""
    # 1. A block, cut behind its first stop token.
    drawn_from: list[torch.Tensor] = []

    def choose(logits_V: torch.Tensor) -> int:
        drawn_from.append(sampler.probabilities(logits_V.to(target.device)))
        return sampler.draw(drawn_from[-1])

    block = cut_behind_stop(drafter.propose(anchor_token, num_slots=num_slots, choose=choose), stop_ids)
    # 2. The target's distributions behind the anchor and behind each drafted token.
    step = target.extend([anchor_token, *block], num_logits=len(block) + 1)
    target_V = sampler.probabilities(step.logits)
    draft_KV = torch.stack(drawn_from[: len(block)]) if block else target_V[:0]
    # 3. What is kept. The token behind it is the next anchor, so neither cache has it yet.
    num_accepted, behind = verify_block(block, draft_KV, target_V, sampler=sampler)
    target.forget(len(block) - num_accepted)
    drafter.see(step.context[: num_accepted + 1])
    emitted = cut_behind_stop([*block[:num_accepted], behind], stop_ids)
    expected = expected_tokens(block, draft_KV, target_V, stop_ids=stop_ids)
    done = Round(num_drafted=len(block), num_accepted=num_accepted, num_emitted=len(emitted), expected_tokens=expected)
    return done, emitted


def cut_behind_stop(tokens: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens up to and including the first stop token."""
    for place, token in enumerate(tokens):
        if token in stop_ids:
            return list(tokens[: place + 1])
    return list(tokens)
