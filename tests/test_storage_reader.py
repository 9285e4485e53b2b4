"""The reader as a sequence: layers, order, zero copy, processes and threads."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from storage import CacheReader, CacheUsageError, CacheWriter, mounts, open_shards
from storage_cache import LENGTHS, check_samples, fill_cache, make_cache, make_header, plan_cache, write_target

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("reader") / "c")


@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
@pytest.mark.parametrize("checks", ["touch", "size"])
@pytest.mark.parametrize("layers", [None, (-1,), (1,), (3,), (-1, 3), (1, 3), (-1, 1, 3)])
def test_samples_come_back(cache: Path, io: str, checks: str, layers: tuple[int, ...] | None) -> None:
    opened = CacheReader(cache, layers=layers, io=io, checks=checks)  # type: ignore[arg-type]
    check_samples(opened, LENGTHS)
    assert opened.layers == (layers or (-1, 1, 3))


@pytest.mark.parametrize("layers", [(-1, 2, 3), (1, 2, 4), (-1, 1, 2, 4)])
def test_unevenly_spaced_layers_are_copied(tmp_path: Path, layers: tuple[int, ...]) -> None:
    cache = make_cache(tmp_path / "c", [5, 6], make_header(layers=(-1, 1, 2, 3, 4)))
    check_samples(CacheReader(cache, layers=layers), [5, 6])


def test_it_behaves_as_a_list(cache: Path) -> None:
    opened = CacheReader(cache)
    assert len(opened) == len(LENGTHS)
    assert opened[-1].sample_id == opened[len(LENGTHS) - 1].sample_id == opened.sample_ids[-1]
    assert opened[np.int64(2)].sample_id == opened.sample_ids[2]
    for index in (len(LENGTHS), -len(LENGTHS) - 1):
        with pytest.raises(IndexError, match="of a cache with 11 samples"):
            opened[index]
    for index in (slice(0, 2), 1.0, "1"):
        with pytest.raises(TypeError):
            opened[index]  # type: ignore[index]


def test_columns_are_those_of_the_samples(cache: Path) -> None:
    opened = CacheReader(cache)
    for index, sample in enumerate(opened):
        assert opened.num_tokens[index] == sample.num_tokens == len(sample.input_ids)
        assert opened.num_supervised[index] == int(sample.loss_mask.sum())
        assert opened.splits[index] == sample.split
    assert opened.split_indices("validation").tolist() == np.flatnonzero(opened.splits == "validation").tolist()
    assert len(opened.split_indices("train")) + len(opened.split_indices("validation")) == len(opened)
    assert opened.shards.tolist() == sorted(opened.shards.tolist())
    assert opened.hidden_size == 8
    assert opened.dtype == torch.bfloat16
    assert (opened.target_dir / "config.json").exists()
    with pytest.raises(CacheUsageError, match="split is one of"):
        opened.split_indices("test")  # type: ignore[arg-type]


def test_wrong_options_are_named(cache: Path) -> None:
    for layers in ((), (3, 1), (1, 1), (2,)):
        with pytest.raises(CacheUsageError, match=r"ascending and among the stored \(-1, 1, 3\)"):
            CacheReader(cache, layers=layers)
    with pytest.raises(CacheUsageError, match="io is auto, mmap or pread, got 'fast'"):
        CacheReader(cache, io="fast")  # type: ignore[arg-type]


def test_excluded_samples_are_left_out(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", exclude=(100, 103, 110))
    opened = CacheReader(cache)
    assert len(opened) == len(LENGTHS) - 3
    check_samples(opened, LENGTHS, exclude=(100, 103, 110))
    assert sorted(path.name for path in cache.glob("commits/*.excluded")) == [
        "00000.excluded",
        "00001.excluded",
        "00004.excluded",
    ]


def test_opening_reads_names_index_and_manifest_only(tmp_path: Path) -> None:
    """With every other file unreadable as what it is, a cache still opens."""
    cache = make_cache(tmp_path / "c", exclude=(103,))
    for path in [*cache.rglob("*.json"), *cache.glob("samples/*"), *cache.glob("shards/*/*/c/**/0")]:
        if path.is_file() and path.name not in ("manifest.json", "00001.json"):
            path.write_bytes(b"")
    assert len(CacheReader(cache)) == len(LENGTHS) - 1


def test_states_are_views_of_the_mapping_and_writes_never_reach_the_file(cache: Path) -> None:
    path = cache / "shards/00000.zarr/hidden_states/c/0/0/0"
    before = path.read_bytes()
    opened = CacheReader(cache, io="mmap")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again = opened[0], opened[0]
    assert first.hidden_states.data_ptr() == again.hidden_states.data_ptr()
    assert first.hidden_states.is_contiguous()
    narrowed = CacheReader(cache, layers=(-1, 3), io="mmap")[0].hidden_states
    assert narrowed.stride()[1] == 2 * opened.hidden_size
    first.hidden_states.zero_()
    first.input_ids.zero_()
    assert path.read_bytes() == before
    assert opened[0].input_ids.any()
    check_samples(CacheReader(cache), LENGTHS)


def test_samples_outlive_the_reader_and_the_list_of_open_shards(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shards, "MAX_OPEN_SHARDS", 1)
    opened = CacheReader(cache, io="mmap")
    kept = list(opened)
    sums = [float(sample.hidden_states.float().sum()) for sample in kept]
    with opened:
        pass
    del opened
    assert [float(sample.hidden_states.float().sum()) for sample in kept] == sums
    num_files = len(os.listdir("/proc/self/fd"))
    pread = CacheReader(cache, io="pread")
    check_samples(pread, LENGTHS)
    assert len(os.listdir("/proc/self/fd")) <= num_files + 2


MEMORY = """
import resource, sys, torch
from pathlib import Path
from storage import CacheReader
def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024
opened = CacheReader(sys.argv[1], io="mmap")
opened[0].hidden_states[0, 0, 0].item()
before = anonymous()
size = 0
for sample in opened:
    size += sample.hidden_states.nbytes + sample.last_hidden_states.nbytes
    sample.hidden_states.view(torch.int16).max()
kept = list(opened)
grown = anonymous() - before
assert size > 190e6, size
assert grown < 8, grown
print(size, grown)
"""


def test_reading_two_hundred_megabytes_takes_no_memory(tmp_path: Path) -> None:
    header = make_header(hidden_size=2048, shard_bytes=64 << 20)
    plan_cache(tmp_path / "c", [1000] * 12, header)
    writer = CacheWriter(tmp_path / "c")
    states = torch.randn(1000, 4, 2048).to(torch.bfloat16)
    for number in writer.missing_shards():
        with writer.shard(number) as shard:
            for _ in writer.plan.read_samples(number):
                shard.append(states[:, :3], states[:, 3])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "c")], check=True, env=environment)


def _checked_in_child(opened: CacheReader, queue: "multiprocessing.Queue[str]") -> None:
    try:
        check_samples(opened, LENGTHS)
        queue.put("ok")
    except BaseException as error:
        queue.put(repr(error))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_reader_travels_into_a_new_process(cache: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    opened = CacheReader(cache)
    opened[0]
    queue = context.Queue()
    process = context.Process(target=_checked_in_child, args=(opened, queue))
    process.start()
    assert queue.get(timeout=60) == "ok"
    process.join()
    queue.close()
    queue.join_thread()


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_forked_child_opens_for_itself(cache: Path, io: str) -> None:
    """Forked while another thread holds the lock: a child that shared it would hang."""
    opened = CacheReader(cache, io=io)  # type: ignore[arg-type]
    opened[0]
    opened._opened._state.lock.acquire()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            check_samples(opened, LENGTHS)
            status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    opened._opened._state.lock.release()
    check_samples(opened, LENGTHS)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_many_threads_share_a_reader(cache: Path, io: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shards, "MAX_OPEN_SHARDS", 2)
    opened = CacheReader(cache, io=io)  # type: ignore[arg-type]
    barrier = threading.Barrier(6)

    def work(_: int) -> None:
        barrier.wait()
        for _ in range(5):
            check_samples(opened, LENGTHS)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_pickling_keeps_the_options(cache: Path) -> None:
    opened = CacheReader(cache, layers=(1, 3), io="pread", checks="size")
    copy = pickle.loads(pickle.dumps(opened))
    assert copy.layers == (1, 3)
    check_samples(copy, LENGTHS)


def test_two_readers_and_a_writer_elsewhere_do_not_meet(cache: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in cache.rglob("*"))
    first, second = CacheReader(cache), CacheReader(cache, layers=(1,))
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left.hidden_states[:, 1:2], right.hidden_states)
    assert sorted(path.name for path in cache.rglob("*")) == before
    write_target(tmp_path)
    fill_cache(cache)


def test_network_file_systems_are_recognised() -> None:
    lines = [
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw",
        "40 22 0:40 / /mnt/share\\040one rw - nfs4 server:/x rw",
        "41 22 0:41 / /mnt/local rw - fuseblk /dev/sdb1 rw",
        "42 40 0:42 / /mnt/share\\040one/disk rw - xfs /dev/sdc1 rw",
        "43 22 0:43 / /data rw - ext4 /dev/sdd rw",
        "44 43 0:44 / /data rw - fuse.s3fs s3fs rw",
        "broken line",
    ]
    kinds = {path: mounts.find_type(Path(path), lines) for path in ("/home", "/mnt/share one/c", "/data/c")}
    assert kinds == {"/home": "ext4", "/mnt/share one/c": "nfs4", "/data/c": "fuse.s3fs"}
    assert mounts.find_type(Path("/mnt/share one/disk/c"), lines) == "xfs"
    assert mounts.find_type(Path("/mnt/share ones"), lines) == "ext4"
    assert [mounts.is_network_type(kind) for kind in ("ext4", "nfs4", "fuse.s3fs", "fuseblk")] == [
        False,
        True,
        True,
        False,
    ]
    assert not mounts.is_network_path(Path("/"), mountinfo=Path("/nonexistent"))
