"""Several extractions of one cache: torchrun's ranks in one folder, one of them killed; parts in folders apart."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import Config, to_toml
from pipeline.stage_one import settings_of
from stages.errors import SettingError
from stages.extract import run
from stages.extract.share import Share
from storage import CacheReader, verify_cache
from storage_cache import files_of
from tiny_target import make_config

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_rank_begins_with_its_own_shards_and_ends_with_the_others(world: int) -> None:
    missing = [0, 1, 2, 4, 5, 9, 10]
    turns = [Share(rank=rank, world=world).plan_turns(missing) for rank in range(world)]
    assert all(sorted(turn) == missing for turn in turns)
    for rank, turn in enumerate(turns):
        own = [shard for shard in missing if shard % world == rank]
        assert turn[: len(own)] == own
        assert Share(rank=rank, world=world, is_folder_shared=False).plan_turns(missing) == own


def test_part_is_checked() -> None:
    assert Share.parse_part("2/4") == Share(rank=1, world=4, is_folder_shared=False)
    for part in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3"):
        with pytest.raises(SettingError, match=r"--part: expected I/N"):
            Share.parse_part(part)


def test_ranks_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "")
    assert Share.of_torchrun() == Share()
    for rank, world in (("1", ""), ("2", "2"), ("x", "2"), ("-1", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(SettingError, match="expected 0 <= RANK < WORLD_SIZE"):
            Share.of_torchrun()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="without torchrun"):
        Share.parse_part("1/2")


def write_config(config: Config, file: Path) -> Path:
    file.write_text(to_toml(config))
    return file


def torchrun(config_file: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Two gloo-sized ranks on this machine's CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "-m", "pipeline.cli", "extract", str(config_file)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def find_worker(config_file: Path, rank: int) -> int | None:
    """The process that does a rank's work: the one of the two with its RANK whose parent has it too."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            have_rank = [
                f"RANK={rank}".encode() in (place / "environ").read_bytes().split(b"\0")
                for place in (folder, folder.parent / str(parent))
            ]
            if str(config_file).encode() in words and all(have_rank):
                return int(folder.name)
        except (OSError, IndexError):
            continue
    return None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config(tmp_path_factory.mktemp("ranks"), num_chats=240)
    run.extract(settings_of(config))
    return config


@pytest.mark.slow
def test_two_ranks_share_a_cache_and_one_may_die(tmp_path: Path, undisturbed: Config) -> None:
    folder = undisturbed.cache.path.parent
    expected = files_of(undisturbed.cache.path)
    config = make_config(folder, cache__path=tmp_path / "cache")
    config_file = write_config(config, tmp_path / "ranks.toml")
    log = tmp_path / "log"
    process = torchrun(config_file, log)
    commits = config.cache.path / "commits"
    try:
        while process.poll() is None and not list(commits.glob("[0-9]*.json")):
            time.sleep(0.002)
        worker = find_worker(config_file, 1)
        assert worker is not None, log.read_text()
        os.kill(worker, signal.SIGKILL)
        missing = len(list((config.cache.path / "samples").iterdir())) - len(list(commits.glob("[0-9]*.json")))
        assert missing > 1, "the kill came too late to show anything"
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.kill()
    text = log.read_text()
    assert "rank 1 ended with signal 9" in text
    assert "rank 1: the others go on and take over its shards" in text
    assert "rank 1 had ended early, and the others have completed the cache" in text
    found = files_of(config.cache.path)
    assert [name for name in found if ".tmp-" in name] or found == expected, "only a temporary of the dead may be left"
    run.extract(settings_of(config))  # nothing to compute; removes what the dead rank left
    assert files_of(config.cache.path) == expected


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_whole_when_the_others_cannot_finish(
    tmp_path: Path, undisturbed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank dies at the same point; what is committed stays, and the same command finishes the job."""
    folder = undisturbed.cache.path.parent
    config = make_config(folder, cache__path=tmp_path / "cache")
    run.extract(settings_of(config))
    for commit in list((config.cache.path / "commits").glob("[0-9]*.json"))[1:]:
        commit.unlink()
    config_file = write_config(config, tmp_path / "ranks.toml")
    monkeypatch.setenv("DSPARK_FAULT", "shard.written")
    process = torchrun(config_file, tmp_path / "log")
    assert process.wait(timeout=120) != 0
    monkeypatch.delenv("DSPARK_FAULT")
    text = (tmp_path / "log").read_text()
    assert re.search(r"rank [01]: [0-9]+ shards are missing; run the same command again to finish", text)
    assert len(list((config.cache.path / "commits").glob("[0-9]*.json"))) == 1
    process = torchrun(config_file, tmp_path / "log")
    assert process.wait(timeout=120) == 0
    assert files_of(config.cache.path) == files_of(undisturbed.cache.path)


@pytest.mark.slow
def test_a_death_before_the_plan_ends_all_ranks(
    tmp_path: Path, undisturbed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank waits for the plan: nobody would write it."""
    config = make_config(undisturbed.cache.path.parent, cache__path=tmp_path / "cache")
    monkeypatch.setenv("DSPARK_FAULT", "plan.samples")
    process = torchrun(write_config(config, tmp_path / "ranks.toml"), tmp_path / "log")
    try:
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    assert "rank 0 ended with signal 9" in text
    assert "rank 0: the cache is not planned; run the same command again" in text


def test_parts_of_several_machines_merge_by_copying(
    tmp_path: Path, undisturbed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each machine plans for itself: equal inputs give equal plans. Shards are copied before their commits."""
    folder = undisturbed.cache.path.parent
    parts = []
    for number in (1, 2, 3):
        monkeypatch.setattr(platform, "node", lambda number=number: f"machine{number}")
        config = make_config(folder, cache__path=tmp_path / f"machine{number}")
        result = run.extract(settings_of(config), share=Share.parse_part(f"{number}/3"))
        assert result.num_missing_shards == result.num_shards - result.num_computed_shards > 0
        parts.append(config.cache.path)
    merged, *others = parts
    for part in others:
        for name in ("shards", "commits"):
            shutil.copytree(part / name, merged / name, dirs_exist_ok=True)
    found, expected = files_of(merged), files_of(undisturbed.cache.path)
    assert found.pop("manifest.json") != expected.pop("manifest.json"), "only the name of the host differs"
    assert found == expected
    assert verify_cache(merged).ok
    assert len(CacheReader(merged)) == len(CacheReader(undisturbed.cache.path))
