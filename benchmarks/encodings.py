"""What each encoding costs on the embedded target's own states: bytes, time a core, error.

bytes a token / bf16     files of the whole cache over raw bf16 states
encode, decode           decoded bytes a second on one core, states already in memory; decode by reading samples
total variation          of the target's distribution, exact against decoded, mean and 99th percentile
int8 against version 1   decoding the same layers, in groups of channels and with a scale per channel and chunk; both
                         from memory to bf16, pieces of 1,024 tokens, pairs of rounds
"""

import statistics
import tempfile
from pathlib import Path

import torch
from common import core_seconds, embedded, ratio, scratch_folder

from pipeline.inspection import inspect_cache
from pipeline.stage_one import settings_of
from stages.extract import run as extraction
from storage import ENCODINGS, CacheReader
from storage.codecs import dequantize, quantize
from storage.commit import plan_shard, read_commit
from storage.encodings import ENCODINGS_V1, INNER_TOKENS, Scaling
from storage.shard_files import Access, open_arrays
from storage.state_writer import StateWriter
from storage.zarr_array import plan_arrays

ROUNDS = 7


def main() -> None:
    torch.set_num_threads(1)
    with scratch_folder() as folder:
        base = embedded(Path(folder) / "bf16", "data.validation_fraction=0.0")
        torch.set_num_threads(2)
        extraction.extract(settings_of(base))
        torch.set_num_threads(1)
        with CacheReader(base.cache.path) as reader:
            states = torch.cat([reader[index].hidden_states for index in range(512)])
        print(f"one core, {states.nelement() * 2 / 1e6:.0f} MB of states")
        print("encoding        bytes/token   / bf16   encode MB/s   decode MB/s   total variation mean, p99")
        for name in ENCODINGS:
            measure(name, states, Path(folder))
        compare_with_version_1(states)


def compare_with_version_1(states: torch.Tensor) -> None:
    """Decoding int8 as it is now over decoding that of version 1: seconds of a core."""
    whole = states[: len(states) // INNER_TOKENS * INNER_TOKENS]
    stored = []
    for encodings in (ENCODINGS_V1, ENCODINGS):
        scaling = encodings["int8"].scaling
        assert scaling is not None
        pairs = [quantize(chunk, scaling=scaling, dtype=torch.int8) for chunk in torch.split(whole, INNER_TOKENS)]
        stored.append((*map(torch.cat, zip(*pairs, strict=True)), scaling))

    def decode(values: torch.Tensor, scales: torch.Tensor, scaling: Scaling) -> None:
        for start in range(0, len(values), 4 * INNER_TOKENS):
            stop = min(start + 4 * INNER_TOKENS, len(values))
            rows = slice(start // scaling.tokens, stop // scaling.tokens)
            dequantize(values[start:stop], scales[rows], scaling=scaling, start=start, dtype=torch.bfloat16)

    seconds = [[core_seconds(lambda kept=kept: decode(*kept)) for kept in stored] for _ in range(ROUNDS + 1)][1:]
    old, new = ([pair[place] for pair in seconds] for place in (0, 1))
    rate = whole.nelement() * 2 / 1e6 / statistics.median(new)
    print(f"int8 decodes {rate:,.0f} MB/s from memory; time over version 1's: {ratio(old, new)}", flush=True)


def measure(name: str, states: torch.Tensor, folder: Path) -> None:
    config = embedded(folder / name, "data.validation_fraction=0.0", f"cache.encoding='{name}'")
    torch.set_num_threads(2)
    plan = extraction.extract(settings_of(config)).plan
    torch.set_num_threads(1)
    files = sum(path.stat().st_size for path in (config.cache.path / "shards").rglob("*") if path.is_file())
    num_tokens = plan.manifest.plan.num_tokens
    raw = num_tokens * (len(plan.header.identity.layers) + 1) * plan.header.hidden_size * 2
    num_bytes = states.nelement() * 2

    def encode() -> None:
        specs = plan_arrays(plan.header, len(states))
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:  # the disk is not what is measured
            names = (specs[0].name, specs[0].name + "_scale")
            writer = StateWriter(
                Path(memory), tuple(spec for spec in specs if spec.name in names), encoding=plan.header.encoding
            )
            writer.append(states)
            writer.finish()
            for array in writer.arrays:
                array.close()

    shard = plan_shard(plan.path, plan.manifest, plan.index, 0)
    hidden, last = open_arrays(shard, read_commit(shard, has_marker=False), Access(mapped=True, check=True))
    num_decoded = shard.num_tokens // INNER_TOKENS * INNER_TOKENS

    def decode() -> None:
        for start in range(0, num_decoded, 4 * INNER_TOKENS):
            stop = min(start + 4 * INNER_TOKENS, num_decoded)
            for read in (hidden.read(start, stop), last.read(start, stop)):
                out[: read.numel()].copy_(read.flatten())  # a mapped state costs what touching it costs

    out = torch.empty(4 * INNER_TOKENS * hidden.read(0, 1).numel(), dtype=plan.header.encoding.torch_dtype)
    decode()
    encoding = num_bytes / statistics.median(core_seconds(encode) for _ in range(3)) / 1e6
    decoding = num_decoded * (raw // num_tokens) / statistics.median(core_seconds(decode) for _ in range(3)) / 1e6
    loss = inspect_cache(config.cache.path).loss
    error = loss.total_variation if loss else None
    shown = "" if error is None else f"{error.mean:.4f}, {error.p99:.4f} at {error.num_positions} positions"
    print(
        f"{name:14}{files / num_tokens:12,.0f}{files / raw:10.4f}{encoding:14,.0f}{decoding:14,.0f}   {shown}",
        flush=True,
    )


if __name__ == "__main__":
    main()
