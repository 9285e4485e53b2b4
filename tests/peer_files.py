"""Caches as DeepSpec and speculators write them, from real forwards; written without the code under test."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One sample alone through the target: [T] ids and mask, [T, N + 1, D] embeddings and block outputs, [T, D]."""

    input_ids: list[int]
    loss_mask: list[int]
    blocks: torch.Tensor
    last: torch.Tensor

    def layers(self, ids: Sequence[int]) -> torch.Tensor:
        """Layers in our numbering, [T, L, D]."""
        return self.blocks[:, [layer + 1 for layer in ids]]


def run_forwards(target: Path, samples: Sequence[tuple[list[int], list[int]]]) -> list[Forward]:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
    before_norm: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _module, args: before_norm.append(args[0]))
    forwards = []
    for input_ids, loss_mask in samples:
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([input_ids]), output_hidden_states=True).hidden_states
        blocks = torch.stack([*states[:-1], before_norm.pop()])[:, 0].transpose(0, 1)
        forwards.append(Forward(input_ids=input_ids, loss_mask=loss_mask, blocks=blocks, last=states[-1][0]))
    return forwards


def bf16_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint16).numpy().tobytes()


def write_deepspec(
    folder: Path,
    forwards: Sequence[Forward],
    *,
    layers: Sequence[int],
    per_shard: int = 10,
    written_layers: Sequence[int] | None = None,
    pre_norm: bool = False,
) -> Path:
    """`written_layers`: what lies in the files, where the manifest says `layers`."""
    folder.mkdir()
    index = b""
    num_shards = -(-len(forwards) // per_shard)
    for shard in range(num_shards):
        payload = b""
        for row in range(shard * per_shard, min(len(forwards), (shard + 1) * per_shard)):
            forward = forwards[row]
            num_tokens = len(forward.input_ids)
            last = forward.blocks[:, -1] if pre_norm else forward.last
            offsets = []
            for part in (
                struct.pack(f"<{num_tokens}i", *forward.input_ids),
                bytes([1] * num_tokens),
                bytes(forward.loss_mask),
                bf16_bytes(forward.layers(written_layers or layers).flatten(1)),
                bf16_bytes(last),
            ):
                offsets.append(len(payload))
                payload += part
            index += struct.pack("<QIIQQQQQ", row, shard, num_tokens, *offsets)
        (folder / f"shard-{shard:05d}.bin").write_bytes(payload)
    (folder / "samples.idx").write_bytes(index)
    manifest = {
        "version": 2,
        "num_samples": len(forwards),
        "num_shards": num_shards,
        "target_layer_ids": list(layers),
        "hidden_dtype": "bfloat16",
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "index_record_size": 56,
        "hidden_size": forwards[0].last.shape[1],
        "shards": [{"shard_id": shard, "file_name": f"shard-{shard:05d}.bin"} for shard in range(num_shards)],
        "target_model_name_or_path": "tiny",
        "git_sha": None,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True))
    return folder


def write_speculators(
    folder: Path, forwards: Sequence[Forward], *, layers: Sequence[int], fp8: bool = False, post_norm: bool = False
) -> tuple[Path, Path]:
    """`layers` in speculators' numbering. Gives the folder of states and the dataset's."""
    states_folder, dataset = folder / "states", folder / "dataset"
    states_folder.mkdir(parents=True)
    for row, forward in enumerate(forwards):
        last = forward.last if post_norm else forward.blocks[:, -1]
        states = torch.cat([forward.blocks[:, list(layers)], last[:, None]], dim=1).contiguous()
        tensors = {"hidden_states": states, "token_ids": torch.tensor(forward.input_ids)}
        if fp8:
            scales = states.float().abs().amax((1, 2), keepdim=True) / 448
            tensors["hidden_states"] = (states.float() / scales).to(torch.float8_e4m3fn)
            tensors["hidden_states_scales"] = scales
        save_file(tensors, states_folder / f"hs_{row}.safetensors")
    write_dataset(dataset, forwards)
    return states_folder, dataset


def write_dataset(folder: Path, forwards: Sequence[Forward], *, rows_per_batch: int = 7) -> None:
    """As `datasets.save_to_disk` does: an IPC stream and two JSON files."""
    folder.mkdir(exist_ok=True)
    table = pa.table(
        {
            "input_ids": pa.array([forward.input_ids for forward in forwards], pa.list_(pa.int32())),
            "loss_mask": pa.array([forward.loss_mask for forward in forwards], pa.list_(pa.int8())),
            "seq_len": pa.array([len(forward.input_ids) for forward in forwards], pa.int64()),
        }
    )
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows_per_batch)
    state = {"_data_files": [{"filename": name}], "_fingerprint": "0", "_format_columns": None, "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
