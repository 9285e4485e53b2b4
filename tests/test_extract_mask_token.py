"""Which token a draft reads as a slot: chosen while planning, needed by training alone."""

import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from pipeline.cli import main
from pipeline.config import Config, to_toml
from pipeline.stage_one import settings_of
from pipeline.stage_two import train_draft
from stages.errors import SettingError
from stages.extract import run
from stages.extract.mask_token import find_mask_token
from stages.extract.target import TargetError
from tiny_target import make_config, save_tiny_target, write_jsonl

NAMES = ["<repo_name>", "<file_sep>", "<filename>"]


def full_target(folder: Path, names: list[str]) -> dict[str, int]:
    """A target whose tokenizer has these special tokens too and uses every id of the embedding, as SmolLM2's does."""
    target = save_tiny_target(folder / "target")
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.save_pretrained(target)
    fields = Qwen3Config.from_pretrained(target).to_dict() | {"vocab_size": len(tokenizer)}
    Qwen3ForCausalLM(Qwen3Config(**fields)).save_pretrained(target)
    return {name: tokenizer.convert_tokens_to_ids(name) for name in names}


def write_chats(folder: Path, *contained: str) -> None:
    answer = "The value is one, and then it is two, and three, and four, and five. " * 2
    rows = [
        {"messages": [{"role": "user", "content": f"Number {n}?{''.join(contained)}"},
                      {"role": "assistant", "content": answer}]}
        for n in range(24)
    ]  # fmt: skip
    write_jsonl(folder / "chats.jsonl", rows)


def plan(config: Config) -> run.ExtractResult:
    return run.extract(settings_of(config))


def test_a_special_token_that_no_conversation_contains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The chat template writes the tokenizer's own special tokens into each chat: the new ones are left."""
    ids = full_target(tmp_path, NAMES)
    write_chats(tmp_path, "<repo_name>", "<filename>")
    config = make_config(tmp_path)
    with caplog.at_level(logging.WARNING):
        run.estimate(settings_of(config))
        assert plan(config).plan.header.mask_token_id == ids["<file_sep>"]
    told = [line for line in caplog.messages if "drafts will read <file_sep>" in line]
    assert len(told) == 2, "by the estimate and by the extraction"
    assert train_draft(config).num_steps == 8


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "target")


@pytest.mark.parametrize("name", ["<mask>", "<|mask|>", "[MASK]", "<mask_token>"])
def test_a_token_that_looks_like_a_mask_is_taken(name: str, tmp_path: Path) -> None:
    ids = full_target(tmp_path, ["<repo_name>", name, "<|mask_start|>"])
    write_chats(tmp_path)
    assert plan(make_config(tmp_path)).plan.header.mask_token_id == ids[name]


def test_the_order_of_choices(tmp_path: Path) -> None:
    ids = full_target(tmp_path, ["<mask>"])
    tokenizer, size = tokenizer_of(tmp_path), max(ids.values()) + 1
    assert find_mask_token(tokenizer, vocab_size=size + 5, wanted=7).token_id == 7
    assert find_mask_token(tokenizer, vocab_size=size + 5, wanted=None).token_id == ids["<mask>"]
    with pytest.raises(TargetError, match=rf"draft\.mask_token_id: expected 0 to {size - 1}, got {size}"):
        find_mask_token(tokenizer, vocab_size=size, wanted=size)


def every_special_token(folder: Path) -> Config:
    """A config whose conversations contain each special token that could serve."""
    ids = full_target(folder, ["<repo_name>"])
    found = find_mask_token(tokenizer_of(folder), vocab_size=max(ids.values()) + 1, wanted=None)
    write_chats(folder, *found.candidates.values())
    return make_config(folder)


def test_extraction_needs_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = every_special_token(tmp_path)
    assert plan(config).plan.header.mask_token_id is None
    assert "conversations contain each of its special tokens" in caplog.text
    with pytest.raises(SettingError, match=r"draft\.mask_token_id: every special token of the target occurs"):
        train_draft(config)


def test_training_may_name_another_that_no_sample_contains(tmp_path: Path) -> None:
    config = every_special_token(tmp_path)
    used = int(plan(config).plan.read_samples(0)[0].input_ids[5])
    unused = tokenizer_of(tmp_path)("zebra", add_special_tokens=False)["input_ids"][0]
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config))
    refused = CliRunner().invoke(main, ["train", str(file), "--no-evaluate", "--set", f"draft.mask_token_id={used}"])
    assert refused.exit_code == 1
    assert f"draft.mask_token_id: {used} is in sample " in refused.output.replace("\n", " ")
    trained = CliRunner().invoke(main, ["train", str(file), "--no-evaluate", "--set", f"draft.mask_token_id={unused}"])
    assert trained.exit_code == 0, trained.output
