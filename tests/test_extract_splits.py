"""Which rows become samples, and of which split: files, columns, bounds, prompts without answers, unknown tokens."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.config import Config, ConfigError, load_config, to_toml
from pipeline.stage_one import estimate, settings_of
from pipeline.stage_two import open_cache
from stages.extract import ordered, run
from stages.extract.rows import DataError
from stages.extract.samples import PromptsOnlyError, SampleCounts
from storage import CacheIdentityError, CacheReader, PlannedSample
from tiny_target import make_chats, make_config, save_tiny_target, write_jsonl


def plan(config: Config) -> tuple[list[PlannedSample], SampleCounts]:
    settings, counts = settings_of(config), SampleCounts()
    return list(run.iterate_samples(run.describe_inputs(settings), settings, counts=counts)), counts


def places(samples: list[PlannedSample]) -> list[tuple[str, int, str]]:
    return [(Path(sample.source_file).name, sample.source_row, sample.split) for sample in samples]


def split_config(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Config:
    write_jsonl(folder / "chats.jsonl", rows)
    return make_config(folder, **changes)


def named(chats: list[dict[str, Any]], column: str, *values: Any) -> list[dict[str, Any]]:
    return [chat | {column: value} for chat, value in zip(chats, values, strict=True)]


def held_out_config(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Config:
    """The rows of a file `held.jsonl` are the validation split; the others are 12 chats."""
    held = write_jsonl(folder / "held.jsonl", rows)
    changes = {"data__validation_fraction": 0.0, "data__validation_files": str(held)} | changes
    return split_config(folder, make_chats(12), **changes)


def test_files_are_held_out_whole_and_their_prompts_are_in_no_other(tmp_path: Path) -> None:
    others = copy.deepcopy(make_chats(16)[12:])
    again = copy.deepcopy(make_chats(12)[5])  # a prompt of the training file, answered otherwise
    again["messages"][1]["content"] = (
        "Something that is long enough to be kept, and quite different from the rest of it."
    )
    samples, counts = plan(held_out_config(tmp_path, [*others, again]))
    train = [("chats.jsonl", row, "train") for row in range(12) if row != 5]
    assert places(samples) == [("held.jsonl", row, "validation") for row in range(5)] + train
    assert counts.dropped == {"its prompt is in data.validation_files": 1}
    assert (counts.split_samples["train"], counts.split_samples["validation"]) == (11, 5)
    lengths = [sample.num_tokens for sample in samples]
    assert (counts.split_tokens["validation"], counts.split_tokens["train"]) == (sum(lengths[:5]), sum(lengths[5:]))


def test_held_out_rows_are_known_by_a_file_whose_address_holds_a_secret(tmp_path: Path) -> None:
    address = f"memory:///{tmp_path.name}/held.jsonl?token=abc"
    with fsspec.open(address, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in make_chats(3))
    config = split_config(
        tmp_path, make_chats(12), data__validation_fraction=0.0, data__validation_files=address, data__max_samples=5
    )
    samples, counts = plan(config)
    secret = [(row, "validation") for row in range(3)]
    assert [(sample.source_row, sample.split) for sample in samples] == [*secret, *((n, "train") for n in range(3, 8))]
    assert counts.dropped == {"its prompt is in data.validation_files": 3}
    assert not any("abc" in sample.source_file for sample in samples)


def test_validation_files_take_the_place_of_the_default_share(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        'target.model = "t"\ncache.path = "c"\ndata.files = "a.jsonl"\ndata.validation_files = ["b.jsonl"]\n'
    )
    loaded = load_config(config)
    assert loaded.data.validation_fraction == 0
    (tmp_path / "resolved.toml").write_text(to_toml(loaded))
    assert load_config(tmp_path / "resolved.toml") == loaded
    with pytest.raises(ConfigError, match="validation_fraction must be 0, or not set, where validation_files"):
        load_config(config, ["data.validation_fraction=0.1"])


def test_a_file_is_for_training_or_held_out(tmp_path: Path) -> None:
    config = held_out_config(tmp_path, make_chats(2), data__files=[str(tmp_path / "*.jsonl")])
    with pytest.raises(DataError, match=r"data\.validation_files: in data\.files too: .*held\.jsonl"):
        plan(config)
    with pytest.raises(DataError, match=r"data\.validation_files: nothing matches"):
        plan(held_out_config(tmp_path, make_chats(2), data__validation_files=[str(tmp_path / "none*.jsonl")]))


def test_the_held_out_files_are_part_of_the_caches_identity(tmp_path: Path) -> None:
    config = held_out_config(tmp_path, make_chats(14)[12:])
    settings = settings_of(config)
    run.extract(settings)
    open_cache(config, layers=None).close()
    with CacheReader(config.cache.path) as reader:
        by_sample = dict(zip(reader.sample_ids.tolist(), reader.splits.tolist(), strict=True))
    assert by_sample == dict.fromkeys(range(2), "validation") | dict.fromkeys(range(2, 14), "train")
    held_out_config(tmp_path, make_chats(15)[12:])
    with pytest.raises(CacheIdentityError, match="validation_digest"):
        open_cache(config, layers=None)
    shorter = make_config(tmp_path, data__max_samples=5)
    with pytest.raises(CacheIdentityError, match="max_samples: cache has None, this run has 5"):
        run.extract(settings_of(shorter))


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "eval", "test", " Test "])
def test_a_split_column_says_where_a_row_belongs(tmp_path: Path, name: str) -> None:
    rows = named(make_chats(4), "split", "train", name, "train", None)
    samples, _ = plan(split_config(tmp_path, rows, data__validation_fraction=0.0))
    assert [sample.split for sample in samples] == ["train", "validation", "train", "train"]
    samples, _ = plan(split_config(tmp_path, rows, data__validation_fraction=0.999999))
    assert [sample.split for sample in samples] == ["train", "validation", "train", "validation"]


def test_a_split_that_is_none_is_a_bad_row(tmp_path: Path) -> None:
    rows = named(make_chats(4), "split", "train", "gsm8k", 3, "validation")
    _, counts = plan(split_config(tmp_path, rows, data__max_bad_fraction=0.5))
    names = "train, validation, valid, val, dev, eval, test"
    assert counts.bad == {f"split: expected one of {names}, got '{value}'": 1 for value in ("gsm8k", "3")}
    held = held_out_config(tmp_path, named(make_chats(14)[12:], "split", "train", "test"), data__max_bad_fraction=0.5)
    samples, counts = plan(held)
    assert counts.bad == {"split: is train in a file of data.validation_files": 1}
    assert places(samples)[0] == ("held.jsonl", 1, "validation")


def test_the_first_usable_rows_of_all_files_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = make_chats(12)
    rows[1] = {"messages": []}
    write_jsonl(tmp_path / "chats.jsonl", rows[:4])
    write_jsonl(tmp_path / "more.jsonl", rows[4:])
    files = [str(tmp_path / name) for name in ("chats.jsonl", "more.jsonl")]
    changes = {"data__files": files, "data__max_bad_fraction": 0.5}
    everything = plan(make_config(tmp_path, **changes))[0]
    for processes in (1, 2):
        monkeypatch.setattr(ordered, "MIN_ITEMS", 1 if processes > 1 else 4096)
        config = make_config(tmp_path, **changes, data__max_samples=5, data__num_processes=processes)
        samples, counts = plan(config)
        assert places(samples) == places(everything)[:5]
        assert places(samples)[-1][:2] == ("more.jsonl", 1)
        assert (counts.num_rows, counts.num_samples) == (6, 5)
    held = held_out_config(tmp_path, make_chats(16)[12:], data__max_samples=3)  # validation files are taken whole
    assert [split for *_, split in places(plan(held)[0])] == ["validation"] * 4 + ["train"] * 3


@pytest.mark.parametrize(
    ("fraction", "words"), [(0.0, "no sample is held out"), (0.999999, "every sample is held out"), (0.25, None)]
)
def test_an_empty_split_is_said_before_anything_is_computed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fraction: float, words: str | None
) -> None:
    config = make_config(tmp_path, data__validation_fraction=fraction)
    for command in (estimate, lambda config: run.extract(settings_of(config))):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="stages.extract.samples"):
            command(config)
        warned = [record.message for record in caplog.records if record.name == "stages.extract.samples"]
        assert len(warned) == (words is not None)
        assert all(words in message and "data.validation_fraction" in message for message in warned if words)


def invoke(*arguments: Any) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return " ".join(result.output.split())


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"What does function {index} do?"}]} for index in range(count)]


def test_rows_without_answers_are_priced_and_sent_to_regenerate(tmp_path: Path) -> None:
    config = split_config(tmp_path, prompts(10), data__max_length=100)
    with pytest.raises(PromptsOnlyError, match=r"10 of the first 10 rows are prompts .* dspark regenerate"):
        plan(config)
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config))
    # By hand: <|im_start|>, "user", newline, the question, <|im_end|>, newline, <|im_start|>, "assistant", newline.
    tokenizer = run.describe_inputs(settings_of(config)).tokenizer
    texts = [
        f"<|im_start|>user\nWhat does function {index} do?<|im_end|>\n<|im_start|>assistant\n" for index in range(10)
    ]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    output = invoke("estimate", file)
    assert f"10, {sum(lengths)} tokens" in output
    assert f"at most {1000 - sum(lengths)} tokens" in output
    assert "at most 70 tokens" in invoke("estimate", file, "--set", "regenerate.max_tokens=7")
    assert "dspark regenerate" in output
    assert not (tmp_path / "cache").exists()
    assert "dspark regenerate" in invoke("extract", file)


def test_some_rows_without_answers_are_bad_rows_that_name_regenerate(tmp_path: Path) -> None:
    config = split_config(tmp_path, [*make_chats(4), *prompts(2)])
    with pytest.raises(DataError, match=r"(?s)2 of the first 6 rows are bad.*2 rows are prompts .* dspark regenerate"):
        plan(config)


@pytest.mark.parametrize("row", [{"input_ids": [5] * 20 + [4096], "loss_mask": [1] * 21}, None])
def test_a_token_beyond_the_embedding_is_a_bad_row_of_estimate_and_extract(
    tmp_path: Path, row: dict[str, Any] | None
) -> None:
    from transformers import AutoTokenizer

    folder = save_tiny_target(tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 4080
    tokenizer.add_tokens([f"<extra_{token}>" for token in range(4080, 4100)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    rows: list[Any] = make_chats(8)
    rows[3]["messages"][0]["content"] = "What about <extra_4099> here?"
    rows[4]["messages"][0]["content"] = "What about <extra_4095> here?"
    rows[5] = row or rows[5]
    config = split_config(tmp_path, rows, data__max_bad_fraction=0.5, draft__mask_token_id=4081)
    priced = estimate(config)
    assert isinstance(priced, tuple)
    reason = "a token id outside the target's embedding of 4096 rows"
    assert priced[1].bad == {reason: 2 if row else 1}
    assert priced[1].examples[reason][0].endswith("row 3")
    result = run.extract(settings_of(config))
    assert result.plan.manifest.plan.dropped == {f"bad row: {reason}": 2 if row else 1}


def test_the_share_that_came_out_is_shown(tmp_path: Path) -> None:
    rows = named(make_chats(4), "split", "train", "test", "train", "train")
    config = split_config(tmp_path, rows)
    samples, _ = plan(config)
    lengths = [sample.num_tokens for sample in samples]
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config))
    line = f"1 sample, {lengths[1]} tokens, {lengths[1] / sum(lengths):.1%} of the tokens"
    for command in ("estimate", "extract"):
        assert f"split validation │ {line}" in invoke(command, file)
    assert f"split validation: {line}" in invoke("extract", file, "--set", f"cache.path={tmp_path / 'other'}")


def test_files_are_looked_for_before_the_target(tmp_path: Path) -> None:
    config = make_config(tmp_path, target__model="none/such")
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config))
    (tmp_path / "chats.jsonl").unlink()
    for command in (["estimate"], ["extract"], ["regenerate", "--local", "--out", tmp_path / "out"]):
        output = invoke(command[0], file, *command[1:])
        assert "nothing matches" in output
        assert "none/such is" not in output
