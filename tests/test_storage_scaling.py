"""Elements and their scales: error bounds and bytes, derived here in numpy alone."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import CacheReader, CacheWriter
from storage.codecs import dequantize, quantize
from storage.encodings import BY_CHANNEL, BY_GROUP, BY_TOKEN, ENCODINGS, INNER_TOKENS, Scaling
from storage_cache import make_header, plan_cache

BF16_ROUNDING = 2.0**-8  # relative, of the decoded state
SCALE_ROUNDING = 1 + 2.0**-7  # a scale is rounded up to a bfloat16

SCALINGS = [BY_GROUP, BY_CHANNEL, BY_TOKEN, Scaling(tokens=1, channels=32, largest=127.0)]


def largest_of_group(states: np.ndarray, scaling: Scaling) -> np.ndarray:
    """Of each value [R, L, D]: the largest magnitude among those that share its scale."""
    groups = np.arange(states.shape[-1]) // (scaling.channels or states.shape[-1])
    largest = np.empty_like(states)
    for group in range(groups.max() + 1):
        place = groups == group
        axes = (0, 2) if scaling.tokens > 1 else (2,)
        largest[..., place] = np.abs(states[..., place]).max(axis=axes, keepdims=True)
    return largest


@settings(max_examples=60, deadline=None)
@given(
    scaling=st.sampled_from(SCALINGS),
    num_rows=st.integers(1, 256),
    num_layers=st.integers(1, 3),
    hidden_size=st.integers(1, 200),
    outliers=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 199), st.floats(1, 30_000)), max_size=4),
    loud_channel=st.integers(0, 199),
    seed=st.integers(0, 1 << 30),
)
def test_no_value_is_further_off_than_half_a_step_of_its_own_group(
    scaling: Scaling,
    num_rows: int,
    num_layers: int,
    hidden_size: int,
    outliers: list[tuple[int, int, float]],
    loud_channel: int,
    seed: int,
) -> None:
    """So a huge value, token or channel costs those that share a scale with it, and no others."""
    random = np.random.default_rng(seed)
    states = random.standard_normal((num_rows, num_layers, hidden_size))
    states[..., loud_channel % hidden_size] *= 50
    for row, channel, size in outliers:
        states[row % num_rows, :, channel % hidden_size] = size
    rows = torch.from_numpy(states).bfloat16()
    exact = rows.double().numpy()
    dtype = torch.float8_e4m3fn if scaling is BY_TOKEN else torch.int8
    values, scales = quantize(rows, scaling=scaling, dtype=dtype)
    found = dequantize(values, scales, scaling=scaling, start=0, dtype=torch.bfloat16).double().numpy()
    step = largest_of_group(exact, scaling) / scaling.largest * SCALE_ROUNDING
    # Of e4m3: three bits of mantissa, and below 2^-6 of a scale an even step of 2^-9.
    half_e4m3 = np.maximum(np.abs(exact) * 2.0**-4, step * 2.0**-10)
    bound = step / 2 if dtype == torch.int8 else half_e4m3
    assert (np.abs(found - exact) <= bound * (1 + 1e-6) + np.abs(found) * BF16_ROUNDING).all()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("hidden_size", [5, 64, 130])
def test_rows_decode_alone_as_they_do_together(scaling: Scaling, hidden_size: int) -> None:
    torch.manual_seed(0)
    chunks = torch.randn(3, INNER_TOKENS, 2, hidden_size)
    dtype = torch.float8_e4m3fn if scaling is BY_TOKEN else torch.int8
    pairs = [quantize(chunk, scaling=scaling, dtype=dtype) for chunk in chunks]
    values, scales = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    whole = dequantize(values, scales, scaling=scaling, start=0, dtype=torch.bfloat16)
    for start, stop in [(0, 768), (0, 1), (255, 257), (256, 512), (300, 700), (767, 768), (511, 513)]:
        first, last = start // scaling.tokens, -(-stop // scaling.tokens)
        part = dequantize(values[start:stop], scales[first:last], scaling=scaling, start=start, dtype=torch.bfloat16)
        assert torch.equal(part, whole[start:stop])
    assert len(dequantize(values[:0], scales[:0], scaling=scaling, start=0, dtype=torch.bfloat16)) == 0


def scales_of(states: np.ndarray, largest: float, *, axis: int | tuple[int, ...]) -> np.ndarray:
    """The least bfloat16 that is not below the largest magnitude over `largest`."""
    exact = (np.abs(states).max(axis=axis) / np.float32(largest)).astype(np.float32)
    rounded = exact.astype(ml_dtypes.bfloat16)
    return np.where(rounded.astype(np.float32) < exact, np.nextafter(rounded, ml_dtypes.bfloat16(np.inf)), rounded)


# sha256 of chunk files of `write_counted`: they must never change while format_version is 2.
GOLDEN = {
    "int8": {
        "hidden_states": "e00dec69da69e85c53506d34691a9e8f9a7b4971b38e0e5f1695f4b44d7a9427",
        "hidden_states_scale": "7132ce854dde57ae6fe4dd9d9798ac1ad56eddaea516ae22914bfa0fd421e7db",
        "last_hidden_states": "7fdd9ef35c207bb3a873d6ab0892606a8533276404f2bbb69bc9ca58ff8162c8",
        "last_hidden_states_scale": "79fbff7824b25f871f7b2974edd3439bd32df554dd2a313877d6fe8f0f085502",
    },
    "fp8": {
        "hidden_states": "03ca590f47b67e11f7e50b396aaf18b7f6777ff8777d2c2e2ed04fbe3175ffb7",
        "hidden_states_scale": "24470f947a3e2fd62c4e8e74482ef1a236ea633ca3b09a1694c29b6256ebe0da",
        "last_hidden_states": "3a8610af8ce0bc133741bebb62d6706112f1b24d8d052d19a22a1da42c383cbe",
        "last_hidden_states_scale": "1f271620c407982166e5ead9ddd6f9ae4bc94621894bd2122c4cc8b7ad53e6ec",
    },
}


def read_chunks(cache: Path, array: str) -> bytes:
    """The one chunk file of an array of shard 0."""
    (file,) = (path for path in (cache / "shards/00000.zarr" / array / "c").rglob("*") if path.is_file())
    return file.read_bytes()


def write_counted(path: Path, encoding: str) -> np.ndarray:
    """Two samples of 3 and 2 tokens, layers 1 and 3, hidden size 70: states that count, as float32 [5, 3, 70]."""
    plan_cache(path, [2, 3], make_header(encoding=encoding, layers=(1, 3), hidden_size=70, shard_bytes=1 << 20))
    states = torch.arange(5 * 3 * 70).view(5, 3, 70).to(torch.bfloat16)
    with CacheWriter(path).shard(0) as shard:
        shard.append(states[:, :2], states[:, 2])
    return states.float().numpy()


@pytest.mark.parametrize("encoding", sorted(GOLDEN))
def test_golden_bytes_of_version_2(tmp_path: Path, encoding: str) -> None:
    states = write_counted(tmp_path / "c", encoding)
    hashes = {name: hashlib.sha256(read_chunks(tmp_path / "c", name)).hexdigest() for name in GOLDEN[encoding]}
    assert hashes == GOLDEN[encoding]
    hidden, last = states[:, :2], states[:, 2]
    padded = np.concatenate([last, np.zeros((251, 70), np.float32)])
    if encoding == "int8":
        parts = [hidden[..., :64], hidden[..., 64:]]
        hidden_scales = np.stack([scales_of(part, 127, axis=-1) for part in parts], axis=-1)
        each = np.repeat(hidden_scales.astype(np.float32), 64, axis=-1)[..., :70]
        hidden_values = np.rint(hidden / each).astype(np.int8)
        last_scales = scales_of(padded, 127, axis=0)[None]
        last_values = np.rint(last / last_scales.astype(np.float32)).astype(np.int8)
    else:
        hidden_scales, last_scales = scales_of(hidden, 448, axis=-1), scales_of(last, 448, axis=-1)
        hidden_values = (hidden / hidden_scales.astype(np.float32)[..., None]).astype(ml_dtypes.float8_e4m3fn)
        last_values = (last / last_scales.astype(np.float32)[..., None]).astype(ml_dtypes.float8_e4m3fn)
    for name, expected in {
        "hidden_states": hidden_values,
        "hidden_states_scale": hidden_scales,
        "last_hidden_states": last_values,
        "last_hidden_states_scale": last_scales,
    }.items():
        data = np.ascontiguousarray(expected).tobytes()
        assert read_chunks(tmp_path / "c", name)[: len(data)] == data, name
    reader = CacheReader(tmp_path / "c")
    assert reader[0].hidden_states.shape[1:] == (2, 70)
    assert ENCODINGS[encoding].lossy
