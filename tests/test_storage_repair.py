"""Repairing: bad shards lose their commits and are computed again to the same bytes; nothing else is touched."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import (
    CacheCorruptError,
    CacheUsageError,
    CacheWriter,
    RepairReport,
    repair_cache,
    verify_cache,
)
from storage.temps import temp_path
from storage_cache import files_of, fill_cache, make_cache

EXCLUDED = (103,)
NOTHING = RepairReport(dropped_shards=(), busy_shards=(), removed=())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("pristine") / "c", exclude=EXCLUDED)


@pytest.fixture
def cache(tmp_path: Path, pristine: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "c"))


def flip(path: Path, place: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def states_file(cache: Path, shard: int, array: str = "hidden_states") -> Path:
    return cache / f"shards/{shard:05d}.zarr/{array}/c/0/0{'/0' * (array == 'hidden_states')}"


def repair(cache: Path, *, quick: bool = False) -> RepairReport:
    return repair_cache(cache, verify_cache(cache, quick=quick))


def test_three_kinds_of_damage_are_repaired_to_the_same_bytes(cache: Path) -> None:
    before = files_of(cache)
    sound = states_file(cache, 4).stat().st_ino
    flip(states_file(cache, 0), 100)
    flip(cache / "commits/00001.json", 40)
    os.truncate(states_file(cache, 3, "last_hidden_states"), 100)
    assert verify_cache(cache).bad_shards == (0, 1, 3)
    assert repair(cache) == RepairReport(dropped_shards=(0, 1, 3), busy_shards=(), removed=())
    assert not (cache / "commits/00001.excluded").exists()
    report = verify_cache(cache)
    assert (report.problems, report.missing_shards) == ((), (0, 1, 3))
    fill_cache(cache, exclude=EXCLUDED)
    assert files_of(cache) == before
    assert states_file(cache, 4).stat().st_ino == sound
    assert verify_cache(cache).ok


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: shutil.rmtree(cache / "shards/00002.zarr"),
        lambda cache: states_file(cache, 2).unlink(),
        lambda cache: (cache / "commits/00002.excluded").touch(),
        lambda cache: shutil.copy(cache / "commits/00003.json", cache / "commits/00002.json"),
        lambda cache: flip(cache / "shards/00002.zarr/zarr.json", 3),
        lambda cache: flip(states_file(cache, 2), -1),
    ],
    ids=["no directory", "no file", "marker", "other commit", "group", "footer"],
)
@pytest.mark.parametrize("quick", [False, True])
def test_every_kind_of_damage_is_repaired(cache: Path, damage: Callable[[Path], object], quick: bool) -> None:
    before = files_of(cache)
    damage(cache)
    assert repair(cache, quick=quick).dropped_shards == (2,)
    fill_cache(cache, exclude=EXCLUDED)
    assert files_of(cache) == before


def test_a_sound_cache_stays_as_it_is(cache: Path) -> None:
    before = files_of(cache)
    assert repair(cache) == NOTHING
    (cache / "notes.txt").write_text("mine")
    (cache / "shards/00001.zarr/notes.txt").write_text("mine")
    assert not verify_cache(cache).ok
    assert repair(cache) == NOTHING
    assert files_of(cache) == before | {"notes.txt": b"mine", "shards/00001.zarr/notes.txt": b"mine"}


def test_a_shard_that_was_computed_anew_since_the_report_stays(cache: Path) -> None:
    before = files_of(cache)
    flip(states_file(cache, 2))
    report = verify_cache(cache)
    (cache / "commits/00002.json").unlink()
    fill_cache(cache, exclude=EXCLUDED)
    assert repair_cache(cache, report) == NOTHING
    assert files_of(cache) == before


@pytest.mark.parametrize("name", ["manifest.json", "index.parquet", "samples/00001.parquet", "target/config.json"])
@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flip", "delete"])
def test_a_damaged_plan_is_refused_and_nothing_is_dropped(
    cache: Path, name: str, damage: Callable[[Path], object]
) -> None:
    flip(states_file(cache, 0))
    damage(cache / name)
    before = files_of(cache)
    with pytest.raises(CacheCorruptError, match=rf"cannot be repaired: {name} of its plan .* put it back"):
        repair(cache)
    assert files_of(cache) == before


@pytest.mark.parametrize("name", ["shards", "commits"])
def test_nothing_behind_a_link_is_removed(cache: Path, tmp_path: Path, name: str) -> None:
    (cache / name).rename(tmp_path / "elsewhere")
    (cache / name).symlink_to(tmp_path / "elsewhere")
    before = files_of(tmp_path / "elsewhere")
    with pytest.raises(CacheCorruptError, match="is a link, and nothing behind it is removed"):
        repair(cache)
    assert files_of(tmp_path / "elsewhere") == before


def test_leftovers_of_the_dead_go_and_a_busy_shard_stays(cache: Path) -> None:
    before = files_of(cache)
    writer = CacheWriter(cache)
    machine, pid, start, rest = temp_path(Path("00003.json")).name.removeprefix(".tmp-").split("-", 3)
    dead = f".tmp-{machine}-{pid}-{int(start) - 1}-{rest}"
    for shard in (1, 2, 3):
        (cache / f"commits/{shard:05d}.json").unlink()
    (cache / "commits" / dead).touch()
    with contextlib.suppress(CacheUsageError), writer.shard(2):  # nothing is appended to it
        assert {problem.kind for problem in verify_cache(cache).problems} == {"leftover"}
        found = repair(cache)
        assert (found.dropped_shards, found.busy_shards) == ((), (2,))
        assert sorted(found.removed) == [
            f"commits/{dead}", "commits/00001.excluded", "shards/00001.zarr", "shards/00003.zarr"
        ]  # fmt: skip
        assert (cache / "shards/00002.zarr").is_dir()
        assert any(path.name.startswith(".tmp-") for path in (cache / "shards").iterdir()), "a living writer's stays"
    fill_cache(cache, exclude=EXCLUDED)
    assert files_of(cache) == before


def test_a_temporary_directory_is_told_once(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    temp = temp_path(cache / "shards/00001.zarr")
    for name in ("zarr.json", "hidden_states/zarr.json", "hidden_states/c/0/0/0"):
        (temp / name).parent.mkdir(parents=True, exist_ok=True)
        (temp / name).write_bytes(b"x")
    (problem,) = verify_cache(cache).problems
    assert problem.file == f"shards/{temp.name}"
    assert problem.kind == "leftover"
