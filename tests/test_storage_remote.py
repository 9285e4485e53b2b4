"""Caches pushed to and pulled from a real S3 server on loopback."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fork_killer import kill_at_faults
from object_store import ObjectStore, serve_objects
from storage import (
    CacheCorruptError,
    CacheExistsError,
    CacheIdentityError,
    CacheIncompleteError,
    CacheNotFoundError,
    CacheReader,
    CacheReadError,
    CacheUsageError,
    pull_cache,
    push_cache,
    remote,
    verify_cache,
)
from storage.faults import PULL_FAULTS, PUSH_FAULTS
from storage_cache import LENGTHS, files_of, fill_cache, make_cache, make_header, plan_cache

PUSH = "import sys; from storage import push_cache; push_cache(sys.argv[1], sys.argv[2])"
PULL = "import sys; from storage import pull_cache; pull_cache(sys.argv[1], sys.argv[2])"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with serve_objects() as store:
        yield store


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("remote") / "c", exclude=(103,))


@pytest.fixture(scope="module")
def pushed(store: ObjectStore, cache: Path) -> str:
    """The address of the cache, for tests that do not damage it."""
    push_cache(cache, store.url("pushed"))
    return store.url("pushed")


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_there_and_back_is_the_same_tree(store: ObjectStore, cache: Path, tmp_path: Path) -> None:
    store.requests.clear()
    result = push_cache(cache, store.url("whole"))
    assert (result.num_copied, result.num_present, result.num_missing) == (5, 0, 0)
    assert store.files("whole") == files_of(cache)
    puts = [key.removeprefix("whole/") for method, key in store.requests if method == "PUT"]
    assert puts.index("manifest.json") == 3 + 5, "behind the index, two files of the target and five of samples"
    for shard in range(5):
        numbered = [key for key in puts[9:] if f"{shard:05d}" in key]
        assert numbered[-1] == f"commits/{shard:05d}.json"
        assert ("commits/00001.excluded" in numbered[-2:]) == (shard == 1)
    result = pull_cache(store.url("whole"), tmp_path / "back")
    assert (result.num_copied, result.num_bytes) == (5, sum(path.stat().st_size for path in shard_files(cache)))
    assert files_of(tmp_path / "back") == files_of(cache)
    assert verify_cache(tmp_path / "back").ok


def shard_files(cache: Path) -> list[Path]:
    return [path for path in [*cache.glob("shards/**/*"), *cache.glob("commits/*")] if path.is_file()]


def test_what_is_there_is_not_sent_again(store: ObjectStore, cache: Path, tmp_path: Path) -> None:
    push_cache(cache, store.url("again"))
    store.requests.clear()
    assert push_cache(cache, store.url("again")).num_present == 5
    assert not [key for method, key in store.requests if method == "PUT"]
    store.put("again/shards/00002.zarr/hidden_states/c/0/0/0", b"short")
    store.client().delete_object(Bucket=store.bucket, Key="again/commits/00004.json")
    result = push_cache(cache, store.url("again"))
    assert (result.num_copied, result.num_present) == (2, 3)
    assert store.files("again") == files_of(cache)
    back = tmp_path / "back"
    pull_cache(store.url("again"), back)
    os.truncate(back / "shards/00001.zarr/last_hidden_states/c/0/0", 100)
    shutil.rmtree(back / "shards/00003.zarr")
    (back / "commits/00000.json").unlink()
    store.requests.clear()
    result = pull_cache(store.url("again"), back)
    assert (result.num_copied, result.num_present) == (3, 2)
    assert len(store.fetched("/c/0")) == 6
    assert files_of(back) == files_of(cache)


def partial_state(path: Path, fault: str) -> bool:
    """Whether the kill left what its point is about."""
    found = files_of(path)
    temps = [name for name in found if ".tmp-" in name]
    if fault in ("plan.started", "fetch.plan", "plan.manifest"):
        num_samples = sum(name.startswith("samples/") for name in found)
        enough = {"plan.started": num_samples == 0, "fetch.plan": True, "plan.manifest": num_samples == 5}
        return "manifest.json" not in found and "manifest.json.partial" in found and enough[fault]
    if fault in ("fetch.opened", "fetch.array", "fetch.synced"):
        directories = list(path.glob("shards/.tmp-*"))
        return bool(directories) and ("/c/0/0" in "".join(temps) or fault == "fetch.opened")
    if fault == "fetch.commit":
        return any(name.startswith("commits/.tmp-") for name in temps)
    committed = list(path.glob("commits/*.json"))
    renamed = list(path.glob("shards/0*.zarr"))
    return (
        "manifest.json" in found
        and {
            "plan.committed": not renamed,
            "fetch.renamed": bool(renamed),
            "fetch.marker": bool(renamed),
            "fetch.committed": bool(committed),
        }[fault]
    )


@pytest.fixture(scope="module")
def killed_pulls(pushed: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAULT: copies whose pull was killed there."""
    folder = tmp_path_factory.mktemp("pulls")
    kill_at_faults(PULL, [(fault, pushed, str(folder / fault)) for fault in PULL_FAULTS])
    return folder


@pytest.fixture(scope="module")
def killed_pushes(store: ObjectStore, cache: Path) -> None:
    """Copies at FAULT in the store, whose push was killed there."""
    kill_at_faults(PUSH, [(fault, str(cache), store.url(fault)) for fault in PUSH_FAULTS])


@pytest.mark.parametrize("fault", PULL_FAULTS)
def test_a_killed_pull_is_finished_by_the_next(pushed: str, cache: Path, killed_pulls: Path, fault: str) -> None:
    path = killed_pulls / fault
    assert partial_state(path, fault)
    assert not verify_cache(path).ok
    pull_cache(pushed, path)
    assert files_of(path) == files_of(cache)
    assert verify_cache(path).ok


@pytest.mark.usefixtures("killed_pushes")
@pytest.mark.parametrize("fault", PUSH_FAULTS)
def test_a_killed_push_is_finished_by_the_next(store: ObjectStore, cache: Path, tmp_path: Path, fault: str) -> None:
    url = store.url(fault)
    there = store.files(fault)
    assert ("manifest.json" in there) == (fault != "push.plan")
    assert there
    assert not [name for name in there if name.startswith("commits/") and name.endswith(".json")]
    with pytest.raises(CacheNotFoundError if fault == "push.plan" else CacheIncompleteError):
        CacheReader(url, staging=tmp_path)
    push_cache(cache, url)
    assert store.files(fault) == files_of(cache)


def test_an_incomplete_cache_is_copied_as_it_is(store: ObjectStore, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    plan_cache(path, LENGTHS)
    fill_cache(path, [1, 4], exclude=(103,))
    result = push_cache(path, store.url("part"))
    assert (result.num_copied, result.num_missing) == (2, 3)
    assert pull_cache(store.url("part"), tmp_path / "back").num_missing == 3
    assert verify_cache(tmp_path / "back").missing_shards == (0, 2, 3)
    fill_cache(path, exclude=(103,))
    assert push_cache(path, store.url("part")).num_copied == 3
    assert pull_cache(store.url("part"), tmp_path / "back").num_copied == 3
    assert files_of(tmp_path / "back") == files_of(cache)


def test_damaged_bytes_are_not_uploaded(store: ObjectStore, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(cache, path)
    payload = path / "shards/00002.zarr/hidden_states/c/0/0/0"
    payload.write_bytes(flip(payload.read_bytes(), 77))
    with pytest.raises(CacheCorruptError, match=r"00002\.zarr/hidden_states.*inner chunk 0 has crc32c .*not pushed"):
        push_cache(path, store.url("damaged"))
    assert "commits/00002.json" not in store.files("damaged")
    samples = path / "samples/00000.parquet"
    samples.write_bytes(flip(samples.read_bytes(), 77))
    with pytest.raises(CacheCorruptError, match=r"samples/00000\.parquet: has .* the file is damaged"):
        push_cache(path, store.url("plan damaged"))
    assert "manifest.json" not in store.files("plan damaged")


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("shards/00003.zarr/hidden_states/c/0/0/0", 77, "inner chunk 0 has crc32c .*delete commits/00003.json there"),
        ("shards/00003.zarr/last_hidden_states/c/0/0", -3, "the index of inner chunks is damaged"),
        ("commits/00003.json", 30, "do not match its own crc32c|is not JSON"),
        ("samples/00003.parquet", 77, "samples/00003.parquet: has crc32c .* the store's copy is damaged"),
        ("target/config.json", 3, "target/config.json: has crc32c"),
        ("manifest.json", 500, "do not match its own crc32c|is not JSON"),
    ],
)
def test_a_flipped_byte_in_the_store_is_refused(
    store: ObjectStore, cache: Path, tmp_path: Path, name: str, place: int, message: str
) -> None:
    push_cache(cache, store.url("flipped"))
    data = store.files("flipped")[name]
    store.put(f"flipped/{name}", flip(data, place % len(data)))
    with pytest.raises(CacheCorruptError, match=message) as caught:
        pull_cache(store.url("flipped"), tmp_path / "back")
    assert str(caught.value).startswith(f"{store.url('flipped')}/{name}: ")
    assert not (tmp_path / "back/commits/00003.json").exists()
    store.put(f"flipped/{name}", data)
    pull_cache(store.url("flipped"), tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(cache)


def test_a_short_or_missing_file_in_the_store_is_named(store: ObjectStore, cache: Path, tmp_path: Path) -> None:
    push_cache(cache, store.url("short"))
    name = "shards/00003.zarr/hidden_states/c/0/0/0"
    store.put(f"short/{name}", b"x")
    with pytest.raises(CacheCorruptError, match=rf"{name}: has 1 bytes, expected 12308"):
        pull_cache(store.url("short"), tmp_path / "a")
    store.client().delete_object(Bucket=store.bucket, Key=f"short/{name}")
    with pytest.raises(CacheCorruptError, match=rf"{name}: is gone, but recorded; push the cache again"):
        pull_cache(store.url("short"), tmp_path / "b")
    push_cache(cache, store.url("short"))
    for path in (tmp_path / "a", tmp_path / "b"):
        pull_cache(store.url("short"), path)
        assert files_of(path) == files_of(cache)


def test_two_caches_are_not_mixed(pushed: str, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", header=make_header(dtype="float16"))
    tokens = make_cache(tmp_path / "tokens", [*LENGTHS[:-1], 10])
    for path, message in (
        (other, "dtype: cache has 'bfloat16'"),
        (tokens, "of the same identity, but of other tokens"),
    ):
        before = files_of(path)
        with pytest.raises(CacheIdentityError, match=message):
            push_cache(path, pushed)
        with pytest.raises(CacheIdentityError):
            pull_cache(pushed, path)
        assert files_of(path) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(CacheExistsError, match=r"not of an interrupted plan \(thesis.txt\)"):
        pull_cache(pushed, tmp_path / "mine")


def test_addresses_that_are_none(store: ObjectStore, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match=r"s3://caches-\w+/nothing/manifest\.json: not found.*dspark push one"):
        pull_cache(store.url("nothing"), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(CacheNotFoundError, match="s3://no-such-bucket/x/"):
        push_cache(cache, "s3://no-such-bucket/x")
    with pytest.raises(CacheReadError, match=r"nosuch://a/manifest\.json: ValueError: Protocol not known"):
        push_cache(cache, "nosuch://a")
    with pytest.raises(CacheUsageError, match="is no address; expected one such as s3://"):
        push_cache(cache, str(tmp_path / "b"))
    with pytest.raises(CacheUsageError, match="copied between a local folder and an address"):
        pull_cache(store.url("whole"), store.url("b"))
    with pytest.raises(CacheUsageError, match="dspark pull it"):
        verify_cache(store.url("whole"))


def test_a_store_that_is_gone(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    with serve_objects() as gone:
        push_cache(cache, gone.url("c"))
        reader = CacheReader(gone.url("c"), staging=tmp_path / "s")
        reader[0]
        gone.server.stop()
        reader[1]  # of the same shard, which is here
        for read in (lambda: reader[-1], lambda: pull_cache(gone.url("c"), tmp_path / "p")):
            with pytest.raises(
                CacheReadError, match=r"s3://caches-\w+/c/.*after 3 attempts. Check that the store can be"
            ):
                read()
        reader[2]


def test_a_disturbed_store_is_asked_again(
    cache: Path, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every first request of each file fails as a dropped connection does."""
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    connect, seen = remote.RemoteStore._connect, set()

    def disturbed(self: remote.RemoteStore) -> object:
        system, root = connect(self)
        name = sys._getframe(1).f_locals["name"]
        if name not in seen:
            seen.add(name)
            raise ConnectionResetError("reset by peer")
        return system, root

    monkeypatch.setattr(remote.RemoteStore, "_connect", disturbed)
    pull_cache(pushed, tmp_path / "back")
    assert len(seen) > 20
    assert files_of(tmp_path / "back") == files_of(cache)


def test_large_files_come_in_pieces(cache: Path, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    pull_cache(pushed, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(cache)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_file_systems(cache: Path, tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://{tmp_path}/there" if scheme == "file" else "memory://there"
    push_cache(cache, url)
    assert push_cache(cache, url).num_present == 5
    pull_cache(url, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(cache)
    if scheme == "file":
        assert files_of(tmp_path / "there") == files_of(cache)
