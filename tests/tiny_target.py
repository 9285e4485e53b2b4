"""A target of some thousand parameters with random weights and the embedded tokenizer, and conversations for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.config import Config, parse_config
from pipeline.embedded import TARGET_DIR
from stages.extract.target import TOKENIZER_FILES

HIDDEN_SIZE = 32
NUM_LAYERS = 4
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
"""Of any decoder that names its sizes as Llama does."""


def save_tiny_target(
    folder: Path, *, seed: int = 0, num_layers: int = NUM_LAYERS, dtype: torch.dtype = torch.bfloat16
) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=2,
    )
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (TARGET_DIR / name).is_file() and name != "generation_config.json":
            shutil.copyfile(TARGET_DIR / name, folder / name)
    return folder


def make_chats(count: int) -> list[dict[str, Any]]:
    """Conversations of different lengths, every third with two rounds."""
    chats = []
    for index in range(count):
        messages = []
        for turn in range(2 if index % 3 == 0 else 1):
            answer = " ".join(
                f"The value {step} of function {index} is {step * index}." for step in range(2 + index % 7)
            )
            messages.append({"role": "user", "content": f"What does function {index} do in turn {turn}?"})
            messages.append({"role": "assistant", "content": answer})
        chats.append({"messages": messages})
    return chats


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def make_config(folder: Path, *, num_chats: int = 24, **changes: Any) -> Config:
    """A config for a new tiny target and chats below `folder`; `section__key=value` changes it."""
    target, chats = folder / "target", folder / "chats.jsonl"
    if not target.exists():
        save_tiny_target(target)
    if not chats.exists():
        write_jsonl(chats, make_chats(num_chats))
    tables: dict[str, Any] = {
        "target": {"model": str(target)},
        "data": {"files": [str(chats)], "validation_fraction": 0.25},
        "cache": {"path": str(folder / "cache"), "layers": [-1, 1, 3], "shard_bytes": 1_000_000},
        "extract": {"max_batch_tokens": 512, "device": "cpu"},
        "draft": {"num_layers": 1, "num_anchors": 6, "markov_rank": 8, "block_size": 4},
        "train": {
            "run_dir": str(folder / "run"),
            "global_batch_size": 4,
            "max_batch_tokens": 256,
            "lr": 1e-2,
            "max_steps": 8,
            "checkpoint_every": 3,
            "dtype": "float32",
            "device": "cpu",
        },
        "objective": {},
        "evaluate": {"num_anchors": 4},
    }
    for path, value in changes.items():
        section, key = path.split("__")
        tables[section][key] = str(value) if isinstance(value, Path) else value
    return parse_config(tables, where="test config")
