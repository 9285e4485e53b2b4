"""Arbitrary bytes in a cache: the reader gives the right rows or a CacheError, the verifier a report, nothing else.

Where a checksum would catch a change before anything is parsed, the fuzzers renew it, as a hostile author would.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import CacheError, CacheReader, verify_cache
from storage.files import crc32c_hex
from storage.sealed import canonical_json
from storage_cache import make_cache, make_header, make_samples, states_of

LENGTHS = [3, 2]
COMMIT = "commits/00000.json"
HIDDEN = "shards/00000.zarr/hidden_states/c/0/0/0"
METADATA = ["shards/00000.zarr/hidden_states/zarr.json", "shards/00000.zarr/last_hidden_states/zarr.json"]

FUZZ = settings(deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine kilobytes, so that many bytes can be tried; each test puts back what it changes."""
    header = make_header(hidden_size=1, layers=(1,))
    return make_cache(tmp_path_factory.mktemp("fuzz") / "c", LENGTHS, header)


@contextmanager
def changed(cache: Path, files: dict[str, bytes]) -> Iterator[None]:
    before = {name: (cache / name).read_bytes() for name in files}
    try:
        for name, data in files.items():
            (cache / name).write_bytes(data)
        yield
    finally:
        for name, data in before.items():
            (cache / name).write_bytes(data)


def read_all(cache: Path, io: str = "auto") -> bool:
    """Whether everything could be read; what is returned is right in any case, and every error is a CacheError."""
    expected = {sample.sample_id: sample for sample in make_samples(LENGTHS)}
    try:
        reader = CacheReader(cache, io=io)  # type: ignore[arg-type]
        header = make_header(hidden_size=1, layers=(1,))
        for sample in reader:
            planned = expected[sample.sample_id]
            hidden, last = states_of(planned, header)
            assert sample.input_ids.tolist() == planned.input_ids.tolist()
            assert sample.loss_mask.tolist() == planned.loss_mask.tolist()
            assert torch.equal(sample.hidden_states, hidden)
            assert torch.equal(sample.last_hidden_states, last)
    except CacheError:
        return False
    assert len(reader) == len(LENGTHS)
    return True


def check(cache: Path, files: dict[str, bytes]) -> None:
    """With these files changed: what the reader refuses, the verifier reports."""
    with changed(cache, files):
        readable = read_all(cache)
        report = verify_cache(cache, num_workers=1)
        assert readable or not report.ok


def reseal(fields: dict[str, Any]) -> bytes:
    """A record in canonical form with a right checksum."""
    fields = {key: value for key, value in fields.items() if key != "crc32c"}
    fields["crc32c"] = crc32c_hex(canonical_json(fields))
    return (json.dumps(fields, sort_keys=True, indent=1) + "\n").encode("ascii")


def record_anew(cache: Path, name: str, data: bytes) -> dict[str, bytes]:
    """A changed file of the plan and the manifest that names its new checksum."""
    manifest = json.loads((cache / "manifest.json").read_bytes())
    manifest["files"][name] = {"num_bytes": len(data), "crc32c": crc32c_hex(data)}
    return {name: data, "manifest.json": reseal(manifest)}


def every(cache: Path, step: int) -> Iterator[tuple[Path, int]]:
    """Every ``step``-th byte of the cache, counted on from file to file."""
    count = 0
    for path in sorted(path for path in cache.rglob("*") if path.is_file()):
        for place in range(path.stat().st_size):
            count += 1
            if count % step == 0:
                yield path, place


def test_any_flipped_bit_is_found(cache: Path) -> None:
    num_cases = 0
    for path, place in every(cache, 9):
        name = path.relative_to(cache).as_posix()
        data = bytearray(path.read_bytes())
        data[place] ^= 1 << place % 8
        with changed(cache, {name: bytes(data)}):
            report = verify_cache(cache, num_workers=1)
            assert not report.ok, f"{name}, byte {place}"
            assert name in {problem.file for problem in report.problems}, f"{name}, byte {place}"
            if num_cases % 3 == 0:
                read_all(cache, io="mmap")
        num_cases += 1
    assert num_cases > 1_000
    assert verify_cache(cache).ok


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Any], None]:
    """A change of a JSON document at one place."""
    place, action = draw(st.integers(0, 10_000)), draw(st.sampled_from(["replace", "replace", "delete", "add"]))
    value, name = draw(JSON_VALUES), draw(st.text(max_size=8))

    def mutate(document: Any) -> None:
        found = list(places(document))
        container, key = found[place % len(found)]
        if action == "replace":
            container[key] = value
        elif action == "delete":
            del container[key]
        elif isinstance(container, dict):
            container[name] = value
        else:
            container.append(value)

    return mutate


@settings(FUZZ, max_examples=500)
@given(mutation=mutations(), name=st.sampled_from(["manifest.json", COMMIT]))
def test_any_record_with_a_right_checksum(cache: Path, mutation: Callable[[Any], None], name: str) -> None:
    fields = json.loads((cache / name).read_bytes())
    mutation(fields)
    try:
        data = reseal(fields)
    except ValueError:  # a NaN has no canonical form
        data = json.dumps(fields).encode()
    check(cache, {name: data})


@settings(FUZZ, max_examples=100)
@given(data=st.binary(max_size=40), name=st.sampled_from(["manifest.json", COMMIT, *METADATA, HIDDEN]))
def test_any_bytes_for_a_file(cache: Path, data: bytes, name: str) -> None:
    check(cache, {name: data})
    with changed(cache, {name: data}):
        assert not verify_cache(cache, quick=True, num_workers=2).ok


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of some bytes: overwritten, cut out, put in."""
    changes = draw(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 3), st.binary(max_size=4)), min_size=1))

    def edit(data: bytes) -> bytes:
        for place, cut, new in changes:
            start = place % (len(data) + 1)
            data = data[:start] + new + data[start + cut :]
        return data

    return edit


@settings(FUZZ, max_examples=400)
@given(edit=edits(), name=st.sampled_from(["index.parquet", "samples/00000.parquet"]))
def test_any_parquet_bytes_with_a_right_checksum(cache: Path, edit: Callable[[bytes], bytes], name: str) -> None:
    check(cache, record_anew(cache, name, edit((cache / name).read_bytes())))


@settings(FUZZ, max_examples=120)
@given(mutation=mutations(), name=st.sampled_from(METADATA))
def test_any_zarr_metadata(cache: Path, mutation: Callable[[Any], None], name: str) -> None:
    fields = json.loads((cache / name).read_bytes())
    mutation(fields)
    check(cache, {name: (json.dumps(fields, indent=1) + "\n").encode()})


CELLS = st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 5) | st.text(max_size=3) | st.binary(max_size=3)


@st.composite
def tables(draw: st.DrawFn) -> Callable[[pa.Table], pa.Table]:
    """A change of a table: rows cut or repeated, a column gone, a cell or a whole column something else."""
    kind, number = draw(st.sampled_from(["rows", "column", "cell", "cell", "text"])), draw(st.integers(0, 100))
    cell, rows = draw(CELLS), draw(st.lists(st.integers(0, 1), max_size=4))

    def change(table: pa.Table) -> pa.Table:
        place = number % table.num_columns
        field, column = table.schema.field(place), table.column(place)
        if kind == "rows":
            return table.take(pa.array(rows, pa.int64()))
        if kind == "column":
            return table.remove_column(place)
        if kind == "text" and pa.types.is_string(field.type):
            broken = pa.array([b"\xff\xfe"] * len(column), pa.binary()).view(pa.string())
            return table.set_column(place, field, broken)
        values = column.to_pylist()
        values[number % len(values)] = [cell] * 2 if pa.types.is_list(field.type) else cell
        try:
            replaced = pa.array(values, None if cell is None else field.type)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):  # a cell of another type
            replaced = pa.array([cell] * len(column))
        same_type = replaced.type == field.type and cell is not None
        return table.set_column(place, field if same_type else field.name, replaced)

    return change


@settings(FUZZ, max_examples=300)
@given(change=tables(), name=st.sampled_from(["index.parquet", "samples/00000.parquet"]))
def test_any_table_with_a_right_checksum(cache: Path, change: Callable[[pa.Table], pa.Table], name: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(change(pq.read_table(cache / name)), sink)
    check(cache, record_anew(cache, name, sink.getvalue().to_pybytes()))
