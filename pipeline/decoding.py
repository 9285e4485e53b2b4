"""Decoding for real, joined: the trained draft and its target, on prompts of the cache's validation split."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import Config
from pipeline.held_out_answers import Prompt, score_answer, score_decoded, take_prompts
from pipeline.stage_two import evaluated_indices, open_draft
from stages.device import choose_device
from stages.errors import SettingError
from stages.evaluate.decode import Answer, Limits, decode_plainly, decode_speculatively
from stages.evaluate.decode_report import (
    CacheComparison,
    DecodedPrompt,
    DecodingRun,
    compare_with_cache,
    summarize_run,
)
from stages.evaluate.rejection import Sampler
from stages.extract.cached_target import CachedTarget, check_cropping
from stages.extract.capture import Capture
from stages.extract.target import TargetParts, eos_token_ids, load_target, locate_target
from stages.train import DSparkTrainerModule, Qwen3DSparkModel
from stages.train.drafting import BlockDrafter
from stages.train.warm_start import COMPARED_ROWS, same_rows

FORMAT_VERSION = 1
CHECKED_TOKENS = 16  # of a prompt, run before anything is timed: enough to see that the KV cache can be cut back

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """`decoding.json`: what decoding with the real target reached."""

    target: str
    dtype: str
    device: str
    num_threads: int
    max_new_tokens: int
    confidence_threshold: float
    seed: int
    stop_ids: tuple[int, ...]
    num_skipped: int
    """Samples that were passed over: their first token is supervised, so they have no prompt."""
    runs: tuple[DecodingRun, ...]
    comparison: CacheComparison | None
    """With the cache's estimate; None unless temperature 1 and whole blocks were asked for."""

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}


class _Decoder:
    """A target, and the draft that proposes for it, ready to answer prompts in both ways."""

    def __init__(self, config: Config, *, parts: TargetParts, drafter: BlockDrafter, model: Qwen3DSparkModel) -> None:
        folder = locate_target(config.target)
        self._config = parts.model.config.get_text_config(decoder=True)
        self._section = config.decode
        self._target = CachedTarget(parts, layers=model.config.target_layer_ids)
        self._plain_target = CachedTarget(parts)
        self._drafter = drafter
        found = eos_token_ids(folder, self._config)
        self.stop_ids = frozenset(token for token in found if 0 <= token < model.config.vocab_size)

    def answer(self, prompt: Prompt, *, temperature: float) -> DecodedPrompt:
        """Both answers, and what they took."""
        positions = getattr(self._config, "max_position_embeddings", None) or 2**31
        limits = Limits(
            max_new_tokens=min(self._section.max_new_tokens, positions - len(prompt.tokens)), stop_ids=self.stop_ids
        )
        samplers = self._samplers(prompt, temperature=temperature)
        plain, plain_seconds = _timed(
            lambda: decode_plainly(prompt.tokens, target=self._plain_target, limits=limits, sampler=next(samplers))
        )
        speculative, speculative_seconds = _timed(
            lambda: decode_speculatively(
                prompt.tokens, target=self._target, drafter=self._drafter, limits=limits, sampler=next(samplers)
            )
        )
        return DecodedPrompt(
            sample_id=prompt.sample_id,
            plain=plain,
            plain_seconds=plain_seconds,
            speculative=speculative,
            speculative_seconds=speculative_seconds,
        )

    def _samplers(self, prompt: Prompt, *, temperature: float) -> Iterator[Sampler]:
        """Streams of their own, which depend on nothing but the seed and the sample."""
        for number in count():
            seed = np.random.SeedSequence([self._section.seed, prompt.sample_id, number]).generate_state(1)[0]
            generator = torch.Generator(device=self._target.device).manual_seed(int(seed))
            yield Sampler(temperature=temperature, generator=generator)


def decode_draft(
    config: Config,
    *,
    draft_dir: Path,
    confidence_temperatures: Sequence[float] | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Decoding:
    """Decode `[decode]`'s prompts with the draft in `draft_dir` and with the target alone.

    `confidence_temperatures`: a calibration's, one a slot. Raises StageError or CacheError.
    """
    # 1. Prompts, draft and target, which must belong together.
    decode = config.decode
    model, reader = open_draft(config, draft_dir=draft_dir, dtype=getattr(torch, decode.dtype))
    model = model.eval().to(choose_device(config.train.device))
    drafter = BlockDrafter(
        model, min_confidence=decode.confidence_threshold, confidence_temperatures=confidence_temperatures
    )
    prompts, num_skipped = take_prompts(reader, evaluated_indices(config, reader), num_prompts=decode.num_prompts)
    reader.plan_reads(np.array([prompt.index for prompt in prompts]))
    parts = _load_target(config, model=model, draft_dir=draft_dir)
    check_cropping(parts, input_ids=prompts[0].tokens[:CHECKED_TOKENS])
    decoder = _Decoder(config, parts=parts, drafter=drafter, model=model)
    # 2. All prompts at each temperature.
    decoded: dict[float, list[DecodedPrompt]] = {}
    done, total = 0, len(decode.temperatures) * len(prompts)
    for temperature in decode.temperatures:
        decoded[temperature] = []
        for prompt in prompts:
            decoded[temperature].append(decoder.answer(prompt, temperature=temperature))
            done += 1
            progress(done, total)
        logger.info("decoded %d prompts at temperature %g", len(prompts), temperature)
    # 3. What came of it, held against the cache's estimate.
    runs = tuple(
        summarize_run(answered, temperature=temperature, block_size=model.block_size)
        for temperature, answered in decoded.items()
    )
    comparison = None
    if 1.0 in decoded and decode.confidence_threshold == 0:
        module = DSparkTrainerModule(model)
        capture = Capture(parts, layers=model.config.target_layer_ids, dtype=parts.dtype)
        answered = zip(prompts, decoded[1.0], strict=True)
        comparison = compare_with_cache(
            decoded[1.0],
            answers=[score_answer(module, reader, prompt, max_new_tokens=decode.max_new_tokens) for prompt in prompts],
            decoded_answers=[
                score_decoded(module, capture, prompt, own.speculative.tokens) for prompt, own in answered
            ],
            max_blocks=config.evaluate.num_anchors,
        )
    return Decoding(
        target=config.target.model,
        dtype=decode.dtype,
        device=str(parts.device),
        num_threads=torch.get_num_threads(),
        max_new_tokens=decode.max_new_tokens,
        confidence_threshold=decode.confidence_threshold,
        seed=decode.seed,
        stop_ids=tuple(sorted(decoder.stop_ids)),
        num_skipped=num_skipped,
        runs=runs,
        comparison=comparison,
    )


def _load_target(config: Config, *, model: Qwen3DSparkModel, draft_dir: Path) -> TargetParts:
    """The config's target in `decode.dtype`. Raises TargetError, and SettingError if the draft is another target's."""
    section = config.target.model_copy(update={"dtype": config.decode.dtype})
    parts = load_target(locate_target(section), target=section, device=choose_device(config.train.device))
    for name in ("embed_tokens", "lm_head"):
        whole, own = getattr(parts, name).weight, getattr(model, name).weight
        if whole.shape != own.shape or not same_rows(whole[:COMPARED_ROWS].cpu(), own[:COMPARED_ROWS]):
            raise SettingError(
                f"{draft_dir}: this draft was trained for another target than {config.target.model}: {name} is "
                f"{list(own.shape)} in the draft and {list(whole.shape)} in the target, or their rows differ; "
                "name the draft's own target in target.model"
            )
    return parts


def _timed(decode: Callable[[], Answer]) -> tuple[Answer, float]:
    """The answer and the seconds that it took."""
    started = time.perf_counter()
    answer = decode()
    return answer, time.perf_counter() - started
