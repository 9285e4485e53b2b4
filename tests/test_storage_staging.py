"""Remote caches read through the staging folder: bounded, shared, fetched once an epoch, whole after any crash."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fork_killer import kill_at_faults
from object_store import ObjectStore, serve_objects
from stages.train.order import plan_windows
from storage import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheReader,
    CacheReadError,
    CacheSpaceError,
    push_cache,
    read_ahead,
    remote,
    staging,
)
from storage.faults import STAGING_FAULTS
from storage_cache import LENGTHS, check_samples, files_of, fill_cache, make_cache, plan_cache

ROOT = Path(__file__).parent.parent
SHARD_BYTES = 19_000  # of the tiny caches: two chunks of 256 tokens, metadata, record; measured and rounded up
MANY = [6] * 36  # twelve shards of three samples
READ = """
import sys
from pathlib import Path
from storage import CacheReader
from storage_cache import LENGTHS, check_samples
reader = CacheReader(sys.argv[1], staging=Path(sys.argv[2]), staging_bytes=int(sys.argv[3]))
reader.check_target()
check_samples(reader, LENGTHS, exclude=(103,))
print("read")
"""


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with serve_objects() as store:
        yield store


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("staging") / "c", exclude=(103,))


@pytest.fixture(scope="module")
def url(store: ObjectStore, cache: Path) -> str:
    push_cache(cache, store.url("c"))
    return store.url("c")


@pytest.fixture(scope="module")
def many(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> str:
    push_cache(make_cache(tmp_path_factory.mktemp("many") / "c", MANY), store.url("many"))
    return store.url("many")


def staged_bytes(folder: Path) -> int:
    """Bytes of shards on disk, whatever else the folder holds."""
    total = 0
    for directory, _, files in os.walk(folder):  # which does not mind that shards come and go
        if "/shards/" in directory or directory.endswith("/commits"):
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(f"{directory}/{name}").st_size
    return total


@contextlib.contextmanager
def watch(folder: Path) -> Iterator[Callable[[], int]]:
    """Measures in a thread of its own what the shards in the folder take at most."""
    most, done = [0], threading.Event()

    def measure() -> None:
        while not done.is_set():
            most[0] = max(most[0], staged_bytes(folder))
            done.wait(0.001)  # or the threads that read and serve get few turns

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        done.set()
        thread.join()


def test_samples_come_back_and_opening_is_cheap(store: ObjectStore, url: str, tmp_path: Path) -> None:
    store.requests.clear()
    reader = CacheReader(url, staging=tmp_path)
    names = {key.removeprefix("c/") for _, key in store.requests}
    assert names == {"manifest.json", "index.parquet", f"/{store.bucket}", "commits/00001.json"}, (
        "the one with exclusions"
    )
    assert reader.is_remote
    assert reader.place == url
    store.requests.clear()
    reader.read_tokens(0)
    assert set(store.fetched(".")) == {"c/samples/00000.parquet"}
    check_samples(reader, LENGTHS, exclude=(103,))
    check_samples(CacheReader(url, layers=(1, 3), io="pread", staging=tmp_path), LENGTHS, exclude=(103,))
    assert set(store.fetched("/c/0").values()) == {1}


def test_an_epoch_in_windows_fetches_each_shard_once_within_the_bound(
    store: ObjectStore, many: str, tmp_path: Path
) -> None:
    bound = 6 * SHARD_BYTES
    reader = CacheReader(many, staging=tmp_path, staging_bytes=bound)
    store.requests.clear()
    with watch(tmp_path) as most:
        for epoch in range(2):
            order = plan_windows(reader.shards, window=3, seed=1, epoch=epoch)
            reader.plan_reads(order, num_ahead=3)
            for index in order:
                assert reader[index].sample_id == reader.sample_ids[index]
                assert staged_bytes(tmp_path) <= bound
            if epoch == 0:
                assert set(store.fetched("/c/0").values()) == {1}
                assert len(store.fetched("hidden_states/c/0/0/0")) == 12
    assert max(store.fetched("/c/0").values()) <= 2
    assert 3 * SHARD_BYTES < most() <= bound
    reader.close()


def test_without_a_plan_the_bound_holds_too(store: ObjectStore, many: str, tmp_path: Path) -> None:
    bound = 2 * SHARD_BYTES
    reader = CacheReader(many, staging=tmp_path, staging_bytes=bound)
    with watch(tmp_path) as most:
        for index in np.random.default_rng(0).permutation(len(reader)):
            assert reader[index].sample_id == reader.sample_ids[index]
    assert SHARD_BYTES < most() <= bound


def test_the_next_shards_are_there_before_they_are_read(many: str, tmp_path: Path) -> None:
    reader = CacheReader(many, staging=tmp_path, staging_bytes=12 * SHARD_BYTES)
    reader.plan_reads(np.arange(len(reader)), num_ahead=3)
    wait_for(lambda: len(list(tmp_path.glob("*/commits/[0-9]*.json"))) == 3)
    time.sleep(0.2)
    assert [path.stem for path in sorted(tmp_path.glob("*/commits/[0-9]*.json"))] == ["00000", "00001", "00002"]
    reader[0]
    wait_for(lambda: len(list(tmp_path.glob("*/commits/[0-9]*.json"))) == 4)
    reader.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_reads_beside_the_plan_get_room_and_give_it_back(store: ObjectStore, many: str, tmp_path: Path) -> None:
    """As validation reads amid an epoch: every shard once, and the epoch goes on."""
    bound = 4 * SHARD_BYTES
    reader = CacheReader(many, staging=tmp_path, staging_bytes=bound)
    order = plan_windows(reader.shards, window=2, seed=1, epoch=0)
    reader.plan_reads(order, num_ahead=2)
    for index in order[:9]:
        reader[index]
    store.requests.clear()
    with watch(tmp_path) as most:
        check_samples(reader, MANY)
        for index in order[9:]:
            reader[index]
    assert most() <= bound
    # Once for the epoch, once for the reads beside it, and again where these took the room of what was fetched ahead.
    assert max(store.fetched("hidden_states/c/0/0/0").values()) <= 5
    reader.close()


def test_a_bound_that_is_too_small_is_named(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SPACE_WAIT_SECONDS", 0.3)
    reader = CacheReader(url, staging=tmp_path, staging_bytes=10_000)
    with pytest.raises(CacheSpaceError, match=r"takes 18,\d+ bytes, 0 are in use and 10,000 allowed; raise cache.stag"):
        reader[0]
    reader.plan_reads(np.arange(len(reader)))
    with pytest.raises(CacheSpaceError, match=r"raise cache\.staging_bytes"):
        reader[0]
    reader.close()
    holder = CacheReader(url, staging=tmp_path, staging_bytes=2 * SHARD_BYTES)
    other = CacheReader(url, staging=tmp_path, staging_bytes=2 * SHARD_BYTES)
    holder.plan_reads(np.arange(len(holder)), num_ahead=2)
    wait_for(lambda: len(list(tmp_path.glob("*/commits/[0-9]*.json"))) == 2)
    with pytest.raises(CacheSpaceError, match="or stop another run that reads from here"):
        other[5]
    assert other[0].sample_id == holder.sample_ids[0], "what is here may be shared"
    holder.close()
    check_samples(other, LENGTHS, exclude=(103,))


def test_two_caches_share_the_bound(store: ObjectStore, url: str, many: str, tmp_path: Path) -> None:
    bound = 3 * SHARD_BYTES
    with watch(tmp_path) as most:
        for _ in range(2):
            check_samples(CacheReader(many, staging=tmp_path, staging_bytes=bound), MANY)
            check_samples(CacheReader(url, staging=tmp_path, staging_bytes=bound), LENGTHS, exclude=(103,))
    assert 2 * SHARD_BYTES < most() <= bound


def start(url: str, folder: Path, *, bound: int) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    command = [sys.executable, "-c", READ, url, str(folder), str(bound)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def killed(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAULT: staging folders, with room for two shards, whose reader was killed there."""
    folder = tmp_path_factory.mktemp("killed")
    kill_at_faults(READ, [(fault, url, str(folder / fault), str(2 * SHARD_BYTES)) for fault in STAGING_FAULTS])
    return folder


@pytest.mark.parametrize("fault", STAGING_FAULTS)
def test_killed_anywhere_the_next_run_reads_on(url: str, killed: Path, fault: str) -> None:
    bound = 2 * SHARD_BYTES
    folder = killed / fault
    assert files_of(folder)
    with watch(folder) as most:
        reader = CacheReader(url, staging=folder, staging_bytes=bound)
        check_samples(reader, LENGTHS, exclude=(103,))
    assert SHARD_BYTES < most() <= bound
    assert not [name for name in files_of(folder) if ".tmp-" in name]
    reader.check_target()


def test_processes_share_one_folder(store: ObjectStore, url: str, cache: Path, tmp_path: Path) -> None:
    """Three at once, with room for all shards: each is fetched once."""
    store.requests.clear()
    processes = [start(url, tmp_path, bound=6 * SHARD_BYTES) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, "read\n"), errors
    assert set(store.fetched("/c/0").values()) == {1}
    [root] = [path for path in tmp_path.iterdir() if (path / "manifest.json").exists()]
    assert files_of(root) == files_of(cache)


def test_processes_that_evict_each_other_read_the_right_bytes(url: str, tmp_path: Path) -> None:
    bound = 4 * SHARD_BYTES
    with watch(tmp_path) as most:
        processes = [start(url, tmp_path, bound=bound) for _ in range(2)]
        for process in processes:
            output, errors = process.communicate(timeout=120)
            assert (process.returncode, output) == (0, "read\n"), errors
    assert most() <= bound


def test_threads_share_a_reader(url: str, tmp_path: Path) -> None:
    reader = CacheReader(url, staging=tmp_path, staging_bytes=2 * SHARD_BYTES)
    reader.plan_reads(np.arange(len(reader)), num_ahead=1)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: check_samples(reader, LENGTHS, exclude=(103,)), range(4)):
            pass
    reader.close()


def _read_in_child(reader: CacheReader, queue: "multiprocessing.Queue[str]") -> None:
    try:
        check_samples(reader, LENGTHS, exclude=(103,))
        queue.put("ok")
    except BaseException as error:
        queue.put(repr(error))


def test_a_reader_travels_into_a_new_process(url: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    reader = CacheReader(url, layers=(1, 3), staging=tmp_path, staging_bytes=5 * SHARD_BYTES)
    reader.plan_reads(np.arange(len(reader)))
    reader[0]
    queue = context.Queue()
    process = context.Process(target=_read_in_child, args=(reader, queue))
    process.start()
    assert queue.get(timeout=60) == "ok"
    process.join()
    queue.close()
    queue.join_thread()
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy.layers, copy.place, copy._source) == ((1, 3), url, reader._source)
    reader.close()


def test_a_forked_child_fetches_for_itself_and_keeps_no_lock(url: str, tmp_path: Path) -> None:
    bound = 2 * SHARD_BYTES
    reader = CacheReader(url, staging=tmp_path, staging_bytes=bound)
    reader.plan_reads(np.arange(len(reader)), num_ahead=1)
    reader[0]
    reader._opened._state.lock.acquire()  # a child that shared it would hang
    leave, waiting = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        idle, child = os.fork(), 0
        if idle == 0:
            os.close(waiting)
            os.read(leave, 1)  # keeps copies of every lock's file open, and does nothing
            os._exit(0)
        child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            own = CacheReader(url, staging=tmp_path / "own", staging_bytes=bound)
            check_samples(own, LENGTHS, exclude=(103,))
            assert reader[0].sample_id == reader.sample_ids[0]
            status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    reader._opened._state.lock.release()
    check_samples(reader, LENGTHS, exclude=(103,))
    os.write(waiting, b"x")
    assert os.waitpid(idle, 0)[1] == 0
    os.close(leave)
    os.close(waiting)
    reader.close()


def test_a_child_forked_amid_a_fetch_keeps_no_lock(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard's lock and that of the space are held when the child gets copies; it outlives the reads."""
    leave, waiting = os.pipe()
    children: list[int] = []
    make_room = staging.StagedCache._make_room

    def fork_and_make_room(self: staging.StagedCache, *arguments: Any) -> int:
        if not children:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                children.append(os.fork())
            if children == [0]:
                os.close(waiting)  # or it would outlive a test that dies
                os.read(leave, 1)
                os._exit(0)
        return make_room(self, *arguments)

    monkeypatch.setattr(staging.StagedCache, "_make_room", fork_and_make_room)
    reader = CacheReader(url, staging=tmp_path, staging_bytes=2 * SHARD_BYTES)
    try:
        for _ in range(2):  # shard 0 is evicted and fetched again
            check_samples(reader, LENGTHS, exclude=(103,))
        assert os.waitpid(children[0], os.WNOHANG) == (0, 0), "the child is alive"
    finally:
        os.write(waiting, b"x")
    assert os.waitpid(children[0], 0)[1] == 0
    os.close(leave)
    os.close(waiting)


def test_a_flipped_byte_in_the_store_never_arrives(store: ObjectStore, cache: Path, tmp_path: Path) -> None:
    push_cache(cache, store.url("flipped"))
    name = "shards/00002.zarr/hidden_states/c/0/0/0"
    data = bytearray(store.files("flipped")[name])
    data[90] ^= 2
    store.put(f"flipped/{name}", bytes(data))
    reader = CacheReader(store.url("flipped"), staging=tmp_path)
    [first, *_] = np.flatnonzero(reader.shards == 2)
    for plan in (False, True):
        if plan:  # the thread meets it ahead of the read
            reader.plan_reads(np.arange(first, len(reader)))
            wait_for(lambda: reader._opened._state.ahead._error is not None)
        with pytest.raises(
            CacheCorruptError, match=r"s3://caches-\w+/flipped/.*inner chunk 0 has crc32c .*push this shard"
        ):
            reader[first]
    assert not list(tmp_path.glob("*/shards/00002.zarr"))
    assert not list(tmp_path.glob("*.shards/00002.bytes")), "what was not fetched takes no space"
    reader.close()


def test_a_store_that_goes_away_while_shards_are_staged_ahead(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(read_ahead, "SPACE_PAUSE_SECONDS", 0.05)
    with serve_objects() as gone:
        push_cache(cache, gone.url("going"))
        reader = CacheReader(gone.url("going"), staging=tmp_path)
        reader.plan_reads(np.arange(len(reader)), num_ahead=1)
        reader[0]
        gone.server.stop()
        with pytest.raises(CacheReadError, match="Check that the store can be reached"):
            list(reader)
        reader.close()


def test_an_incomplete_cache_is_not_read(store: ObjectStore, tmp_path: Path) -> None:
    plan_cache(tmp_path / "c", LENGTHS)
    fill_cache(tmp_path / "c", [1])
    push_cache(tmp_path / "c", store.url("part"))
    with pytest.raises(
        CacheIncompleteError, match=r"s3://caches-\w+/part: 4 of 5 shards are missing .* then push it again"
    ):
        CacheReader(store.url("part"), staging=tmp_path / "s")


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert staging.default_staging() == tmp_path / "dspark-offline/staging"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert staging.default_staging() == tmp_path / "home/.cache/dspark-offline/staging"
