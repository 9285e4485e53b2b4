"""Stage one as the command line runs it: config sections to `stages.extract`'s settings."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.regeneration_price import RegenerationPrice, price_regeneration
from stages.errors import SettingError
from stages.extract import import_run, run
from stages.extract.peer_caches import DeepSpecCache, PeerCache, SpeculatorsCache
from stages.extract.price import Price
from stages.extract.samples import PromptsOnlyError, SampleCounts
from stages.extract.share import ALONE, Share
from stages.train.config import build_draft_config

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


def check_draft(config: Config, target_config: Any) -> None:
    """Raises SettingError, before anything is computed, for a target that the config's draft cannot be built for."""
    build_draft_config(
        target_config,
        mask_token_id=0,
        target_layer_ids=config.draft.target_layer_ids,
        intermediate_size=config.draft.intermediate_size,
    )


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
