"""Reports: what is read of runs, how they are held against each other, and the sentence at the top."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from made_runs import Page, evaluate, make_run, read, report
from pipeline.cli import main
from pipeline.report.compare import compare_runs, headline
from pipeline.report.pairing import Difference, paired_difference
from pipeline.report.runs import common_folder, differing_keys, find_runs, read_runs
from pipeline.sweep.record import write_trial
from stages.errors import SettingError
from stages.evaluate.calibration import Origin
from stages.train.metrics import read_metrics


def assert_nothing_is_called_best(page: Page) -> None:
    assert "best" not in page.text.lower()
    assert "ship" not in page.text.lower()
    assert "compared" not in page.title


def test_a_paired_difference_equals_a_plain_bootstrap() -> None:
    one, other = evaluate(gain=0.1), evaluate(gain=0.08, seed=3)
    found = paired_difference([one], [other])
    assert found is not None
    pairs = [(s.num_blocks, s.tau - o.tau) for s, o in zip(one.samples, other.samples, strict=True)]
    assert len(pairs) == 30
    assert found.mean == pytest.approx(sum(n * d for n, d in pairs) / sum(n for n, _ in pairs))
    rng, means = np.random.default_rng(17), []
    for _ in range(2000):
        drawn = [pairs[index] for index in rng.integers(len(pairs), size=len(pairs))]
        means.append(sum(n * d for n, d in drawn) / sum(n for n, _ in drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
    back = paired_difference([other], [one])
    assert back is not None
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))


def test_pairing_sees_what_the_intervals_of_each_do_not(tmp_path: Path) -> None:
    """A small gain on every conversation: the intervals overlap, the difference is beyond chance."""
    better = make_run(tmp_path / "better", evaluate(gain=0.02))
    worse = make_run(tmp_path / "worse", evaluate(gain=0.0), config={"lr": 0.1})
    comparison = read(worse, better)
    assert [run.name for run in comparison.runs] == ["better", "worse"]
    one, other = (run.evaluation for run in comparison.runs)
    assert one is not None
    assert other is not None
    assert other.tau_high > one.tau_low
    assert comparison.ties == []
    assert re.fullmatch(
        r"Ship better: tau [\d.]+ \(95 % interval .*\), [\d.]+ above the next, worse \(paired difference 0\.0.*\), "
        r"which is beyond the luck of these 30 conversations; .* more seeds tell\.",
        headline(comparison),
    )


def test_runs_measured_on_other_blocks_are_not_compared(tmp_path: Path) -> None:
    elsewhere = Origin(cache_digest="1" * 64, num_anchors=4, seed=0)
    folders = [
        make_run(tmp_path / "one", evaluate(gain=0.1)),
        make_run(tmp_path / "two", evaluate(origin=elsewhere)),
    ]
    comparison = read(*folders)
    assert comparison.others == []
    assert "the others were measured on other blocks" in headline(comparison)


def test_a_run_measured_on_fewer_conversations_is_not_held_against_the_others(tmp_path: Path) -> None:
    """One lucky conversation gives a weak draft the highest tau, and says nothing of the others."""
    lucky = evaluate(gain=0.15, num_samples=1)
    good, fair = evaluate(gain=0.1), evaluate(gain=0.0)
    assert lucky.tau > good.tau
    assert paired_difference([lucky], [good]) is None
    folders = [make_run(tmp_path / name, found) for name, found in (("weak", lucky), ("good", good), ("fair", fair))]
    comparison = read(*folders)
    assert comparison.choice is None
    assert "nothing to compare it with, since the others were measured on other blocks" in headline(comparison)
    result = report(*folders)
    page = Page(tmp_path / "report.html")
    line = (
        "Not comparable, since measured on different blocks: weak (1 conversation, 4 blocks, cache 000000000000, "
        "evaluate.num_anchors 4, evaluate.seed 0); good, fair (30 conversations, 120 blocks, cache 000000000000, "
        "evaluate.num_anchors 4, evaluate.seed 0)."
    )
    assert line in " ".join(result.output.split())
    assert line in re.sub("<[^>]*>", "", (tmp_path / "report.html").read_text())
    assert page.rows[0][:3] == ["run", "tau", "95 % interval"]
    assert [row[0] for row in page.rows[1:4]] == ["weak", "good", "fair"]
    assert_nothing_is_called_best(page)
    assert "ship this" not in (tmp_path / "report.html").read_text()


def test_a_difference_is_clear_only_in_favour_of_the_best() -> None:
    assert Difference(mean=0.02, low=0.01, high=0.03).is_clear
    assert not Difference(mean=-0.02, low=-0.03, high=-0.01).is_clear
    assert not Difference(mean=0.0, low=0.0, high=0.0).is_clear


@pytest.mark.parametrize("num_samples", [1, 4, 5])
def test_a_handful_of_conversations_is_needed_for_a_claim(tmp_path: Path, num_samples: int) -> None:
    """The interval of one conversation has no width, which would make any difference one beyond chance."""
    better = make_run(tmp_path / "better", evaluate(gain=0.1, num_samples=num_samples))
    worse = make_run(tmp_path / "worse", evaluate(gain=0.0, num_samples=num_samples))
    comparison = read(better, worse)
    if num_samples == 5:
        assert headline(comparison).startswith("Ship better")
        return
    few = {1: "1 conversation", 4: "4 conversations"}[num_samples]
    assert comparison.choice is None
    assert headline(comparison).startswith("better has tau ")
    assert headline(comparison).endswith(f"{few} cannot tell runs apart (it takes 5 at least).")


def test_time_does_not_decide_between_runs_that_are_alike(tmp_path: Path) -> None:
    """Seconds are noise: of equal parameters, the higher tau, however long it took."""
    best = make_run(tmp_path / "best", evaluate(gain=0.1, seed=1), num_steps=12)
    quick = make_run(tmp_path / "quick", evaluate(gain=0.1, seed=2), num_steps=2)
    comparison = read(best, quick)
    assert [run.name for run in comparison.ties] == ["quick"]
    assert comparison.choice is comparison.best is comparison.runs[0]
    assert "None of those has fewer trained parameters (100)." in headline(comparison)


def test_the_sentence_names_the_cheapest_of_those_that_are_alike(tmp_path: Path) -> None:
    noisy = make_run(tmp_path / "noisy", evaluate(gain=0.1, seed=1), num_parameters=1000)
    cheap = make_run(tmp_path / "cheap", evaluate(gain=0.1, seed=2), num_parameters=10)
    bad = make_run(tmp_path / "bad", evaluate(gain=-0.3), num_parameters=1)
    comparison = read(noisy, cheap, bad)
    assert {run.name for run in [comparison.runs[0], *comparison.ties]} == {"noisy", "cheap"}
    assert comparison.choice is not None
    assert comparison.choice.name == "cheap"
    assert headline(comparison).startswith("Ship cheap: tau ")
    assert "fewest trained parameters of those that cannot be told from the best (10)" in headline(comparison)
    assert "not beyond chance" in headline(comparison)


def test_a_sweep_stands_for_its_trials(tmp_path: Path) -> None:
    for name in ("b", "a"):
        make_run(tmp_path / "sweep" / name, evaluate())
    (tmp_path / "sweep" / "report").mkdir()
    (tmp_path / "sweep" / ".locks").mkdir()
    alone = make_run(tmp_path / "alone", evaluate())
    assert [folder.name for folder in find_runs(tmp_path / "sweep")] == ["a", "b"]
    runs = read_runs([tmp_path / "sweep", alone, alone])
    assert {run.name for run in runs} == {"sweep/a", "sweep/b", "alone"}
    assert common_folder([tmp_path / "sweep" / "a", tmp_path / "sweep" / "b"]) == tmp_path / "sweep"
    with pytest.raises(SettingError, match="neither a run nor a sweep"):
        find_runs(tmp_path / "sweep" / "report")


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", evaluate(), num_parameters=123)
    write_trial(folder, {"number": 1, "state": "complete", "origin": {"revision": "abc"}})
    (run,) = read_runs([folder])
    assert run.num_parameters == 123  # the target's embedding does not count
    assert run.seconds == 3.0
    assert run.num_steps == 6
    assert run.config["train.lr"] == 0.001
    assert run.trial["origin"] == {"revision": "abc"}
    assert run.cache_bytes is None
    assert run.draft_bytes == (folder / "draft" / "model.safetensors").stat().st_size


def test_only_what_differs_is_shown(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", evaluate(), config={"lr": 0.1, "seed": 1})
    second = make_run(tmp_path / "b", evaluate(), config={"lr": 0.2, "seed": 1, "extra": [1, 2]})
    assert differing_keys(read_runs([first, second])) == ["train.lr", "train.extra"]
    assert differing_keys(read_runs([first])) == []


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("evaluation.json", "{}", "no format_version"),
        ("evaluation.json", '{"format_version": 1, "tau": 2}', "run dspark evaluate again"),
        ("evaluation.json", "not JSON", "is not JSON"),
        ("metrics.jsonl", '{"kind": "train"}\n[1]\ngarbage\n', None),
        ("config.toml", "not = = TOML", None),
        ("config.toml", 'title = "x"\n', None),
        ("config.toml", "[[draft]]\nnum_layers = 1\n", None),
        ("config.toml", f"a = {'[' * 5000}", None),
        ("draft/model.safetensors", "short", None),
        ("draft/model.safetensors", "\x01\x00\x00\x00\x00\x00\x00\x00[", None),
        ("draft/model.safetensors", f"{chr(100)}{chr(0) * 7}" + '{"a": {"shape": [1e999]}}'.ljust(100), None),
        ("trial.json", "[]", None),
        ("trial.json", '{"format_version": 1, "origin": "x"}', None),
        ("trial.json", '{"format_version": 1, "state": "\\ud800"}', None),
        ("trial.json", '{"format_version": 9}', None),
    ],
)
def test_a_damaged_file_costs_what_it_would_have_shown(
    tmp_path: Path, name: str, content: str, problem: str | None
) -> None:
    folder = make_run(tmp_path / "run", evaluate())
    other = make_run(tmp_path / "other", evaluate())
    (folder / name).write_text(content)
    result = report(folder, other)
    assert result.exit_code == 0
    (run,) = (run for run in read_runs([folder, other]) if run.name == "run")
    if problem is None:
        assert run.problem is None
    else:
        assert problem in (run.problem or "")
        assert any(problem in cell for row in Page(tmp_path / "report.html").rows for cell in row)


@pytest.mark.parametrize("name", ["evaluation.json", "trial.json", "config.toml", "metrics.jsonl"])
def test_a_file_of_any_size_costs_no_memory_and_no_other_run(tmp_path: Path, name: str) -> None:
    """A hole of 40 GB behind what was written: nothing that could be held."""
    folder, other = make_run(tmp_path / "run", evaluate()), make_run(tmp_path / "other", evaluate())
    with (folder / name).open("ab") as stream:
        stream.truncate(40 << 30)
    assert report(folder, other).exit_code == 0
    runs = {run.name: run for run in read_runs([folder, other])}
    assert runs["other"].problem is None
    assert runs["other"].config
    run = runs["run"]
    if name == "evaluation.json":
        assert "42,949,672,960 bytes, expected 268,435,456 at most" in (run.problem or "")
    elif name == "metrics.jsonl":
        assert run.num_steps == runs["other"].num_steps, "the rows before the hole"
    elif name == "config.toml":
        assert run.config == {}


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("accept_rate_per_pos", "accept_rate_per_pos: expected 3 slots, got 0"),
        ("conditional_accept_low_per_pos", "conditional_accept_low_per_pos: expected 3 slots, got 0"),
        ("scheduling.thresholds_after.accepted", "threshold curve: expected as many"),
        ("scheduling.reliability_after.survival.count", "reliability: expected as many"),
        ("scheduling.outlook.concurrencies.0.fixed", "outlook: expected fixed lengths"),
        (
            "scheduling.outlook.concurrencies.0.fixed.0.tokens_per_second",
            "outlook: expected more than 0 tokens a second",
        ),
    ],
)
def test_an_evaluation_whose_parts_do_not_fit_is_listed_with_the_reason(
    tmp_path: Path, path: str, problem: str
) -> None:
    folder, other = make_run(tmp_path / "run", evaluate()), make_run(tmp_path / "other", evaluate())
    fields = json.loads((folder / "evaluation.json").read_text())
    del fields["crc32c"]  # as earlier versions wrote it
    *parents, last = path.split(".")
    part: Any = fields
    for name in parents:
        part = part[int(name) if isinstance(part, list) else name]
    part[last] = 0.0 if last == "tokens_per_second" else []
    (folder / "evaluation.json").write_text(json.dumps(fields))
    assert report(folder, other).exit_code == 0
    problems = {run.name: run.problem for run in read_runs([folder, other])}
    assert problems["other"] is None
    assert problem in (problems["run"] or "")


def test_a_run_that_cannot_be_read_is_listed_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = make_run(tmp_path / "run", evaluate()), make_run(tmp_path / "other", evaluate())

    def fail(run_dir: Path) -> list[dict[str, Any]]:
        if run_dir.name == "run":
            raise PermissionError(13, "Permission denied", str(run_dir / "metrics.jsonl"))
        return read_metrics(run_dir)

    monkeypatch.setattr("pipeline.report.runs.read_metrics", fail)
    assert report(folder, other).exit_code == 0
    rows = Page(tmp_path / "report.html").rows
    assert any("cannot be read" in cell and "Permission denied" in cell for row in rows for cell in row)
    assert [run.name for run in read_runs([folder, other]) if run.evaluation is not None] == ["other"]


def test_a_folder_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    base = tmp_path / os.fsdecode(b"caf\xe9")
    make_run(base / os.fsdecode(b"r\xe9sum\xe9"), evaluate())
    (make_run(base / os.fsdecode(b"d\xe9j\xe0"), evaluate()) / "evaluation.json").write_text("damaged")
    assert report(base).exit_code == 0
    page = Page(base / "report.html")
    assert page.headline.startswith("r?sum? has tau ")
    assert any("is not JSON" in cell for row in page.rows for cell in row)


def test_a_run_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", evaluate())
    (tmp_path / "link").symlink_to(folder)
    runs = read_runs([folder, tmp_path / "a" / ".." / "a", tmp_path / "link"])
    assert [run.name for run in runs] == ["a"]
    assert "there is no other evaluated run" in headline(compare_runs(runs))


def test_a_pruned_and_a_failed_trial_say_so(tmp_path: Path) -> None:
    make_run(tmp_path / "sweep" / "good", evaluate())
    for name in ("pruned", "failed"):
        folder = make_run(tmp_path / "sweep" / name, None, num_parameters=None, num_steps=2)
        write_trial(folder, {"number": 2, "state": name, "reason": f"why it was {name}"})
    result = report(tmp_path / "sweep")
    page = Page(tmp_path / "sweep" / "report.html")
    for name in ("pruned", "failed"):
        assert any(f"{name}: why it was {name}" in cell for row in page.rows for cell in row)
        assert f"{name}: why it" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [["nowhere"], []])
def test_folders_that_are_no_runs(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["report", *arguments])
    assert result.exit_code != 0
    assert ("nowhere: no such run" if arguments else "Missing argument") in result.output


def test_a_report_of_one_run_compares_nothing(tmp_path: Path) -> None:
    config = {"target": {"model": "org/Big"}, "data": {"files": ["a.jsonl", "b/*.jsonl"]}}
    folder = make_run(tmp_path / "only", evaluate(), sections=config)
    os.utime(folder / "evaluation.json", (1_700_000_000, 1_700_000_000))  # 14 November 2023, 22:13 UTC
    result = report(folder)
    page = Page(folder / "report.html")
    assert page.title == "Draft only"
    assert_nothing_is_called_best(page)
    assert "best" not in result.output
    for name, values in (
        ("target", "org/Big"), ("data", "a.jsonl, b/*.jsonl"), ("steps", "6"), ("block size", "3"),
        ("measured on", "30 held-out conversations, 120 blocks"), ("date", "2023-11-14"),
    ):  # fmt: skip
        assert page.facts[name] == values
    assert "Against no draft: only gives +" in " ".join(result.output.split())
    assert "Against no draft: only gives +" in page.text


def test_drafts_of_two_targets_are_not_compared(tmp_path: Path) -> None:
    """Two drafts of each, whose own comparison would say who is the best of its target."""
    for target, digest in (("org/Big", "1"), ("org/Small", "2")):
        for name, gain in (("one", 0.1), ("two", 0.0)):
            origin = Origin(cache_digest=digest * 64, num_anchors=4, seed=0)
            found, sections = evaluate(gain=gain, origin=origin), {"target": {"model": target}}
            make_run(tmp_path / f"{target[4:]}-{name}", found, config={"lr": gain}, sections=sections)
    result = report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.title == "Drafts"
    assert page.headline.startswith("Drafts of different targets (org/Big, org/Small) are not compared")
    assert page.facts["target"] == "org/Big, org/Small"
    assert_nothing_is_called_best(page)
    assert "best" not in result.output.lower()
    own = read(tmp_path / "Big-one", tmp_path / "Big-two")
    assert headline(own).startswith("Ship Big-one"), "of one target they are compared"


def test_a_draft_without_gain_is_not_shipped(tmp_path: Path) -> None:
    """Its tokens are hardly ever accepted, so that steps yield what they yield without it."""
    useless = make_run(tmp_path / "first", evaluate(gain=-0.795))
    worse = make_run(tmp_path / "second", evaluate(gain=-0.8))
    comparison = read(useless, worse)
    best = comparison.best
    assert best is not None
    assert best.is_useless
    assert best.evaluation is not None
    assert 1 < best.evaluation.tau < 1.01
    assert comparison.choice is None
    assert headline(comparison).endswith("but gains nothing against no draft.")
    result = report(useless, worse)
    page = Page(tmp_path / "report.html")
    for text in (page.text, result.output):
        assert "ship" not in text.lower()
        assert "Against no draft: first is not faster at any number of requests" in " ".join(text.split())
    assert not read(make_run(tmp_path / "fair", evaluate(gain=0.1))).runs[0].is_useless
    assert not read(make_run(tmp_path / "plain", evaluate(confidence=False))).runs[0].is_useless, "no outlook"


@pytest.mark.parametrize("count", [0, 1])
def test_the_sentence_about_fewer_than_two_runs(tmp_path: Path, count: int) -> None:
    folder = make_run(tmp_path / "only", evaluate() if count else None)
    text = headline(read(folder))
    assert ("there is no other evaluated run" if count else "No run has been evaluated") in text
