"""What a trial was made from, beside its config: cache, order of the data, revision of the code, versions."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config import Config
from stages.train.order import digest_order, plan_windows, resolve_window
from storage import CacheReader

PACKAGES = ("dspark-offline", "torch", "transformers", "numpy", "safetensors", "optuna")


def describe_cache(reader: CacheReader) -> dict[str, str]:
    """What says that two trials were trained from the same cache."""
    return {"cache.identity": reader.identity.digest(), "cache.plan": reader.manifest.plan_digest}


def describe_origin(config: Config, reader: CacheReader) -> dict[str, Any]:
    """What a trial was made from, as plain JSON values.

    cache     digests of the identity and of the plan
    order     sha256 of the training split's sample ids in the order of the first epoch
    revision  the code's git commit, `+` behind it where files were changed; None outside a checkout
    versions  of Python and the packages that decide numbers
    """
    return {
        "cache": {"path": str(reader.place), **describe_cache(reader)},
        "order": _digest_first_epoch(config, reader),
        "revision": find_revision(),
        "versions": find_versions(),
    }


def find_revision(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout that `folder`'s own files are tracked in."""
    if _git(folder, "ls-files", "--error-unmatch", "--", "__init__.py") is None:
        return None  # none at all, or one that this code merely lies in
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+" if changes else "")


def find_versions() -> dict[str, str]:
    """Versions of Python and `PACKAGES`, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _digest_first_epoch(config: Config, reader: CacheReader) -> str:
    train = resolve_window(config.train, is_remote=reader.is_remote)
    indices = reader.split_indices("train")
    order = plan_windows(reader.shards[indices], window=train.shuffle_window or 0, seed=train.seed, epoch=0)
    return digest_order(reader.sample_ids[indices[order]])


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None where it is not there or refuses."""
    try:
        done = subprocess.run(  # noqa: S603 — fixed arguments
            ["git", "-C", str(folder), *arguments],  # noqa: S607 — whichever git the user has
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
