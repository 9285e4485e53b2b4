"""A config beside a cache that is there: what the config leaves open is what the cache was made with."""

from pathlib import Path

from pipeline.config import Config
from storage import CacheIdentity, CacheNotFoundError
from storage.manifest import read_manifest

SECTIONS = ("target", "data", "cache", "extract")  # a key here that an identity's field has the name of is that field


def adopt_cache(config: Config) -> Config:
    """As `adopt_identity`, of the cache in the config's folder; the config itself where none is planned there yet.

    Raises CacheError for a damaged one. A cache at an address is read by training alone, which adopts its identity.
    """
    if not isinstance(config.cache.path, Path):
        return config
    try:
        return adopt_identity(config, read_manifest(config.cache.path).identity)
    except CacheNotFoundError:
        return config


def adopt_identity(config: Config, identity: CacheIdentity) -> Config:
    """The config with the cache's encoding, layers, lengths and so on in place of defaults.

    What the config says is kept, so that it can be held against the cache.
    """
    changes = {}
    for name in SECTIONS:
        section = getattr(config, name)
        open_keys = (type(section).model_fields.keys() & CacheIdentity.model_fields.keys()) - section.model_fields_set
        changes[name] = section.model_copy(update={key: getattr(identity, key) for key in sorted(open_keys)})
    return config.model_copy(update=changes)
