"""What decodings of many prompts say: tokens a round, acceptance by slot, whether greedy output is the target's own.

Shape suffixes: G prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.errors import SettingError
from stages.evaluate.bootstrap import Estimate, estimate_difference, estimate_ratio
from stages.evaluate.decode import Answer
from stages.evaluate.replay import AnswerScores, BridgeStep, bridge, replay


@dataclass(frozen=True, kw_only=True)
class DecodedPrompt:
    """One prompt decoded both ways."""

    sample_id: int
    plain: Answer
    plain_seconds: float
    speculative: Answer
    speculative_seconds: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first token at which greedy speculative decoding left the target's own answer."""

    sample_id: int
    position: int
    """In the answer, from 0."""
    plain_token: int | None
    speculative_token: int | None
    """None: the answer had ended."""
    gap: float | None
    """How far the target's largest logit lay above the next there; next to nothing where rounding decided."""


@dataclass(frozen=True, kw_only=True)
class DecodingRun:
    """All prompts at one temperature.

    tokens_per_round     tokens that rounds emitted / rounds; the answer's first token comes before the first round
    expected_per_round   the same with each round's expectation given its draft (`rejection.expected_tokens`)
    accept_rate_per_pos  accepted / tested of each slot, tested being those whose slots before were accepted; 0 without
    num_differing_tokens places at which greedy answers differ from plain ones; None for sampled answers
    """

    temperature: float
    num_prompts: int
    num_tokens: int
    num_rounds: int
    num_drafted: int
    tokens_per_round: Estimate
    expected_per_round: Estimate
    accept_rate_per_pos: tuple[float, ...]
    num_tested_per_pos: tuple[int, ...]
    num_plain_tokens: int
    plain_seconds: float
    speculative_seconds: float
    num_differing_tokens: int | None
    differences: tuple[Difference, ...]


@dataclass(frozen=True, kw_only=True)
class CacheComparison:
    """Decoding at temperature 1 against the cache's estimates for the same prompts, and against itself.

    difference           expected tokens a round minus those of the replay of the cache's answers, which are others
    agrees               its interval holds 0
    replayed_decoded     the replay of the decoded answers themselves, from a forward of the target over each
    difference_decoded   counted tokens a round minus that: the text is the same, so only the draws of the rounds differ
    """

    num_answers: int
    steps: tuple[BridgeStep, ...]
    difference: Estimate
    agrees: bool
    replayed_decoded: Estimate
    difference_decoded: Estimate


def summarize_run(decoded: Sequence[DecodedPrompt], *, temperature: float, block_size: int) -> DecodingRun:
    """Raises SettingError where no answer was long enough for a round."""
    rounds = [done for prompt in decoded for done in prompt.speculative.rounds]
    if not rounds:
        raise SettingError(
            "no answer is longer than its first token; raise decode.max_new_tokens or decode.num_prompts"
        )
    tested, accepted = np.zeros(block_size, dtype=np.int64), np.zeros(block_size, dtype=np.int64)
    for done in rounds:
        tested[: min(done.num_accepted + 1, done.num_drafted)] += 1
        accepted[: done.num_accepted] += 1
    num_rounds_G = count_rounds(decoded)
    differences = [find_difference(prompt) for prompt in decoded] if temperature == 0 else []
    return DecodingRun(
        temperature=temperature,
        num_prompts=len(decoded),
        num_tokens=sum(len(prompt.speculative.tokens) for prompt in decoded),
        num_rounds=len(rounds),
        num_drafted=sum(done.num_drafted for done in rounds),
        tokens_per_round=estimate_ratio(count_tokens(decoded), num_rounds_G),
        expected_per_round=estimate_ratio(expected_tokens(decoded), num_rounds_G),
        accept_rate_per_pos=tuple((accepted / np.maximum(tested, 1)).tolist()),
        num_tested_per_pos=tuple(tested.tolist()),
        num_plain_tokens=sum(len(prompt.plain.tokens) for prompt in decoded),
        plain_seconds=sum(prompt.plain_seconds for prompt in decoded),
        speculative_seconds=sum(prompt.speculative_seconds for prompt in decoded),
        num_differing_tokens=sum(map(count_differing, decoded)) if temperature == 0 else None,
        differences=tuple(difference for difference in differences if difference is not None),
    )


def compare_with_cache(
    decoded: Sequence[DecodedPrompt],
    *,
    answers: Sequence[AnswerScores],
    decoded_answers: Sequence[AnswerScores],
    max_blocks: int,
) -> CacheComparison | None:
    """Answers decoded at temperature 1 against those of the cache; one of each kind for every prompt, in one order.

    `max_blocks`: anchors of a conversation in the published estimate. None where no answer has a second token.
    """
    if not len(decoded) == len(answers) == len(decoded_answers):
        raise AssertionError(
            f"{len(decoded)} prompts, {len(answers)} cached and {len(decoded_answers)} decoded answers"
        )
    if not any(len(answer.keep_chance) for answer in answers):
        return None
    rounds_G = count_rounds(decoded)
    difference = estimate_difference(expected_tokens(decoded), rounds_G, *replay(answers))
    return CacheComparison(
        num_answers=len(answers),
        steps=tuple(bridge(answers, max_blocks=max_blocks)),
        difference=difference,
        agrees=difference.low <= 0 <= difference.high,
        replayed_decoded=estimate_ratio(*replay(decoded_answers)),
        difference_decoded=estimate_difference(count_tokens(decoded), rounds_G, *replay(decoded_answers)),
    )


def count_rounds(decoded: Sequence[DecodedPrompt]) -> np.ndarray:
    """Rounds of each prompt [G]."""
    return np.array([len(prompt.speculative.rounds) for prompt in decoded])


def count_tokens(decoded: Sequence[DecodedPrompt]) -> np.ndarray:
    """Tokens that the rounds of each prompt emitted [G]."""
    return np.array([sum(done.num_emitted for done in prompt.speculative.rounds) for prompt in decoded])


def expected_tokens(decoded: Sequence[DecodedPrompt]) -> np.ndarray:
    """Sum over the rounds of each prompt [G]."""
    return np.array([sum(done.expected_tokens for done in prompt.speculative.rounds) for prompt in decoded])


def count_differing(prompt: DecodedPrompt) -> int:
    """Places at which the two answers have different tokens, or one of them none."""
    plain, other = prompt.plain.tokens, prompt.speculative.tokens
    return sum(a != b for a, b in zip(plain, other, strict=False)) + abs(len(plain) - len(other))


def find_difference(prompt: DecodedPrompt) -> Difference | None:
    """The first of those places; None where the answers are equal."""
    plain, other = prompt.plain.tokens, prompt.speculative.tokens
    if plain == other:
        return None
    shared = min(len(plain), len(other))
    position = next((place for place in range(shared) if plain[place] != other[place]), shared)
    return Difference(
        sample_id=prompt.sample_id,
        position=position,
        plain_token=plain[position] if position < len(plain) else None,
        speculative_token=other[position] if position < len(other) else None,
        gap=prompt.plain.gaps[position] if position < len(plain) else None,
    )
