"""Real tokens a second of packed rows against padded batches of the same token budget, forward and backward.

The same documents, log-normal in length with mean 1,200 and at most 4,096, with the same anchors and random states, go
through the same module in their order: packed side by side into rows of the budget, and padded to the longest of a
batch, with as many in it as fit the budget. Both add up to the same loss. Processor time of one thread.

Padded batches go through the plain path, where padding costs what it costs a trainer that pads, and through the fast
path, which computes neither padded tokens nor padded anchors: there packing saves only the number of batches.
"""

import statistics
from collections.abc import Callable

import numpy as np
import torch
from common import core_seconds, ratio
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config

from stages.train import DSparkTrainerModule, Qwen3DSparkModel, build_draft_config
from stages.train.anchors import choose_anchors
from stages.train.order import plan_micro_batches

HIDDEN, LAYERS, VOCABULARY = 256, 5, 1024
BUDGET = 16384
NUM_DOCUMENTS = 40
ANCHORS = (32, 128)  # of a document
ROUNDS = 3

Batch = dict[str, torch.Tensor]


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(1200) - 0.32, 0.8, NUM_DOCUMENTS).astype(int), 16, 4096).tolist()
    packed, padded = plan_micro_batches(lengths, max_batch_tokens=BUDGET), plan_padded(lengths)
    slots = sum(len(batch) * max(lengths[batch.start : batch.stop]) for batch in padded)
    print(
        f"packing {len(lengths)} documents of {statistics.mean(lengths):,.0f} tokens: {len(packed)} rows, "
        f"or {len(padded)} batches padded to {slots / sum(lengths):.2f} times as many tokens"
    )
    for num_anchors in ANCHORS:
        documents = [make_document(row, length, num_anchors) for row, length in enumerate(lengths)]
        module = DSparkTrainerModule(make_draft(num_anchors), loss_decay_gamma=4.0)
        measure(
            module,
            [pack(documents[batch.start : batch.stop]) for batch in packed],
            [pad(documents[batch.start : batch.stop]) for batch in padded],
            label=f"{num_anchors} anchors a document",
        )


def measure(module: DSparkTrainerModule, packed: list[Batch], padded: list[Batch], *, label: str) -> None:
    num_tokens = sum(int(batch["seq_lens"].sum()) for batch in packed)

    def run(batches: list[Batch], *, is_plain: bool = False) -> float:
        module.is_plain = is_plain
        total = 0.0
        for batch in batches:
            loss = module(**batch).loss_num
            loss.backward()
            total += loss.item()
            module.zero_grad()
        return total

    forms: dict[str, Callable[[], float]] = {
        "packed": lambda: run(packed),
        "padded": lambda: run(padded),
        "padded, plain path": lambda: run(padded, is_plain=True),
    }
    losses = [form() for form in forms.values()]
    assert max(losses) / min(losses) - 1 < 1e-4, losses
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            times[name].append(core_seconds(form))
    print(f"  {label}: packed {num_tokens / min(times['packed']):,.0f} tokens/s")
    for name in list(forms)[1:]:
        rate = num_tokens / min(times[name])
        print(f"    / {name}: {rate:7,.0f} tokens/s   {ratio(times[name], times['packed'])}", flush=True)


def plan_padded(lengths: list[int]) -> list[range]:
    """Runs of neighbours that fit the budget when each is as long as the longest."""
    batches, start = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * max(lengths[start : end + 1]) > BUDGET:
            batches.append(range(start, end))
            start = end
    return batches


def make_draft(num_anchors: int) -> Qwen3DSparkModel:
    target = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=36, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config = build_draft_config(
        target, mask_token_id=VOCABULARY - 1, num_draft_layers=2, num_anchors=num_anchors, markov_rank=32
    )
    return Qwen3DSparkModel(config)


def make_document(row: int, length: int, num_anchors: int) -> Batch:
    """All of it is supervised, but for the first token."""
    generator = torch.Generator().manual_seed(row)
    loss_mask = (torch.arange(length) > 0).to(torch.uint8)
    return {
        "input_ids": torch.randint(VOCABULARY - 1, (length,), generator=generator),
        "target_hidden_states": torch.randn(length, LAYERS * HIDDEN, generator=generator).bfloat16(),
        "loss_mask": loss_mask,
        "target_last_hidden_states": torch.randn(length, HIDDEN, generator=generator).bfloat16(),
        "anchor_positions": choose_anchors(loss_mask, num_anchors, seed=0, epoch=0, sample_id=row),
    }


def pack(documents: list[Batch]) -> Batch:
    """One row, documents side by side."""
    lengths = [len(document["loss_mask"]) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    row = {name: torch.cat([document[name] for document in documents])[None] for name in documents[0]}
    anchors = [document["anchor_positions"] + start for start, document in zip(starts, documents, strict=True)]
    return row | {"seq_lens": torch.tensor([lengths]), "anchor_positions": torch.cat(anchors)[None]}


def pad(documents: list[Batch]) -> Batch:
    """One row a document, zeros behind it."""
    rows = {name: pad_sequence([document[name] for document in documents], batch_first=True) for name in documents[0]}
    anchors = pad_sequence([document["anchor_positions"] for document in documents], batch_first=True, padding_value=-1)
    lengths = torch.tensor([[len(document["loss_mask"])] for document in documents])
    return rows | {"seq_lens": lengths, "anchor_positions": anchors}


if __name__ == "__main__":
    main()
