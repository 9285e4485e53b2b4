"""Tiny caches of known content for the tests of the storage package and of whoever reads caches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage import FORMAT_VERSION, CacheHeader, CacheIdentity, CachePlan, CacheReader, CacheWriter, PlannedSample

HIDDEN_SIZE = 8
VOCAB_SIZE = 97


def make_identity(**changes: Any) -> CacheIdentity:
    fields: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "target_config_digest": "c0",
        "target_weights_digest": "w0",
        "tokenizer_digest": "t0",
        "chat_template_digest": "m0",
        "data_digest": "d0",
        "layers": (-1, 1, 3),
        "encoding": "bf16",
        "dtype": "bfloat16",
        "attn_implementation": "sdpa",
        "max_length": 4096,
        "overlong": "truncate",
        "supervise": "all",
        "min_supervised_tokens": 1,
        "validation_fraction": 0.25,
        "max_samples": None,
        "validation_digest": None,
        "max_batch_tokens": 64,
        "shard_bytes": 20 * 4 * HIDDEN_SIZE * 2,  # twenty tokens of four bf16 states
    }
    return CacheIdentity(**{**fields, **changes})


def make_header(*, hidden_size: int = HIDDEN_SIZE, **identity: Any) -> CacheHeader:
    return CacheHeader(
        identity=make_identity(**identity),
        hidden_size=hidden_size,
        num_target_layers=6,
        vocab_size=VOCAB_SIZE,
        mask_token_id=96,
        logit_scale=None,
        logit_softcap=30.0,
        provenance={"data": "made up"},
    )


def make_samples(lengths: list[int]) -> Iterator[PlannedSample]:
    """Samples 100, 101, ... whose tokens follow from their place; every fourth is held out."""
    for row, length in enumerate(lengths):
        places = np.arange(length, dtype=np.int32)
        yield PlannedSample(
            sample_id=100 + row,
            source_file="chats.jsonl",
            source_row=row,
            input_ids=(places * 7 + row) % np.int32(VOCAB_SIZE),
            loss_mask=(places % 3 > 0).astype(np.uint8),
            split="validation" if row % 4 == 3 else "train",
        )


def states_of(sample: PlannedSample, header: CacheHeader) -> tuple[torch.Tensor, torch.Tensor]:
    """The made-up states of a sample, [T, L, D] and [T, D], a function of its id alone."""
    generator = torch.Generator().manual_seed(sample.sample_id)
    num_layers = len(header.identity.layers)
    states = torch.randn(sample.num_tokens, num_layers + 1, header.hidden_size, generator=generator)
    states = states.to(header.encoding.torch_dtype)
    return states[:, :num_layers], states[:, num_layers]


def write_target(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "tiny"}\n')
    (directory / "extra").mkdir()
    (directory / "extra" / "head.bin").write_bytes(bytes(range(256)))


def plan_cache(path: Path, lengths: list[int], header: CacheHeader | None = None) -> CachePlan:
    return CachePlan.write(
        path,
        make_samples(lengths),
        header=header or make_header(),
        write_target=write_target,
        dropped=lambda: {"too few supervised tokens": 2},
    )


def fill_cache(path: Path, shards: list[int] | None = None, exclude: tuple[int, ...] = ()) -> None:
    """Compute the given (default: the missing) shards, two samples at a time."""
    writer = CacheWriter(path)
    for number in writer.missing_shards() if shards is None else shards:
        samples = writer.plan.read_samples(number)
        with writer.shard(number) as shard:
            if writer.plan.header.encoding.lossy:
                shard.record_total_variation([0.25, 0.0078125])
            for start in range(0, len(samples), 2):
                states = [states_of(sample, writer.plan.header) for sample in samples[start : start + 2]]
                shard.append(torch.cat([pair[0] for pair in states]), torch.cat([pair[1] for pair in states]))
            for sample in samples:
                if sample.sample_id in exclude:
                    shard.exclude(sample.sample_id, "not finite", layer=1)


LENGTHS = [9, 4, 7, 12, 3, 20, 5, 6, 2, 8, 11]


def make_cache(
    path: Path, lengths: list[int] | None = None, header: CacheHeader | None = None, exclude: tuple[int, ...] = ()
) -> Path:
    """A complete cache; eleven samples in five shards unless told otherwise."""
    plan_cache(path, lengths or LENGTHS, header)
    fill_cache(path, exclude=exclude)
    return path


def check_samples(reader: CacheReader, lengths: list[int], exclude: tuple[int, ...] = ()) -> None:
    """The reader gives back exactly what ``make_cache`` put in."""
    header = reader.manifest.header
    expected = {sample.sample_id: sample for sample in make_samples(lengths) if sample.sample_id not in exclude}
    places = [header.identity.layers.index(layer) for layer in reader.layers]
    samples = list(reader)
    assert sorted(reader.sample_ids.tolist()) == sorted(expected)
    for sample in samples:
        planned = expected[sample.sample_id]
        hidden, last = states_of(planned, header)
        assert sample.split == planned.split
        assert sample.num_tokens == planned.num_tokens
        assert sample.input_ids.dtype == torch.int32
        assert sample.loss_mask.dtype == torch.uint8
        assert np.array_equal(sample.input_ids.numpy(), planned.input_ids)
        assert np.array_equal(sample.loss_mask.numpy(), planned.loss_mask)
        check_states(sample.hidden_states, hidden[:, places], header.identity.encoding)
        check_states(sample.last_hidden_states, last, header.identity.encoding)


def check_states(found: torch.Tensor, expected: torch.Tensor, encoding: str) -> None:
    """Equal; of a lossy encoding within its worst case over values of `torch.randn`, whose largest are below 6."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if encoding == "int8":  # half a step of the channel's largest value over 127, and a bf16 rounding
        assert torch.allclose(found.float(), expected.float(), rtol=2**-8, atol=6 / 127 / 2 * 1.01)
    elif encoding == "fp8":  # three bits of mantissa; below 2^-6 of the scale an even step
        assert torch.allclose(found.float(), expected.float(), rtol=2**-4 + 2**-8, atol=6 / 448 * 2**-9)
    else:
        assert torch.equal(found, expected)


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
