"""Damage, hostile bytes and kills in caches that are compressed or have scales.

Of whatever is changed, `verify_cache` names the file, and the reader raises a CacheError or gives the right rows.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fork_killer import kill_at_faults
from storage import CacheError, CachePlan, CacheReader, shard_files, verify_cache
from storage.codecs import decompress
from storage.encodings import ENCODINGS, bytes_per_token
from storage.faults import SHARD_FAULTS
from storage.files import crc32c_hex
from storage.sealed import canonical_json
from storage.zarr_array import ArraySpec
from storage_cache import check_samples, files_of, fill_cache, make_cache, make_header, plan_cache

NEW = ["bf16-lossless", "int8", "fp8"]
LAYERS, HIDDEN_SIZE = (1, 3), 4
LENGTHS = [280, 30, 280, 30]  # two shards of 310 tokens: two inner chunks, the last one ragged
SHARD = "shards/00000.zarr"
COMMIT = "commits/00000.json"
HIDDEN = f"{SHARD}/hidden_states/c/0/0/0"
PLACES_PER_FILE = 25
GUARD_BYTES = 4096
SECONDS_PER_CASE = 5.0  # what a loaded machine may need for some kilobytes; a case takes milliseconds

Rows = dict[int, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Sound:
    """A cache that is put back after each change, and what a reader gives of it."""

    path: Path
    encoding: str
    rows: Rows

    @property
    def specs(self) -> dict[str, ArraySpec]:
        return {f"{SHARD}/{spec.data_name}": spec for spec in CachePlan.read(self.path).planned_shard(0).arrays}

    def data(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    @property
    def shard_files(self) -> list[str]:
        return [COMMIT, *sorted(f"{SHARD}/{name}" for name in files_of(self.path / SHARD))]


def header_of(encoding: str) -> Any:
    token_bytes = bytes_per_token(num_layers=len(LAYERS), hidden_size=HIDDEN_SIZE, encoding=encoding)
    return make_header(hidden_size=HIDDEN_SIZE, layers=LAYERS, encoding=encoding, shard_bytes=310 * token_bytes)


def read_rows(path: Path, **options: Any) -> Rows:
    with CacheReader(path, **options) as reader:
        return {
            sample.sample_id: (sample.input_ids, sample.loss_mask, sample.hidden_states, sample.last_hidden_states)
            for sample in reader
        }


def make_sound(folder: Path, encoding: str) -> Sound:
    path = make_cache(folder / encoding, LENGTHS, header_of(encoding))
    assert CachePlan.read(path).num_shards == 2
    check_samples(CacheReader(path), LENGTHS)
    return Sound(path, encoding, read_rows(path))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    """One cache of each encoding, of equal tokens."""
    folder = tmp_path_factory.mktemp("encodings")
    return {encoding: make_sound(folder, encoding) for encoding in ENCODINGS}


@pytest.fixture(params=NEW)
def sound(request: pytest.FixtureRequest, caches: dict[str, Sound]) -> Sound:
    return caches[request.param]


@contextmanager
def changed(sound: Sound, files: dict[str, bytes | None]) -> Iterator[None]:
    """With these bytes in these files, or without the files; afterwards the cache is as it was."""
    before = {name: sound.data(name) for name in files}
    try:
        for name, data in files.items():
            (sound.path / name).unlink() if data is None else (sound.path / name).write_bytes(data)
        yield
    finally:
        for name, original in before.items():
            (sound.path / name).write_bytes(original)


def is_readable(sound: Sound, *, io: str = "mmap", checks: str = "touch") -> bool:
    """Whether every row could be read; no other error than a CacheError comes.

    With checks of every byte the rows are the right ones, with those of sizes alone at least of the right form.
    """
    started = time.monotonic()
    try:
        found = read_rows(sound.path, io=io, checks=checks)
    except CacheError:
        return False
    finally:
        assert time.monotonic() - started < SECONDS_PER_CASE
    assert found.keys() == sound.rows.keys()
    for sample_id, expected in sound.rows.items():
        for one, other in zip(found[sample_id], expected, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert checks == "size" or torch.equal(one, other)
    return True


def expect_damage(sound: Sound, *names: str) -> None:
    """Verify names one of the files, and no reader gives a wrong row."""
    problems = verify_cache(sound.path, num_workers=1).problems
    assert {problem.file for problem in problems} & set(names), f"{names}: {problems}"
    for io in ("mmap", "pread"):
        is_readable(sound, io=io)
    is_readable(sound, checks="size")


def places_of(sound: Sound, name: str) -> list[int]:
    """A fair sample of a file's bytes; all of an index of inner chunks."""
    size = len(sound.data(name))
    spec = sound.specs.get(name)
    footer = range(size - spec.footer_bytes, size) if spec else ()
    return sorted({*range(0, size, max(1, size // PLACES_PER_FILE)), *footer})


def test_any_flipped_bit_is_found(sound: Sound) -> None:
    num_cases = 0
    for name in sound.shard_files:
        for place in places_of(sound, name):
            data = bytearray(sound.data(name))
            data[place] ^= 1 << place % 8
            with changed(sound, {name: bytes(data)}):
                problems = verify_cache(sound.path, num_workers=1).problems
                assert name in {problem.file for problem in problems}, f"{name}, byte {place}"
                is_readable(
                    sound, io="pread" if num_cases % 2 else "mmap", checks=("touch", "size")[num_cases % 3 // 2]
                )
            num_cases += 1
    assert num_cases > 200
    assert verify_cache(sound.path).ok


def test_a_flipped_bit_of_a_row_or_a_scale_is_an_error(sound: Sound) -> None:
    """Not only where verify looks: every inner chunk that a row comes from is checked before it is decoded."""
    for name, spec in sound.specs.items():
        data = sound.data(name)
        step = max(1, (len(data) - spec.footer_bytes) // 20)
        for place in range(0, len(data) - spec.footer_bytes, step):
            flipped = bytearray(data)
            flipped[place] ^= 0x10
            with changed(sound, {name: bytes(flipped)}):
                assert not is_readable(sound), f"{name}, byte {place}"


def test_after_an_error_no_thread_goes_on_reading(caches: dict[str, Sound], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is mended in place while a thread still decodes from its mapping would be a SIGBUS."""
    sound = caches["bf16-lossless"]
    decoded = []

    def decode_slowly(source: np.ndarray, out: np.ndarray) -> None:
        time.sleep(0.3)
        decompress(source, out)
        decoded.append(out.size)

    monkeypatch.setattr(shard_files, "decompress", decode_slowly)
    data = sound.data(HIDDEN)
    with changed(sound, {HIDDEN: bytes([data[0] ^ 1]) + data[1:]}), CacheReader(sound.path) as reader:
        with pytest.raises(CacheError, match="inner chunk 0"):  # the sample reaches over both inner chunks
            reader[0]
        assert decoded, "the other chunk was still being decoded"


def test_any_other_length_is_found(sound: Sound) -> None:
    for name in sound.shard_files:
        data = sound.data(name)
        for length in {0, 1, len(data) // 2, max(len(data) - 36, 0), len(data) - 1}:
            with changed(sound, {name: data[:length]}):
                expect_damage(sound, name)
        for tail in (b"\0", data[-36:]):
            with changed(sound, {name: data + tail}):
                expect_damage(sound, name)


def test_a_deleted_file_is_found(sound: Sound) -> None:
    for name in sound.shard_files:
        with changed(sound, {name: None}):
            report = verify_cache(sound.path)
            assert name in {problem.file for problem in report.problems} or (name == COMMIT and report.missing_shards)
            assert is_readable(sound) == (name == f"{SHARD}/zarr.json")  # no reader needs the group's metadata


def test_two_swapped_shards_are_found(sound: Sound) -> None:
    """Every file for itself, for the scales are plausible ones; then all of them, with and without the records."""
    others = {name: name.replace("00000", "00001") for name in sound.shard_files}
    contents = {name: (sound.data(name), sound.data(other)) for name, other in others.items()}
    groups = [[name] for name, (one, other) in contents.items() if one != other]
    assert len(groups) == 1 + len(sound.specs), "record and chunk files differ, metadata does not"
    groups += [[name for name in others if name != COMMIT], list(others)]
    for names in groups:
        swapped = {name: contents[name][1] for name in names} | {others[name]: contents[name][0] for name in names}
        with changed(sound, swapped):
            expect_damage(sound, *swapped)
            assert not is_readable(sound)


def reseal(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A record with a change and a right checksum, as a hostile author would write it."""
    fields = json.loads(data)
    change(fields)
    fields.pop("crc32c")
    fields["crc32c"] = crc32c_hex(canonical_json(fields))
    return (json.dumps(fields, sort_keys=True, indent=1) + "\n").encode("ascii")


def test_a_record_of_another_encoding_is_refused(sound: Sound, caches: dict[str, Sound]) -> None:
    """As it is, and with the plan digest of this cache; and so is the whole shard with it."""
    digest = json.loads(sound.data(COMMIT))["plan_digest"]
    for other in caches.values():
        if other.encoding == sound.encoding:
            continue
        forged = reseal(other.data(COMMIT), lambda fields: fields.update(plan_digest=digest))
        for record in (other.data(COMMIT), forged):
            with changed(sound, {COMMIT: record}):
                expect_damage(sound, COMMIT, HIDDEN)
                assert not is_readable(sound)
        names = [name for name in sound.shard_files if (other.path / name).is_file()]
        with changed(sound, {name: other.data(name) for name in names} | {COMMIT: forged}):
            expect_damage(sound, COMMIT, f"{SHARD}/hidden_states/zarr.json")
            assert not is_readable(sound)


@pytest.mark.parametrize("values", [None, [2.0], [-0.1], ["0"], [float("1e999")], 0.5])
def test_a_lossy_record_has_its_measured_error(caches: dict[str, Sound], values: object) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields.pop("total_variation") if values is None else fields.update(total_variation=values)

    for encoding in ("int8", "fp8"):
        sound = caches[encoding]
        try:
            record = reseal(sound.data(COMMIT), change)
        except ValueError:  # an infinity has no canonical form
            record = sound.data(COMMIT).replace(b"0.25", b"Infinity")
        with changed(sound, {COMMIT: record}):
            expect_damage(sound, COMMIT)
            assert not is_readable(sound)


def forge(sound: Sound, name: str, chunks: list[bytes]) -> dict[str, bytes | None]:
    """A chunk file of these inner chunks, with a right index, and a record with the right size and checksums."""
    spec = sound.specs[name]
    data = b"".join(chunks) + spec.render_footer([len(chunk) for chunk in chunks])
    array = {"file_bytes": len(data), "chunk_crc32c": [crc32c_hex(chunk) for chunk in chunks]}
    record = reseal(sound.data(COMMIT), lambda fields: fields["arrays"].update({spec.name: array}))
    return {name: data, COMMIT: record}


def stored_chunks(sound: Sound, name: str) -> list[bytes]:
    data, spec = sound.data(name), sound.specs[name]
    offsets = spec.parse_footer(data[-spec.footer_bytes :], file_bytes=len(data), where=name).tolist()
    return [data[first:last] for first, last in itertools.pairwise(offsets)]


def hostile_chunks(chunk: bytes, random: np.random.Generator, *, num_random: int) -> Iterator[bytes]:
    """Blosc chunks that lie: each header field, then the body, then both, then anything."""
    numbers = [0, 1, 15, 16, 17, 4095, 4097, 1 << 20, 1 << 24, 2**31 - 1, 2**31, 2**32 - 1, len(chunk) - 1]
    for place in (4, 8, 12):
        for number in numbers:
            yield chunk[:place] + number.to_bytes(4, "little") + chunk[place + 4 :]
    for place in range(4):
        for value in range(256):
            yield chunk[:place] + bytes([value]) + chunk[place + 1 :]
    for _ in range(num_random):
        places = random.integers(16, len(chunk), size=random.integers(1, 20))
        body = bytearray(chunk)
        for place in places:
            body[place] = random.integers(256)
        yield bytes(body)
        kept = int(random.integers(16, len(chunk)))
        length = int(random.integers(1, len(chunk) - 15))
        head = chunk[:8] + random.bytes(4) + (16 + length).to_bytes(4, "little")
        yield head[:2] + random.bytes(1) + head[3:] + random.bytes(length)
        yield chunk[:12] + kept.to_bytes(4, "little") + chunk[16:kept]
        yield random.bytes(int(random.integers(1, len(chunk))))


def test_hostile_blosc_chunks_decode_inside_their_bounds(caches: dict[str, Sound]) -> None:
    sound = caches["bf16-lossless"]
    memory = np.full(2 * GUARD_BYTES + sound.specs[HIDDEN].chunk_bytes, 0xA5, dtype=np.uint8)
    guards = (memory[:GUARD_BYTES], memory[-GUARD_BYTES:])
    num_refused = num_cases = 0
    started = time.monotonic()
    for chunk in hostile_chunks(stored_chunks(sound, HIDDEN)[0], np.random.default_rng(7), num_random=2_000):
        try:
            decompress(np.frombuffer(chunk, dtype=np.uint8), memory[GUARD_BYTES:-GUARD_BYTES])
        except ValueError:
            num_refused += 1
        assert all((guard == 0xA5).all() for guard in guards), chunk[:16].hex()
        num_cases += 1
    assert time.monotonic() - started < 60
    assert num_cases > 9_000
    assert num_refused > num_cases // 2


def test_hostile_blosc_chunks_with_right_checksums(caches: dict[str, Sound]) -> None:
    """What the author of a record vouches for cannot be told from the truth, but it cannot crash a reader either."""
    sound = caches["bf16-lossless"]
    first, second = stored_chunks(sound, HIDDEN)
    hostile = list(hostile_chunks(first, np.random.default_rng(13), num_random=100))[::5]
    num_refused = 0
    for case, chunk in enumerate(hostile):
        with changed(sound, forge(sound, HIDDEN, [chunk, second])):
            num_refused += not is_readable(sound, checks="size", io="pread" if case % 2 else "mmap")
    assert num_refused > len(hostile) // 2


def test_hostile_indexes_with_right_checksums(sound: Sound) -> None:
    random = np.random.default_rng(11)
    numbers = [0, 1, 15, 256, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
    for name, spec in sound.specs.items():
        data = sound.data(name)
        payload, footer = data[: -spec.footer_bytes], data[-spec.footer_bytes :]
        for case in range(30):
            index = np.frombuffer(footer[:-4], dtype="<u8").copy()
            place = int(random.integers(len(index)))
            index[place] = numbers[case % len(numbers)] if case % 2 else index[place] + np.uint64(1 + case)
            hostile = index.tobytes() + int(crc32c_hex(index.tobytes()), 16).to_bytes(4, "little")
            if hostile != footer:
                with changed(sound, {name: payload + hostile}):
                    expect_damage(sound, name)
                    assert not spec.compressed or not is_readable(sound)


def test_inner_chunks_cut_elsewhere_are_refused(caches: dict[str, Sound]) -> None:
    """An index in good order that cuts the same bytes at another place, checksums and all."""
    sound = caches["bf16-lossless"]
    chunks = stored_chunks(sound, HIDDEN)
    whole = b"".join(chunks)
    for cut in [1, 15, 16, 17, len(chunks[0]) - 1, len(chunks[0]) + 1, len(whole) - 1]:
        with changed(sound, forge(sound, HIDDEN, [whole[:cut], whole[cut:]])):
            assert not is_readable(sound)
    with changed(sound, forge(sound, HIDDEN, chunks[::-1])):  # sound chunks in another order: the record's word
        assert is_readable(sound, checks="size")


WRITE = """
import sys
from pathlib import Path
from storage_cache import fill_cache, plan_cache
from test_storage_encodings import LENGTHS, header_of
path = Path(sys.argv[1])
plan_cache(path, LENGTHS, header_of(path.parent.name))
fill_cache(path, exclude=(101,))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ENCODING/FAULT: caches whose writers were killed there."""
    folder = tmp_path_factory.mktemp("killed")
    cases = [(fault, str(folder / encoding / fault)) for encoding in NEW for fault in SHARD_FAULTS]
    kill_at_faults(WRITE, cases, imports=["test_storage_encodings"])
    return folder


@pytest.mark.parametrize("fault", SHARD_FAULTS)
@pytest.mark.parametrize("encoding", NEW)
def test_killed_anywhere_and_finished_is_byte_identical(
    tmp_path: Path, killed: Path, encoding: str, fault: str
) -> None:
    undisturbed = tmp_path / "undisturbed"
    plan_cache(undisturbed, LENGTHS, header_of(encoding))
    fill_cache(undisturbed, exclude=(101,))
    cache = killed / encoding / fault
    found = files_of(cache)
    is_named = SHARD_FAULTS.index(fault) >= SHARD_FAULTS.index("shard.renamed")
    assert (f"{SHARD}/zarr.json" in found) == is_named
    assert any(name.startswith("shards/.tmp-") for name in found) != is_named
    assert any(name.startswith("commits/.tmp-") for name in found) == (fault == "commit.written")
    assert (COMMIT in found) == (fault == "commit.renamed")
    assert not verify_cache(cache).ok
    with pytest.raises(CacheError):
        CacheReader(cache)
    fill_cache(cache, exclude=(101,))
    assert files_of(cache) == files_of(undisturbed)
    shutil.rmtree(cache)
