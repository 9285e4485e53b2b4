"""Train the embedded target: a byte-level BPE tokenizer and a small Qwen3 on the standard library's own text.

    python -m pipeline.embedded.train_target [--minutes 45] [--out pipeline/embedded/target]

The result is a real causal language model, but a tiny one: it recites and imitates documentation strings and source.
"""

import math
import time
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pipeline.embedded import TARGET_DIR
from pipeline.embedded.corpus import conversations, read_pairs

TOKENIZER_SIZE = (
    4080  # ids the tokenizer uses; the embedding has VOCAB_SIZE, so that an unused id can be the mask token
)
VOCAB_SIZE = 4096
MAX_LENGTH = 512  # tokens a training window
BATCH_WINDOWS = 12
PEAK_LR = 3e-3
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `texts` with the ChatML special tokens and the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_target(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of about 4.3 M parameters, small enough to ship in bfloat16."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def pack_windows(token_lists: list[list[int]], *, generator: torch.Generator) -> torch.Tensor:
    """All chats in a new random order, end to end, cut into `[windows, MAX_LENGTH]`."""
    order = torch.randperm(len(token_lists), generator=generator).tolist()
    stream = torch.tensor([token for index in order for token in token_lists[index]], dtype=torch.long)
    return stream[: len(stream) // MAX_LENGTH * MAX_LENGTH].view(-1, MAX_LENGTH)


def train(model: Qwen3ForCausalLM, token_lists: list[list[int]], *, minutes: float, seed: int) -> None:
    """AdamW in bfloat16 autocast until `minutes` have passed; the cosine follows the clock, not a step count."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.05)
    started = time.monotonic()
    step = 0
    windows = pack_windows(token_lists, generator=generator)
    model.train()
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        if len(windows) < BATCH_WINDOWS:
            windows = pack_windows(token_lists, generator=generator)
        batch, windows = windows[:BATCH_WINDOWS], windows[BATCH_WINDOWS:]
        lr = PEAK_LR * min(1.0, progress / 0.02) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            rate = step * batch.numel() / (time.monotonic() - started)
            click.echo(f"step {step:6d}  {100 * progress:5.1f} %  loss {loss.item():.3f}  {rate:,.0f} tokens/s")


@click.command()
@click.option("--minutes", default=45.0, show_default=True, help="Wall-clock length of the training.")
@click.option("--out", type=click.Path(path_type=Path), default=TARGET_DIR, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(minutes: float, out: Path, seed: int) -> None:
    torch.manual_seed(seed)
    chats = conversations(read_pairs(), seed=seed)
    tokenizer = train_tokenizer([message["content"] for chat in chats for message in chat])
    tokenizer.save_pretrained(out)
    token_lists = [list(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats]
    click.echo(f"{len(chats):,} chats, {sum(map(len, token_lists)):,} tokens, vocabulary {len(tokenizer)}")
    model = build_target(tokenizer)
    click.echo(f"{model.num_parameters():,} parameters")
    train(model, token_lists, minutes=minutes, seed=seed)
    model.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main()
