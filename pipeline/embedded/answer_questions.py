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
from stages.regenerate.dialogue import Dialogue
from stages.regenerate.local import LocalTarget, answer_batch
from stages.regenerate.prompts import plan_prompt
from stages.regenerate.render import PromptRenderer
from stages.regenerate.settings import RegenerateSection

BATCH_CHATS = 64
MAX_NEW_TOKENS = 320


def load_embedded(*, seed: int) -> LocalTarget:
    """The embedded target in float32, sampling from its whole distribution."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    model = AutoModelForCausalLM.from_pretrained(TARGET_DIR, dtype=torch.float32).eval()
    return LocalTarget(
        model=model,
        device=model.device,
        renderer=PromptRenderer(tokenizer, variables={}),
        end_ids=frozenset({tokenizer.eos_token_id}),
        section=RegenerateSection(max_tokens=MAX_NEW_TOKENS, seed=seed),
        max_length=model.config.max_position_embeddings,
    )


def answer(target: LocalTarget, chats: list[list[dict[str, Any]]], *, first_row: int) -> list[list[dict[str, Any]]]:
    """The chats with the target's answers, up to the last one that came to an end; those without any are left out."""
    prompts = [plan_prompt(first_row + index, chat, turns="all") for index, chat in enumerate(chats)]
    dialogues = [Dialogue(prompt, keep_truncated=False) for prompt in prompts]
    answer_batch(target, dialogues, is_stopped=lambda: False)
    return [outcome.messages for dialogue in dialogues if (outcome := dialogue.outcome()).kind == "answered"]


@click.command()
@click.option("--count", default=3000, show_default=True, help="Conversations to ask.")
@click.option("--out", type=click.Path(path_type=Path), default=CONVERSATIONS_FILE, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(count: int, out: Path, seed: int) -> None:
    target = load_embedded(seed=seed)
    questions = conversations(read_pairs(), seed=seed)
    random.Random(seed).shuffle(questions)
    kept: list[list[dict[str, Any]]] = []
    for start in range(0, count, BATCH_CHATS):
        batch = questions[start : min(start + BATCH_CHATS, count)]
        kept.extend(answer(target, batch, first_row=start))
        click.echo(f"{len(kept):,} of {min(start + BATCH_CHATS, count):,} conversations kept")
    with out.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as stream:
        for chat in kept:
            stream.write((json.dumps({"messages": chat}, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
