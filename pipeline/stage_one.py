"""Stage one as the command line runs it: config sections to `stages.extract`'s settings."""

from collections.abc import Callable

from pipeline.config import Config
from stages.extract import run
from stages.extract.price import Price
from stages.extract.samples import SampleCounts


def settings_of(config: Config) -> run.Settings:
    """The sections that stage one reads."""
    return run.Settings(
        target=config.target,
        data=config.data,
        cache=config.cache,
        extract=config.extract,
        mask_token_id=config.draft.mask_token_id,
    )


def estimate(config: Config) -> tuple[Price, SampleCounts]:
    """Price the extraction; nothing is written and no weights are read."""
    return run.estimate(settings_of(config))


def extract(config: Config, *, show_price: Callable[[Price, SampleCounts], None]) -> run.ExtractResult:
    """Plan and compute what the cache lacks."""
    return run.extract(settings_of(config), show_price=show_price)
