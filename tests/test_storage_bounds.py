"""Small files that claim to be large: refused before memory is taken, by everything that reads a cache.

Each attack runs in a process of its own whose address space has 1 GB to grow; what it would unfold to is more.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import parquet_forgery as forgery
from parquet_forgery import I32, I64, STRUCT
from storage import CacheError, CachePlan, CacheReader, verify_cache
from storage.bounds import MAX_TARGET_TEXT_BYTES
from storage.errors import CacheFormatError, CacheUsageError
from storage.index import PlanIndex, parse_index, render_index
from storage.manifest import PlanSummary
from storage.tables import MAX_ROWS_PER_BYTE
from storage_cache import fill_cache, make_cache, make_header, make_samples
from test_storage_fuzz import record_anew, reseal

ROOM = 1000 << 20  # of which the forty threads of a pull reserve a third as their stacks
GIGABYTES = 1 << 31  # what an attack unfolds to, or more
INDEX, SAMPLES = "index.parquet", "samples/00000.parquet"

PROBE = """
import resource, sys
from pathlib import Path
from storage import CacheError, CacheReader, pull_cache, verify_cache
import pipeline.inspection
path, copy = Path(sys.argv[1]), Path(sys.argv[2])
actions = {
    "read": lambda: [sample.input_ids for sample in CacheReader(path)],
    "stage": lambda: [sample.input_ids for sample in CacheReader(f"file://{path}", staging=copy / "staging")],
    "pull": lambda: pull_cache(f"file://{path}", copy / "pulled"),
    "inspect": lambda: pipeline.inspection.inspect_cache(path),
    "verify": lambda: verify_cache(path),
}
for name in sys.argv[4:]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[3]), -1))
    try:
        found = actions[name]()
        print(name, "ok" if getattr(found, "ok", True) else f"refused: {found.problems[0]}")
    except CacheError as error:
        print(name, "refused:", str(error).replace("\\n", " "))
"""


def probe(path: Path, *actions: str) -> dict[str, str]:
    """What each action says of the cache, in one process with little room."""
    copy = path.parent / "copy"
    command = [sys.executable, "-c", PROBE, str(path), str(copy), str(ROOM), *actions]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, env=os.environ | {"MALLOC_ARENA_MAX": "1"}
    )
    shutil.rmtree(copy, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "c", [9, 4, 7], make_header(shard_bytes=1 << 20))


def put(cache: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (cache / name).write_bytes(data)


def change_manifest(cache: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((cache / "manifest.json").read_bytes())
    change(manifest)
    (cache / "manifest.json").write_bytes(reseal(manifest))


def zeros(num_bytes: int) -> bytes:
    """So many zeros in the form of a zstd page: some kilobytes a gigabyte."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        block = bytes(1 << 24)
        for _ in range(num_bytes >> 24):
            stream.write(block)
    return sink.getvalue().to_pybytes()


def forge(data: bytes, column: int, change: Callable[[list[tuple[Any, bytes]], Any], None]) -> bytes:
    """The file with another column chunk: ``change`` gets its pages and its metadata in the footer."""
    footer = forgery.read_footer(data)
    columns = forgery.columns_of(footer)
    pages = [forgery.read_pages(data, item) for item in columns]
    change(pages[column], columns[column])
    return forgery.write(pages, footer)


def large_dictionary(pages: list[tuple[Any, bytes]], _: Any) -> None:
    """The dictionary page unfolds to two gigabytes; it says so, and that these are its three entries."""
    header, _ = pages[0]
    assert header[1][1] == 2
    pages[0] = ({**header, 2: (I32, GIGABYTES - (1 << 24))}, zeros(GIGABYTES - (1 << 24)))


def many_entries(pages: list[tuple[Any, bytes]], _: Any) -> None:
    header, stored = pages[0]
    pages[0] = ({**header, 7: (STRUCT, {**header[7][1], 1: (I32, GIGABYTES - 1)})}, stored)


def large_page(pages: list[tuple[Any, bytes]], _: Any) -> None:
    header, _ = pages[-1]
    pages[-1] = ({**header, 2: (I32, GIGABYTES - (1 << 24))}, zeros(GIGABYTES - (1 << 24)))


def many_values(pages: list[tuple[Any, bytes]], column: Any) -> None:
    """The last page says that it holds two thousand million values, in the page and in the footer."""
    header, stored = pages[-1]
    pages[-1] = ({**header, 5: (STRUCT, {**header[5][1], 1: (I32, GIGABYTES - 1)})}, stored)
    column[5] = (I64, GIGABYTES - 1)


def many_values_in_the_footer(_: list[tuple[Any, bytes]], column: Any) -> None:
    column[5] = (I64, GIGABYTES * 8)


def other_encoding(pages: list[tuple[Any, bytes]], _: Any) -> None:
    """DELTA_BYTE_ARRAY: a value may be the one before and a letter more."""
    header, stored = pages[-1]
    pages[-1] = ({**header, 5: (STRUCT, {**header[5][1], 2: (I32, 7)})}, stored)


ATTACKS = [large_dictionary, many_entries, large_page, many_values, many_values_in_the_footer, other_encoding]


def test_the_forger_writes_what_the_package_reads(cache: Path) -> None:
    for name in (INDEX, SAMPLES):
        data = (cache / name).read_bytes()
        put(cache, record_anew(cache, name, forge(data, 0, lambda pages, column: None)))
    assert [sample.num_tokens for sample in CacheReader(cache)] == [9, 7, 4]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("name", "column"), [(INDEX, 0), (INDEX, 5), (SAMPLES, 1), (SAMPLES, 3), (SAMPLES, 4)])
def test_no_column_unfolds_beyond_the_plan(cache: Path, attack: Any, name: str, column: int) -> None:
    put(cache, record_anew(cache, name, forge((cache / name).read_bytes(), column, attack)))
    started = time.monotonic()
    with pytest.raises(CacheFormatError, match=r"column \w+: "):
        list(CacheReader(cache))
    assert time.monotonic() - started < 5
    assert not verify_cache(cache).ok


@pytest.mark.parametrize(("name", "column"), [(INDEX, 0), (SAMPLES, 4)])
def test_every_reader_is_bounded(cache: Path, name: str, column: int) -> None:
    put(cache, record_anew(cache, name, forge((cache / name).read_bytes(), column, large_dictionary)))
    found = probe(cache, "read", "stage", "inspect", "verify", "pull")
    if name == SAMPLES:  # a pull holds them against the manifest alone: whoever reads the copy finds out
        assert found.pop("pull") == "ok"
    assert all(answer.startswith("refused") for answer in found.values()), found


def test_a_long_list_of_one_value_is_refused(cache: Path) -> None:
    """Honest metadata, a few kilobytes: one row of 40 million tokens, where the plan has nine."""
    table = pq.read_table(cache / SAMPLES)
    length = 40_000_000
    offsets = pa.array([0, length, length + 1, length + 2], pa.int32())
    for place, kind in ((3, np.int32), (4, np.uint8)):
        field = table.schema.field(place)
        values = pa.array(np.ones(length + 2, kind))
        table = table.set_column(place, field, pa.ListArray.from_arrays(offsets, values, type=field.type))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, version="2.6", compression="zstd")
    data = sink.getvalue().to_pybytes()
    assert len(data) < 200_000
    put(cache, record_anew(cache, SAMPLES, data))
    assert "40000002 values" in probe(cache, "read")["read"]


def test_a_long_name_is_held_once(tmp_path: Path) -> None:
    """A name of 200 kB that four hundred rows share: the file holds it once, and so does who reads it."""
    cache = make_cache(tmp_path / "c", [1] * 400, make_header(shard_bytes=1 << 20))
    table = pq.read_table(cache / SAMPLES)
    table = table.set_column(1, table.schema.field(1), pa.array(["x" * 200_000] * 400))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, version="2.6", compression="zstd")
    put(cache, record_anew(cache, SAMPLES, sink.getvalue().to_pybytes()))
    samples = CachePlan.read(cache).read_samples(0)
    assert len(samples[0].source_file) == 200_000
    assert len({id(sample.source_file) for sample in samples}) == 1


def test_an_index_of_millions_of_rows_in_few_bytes_is_refused(cache: Path) -> None:
    """A delta-encoded column has any number of different ids in no bytes; the plan may well claim them."""
    num_rows = 30_000_000
    change_manifest(cache, lambda m: m["plan"].update(num_samples=num_rows, num_tokens=num_rows, num_supervised=0))
    found = probe(cache, "read", "stage", "inspect", "verify", "pull")
    assert all("cannot hold 30000000 rows" in answer for answer in found.values()), found


@pytest.mark.parametrize("name", ["manifest.json", "commits/00000.json", INDEX, SAMPLES])
def test_a_sparse_file_is_not_read(cache: Path, name: str) -> None:
    os.truncate(cache / name, 40_000_000_000)
    if name in (INDEX, SAMPLES):
        change_manifest(cache, lambda m: m["files"][name].update(num_bytes=40_000_000_000))
    started = time.monotonic()
    found = probe(cache, "read", "stage", "inspect", "verify", "pull")
    assert all(answer.startswith("refused") and "40000000000 bytes" in answer for answer in found.values()), found
    assert time.monotonic() - started < 60


def test_sparse_zarr_metadata_is_not_read(cache: Path) -> None:
    os.truncate(cache / "shards/00000.zarr/hidden_states/zarr.json", 40_000_000_000)
    assert "is not the metadata" in probe(cache, "read")["read"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["header"]["identity"].update(layers=list(range(30_000))), "1024 layers at most, got 30000"),
        (lambda m: m["header"].update(hidden_size=1 << 40), "8388608 at most"),
        (lambda m: m["plan"].update(num_samples=21), "sample and token counts"),
        (lambda m: m["plan"].update(num_supervised=21), "sample and token counts"),
        (lambda m: m["header"]["identity"].update(max_length=8), "samples longer than max_length"),
    ],
)
def test_totals_that_cannot_be_are_refused_at_once(cache: Path, change: Any, message: str) -> None:
    change_manifest(cache, lambda m: (m["header"].update(num_target_layers=40_000), change(m)))
    started = time.monotonic()
    with pytest.raises(CacheError, match=message):
        CacheReader(cache)
    assert not verify_cache(cache).ok
    assert time.monotonic() - started < 5


def test_a_shard_of_more_samples_than_can_be_read_is_not_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.bounds.MAX_SHARD_SAMPLES", 2)
    with pytest.raises(CacheUsageError, match=r"lower cache\.shard_bytes"):
        CachePlan.write(tmp_path / "c", make_samples([1, 1, 1]), header=make_header(shard_bytes=1 << 20))


def test_the_smallest_honest_index_is_read() -> None:
    """Rows that are alike in all but their id compress best: they must stay above the least bytes a row."""
    num_rows = 400_000
    index = PlanIndex(
        sample_ids=np.arange(num_rows),
        shards=(np.arange(num_rows) // 200).astype(np.int32),
        token_offsets=np.arange(num_rows) % 200,
        num_tokens=np.ones(num_rows, np.int32),
        num_supervised=np.zeros(num_rows, np.int32),
        split_codes=np.zeros(num_rows, np.uint8),
    )
    data = render_index(index)
    assert num_rows < len(data) * MAX_ROWS_PER_BYTE / 2
    totals = {"num_samples": num_rows, "num_tokens": num_rows, "num_supervised": 0, "num_shards": num_rows // 200}
    plan = PlanSummary(**totals, payload_bytes=0, splits={}, dropped={})
    assert np.array_equal(parse_index(data, plan, make_header(), where="x").sample_ids, index.sample_ids)


def test_a_text_of_the_target_that_is_too_large_is_neither_read_nor_fetched(tmp_path: Path) -> None:
    def write_target(folder: Path) -> None:
        for name in ("head.safetensors", "tokenizer.json"):
            with (folder / name).open("wb") as file:
                file.truncate(MAX_TARGET_TEXT_BYTES + 1)  # sparse: no disk is taken

    cache = tmp_path / "c"
    CachePlan.write(cache, make_samples([9, 4]), header=make_header(), write_target=write_target)
    fill_cache(cache)
    refusal = f"target/tokenizer.json: is larger than {MAX_TARGET_TEXT_BYTES} bytes"
    for address in (cache, f"file://{cache}"):
        with CacheReader(address, staging=tmp_path / "s") as reader, pytest.raises(CacheFormatError, match=refusal):
            reader.check_target()
    assert list(tmp_path.glob("s/*/index.parquet"))
    assert not list(tmp_path.glob("s/*/target/tokenizer.json"))
