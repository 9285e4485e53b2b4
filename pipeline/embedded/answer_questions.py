"""Let the embedded target answer questions about the standard library: the conversations that the project ships.

    python -m pipeline.embedded.answer_questions [--count 3000] [--out pipeline/embedded/conversations.jsonl.gz]

Answers are sampled at temperature 1 from the target's whole distribution, so they are on-policy: what the draft learns
to propose is what this target says. An answer that does not end within the limit is thrown away.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.embedded import CONVERSATIONS_FILE, TARGET_DIR
from pipeline.embedded.corpus import conversations, read_pairs

BATCH_CHATS = 64
MAX_NEW_TOKENS = 320


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, chats: list[list[dict[str, str]]]) -> list[str | None]:
    """The target's answer to each chat, None where it did not come to an end."""
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    output = model.generate(
        **prompts, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    answers: list[str | None] = []
    for row in output[:, prompts["input_ids"].shape[1] :].tolist():
        ended = tokenizer.eos_token_id in row
        text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]) if ended else None
        answers.append(text)
    return answers


@click.command()
@click.option("--count", default=3000, show_default=True, help="Conversations to ask.")
@click.option("--out", type=click.Path(path_type=Path), default=CONVERSATIONS_FILE, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(count: int, out: Path, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(TARGET_DIR, dtype=torch.float32).eval()
    questions = conversations(read_pairs(), seed=seed)
    random.Random(seed).shuffle(questions)
    kept: list[dict[str, Any]] = []
    for start in range(0, count, BATCH_CHATS):
        batch = questions[start : min(start + BATCH_CHATS, count)]
        chats: list[list[dict[str, str]]] = [[] for _ in batch]
        for turn in range(max(len(chat) for chat in batch) // 2):
            open_chats = [
                index for index, chat in enumerate(batch) if len(chat) > 2 * turn and len(chats[index]) == 2 * turn
            ]
            for index in open_chats:
                chats[index].append(batch[index][2 * turn])
            for index, text in zip(open_chats, answer(model, tokenizer, [chats[i] for i in open_chats]), strict=True):
                if text:
                    chats[index].append({"role": "assistant", "content": text})
                else:
                    chats[index].pop()
        kept.extend({"messages": chat} for chat in chats if chat)
        click.echo(f"{len(kept):,} of {min(start + BATCH_CHATS, count):,} conversations kept")
    with out.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as stream:
        for row in kept:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
