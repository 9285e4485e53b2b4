"""A process killed at any named point leaves something that the same command turns into the undisturbed cache."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fork_killer import kill_at_faults
from storage import (
    CacheBusyError,
    CacheError,
    CacheIncompleteError,
    CachePlan,
    CacheReader,
    CacheSpaceError,
    CacheUsageError,
    CacheWriter,
    ShardWriter,
    files,
    verify_cache,
)
from storage.faults import PLAN_FAULTS, SHARD_FAULTS
from storage.temps import temp_path
from storage_cache import LENGTHS, check_samples, files_of, fill_cache, make_cache, plan_cache, states_of

ROOT = Path(__file__).parent.parent
RUN = """
import sys
from pathlib import Path
from storage_cache import LENGTHS, fill_cache, plan_cache
path = Path(sys.argv[1])
plan_cache(path, LENGTHS)
fill_cache(path, exclude=(103,))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(make_cache(tmp_path_factory.mktemp("undisturbed") / "c", exclude=(103,)))


def partial_state(path: Path, fault: str) -> bool:
    """Whether the kill left what its point is about."""
    found = files_of(path)
    temps = [name for name in found if ".tmp-" in name]
    committed = "manifest.json" in found
    if fault.startswith("plan."):
        parts = {"plan.samples": "samples/00000.parquet", "plan.target": "target/config.json"}
        parts |= {"plan.index": "index.parquet", "plan.manifest": "samples/00004.parquet"}
        return committed == (fault == "plan.committed") and parts.get(fault, found.__iter__().__next__()) in found
    in_temp = [name for name in temps if name.startswith("shards/")]
    renamed = "shards/00000.zarr/zarr.json" in found
    if fault in ("shard.opened", "shard.appended", "shard.written", "shard.synced"):
        payload = sum(len(found[name]) for name in in_temp if "/c/0/0" in name)
        written = fault in ("shard.written", "shard.synced")  # before, less than one inner chunk is waiting in memory
        return bool(in_temp) and not renamed and (payload > 0) == written
    if fault == "commit.written":
        return renamed and any(name.startswith("commits/.tmp-") for name in temps)
    return renamed and not temps and ("commits/00000.json" in found) == (fault == "commit.renamed")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAULT: caches whose writers were killed there."""
    folder = tmp_path_factory.mktemp("killed")
    kill_at_faults(RUN, [(fault, str(folder / fault)) for fault in [*PLAN_FAULTS, *SHARD_FAULTS]])
    return folder


@pytest.mark.parametrize("fault", [*PLAN_FAULTS, *SHARD_FAULTS])
def test_killed_anywhere_and_finished_is_byte_identical(
    killed: Path, fault: str, undisturbed: dict[str, bytes]
) -> None:
    path = killed / fault
    assert partial_state(path, fault)
    assert not verify_cache(path).ok
    with pytest.raises(CacheError):
        CacheReader(path)
    if not (path / "manifest.json").exists():
        plan_cache(path, LENGTHS)
    fill_cache(path, exclude=(103,))
    assert files_of(path) == undisturbed
    assert verify_cache(path).ok
    check_samples(CacheReader(path), LENGTHS, exclude=(103,))


def test_the_marker_comes_before_the_record(tmp_path: Path) -> None:
    """Killed between the two, then finished without an exclusion: the stale marker goes."""
    path = tmp_path / "c"
    plan_cache(path, LENGTHS)
    fill_cache(path, [0])
    (path / "commits/00001.excluded").touch()
    fill_cache(path)
    assert not list(path.glob("commits/*.excluded"))
    check_samples(CacheReader(path), LENGTHS)


def test_an_error_in_the_body_publishes_nothing_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "c"
    plan = plan_cache(path, LENGTHS)
    before = files_of(path)
    writer = CacheWriter(path)
    sample = plan.read_samples(0)[0]

    def compute() -> None:
        with writer.shard(0) as shard:
            shard.append(*states_of(sample, plan.header))
            raise KeyError("forward")

    with pytest.raises(KeyError, match="forward"):
        compute()
    assert files_of(path) == before
    assert not list((path / "shards").iterdir())
    assert writer.missing_shards() == [0, 1, 2, 3, 4]


def test_row_counts_and_shapes_must_be_the_planned_ones(tmp_path: Path) -> None:
    path = tmp_path / "c"
    plan = plan_cache(path, LENGTHS)
    writer = CacheWriter(path)
    hidden, last = torch.zeros(21, 3, 8), torch.zeros(21, 8)
    with pytest.raises(CacheUsageError, match="19 rows were appended, 20 are planned"), writer.shard(0) as shard:
        shard.append(hidden[:19], last[:19])
    with pytest.raises(CacheUsageError, match="more rows than the 20 planned ones"), writer.shard(0) as shard:
        shard.append(hidden, last)
    with pytest.raises(CacheUsageError, match=r"expected rows \[T, 3, 8\], got \[20, 2, 8\]"), writer.shard(0) as shard:
        shard.append(hidden[:20, :2], last[:20])
    with pytest.raises(CacheUsageError, match="20 rows of hidden_states, but 19"), writer.shard(0) as shard:
        shard.append(hidden[:20], last[:19])
    with pytest.raises(CacheUsageError, match="sample 999 is not in this shard"), writer.shard(0) as shard:
        shard.exclude(999, "x")
    assert not list((path / "shards").iterdir())
    with pytest.raises(CacheUsageError, match="no shard 5; the plan has 5"):
        writer.shard(5)
    fill_cache(path, [0])
    with pytest.raises(CacheBusyError, match="already committed"):
        writer.shard(0).__enter__()
    assert plan.num_shards == 5


def append_all(shard: ShardWriter, plan: CachePlan, number: int) -> None:
    for sample in plan.read_samples(number):
        shard.append(*states_of(sample, plan.header))


def test_a_shard_that_is_being_written_is_busy(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    path = tmp_path / "c"
    plan = plan_cache(path, LENGTHS)
    late = CacheWriter(path)
    with CacheWriter(path).shard(0) as shard:
        append_all(shard, plan, 0)
        with pytest.raises(CacheBusyError, match=r"00000\.zarr: another process is writing this shard"):
            late.shard(0).__enter__()
        with late.shard(1) as other:
            append_all(other, plan, 1)
    with pytest.raises(CacheBusyError, match="already committed"):
        late.shard(0).__enter__()
    assert late.missing_shards() == [2, 3, 4]
    fill_cache(path, exclude=(103,))
    assert files_of(path).keys() <= undisturbed.keys(), "the lock leaves no file"


def test_without_locks_the_second_to_finish_leaves_the_shard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "c"
    plan = plan_cache(path, LENGTHS)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    first, second = CacheWriter(path).shard(0), CacheWriter(path).shard(0)
    for shard in (first, second):
        append_all(shard.__enter__(), plan, 0)
    first.__exit__(None, None, None)
    committed = (path / "shards/00000.zarr").stat().st_ino
    with pytest.raises(CacheBusyError, match="already committed"):
        second.__exit__(None, None, None)
    assert (path / "shards/00000.zarr").stat().st_ino == committed
    fill_cache(path)
    assert verify_cache(path).ok


@pytest.mark.parametrize("number", [0, 3])
def test_a_commit_whose_shard_is_gone_is_missing_and_computed_again(tmp_path: Path, number: int) -> None:
    path = make_cache(tmp_path / "c", exclude=(103,))
    before = files_of(path)
    shutil.rmtree(path / f"shards/{number:05d}.zarr")
    assert CacheWriter(path).missing_shards() == [number]
    fill_cache(path, exclude=(103,))
    assert files_of(path) == before
    assert verify_cache(path).ok


def test_temps_of_the_dead_go_and_of_the_living_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    plan_cache(path, LENGTHS)
    code = (
        "import sys, time; from pathlib import Path; from storage.temps import temp_path\n"
        "temp = temp_path(Path(sys.argv[1])); temp.mkdir(); print(temp.name, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path / "shards/00001.zarr")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with child:
        assert child.stdout is not None
        living = path / "shards" / child.stdout.readline().strip()
        foreign = living.with_name(living.name.replace(living.name[5:17], "0" * 12))
        old = living.with_name(living.name.replace(living.name[5:17], "1" * 12))
        foreign.mkdir()
        old.mkdir()
        os.utime(old, (0, 0))
        CacheWriter(path)
        assert living.exists()
        assert foreign.exists()  # on a machine that we cannot see into: only a day without change makes it stale
        assert not old.exists()
        child.kill()
    CacheWriter(path)
    assert not living.exists()


def test_a_recycled_process_id_does_not_keep_a_temp(tmp_path: Path) -> None:
    path = tmp_path / "c"
    plan_cache(path, LENGTHS)
    temp = temp_path(path / "shards/00001.zarr")
    machine, pid, start, rest = temp.name.removeprefix(".tmp-").split("-", 3)
    recycled = temp.with_name(f".tmp-{machine}-{pid}-{int(start) - 1}-{rest}")
    recycled.mkdir()
    temp.mkdir()
    CacheWriter(path)
    assert temp.exists()
    assert not recycled.exists()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    plan = plan_cache(path, LENGTHS)
    before = files_of(path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def compute() -> None:
        with CacheWriter(path).shard(0) as shard:
            append_all(shard, plan, 0)
            monkeypatch.setattr(files.os, "write", full)

    with pytest.raises(CacheSpaceError, match="No space left on device; free some space"):
        compute()
    monkeypatch.undo()
    assert files_of(path) == before
    fill_cache(path)
    assert verify_cache(path).ok


def test_incomplete_says_how_much_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "c"
    plan_cache(path, LENGTHS)
    fill_cache(path, [1, 4])
    with pytest.raises(CacheIncompleteError, match=r"3 of 5 shards are missing \(first: 0\); run the same extract"):
        CacheReader(path)
    report = verify_cache(path)
    assert report.missing_shards == (0, 2, 3)
    assert not report.problems
    assert not report.ok
    assert CachePlan.read(path).bytes_on_disk([1]) > 0
