"""Names of files in a cache: the only code that spells one, and the only code that reads one back.

``*_name`` functions give paths relative to the cache directory, with forward slashes.
``parse_*`` functions turn a name found on disk or in a manifest into something typed, or give None / raise.
"""

import re
from pathlib import PurePosixPath

from storage.errors import CacheFormatError

MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.json.partial"
INDEX = "index.parquet"
TARGET = "target"
SAMPLES = "samples"
SHARDS = "shards"
COMMITS = "commits"
HIDDEN_STATES = "hidden_states"
LAST_HIDDEN_STATES = "last_hidden_states"
SCALE_SUFFIX = "_scale"
ZARR_METADATA = "zarr.json"
STAGING_LOCK = "space.lock"
STAGING_TURN = "turn.lock"

_TEMP = re.compile(r"\.tmp-([0-9a-f]{12})-([0-9]{1,10})-([0-9]{1,20})-([0-9a-f]{8})-.+", re.DOTALL)


def samples_name(shard: int) -> str:
    """The token ids and loss masks of one shard."""
    return f"{SAMPLES}/{shard:05d}.parquet"


def shard_name(shard: int) -> str:
    """The Zarr group of one shard."""
    return f"{SHARDS}/{shard:05d}.zarr"


def commit_name(shard: int) -> str:
    """The record that makes a shard count."""
    return f"{COMMITS}/{shard:05d}.json"


def excluded_name(shard: int) -> str:
    """The empty file that says: this shard's record names excluded samples."""
    return f"{COMMITS}/{shard:05d}.excluded"


def scale_name(array: str) -> str:
    """The array with the scales of another one, in the same group."""
    return array + SCALE_SUFFIX


def group_metadata_name() -> str:
    """The group's metadata, relative to the shard's directory."""
    return ZARR_METADATA


def array_metadata_name(array: str) -> str:
    """An array's metadata, relative to the shard's directory."""
    return f"{array}/{ZARR_METADATA}"


def array_data_name(array: str, num_axes: int) -> str:
    """The one chunk file of an array (Zarr's default key encoding), relative to the shard's directory."""
    return "/".join([array, "c"] + ["0"] * num_axes)


def temp_name(*, machine: str, pid: int, start: int, token: str, final: str) -> str:
    """Where something is written before it has its name; says which process writes it."""
    return f".tmp-{machine}-{pid}-{start}-{token}-{final}"


def parse_temp(name: str) -> tuple[str, int, int] | None:
    """(machine, pid, process start) of a temporary name, None for any other name."""
    match = _TEMP.fullmatch(name)
    return None if match is None else (match[1], int(match[2]), int(match[3]))


def parse_commit(name: str) -> int | None:
    """The shard of ``00017.json``, None for any other name."""
    return _parse_numbered(name, ".json")


def parse_excluded(name: str) -> int | None:
    """The shard of ``00017.excluded``, None for any other name."""
    return _parse_numbered(name, ".excluded")


def parse_shard(name: str) -> int | None:
    """The shard of ``00017.zarr``, None for any other name."""
    return _parse_numbered(name, ".zarr")


def staging_lock_name(key: str, shard: int) -> str:
    """What a process locks while it uses, fetches or evicts a staged shard; relative to the staging folder."""
    return f"{key}.shards/{shard:05d}.lock"


def staging_charge_name(key: str, shard: int) -> str:
    """How many bytes a staged shard takes, in decimal digits; relative to the staging folder."""
    return f"{key}.shards/{shard:05d}.bytes"


def staging_charge_pattern() -> str:
    """A glob of all charges."""
    return "*.shards/*.bytes"


def parse_staging_charge(name: str) -> tuple[str, int] | None:
    """(key of the cache, shard) of a charge's name, None for any other name."""
    key, _, file = name.partition(".shards/")
    shard = _parse_numbered(file, ".bytes")
    return None if shard is None else (key, shard)


def _parse_numbered(name: str, suffix: str) -> int | None:
    stem = name.removesuffix(suffix)
    if stem == name or not re.fullmatch(r"[0-9]{5,9}", stem):
        return None
    return int(stem) if f"{int(stem):05d}" == stem else None


def parse_plan_file(name: str) -> str:
    """Check a name from a manifest's ``files``: the index, a samples file, or something inside target/."""
    parts = PurePosixPath(name).parts
    plain = "/".join(parts) == name and not any(part in ("", ".", "..") for part in parts)
    if not plain or "\\" in name or "\0" in name:
        raise CacheFormatError(f"{MANIFEST}: file name {name!r} is not a plain path inside the cache")
    if name == INDEX or (parts[0] == TARGET and len(parts) > 1):
        return name
    if parts[0] == SAMPLES and len(parts) == 2 and _parse_numbered(parts[1], ".parquet") is not None:
        return name
    raise CacheFormatError(
        f"{MANIFEST}: file name {name!r} is none of {INDEX}, {SAMPLES}/NNNNN.parquet, {TARGET}/...; "
        "the manifest was not written by this code"
    )
