"""Dropping damaged shards, so that the next extract computes just these, and what dead writers left.

Only commits, markers and states are removed, each shard's under its lock; never the plan, never a sound shard.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from storage import layout
from storage.commit import list_commits
from storage.errors import CacheBusyError, CacheCorruptError, CacheReadError
from storage.files import check_folders, disk_errors, sync_directory
from storage.locks import locked_shard
from storage.plan import PLAN_REMEDY, CachePlan
from storage.temps import remove_stale_temps, remove_tree
from storage.verify import VerifyReport, is_damaged

_REFUSED = ("plan", "unreadable")


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What was done, shards ascending, names relative to the cache."""

    dropped_shards: tuple[int, ...]  # they had a commit and now have none
    busy_shards: tuple[int, ...]  # a writer holds them, so they were left alone
    removed: tuple[str, ...]  # leftovers


def repair_cache(path: str | os.PathLike[str], report: VerifyReport) -> RepairReport:
    """Drop commit, marker and states of every shard that ``verify_cache`` found bad, and remove leftovers.

    A shard is looked at again under its lock: one that somebody has computed anew meanwhile stays. Raises
    CacheCorruptError if the plan is damaged, CacheReadError if some file could not be read, CacheWriteError or
    CacheSpaceError if the disk refuses.
    """
    root = Path(path)
    _check_repairable(root, report)
    plan = CachePlan.read(root)
    dropped: list[int] = []
    busy: list[int] = []
    with disk_errors(root):
        removed = remove_stale_temps([root, root / layout.SHARDS, root / layout.COMMITS], strict=True)
        for shard in sorted({*report.bad_shards, *_leftover_shards(plan)}):
            try:
                with locked_shard(root, shard):
                    if shard not in report.bad_shards:
                        removed += _remove_uncommitted(root, shard)
                    elif _drop_damaged(plan, shard, quick=report.quick):
                        dropped.append(shard)
            except CacheBusyError:
                busy.append(shard)
    return RepairReport(
        dropped_shards=tuple(dropped),
        busy_shards=tuple(busy),
        removed=tuple(item.relative_to(root).as_posix() for item in removed),
    )


def _check_repairable(root: Path, report: VerifyReport) -> None:
    files = {kind: sorted({problem.file for problem in report.problems if problem.kind == kind}) for kind in _REFUSED}
    if files["plan"]:
        raise CacheCorruptError(
            f"{root}: cannot be repaired: {_some(files['plan'])} of its plan is damaged, and shards are made from the "
            f"plan; {PLAN_REMEDY}"
        )
    if files["unreadable"]:
        raise CacheReadError(
            f"{root}: not repaired: {_some(files['unreadable'])} cannot be read and may be sound; see to permissions "
            "and disk, then verify again"
        )
    check_folders(root)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _leftover_shards(plan: CachePlan) -> set[int]:
    """Planned shards of which there is a directory or a marker, but no commit."""
    commits, markers = list_commits(plan.path)
    shards = plan.path / layout.SHARDS
    names = os.listdir(shards) if shards.is_dir() else []
    directories = {shard for name in names if (shard := layout.parse_shard(name)) is not None}
    return ((markers | directories) - commits) & set(range(plan.num_shards))


def _remove_uncommitted(root: Path, shard: int) -> list[Path]:
    """Remove what a crash left of a shard, unless it has been committed meanwhile; give what is gone."""
    if os.path.lexists(root / layout.commit_name(shard)):
        return []
    found = [root / layout.shard_name(shard), root / layout.excluded_name(shard)]
    removed = [path for path in found if os.path.lexists(path)]
    for path in removed:
        remove_tree(path, strict=True)
    return removed


def _drop_damaged(plan: CachePlan, shard: int, *, quick: bool) -> bool:
    """Drop a shard, its commit first; False if it is sound now."""
    commit, marker = plan.path / layout.commit_name(shard), plan.path / layout.excluded_name(shard)
    if not is_damaged(plan, shard, has_marker=os.path.lexists(marker), quick=quick):
        return False
    remove_tree(commit, strict=True)
    remove_tree(marker, strict=True)
    sync_directory(commit.parent)
    remove_tree(plan.path / layout.shard_name(shard), strict=True)
    return True
