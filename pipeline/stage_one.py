"""Stage one as the command line runs it: config sections to `stages.extract`'s settings."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.regeneration_price import RegenerationPrice, price_regeneration
from stages.errors import SettingError
from stages.extract import import_run, run
from stages.extract.peer_caches import DeepSpecCache, PeerCache, SpeculatorsCache
from stages.extract.price import Price
from stages.extract.samples import PromptsOnlyError, SampleCounts
from stages.extract.share import ALONE, Share
from stages.target_config import choose_max_length
from stages.target_shape import TargetShape
from stages.train import Qwen3DSparkModel, build_draft_config

logger = logging.getLogger(__name__)


def settings_of(config: Config) -> run.Settings:
    """The sections that stage one reads."""
    return run.Settings(
        target=config.target,
        data=config.data,
        cache=config.cache,
        extract=config.extract,
        mask_token_id=config.draft.mask_token_id,
    )


def check_draft(config: Config, target: TargetShape) -> None:
    """Raises SettingError, before anything is computed, for a target that the config's draft cannot be built for.

    The whole draft is built, without storage.
    """
    draft = config.draft
    try:
        draft_config = build_draft_config(
            target,
            mask_token_id=0,
            num_draft_layers=draft.num_layers,
            block_size=draft.block_size,
            target_layer_ids=draft.target_layer_ids or config.cache.layers,
            num_anchors=draft.num_anchors,
            markov_rank=draft.markov_rank,
            markov_head_type=draft.markov_head_type,
            enable_confidence_head=draft.enable_confidence_head,
            confidence_head_with_markov=draft.confidence_head_with_markov,
            intermediate_size=draft.intermediate_size,
            max_length=choose_max_length(config.data.max_length, target.max_positions),
        )
        with torch.device("meta"):
            Qwen3DSparkModel(draft_config)
    except SettingError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise SettingError(
            f"no draft can be built for this {target.model_type} target: {error}; name another target, or set [draft]"
        ) from error


def estimate(config: Config) -> tuple[Price, SampleCounts] | RegenerationPrice:
    """Price the extraction, or, where no row has an answer, the answers; nothing is written, no weights are read."""
    try:
        return run.estimate(settings_of(config), check_target=partial(check_draft, config))
    except PromptsOnlyError as error:
        logger.warning("%s", error)
        return price_regeneration(config)


def extract(
    config: Config, *, show_price: Callable[[Price, SampleCounts], None], share: Share = ALONE
) -> run.ExtractResult:
    """Plan and compute what the cache lacks."""
    check = partial(check_draft, config)
    return run.extract(settings_of(config), check_target=check, show_price=show_price, share=share)


def open_source(name: str, folder: Path, *, dataset: Path | None, layers: tuple[int, ...] | None) -> PeerCache:
    """The cache of another project in `folder`. Raises PeerCacheError, and SettingError for options that do not fit."""
    if name == DeepSpecCache.name:
        if dataset or layers:
            raise SettingError("--dataset and --layers are for speculators; DeepSpec's files have both")
        return DeepSpecCache(folder)
    if not dataset or not layers:
        raise SettingError("speculators' files name neither rows nor layers; give --dataset and --layers")
    return SpeculatorsCache(folder, dataset=dataset, layers=layers)


def import_cache(
    config: Config, source: PeerCache, *, show_price: Callable[[Price, SampleCounts], None]
) -> run.ExtractResult:
    """Plan and convert what the cache lacks."""
    check_target = partial(check_draft, config)
    return import_run.import_cache(settings_of(config), source, check_target=check_target, show_price=show_price)
