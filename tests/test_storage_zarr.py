"""The arrays on disk, byte for byte and through the eyes of two independent Zarr readers."""

import hashlib
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage
from storage import CachePlan, CacheReader, CacheUsageError, bytes_per_token, verify_cache
from storage.codecs import dequantize, quantize, widen_e4m3
from storage.encodings import BFLOAT16, ENCODINGS
from storage.state_writer import StateWriter
from storage.zarr_array import ArraySpec
from storage_cache import (
    LENGTHS,
    check_samples,
    files_of,
    fill_cache,
    make_cache,
    make_header,
    make_samples,
    plan_cache,
    states_of,
)

FORMAT = Path(storage.__file__).with_name("FORMAT.md").read_text()


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint16 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy()


def read_tensorstore(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return tensorstore.open(spec, read=True).result().read().result()


EXACT = [name for name, encoding in sorted(ENCODINGS.items()) if not encoding.lossy]
LOSSY = [name for name, encoding in sorted(ENCODINGS.items()) if encoding.lossy]


@pytest.mark.parametrize("encoding", EXACT)
def test_zarr_python_and_tensorstore_read_the_same_arrays(tmp_path: Path, encoding: str) -> None:
    """Shards of more than one inner chunk, the last one ragged."""
    header = make_header(encoding=encoding, shard_bytes=1 << 20)
    lengths = [300, 256, 40]
    cache = make_cache(tmp_path / "cache", lengths, header)
    samples = CachePlan.read(cache).read_samples(0)
    expected = [torch.cat(parts) for parts in zip(*(states_of(sample, header) for sample in samples), strict=True)]
    group = zarr.open_group(cache / "shards/00000.zarr", mode="r")
    for name, tensor in zip(("hidden_states", "last_hidden_states"), expected, strict=True):
        assert np.array_equal(group[name][:], bits(tensor))
        assert np.array_equal(group[name][290:310], bits(tensor[290:310]))
        assert np.array_equal(read_tensorstore(cache / f"shards/00000.zarr/{name}"), bits(tensor))
    logical = group["hidden_states"].attrs.get("logical_dtype")
    assert logical == ("bfloat16" if encoding.startswith("bf16") else None)
    assert group["hidden_states"].attrs["layers"] == [-1, 1, 3]
    check_samples(CacheReader(cache), lengths)


def as_float(stored: np.ndarray, logical_dtype: str | None) -> np.ndarray:
    """Values of a Zarr array as its attribute says, without this project's code."""
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn, None: stored.dtype}
    return stored.view(dtype[logical_dtype]).astype(np.float32)


@pytest.mark.parametrize("hidden_size", [8, 64, 100])
@pytest.mark.parametrize("encoding", LOSSY)
def test_any_zarr_reader_decodes_lossy_states_by_their_attributes(
    tmp_path: Path, encoding: str, hidden_size: int
) -> None:
    header = make_header(encoding=encoding, shard_bytes=1 << 20, hidden_size=hidden_size)
    lengths = [300, 256, 40]
    cache = make_cache(tmp_path / "cache", lengths, header)
    reader = CacheReader(cache)
    group = zarr.open_group(cache / "shards/00000.zarr", mode="r")
    assert sorted(group) == ["hidden_states", "hidden_states_scale", "last_hidden_states", "last_hidden_states_scale"]
    for name in ("hidden_states", "last_hidden_states"):
        array = group[name]
        values = as_float(array[:], array.attrs.get("logical_dtype"))
        assert np.array_equal(read_tensorstore(cache / f"shards/00000.zarr/{name}"), array[:])
        scale = group[array.attrs["scale"]]
        scales = as_float(scale[:], scale.attrs["logical_dtype"])
        scales = np.repeat(scales, array.attrs["tokens_per_scale"], axis=0)[: len(values)]
        if "channels_per_scale" in array.attrs:
            scales = np.repeat(scales, array.attrs["channels_per_scale"], axis=-1)[..., : values.shape[-1]]
        elif scales.ndim < values.ndim:
            scales = scales[..., None]
        decoded = (values * scales).astype(ml_dtypes.bfloat16)
        states = torch.cat([getattr(sample, name) for sample in reader])
        assert np.array_equal(decoded.view(np.uint16), bits(states))


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("encoding", ["bf16-lossless", *LOSSY])
def test_a_sample_is_read_alone_across_chunk_edges(tmp_path: Path, encoding: str, io: str) -> None:
    """Samples that begin and end anywhere in the inner chunks of a shard, in any order."""
    lengths = [700, 513, 512, 300, 256, 255, 40, 1]
    header = make_header(encoding=encoding, shard_bytes=1 << 24)
    cache = make_cache(tmp_path / "cache", lengths, header)
    whole = {sample.sample_id: sample for sample in CacheReader(cache)}
    for index in (4, 0, 7, 2, 6, 1, 5, 3):
        sample = CacheReader(cache, io=io)[index]
        assert torch.equal(sample.hidden_states, whole[sample.sample_id].hidden_states)
        assert torch.equal(sample.last_hidden_states, whole[sample.sample_id].last_hidden_states)
    check_samples(CacheReader(cache, io=io), lengths)


def test_random_bits_survive_compression(tmp_path: Path) -> None:
    """Every bf16 bit pattern, NaNs with payloads among them, and data that does not compress."""
    header = make_header(encoding="bf16-lossless", hidden_size=64, layers=(1, 2, 3), shard_bytes=1 << 24)
    plan = plan_cache(tmp_path / "c", [256, 80], header)
    noise = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16)
    rows = torch.from_numpy(np.resize(noise, (336, 4, 64))).view(torch.bfloat16)
    with storage.CacheWriter(plan.path).shard(0) as shard:
        shard.append(rows[:, :3], rows[:, 3])
    found = [(sample.hidden_states, sample.last_hidden_states) for sample in CacheReader(plan.path)]
    assert np.array_equal(bits(torch.cat([pair[0] for pair in found])), bits(rows[:, :3]))
    assert np.array_equal(bits(torch.cat([pair[1] for pair in found])), bits(rows[:, 3]))
    assert verify_cache(plan.path).ok


@pytest.mark.parametrize(("encoding", "limit"), [("int8", 0.02), ("fp8", 0.04)])
@pytest.mark.parametrize("hidden_size", [64, 200, 576])
def test_one_wild_token_or_channel_does_not_spoil_the_rest(encoding: str, limit: float, hidden_size: int) -> None:
    """Tokens whose channel 7 is far larger than the rest, as real targets have; not finite ones leave others alone."""
    torch.manual_seed(0)
    parsed = ENCODINGS[encoding]
    states = torch.randn(256, 2, hidden_size)
    states[:, :, 7] *= 20
    states[3, :, 7] = 24_960
    states[5, 1] = float("nan")
    states[6, 1, 3] = float("inf")
    values, scales = quantize(states, scaling=parsed.scaling, dtype=parsed.element.torch_dtype)
    decoded = dequantize(values, scales, scaling=parsed.scaling, start=0, dtype=torch.float32)
    assert bool(decoded.isfinite().all())
    exact, found = states.double().numpy(), decoded.double().numpy()
    good = [token for token in range(256) if token not in (5, 6)]
    errors = np.linalg.norm(found - exact, axis=-1)[good] / np.linalg.norm(exact, axis=-1)[good]
    assert np.quantile(errors, 0.99) < limit
    others = exact[..., 64:]  # no neighbours of channel 7 in a group of int8
    if encoding == "int8" and hidden_size > 64:
        errors = np.linalg.norm(found[..., 64:] - others, axis=-1)[good] / np.linalg.norm(others, axis=-1)[good]
        assert errors.max() < 0.01  # of gaussian values half a step in 127: 2.6 / 127 / sqrt(12) = 0.006


def test_scales_are_rounded_up_so_that_nothing_is_clipped() -> None:
    states = torch.full((256, 130), 1.0)
    states[0, [3, 70, 129]] = torch.tensor([1.003, 254.9, 0.0])
    scaling = ENCODINGS["int8"].scaling
    values, scales = quantize(states, scaling=scaling, dtype=torch.int8)
    assert values.abs().max() <= 127
    assert scales.shape == (256, 3)
    assert bool((scales.float()[0] * 127 >= torch.tensor([1.003, 254.9, 1.0])).all())
    zeros = quantize(torch.zeros(256, 3), scaling=scaling, dtype=torch.int8)
    assert not zeros[0].any()
    assert not zeros[1].any()


@pytest.mark.parametrize("encoding", LOSSY)
def test_the_largest_states_stay_finite(encoding: str) -> None:
    parsed = ENCODINGS[encoding]
    states = torch.full((256, 4), torch.finfo(torch.bfloat16).max)
    states[:, 1] *= -1
    states[::2, 2] = 3.38e38
    values, scales = quantize(states, scaling=parsed.scaling, dtype=parsed.element.torch_dtype)
    decoded = dequantize(values, scales, scaling=parsed.scaling, start=0, dtype=torch.bfloat16)
    assert bool(decoded.isfinite().all())
    assert torch.allclose(decoded.float() / 3.38e38, states / 3.38e38, rtol=0.04)


def test_every_e4m3_is_widened_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = codes.float()
    finite = ~expected.isnan()
    assert int(finite.sum()) == 254
    assert torch.equal(widen_e4m3(codes)[finite], expected[finite])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    encoding=st.sampled_from(EXACT),
    row_shape=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    pieces=st.lists(st.integers(0, 300), min_size=1, max_size=5).filter(sum),
    seed=st.integers(0, 1 << 30),
)
def test_any_sequence_of_appends_reads_back(
    tmp_path_factory: pytest.TempPathFactory, encoding: str, row_shape: tuple[int, ...], pieces: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("array")
    parsed = ENCODINGS[encoding]
    spec = ArraySpec(
        name="a",
        num_rows=sum(pieces),
        row_shape=row_shape,
        dimension_names=("token", "layer", "hidden")[: 1 + len(row_shape)],
        element=parsed.element,
        compressed=parsed.compressed,
    )
    data = np.random.default_rng(seed).integers(0, 256, spec.num_rows * spec.row_bytes).astype(np.uint8)
    rows = torch.from_numpy(data).view(parsed.torch_dtype).view(-1, *row_shape)
    writer = StateWriter(folder, (spec,), encoding=parsed)
    for piece in torch.split(rows, pieces):
        writer.append(piece)
    writer.finish()
    (array,) = writer.arrays
    array.sync()
    array.close()
    assert os.path.getsize(folder / spec.data_name) == array.file_bytes
    assert spec.fits(array.file_bytes)
    if not parsed.compressed:
        assert (folder / spec.data_name).read_bytes()[: data.size] == data.tobytes()
    stored = zarr.open_array(folder / "a", mode="r")[:]
    assert stored.shape == (spec.num_rows, *row_shape)
    assert stored.tobytes() == data.tobytes()
    assert read_tensorstore(folder / "a").tobytes() == data.tobytes()


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 100),
    encoding=st.sampled_from(sorted(ENCODINGS)),
    io=st.sampled_from(["mmap", "pread"]),
    layers=st.sampled_from([None, (-1,), (1, 3), (-1, 3), (-1, 1, 5), (5,)]),
)
def test_any_cache_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    shard_tokens: int,
    encoding: str,
    io: str,
    layers: tuple[int, ...] | None,
) -> None:
    token = bytes_per_token(num_layers=4, hidden_size=8, encoding=encoding)
    header = make_header(encoding=encoding, layers=(-1, 1, 3, 5), shard_bytes=shard_tokens * token)
    cache = make_cache(tmp_path_factory.mktemp("cache") / "c", lengths, header)
    check_samples(CacheReader(cache, layers=layers, io=io), lengths)
    plan = CachePlan.read(cache)
    assert all(
        plan.index.shard_tokens[shard] <= shard_tokens or len(plan.index.shard_rows(shard)) == 1
        for shard in range(plan.num_shards)
    )
    planned, found = plan.bytes_on_disk() + plan.plan_file_bytes(), sum(map(len, files_of(cache).values()))
    assert found <= planned + 40 * plan.num_shards if ENCODINGS[encoding].lossy else found <= planned
    assert found == planned or encoding not in ("bf16", "fp16", "fp32")


# sha256 of every file of the example whose bytes do not depend on the pyarrow release: they must never change
# while format_version is 2.
GOLDEN = {
    "commits/00000.json": "a6784ea76e107a985d3d1133d4e8f32b6f3ccb551961c0d0942f9dd699c8f216",
    "hidden_states/c/0/0/0": "345f062ec84a27a26a321e5f7dd689000992587f79a825c2a067e6d415e50a6b",
    "hidden_states/zarr.json": "32c6219219283404d3e0433d5521c516f5d8b98d83b17b69045b624e38d3f43e",
    "last_hidden_states/c/0/0": "441c055e9cb822daf7aec531bed5c521b427153610f3debcf088c4006657d81f",
    "last_hidden_states/zarr.json": "224820c7af894eae3b8a111fdc7ecafb11ed332a4b1fd6bd09b77ea224453108",
    "zarr.json": "2c62db1f33b97c0221c1fbe182507b7c0a184e677af419c26d3db4147cbd48eb",
}


def write_example(path: Path) -> Path:
    """The worked example of FORMAT.md: two samples, states that count up in bf16."""
    header = make_header(layers=(1, 3), hidden_size=4, shard_bytes=1 << 20)
    plan = plan_cache(path, [2, 3], header)
    writer = storage.CacheWriter(path)
    assert [sample.num_tokens for sample in plan.read_samples(0)] == [3, 2]
    with writer.shard(0) as shard:
        states = torch.arange(5 * 3 * 4).view(5, 3, 4).to(torch.bfloat16)
        shard.append(states[:, :2], states[:, 2])
    return path


def test_example_of_the_format_page(tmp_path: Path) -> None:
    files = files_of(write_example(tmp_path / "cache"))
    names = {name: name if name.startswith("commits/") else f"shards/00000.zarr/{name}" for name in GOLDEN}
    hashes = {name: hashlib.sha256(files[place]).hexdigest() for name, place in names.items()}
    assert hashes == GOLDEN
    rows = re.findall(r"^\| `([^`]+)` \| ([0-9,]+) \|", FORMAT, flags=re.MULTILINE)
    assert len(rows) > 5
    for name, size in rows:
        assert len(files[name]) == int(size.replace(",", "")), name
    blocks = re.findall(r"```json\n(.*?)```", FORMAT, flags=re.DOTALL)
    assert files["commits/00000.json"].decode() in blocks
    assert json.loads(files["shards/00000.zarr/hidden_states/zarr.json"]) in [json.loads(block) for block in blocks]
    data = files["shards/00000.zarr/hidden_states/c/0/0/0"]
    lines = re.findall(r"^    ([0-9a-f]{4}): ([0-9a-f ]+)$", FORMAT, flags=re.MULTILINE)
    assert len(lines) == 3
    for offset, line in lines:
        expected = bytes.fromhex(line)
        assert data[int(offset, 16) :][: len(expected)] == expected
    assert not any(data[80:4096])


def test_samples_and_index_hold_what_the_format_page_says(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    cache = write_example(tmp_path / "cache")
    assert pq.read_table(cache / "index.parquet").to_pylist() == [
        {"sample_id": 101, "shard": 0, "token_offset": 0, "num_tokens": 3, "num_supervised": 2, "split": "train"},
        {"sample_id": 100, "shard": 0, "token_offset": 3, "num_tokens": 2, "num_supervised": 1, "split": "train"},
    ]
    row = pq.read_table(cache / "samples/00000.parquet").to_pylist()[0]
    expected = list(make_samples([2, 3]))[1]
    assert row == {
        "sample_id": 101,
        "source_file": "chats.jsonl",
        "source_row": 1,
        "input_ids": expected.input_ids.tolist(),
        "loss_mask": expected.loss_mask.tolist(),
    }


def test_bytes_depend_on_nothing_but_the_plan(tmp_path: Path) -> None:
    """Two caches, their shards computed in another order, are equal in every byte."""
    first = make_cache(tmp_path / "a", exclude=(103,))
    plan_cache(tmp_path / "b", LENGTHS)
    fill_cache(tmp_path / "b", [4, 1, 3], exclude=(103,))
    fill_cache(tmp_path / "b", [2, 0], exclude=(103,))
    assert files_of(first) == files_of(tmp_path / "b")
    assert verify_cache(first).ok


def test_an_empty_shard_is_refused() -> None:
    with pytest.raises(CacheUsageError, match="at least one token, got 0"):
        ArraySpec(name="a", num_rows=0, row_shape=(1,), dimension_names=("t", "h"), element=BFLOAT16)
