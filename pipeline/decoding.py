"""Decoding for real, joined: the trained draft and its target, on prompts of the cache's validation split."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import Config
from pipeline.held_out_answers import Prompt, score_answer, score_decoded, take_prompts
from pipeline.stage_two import evaluated_indices, open_draft
from stages.device import choose_device
from stages.errors import SettingError
from stages.evaluate.calibration import CALIBRATION_FILE, read_calibration
from stages.evaluate.decode import Limits, decode_plainly, decode_speculatively
from stages.evaluate.decode_report import (
    CacheComparison,
    DecodedPrompt,
    DecodingRun,
    compare_with_cache,
    summarize_run,
)
from stages.evaluate.rejection import Sampler
from stages.evaluate.settings import DecodeSection
from stages.extract.cached_target import CachedTarget, check_cropping
from stages.extract.capture import Capture
from stages.extract.model_files import locate_target
from stages.extract.target import TargetParts, eos_token_ids, load_target
from stages.target_shape import parse_target_shape
from stages.train import DSparkTrainerModule, Qwen3DSparkModel
from stages.train.drafting import BlockDrafter
from stages.train.warm_start import COMPARED_ROWS, same_rows
from storage import CacheReader

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
    is_calibrated: bool
    """The threshold was held against calibrated confidences."""
    seed: int
    stop_ids: tuple[int, ...]
    num_skipped: int
    """Samples that were passed over: their first token is supervised, so they have no prompt."""
    runs: tuple[DecodingRun, ...]
    comparison: CacheComparison | None
    """With the cache's estimate; None unless temperature 1 and whole blocks were asked for."""

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    """A target, and the draft that proposes for it, ready to answer prompts in both ways."""

    parts: TargetParts
    target: CachedTarget
    plain_target: CachedTarget
    drafter: BlockDrafter
    stop_ids: frozenset[int]
    max_positions: int
    section: DecodeSection

    def answer(self, prompt: Prompt, *, temperature: float) -> DecodedPrompt:
        """Both answers, and the seconds that they took."""
        limits = Limits(
            max_new_tokens=min(self.section.max_new_tokens, self.max_positions - len(prompt.tokens)),
            stop_ids=self.stop_ids,
        )
        plain, ours = (self._sampler(prompt, temperature=temperature, stream=stream) for stream in range(2))
        times = [time.perf_counter()]
        alone = decode_plainly(prompt.tokens, target=self.plain_target, limits=limits, sampler=plain)
        times.append(time.perf_counter())
        drafted = decode_speculatively(
            prompt.tokens, target=self.target, drafter=self.drafter, limits=limits, sampler=ours
        )
        times.append(time.perf_counter())
        return DecodedPrompt(
            sample_id=prompt.sample_id,
            plain=alone,
            plain_seconds=times[1] - times[0],
            speculative=drafted,
            speculative_seconds=times[2] - times[1],
        )

    def _sampler(self, prompt: Prompt, *, temperature: float, stream: int) -> Sampler:
        """Draws that depend on the seed and the sample alone, not on the prompts before."""
        seed = np.random.SeedSequence([self.section.seed, prompt.sample_id, stream]).generate_state(1)[0]
        generator = torch.Generator(device=self.target.device).manual_seed(int(seed))
        return Sampler(temperature=temperature, generator=generator)


def decode_draft(
    config: Config,
    *,
    draft_dir: Path,
    progress: Progress = lambda _done, _total: None,
) -> Decoding:
    """Decode `[decode]`'s prompts with the draft in `draft_dir` and with the target alone.

    A threshold is held against calibrated confidences where the draft's folder has a calibration. Raises StageError or
    CacheError.
    """
    decode = config.decode
    # 1. Prompts, draft and target, which must belong together.
    model, reader = open_draft(config, draft_dir=draft_dir, dtype=getattr(torch, decode.dtype))
    model = model.eval().to(choose_device(config.train.device))
    prompts, num_skipped = take_prompts(reader, evaluated_indices(config, reader), num_prompts=decode.num_prompts)
    reader.plan_reads(np.array([prompt.index for prompt in prompts]))
    temperatures = None
    if decode.confidence_threshold > 0 and (draft_dir / CALIBRATION_FILE).exists():
        temperatures = read_calibration(draft_dir).temperatures
    drafter = BlockDrafter(model, min_confidence=decode.confidence_threshold, confidence_temperatures=temperatures)
    decoder = _prepare(config, model=model, drafter=drafter, draft_dir=draft_dir, max_length=reader.identity.max_length)
    check_cropping(decoder.parts, input_ids=prompts[0].tokens[:CHECKED_TOKENS])
    # 2. All prompts at each temperature.
    decoded = _answer_all(decoder, prompts, progress=progress)
    # 3. What came of it, held against the cache's estimate.
    runs = tuple(
        summarize_run(answered, temperature=temperature, block_size=model.block_size)
        for temperature, answered in decoded.items()
    )
    comparison = None
    if 1.0 in decoded and decode.confidence_threshold == 0:
        comparison = _compare(config, model, reader=reader, prompts=prompts, decoded=decoded[1.0], parts=decoder.parts)
    return Decoding(
        target=config.target.model,
        dtype=decode.dtype,
        device=str(decoder.parts.device),
        num_threads=torch.get_num_threads(),
        max_new_tokens=decode.max_new_tokens,
        confidence_threshold=decode.confidence_threshold,
        is_calibrated=temperatures is not None,
        seed=decode.seed,
        stop_ids=tuple(sorted(decoder.stop_ids)),
        num_skipped=num_skipped,
        runs=runs,
        comparison=comparison,
    )


def _prepare(
    config: Config, *, model: Qwen3DSparkModel, drafter: BlockDrafter, draft_dir: Path, max_length: int
) -> _Decoder:
    """Load the target beside the draft."""
    parts = _load_target(config, model=model, draft_dir=draft_dir, max_length=max_length)
    stop_ids = eos_token_ids(locate_target(config.target), parts.model.config)
    return _Decoder(
        parts=parts,
        target=CachedTarget(parts, layers=model.config.target_layer_ids),
        plain_target=CachedTarget(parts),
        drafter=drafter,
        stop_ids=frozenset(token for token in stop_ids if 0 <= token < model.config.vocab_size),
        max_positions=parse_target_shape(parts.model.config).max_positions or sys.maxsize,
        section=config.decode,
    )


def _answer_all(
    decoder: _Decoder, prompts: Sequence[Prompt], *, progress: Progress
) -> dict[float, list[DecodedPrompt]]:
    """Every prompt's answers at each temperature."""
    temperatures = decoder.section.temperatures
    decoded: dict[float, list[DecodedPrompt]] = {temperature: [] for temperature in temperatures}
    total = len(decoded) * len(prompts)
    for place, temperature in enumerate(decoded):
        for done, prompt in enumerate(prompts, start=place * len(prompts) + 1):
            decoded[temperature].append(decoder.answer(prompt, temperature=temperature))
            progress(done, total)
        logger.info("temperature %g: prompts decoded: %d", temperature, len(prompts))
    return decoded


def _compare(
    config: Config,
    model: Qwen3DSparkModel,
    *,
    reader: CacheReader,
    prompts: Sequence[Prompt],
    decoded: Sequence[DecodedPrompt],
    parts: TargetParts,
) -> CacheComparison | None:
    """Answers at temperature 1 against those of the cache, and against a replay of their own."""
    module = DSparkTrainerModule(model)
    capture = Capture(parts, layers=model.config.target_layer_ids, dtype=parts.dtype)
    limit = config.decode.max_new_tokens
    return compare_with_cache(
        decoded,
        answers=[score_answer(module, reader, prompt, max_new_tokens=limit) for prompt in prompts],
        decoded_answers=[
            score_decoded(module, capture, prompt, own.speculative.tokens)
            for prompt, own in zip(prompts, decoded, strict=True)
        ],
        max_blocks=config.evaluate.num_anchors,
    )


def _load_target(
    config: Config, *, model: Qwen3DSparkModel, draft_dir: Path, max_length: int | None = None
) -> TargetParts:
    """The config's target in `decode.dtype`. Raises TargetError, and SettingError if the draft is another target's."""
    section = config.target.model_copy(update={"dtype": config.decode.dtype})
    device = choose_device(config.train.device)
    parts = load_target(locate_target(section), target=section, device=device, max_length=max_length)
    for name in ("embed_tokens", "lm_head"):
        whole, own = getattr(parts, name).weight, getattr(model, name).weight
        if whole.shape != own.shape or not same_rows(whole[:COMPARED_ROWS].cpu(), own[:COMPARED_ROWS]):
            raise SettingError(
                f"{draft_dir}: this draft was trained for another target than {config.target.model}: {name} is "
                f"{list(own.shape)} in the draft and {list(whole.shape)} in the target, or their rows differ; "
                "name the draft's own target in target.model"
            )
    return parts
