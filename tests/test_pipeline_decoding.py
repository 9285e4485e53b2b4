"""`dspark evaluate --decode` on a tiny target: real extraction, real draft, and the target alone beside it."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from pipeline.config import Config, to_toml
from pipeline.decoding import _load_target, decode_draft
from pipeline.held_out_answers import find_last_answer, score_answer, take_prompts
from pipeline.measure import measure_from_cache
from pipeline.stage_one import settings_of
from pipeline.stage_two import evaluate_draft, open_cache, open_draft, train_draft
from stages.errors import SettingError
from stages.evaluate.calibration import Calibration, Origin, write_calibration
from stages.evaluate.decode import Answer, Round
from stages.evaluate.decode_report import DecodedPrompt, find_difference, summarize_run
from stages.evaluate.evaluation import Evaluation
from stages.evaluate.reliability import ConfidenceQuality
from stages.extract.run import extract
from stages.train import DSparkTrainerModule
from tiny_target import make_config, save_tiny_target, write_jsonl


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of target, chats and cache, draft)."""
    folder = tmp_path_factory.mktemp("decoding")
    config = make_config(folder, train__max_steps=6)
    extract(settings_of(config))
    return folder, train_draft(config).draft_dir


def change(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def small(folder: Path, **values: Any) -> Config:
    return change(make_config(folder), "decode", **{"num_prompts": 3, "max_new_tokens": 24, **values})


def test_greedy_decoding_is_lossless_and_sampled_decoding_is_compared(trained: tuple[Path, Path]) -> None:
    folder, draft_dir = trained
    result = decode_draft(small(folder), draft_dir=draft_dir)
    greedy, sampled = result.runs
    assert (greedy.temperature, sampled.temperature) == (0.0, 1.0)
    assert greedy.num_differing_tokens == 0
    assert greedy.differences == ()
    assert sampled.num_differing_tokens is None
    assert greedy.num_tokens == greedy.num_plain_tokens <= 3 * 24
    for run in result.runs:
        assert run.num_prompts == 3
        assert run.num_tokens - 3 == pytest.approx(run.tokens_per_round.value * run.num_rounds)
        assert run.tokens_per_round.low <= run.tokens_per_round.value <= run.tokens_per_round.high
        assert run.num_tested_per_pos[0] <= run.num_rounds
    assert result.comparison is not None
    assert result.comparison.num_answers == 3
    assert abs(result.comparison.difference_decoded.value) < 0.5, "the same answers; a few rounds"
    again = decode_draft(small(folder), draft_dir=draft_dir)
    assert again.runs[1].num_tokens == sampled.num_tokens, "draws depend on the seed alone"
    assert again.comparison == result.comparison


def fixed_calibration(temperatures: tuple[float, ...]) -> Calibration:
    quality = ConfidenceQuality(
        ece=0.1, auc=0.5, survival_ece=0.1, survival_auc=0.5, survival_ece_per_pos=(0.1,) * len(temperatures)
    )
    return Calibration(
        temperatures=temperatures, kept_slots=(), origin=Origin(cache_digest="0", num_anchors=1, seed=0),
        num_fitted_samples=1, num_fitted_blocks=1, num_measured_samples=1, num_measured_blocks=1,
        before=quality, after=quality,
    )  # fmt: skip


def test_a_threshold_shortens_blocks_and_leaves_the_answer_alone(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, draft_dir = trained
    config = small(folder, temperatures=(0.0,))
    whole = decode_draft(config, draft_dir=draft_dir).runs[0]
    config = small(folder, temperatures=(0.0, 1.0), confidence_threshold=0.2)
    result = decode_draft(config, draft_dir=draft_dir)
    assert not result.is_calibrated
    cut = result.runs[0]
    assert cut.num_differing_tokens == 0
    assert cut.num_drafted / cut.num_rounds < whole.num_drafted / whole.num_rounds
    assert result.comparison is None, "the cache's estimate is of whole blocks"
    calibrated = tmp_path / "calibrated"
    shutil.copytree(draft_dir, calibrated)
    write_calibration(calibrated, fixed_calibration((1e6,) * 4))
    result = decode_draft(config, draft_dir=calibrated)
    assert result.is_calibrated
    assert result.runs[0].num_drafted > cut.num_drafted, "confidences of 0.5: two slots a round"


def test_the_cache_is_not_measured_again_before_decoding(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only numbers of these very weights, blocks and settings stand in; anything else is measured."""
    folder, draft_dir = trained
    draft = Path(shutil.copytree(draft_dir, tmp_path / "draft"))
    config = small(folder, temperatures=(0.0,))
    measured: list[Path] = []
    monkeypatch.setattr(
        "pipeline.measure.evaluate_draft",
        lambda config, *, draft_dir, opened: (
            measured.append(draft_dir) or evaluate_draft(config, draft_dir=draft_dir, opened=opened)
        ),
    )

    def measure(config: Config, *, may_reuse: bool = True) -> tuple[bool, Evaluation, str]:
        measured.clear()
        console = Console(record=True, width=200, file=io.StringIO())
        found = measure_from_cache(config, draft=draft, console=console, may_reuse=may_reuse)
        return bool(measured), found, console.export_text()

    was_measured, first, _ = measure(config)
    assert was_measured, "there is no evaluation.json yet"
    was_measured, again, text = measure(config)
    assert not was_measured
    assert again == first
    assert "is of these weights: not measured again" in text
    assert f"{first.tau:.3f}" in text
    assert measure(config, may_reuse=False)[0], "asked for itself, it is measured"
    table = tmp_path / "table.csv"
    table.write_text("tokens,steps_per_second\n1,50\n300,10\n")
    for section, values in (
        ("evaluate", {"num_anchors": 2}), ("evaluate", {"seed": 1}), ("evaluate", {"max_samples": 2}),
        ("evaluate", {"throughput_table": table}), ("train", {"dtype": "bfloat16"}),
    ):  # fmt: skip
        assert measure(change(config, section, **values))[0], values
        assert measure(config)[0], "that was of other settings"
        assert not measure(config)[0]
    (draft / "calibration.json").unlink()
    assert measure(config)[0]
    assert (draft / "calibration.json").is_file()
    weights = load_file(draft / "model.safetensors")
    weights["fc.weight"] *= 1.01
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    assert measure(config)[0]
    numbers = json.loads((draft / "evaluation.json").read_text())
    (draft / "evaluation.json").write_text(json.dumps(numbers | {"weights_digest": None}))
    assert measure(config)[0], "it does not say of which weights it is"


def test_another_target_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, draft_dir = trained
    config = small(folder)
    other = save_tiny_target(tmp_path / "other", seed=5)
    model, _ = open_draft(config, draft_dir=draft_dir, dtype=torch.float32)
    with pytest.raises(SettingError, match=r"trained for another target than .*other.*embed_tokens"):
        _load_target(change(config, "target", model=str(other)), model=model, draft_dir=draft_dir)


def test_the_command_writes_and_prints_what_was_measured(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, draft_dir = trained
    file = tmp_path / "config.toml"
    file.write_text(to_toml(small(folder)), encoding="utf-8")
    result = CliRunner().invoke(main, ["evaluate", str(file), "--decode"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for text in ("tokens a round", "greedy", "temperature 1", "│ 0 of ", "the replay", "cpu"):
        assert text in result.output
    numbers = json.loads((draft_dir.parent / "decoding.json").read_text())
    assert numbers["format_version"] == 1
    assert [run["temperature"] for run in numbers["runs"]] == [0.0, 1.0]
    assert numbers["runs"][0]["num_differing_tokens"] == 0
    assert set(numbers["comparison"]["difference"]) == {"value", "low", "high"}


@pytest.mark.parametrize(
    ("mask", "answer"),
    [([0, 0, 1, 1], (2, 4)), ([0, 1, 0, 1, 1, 0], (3, 5)), ([1, 1], (0, 2)), ([0, 0], (0, 0)), ([0, 1], (1, 2))],
)
def test_the_last_answer_is_the_last_run_of_supervised_tokens(mask: list[int], answer: tuple[int, int]) -> None:
    assert find_last_answer(torch.tensor(mask)) == answer


def test_prompts_are_the_held_out_tokens_before_the_last_answer(trained: tuple[Path, Path]) -> None:
    folder, draft_dir = trained
    _, reader = open_draft(small(folder), draft_dir=draft_dir, dtype=torch.float32)
    indices = reader.split_indices("validation")
    prompts, num_skipped = take_prompts(reader, indices, num_prompts=4)
    assert (len(prompts), num_skipped) == (4, 0)
    for prompt, index in zip(prompts, indices, strict=False):
        sample = reader[index]
        assert prompt.tokens == tuple(sample.input_ids[: len(prompt.tokens)].tolist())
        assert sample.loss_mask[len(prompt.tokens) : prompt.answer_end].all()
        assert not sample.loss_mask[len(prompt.tokens) - 1]
        assert not sample.loss_mask[prompt.answer_end :].any()


def test_samples_without_a_prompt_are_passed_over(tmp_path: Path) -> None:
    texts = [{"text": f"Function {index} gives {index * index} and never anything else."} for index in range(16)]
    write_jsonl(tmp_path / "chats.jsonl", texts)
    config = small(tmp_path)
    extract(settings_of(config))
    reader = open_cache(config, layers=None)
    with pytest.raises(SettingError, match=r"none of the \d+ validation samples has a prompt"):
        take_prompts(reader, reader.split_indices("validation"), num_prompts=2)


def test_scores_of_an_answer_are_those_of_the_full_distributions(trained: tuple[Path, Path]) -> None:
    folder, draft_dir = trained
    model, reader = open_draft(small(folder), draft_dir=draft_dir, dtype=torch.float32)
    (prompt,), _ = take_prompts(reader, reader.split_indices("validation"), num_prompts=1)
    limit = 9
    scores = score_answer(DSparkTrainerModule(model.eval()), reader, prompt, max_new_tokens=limit)
    sample, first = reader[prompt.index], len(prompt.tokens)
    last = min(prompt.answer_end, first + limit) - 1
    anchors = torch.arange(first, last)[None]
    with torch.no_grad():
        ids = torch.nn.functional.pad(sample.input_ids[None].long(), (0, 4))
        hidden = torch.nn.functional.pad(sample.hidden_states.flatten(1).float(), (0, 0, 0, 4))[None]
        h = model(ids, hidden, anchors)
        prev = torch.stack([ids[0, anchor : anchor + 4] for anchor in anchors[0]])[None]
        bias = model.markov_head.bias(model.markov_head.latent(h, prev))
        draft = (model.base_logits(h) + bias).softmax(-1)[0].double()
        target = model.base_logits(sample.last_hidden_states).softmax(-1).double()
    accept, keep = np.zeros((last - first, 4)), np.zeros((last - first, 4))
    for place, anchor in enumerate(range(first, last)):
        for slot in range(4):
            if anchor + slot + 1 <= last:
                p, q, token = target[anchor + slot], draft[place, slot], ids[0, anchor + slot + 1]
                accept[place, slot] = torch.minimum(p, q).sum()
                keep[place, slot] = min(1.0, float(q[token] / p[token]))
    assert scores.accept_rate == pytest.approx(accept, abs=1e-4)
    assert scores.keep_chance == pytest.approx(keep, rel=1e-3, abs=1e-6)


def make_decoded(plain: list[int], speculative: list[int], rounds: tuple[Round, ...] = ()) -> DecodedPrompt:
    gaps = tuple(0.1 * (place + 1) for place in range(len(plain)))
    return DecodedPrompt(
        sample_id=7,
        plain=Answer(tokens=tuple(plain), gaps=gaps),
        plain_seconds=2.0,
        speculative=Answer(tokens=tuple(speculative), rounds=rounds),
        speculative_seconds=1.0,
    )


def test_a_differing_token_is_reported_with_the_gap() -> None:
    difference = find_difference(make_decoded([1, 2, 3, 4], [1, 2, 9, 9]))
    assert difference is not None
    assert (difference.sample_id, difference.position) == (7, 2)
    assert (difference.plain_token, difference.speculative_token) == (3, 9)
    assert difference.gap == pytest.approx(0.3)
    longer = find_difference(make_decoded([1, 2], [1, 2, 5]))
    assert longer is not None
    assert (longer.position, longer.plain_token, longer.speculative_token, longer.gap) == (2, None, 5, None)
    assert find_difference(make_decoded([1, 2], [1, 2])) is None


def test_sums_over_rounds() -> None:
    def make_round(num_drafted: int, num_accepted: int, num_emitted: int) -> Round:
        return Round(num_drafted=num_drafted, num_accepted=num_accepted, num_emitted=num_emitted, expected_tokens=1.5)

    rounds = (make_round(3, 3, 4), make_round(3, 0, 1), make_round(0, 0, 1), make_round(2, 2, 2))
    run = summarize_run(
        [make_decoded([0] * 9, [0] * 9, rounds), make_decoded([1, 2], [1, 3], (make_round(3, 1, 2),))],
        temperature=0.0,
        block_size=3,
    )
    assert run.accept_rate_per_pos == (3 / 4, 2 / 3, 1.0)
    assert run.num_tested_per_pos == (4, 3, 1)
    assert run.tokens_per_round.value == 10 / 5
    assert run.expected_per_round.value == 1.5
    assert (run.num_rounds, run.num_drafted, run.num_differing_tokens, len(run.differences)) == (5, 11, 1, 1)
    with pytest.raises(SettingError, match="max_new_tokens"):
        summarize_run([make_decoded([1], [1])], temperature=0.0, block_size=3)
