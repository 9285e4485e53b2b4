"""Reports: what is read of runs, how they are held against each other, the sentence at the top, and the page itself."""

import base64
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from pipeline.cli import main
from pipeline.report.compare import Comparison, compare_runs, headline
from pipeline.report.figures import COLOURS, draw_plots, plan_styles
from pipeline.report.pairing import Difference, paired_difference
from pipeline.report.recipes import count_seeds, describe_recipes
from pipeline.report.runs import Run, common_folder, differing_keys, find_runs, read_runs
from pipeline.report.words import readable
from pipeline.sweep.record import write_trial
from stages.errors import SettingError
from stages.evaluate.calibration import Origin
from stages.evaluate.evaluation import Evaluation, evaluate_fully, write_evaluation
from stages.evaluate.throughput import assumed_table
from stages.train.metrics import read_metrics
from test_evaluate import make_scores

K = 3
ORIGIN = Origin(cache_digest="0" * 64, num_anchors=4, seed=0)
PLOTS = {"tau", "loss", "validation", "acceptance", "reliability", "thresholds", "outlook"}
NASTY = '<script>alert("x")</script>&$x^2$'


def evaluate(
    *, gain: float = 0.0, num_samples: int = 30, confidence: bool = True, origin: Origin = ORIGIN, seed: int = 0
) -> Evaluation:
    """Scores of the same blocks, whose accept rates are raised by `gain`."""
    rng = np.random.default_rng(seed)
    batches = []
    for index in range(num_samples):
        scores = make_scores([3, 3, 2, 3], rng, confidence=confidence)
        scores.accept_rate = np.clip(np.asarray(scores.accept_rate) * 0.8 + gain, 0, 1)
        batches.append((index, scores))
    return evaluate_fully(batches, block_size=K, origin=origin, table=assumed_table())


def make_run(
    folder: Path,
    evaluation: Evaluation | None,
    *,
    config: dict[str, Any] | None = None,
    num_parameters: int | None = 100,
    num_steps: int = 6,
) -> Path:
    """A run's folder with everything that a report reads, where nothing was trained."""
    folder.mkdir(parents=True)
    run_dir = readable(str(folder))
    values = {"lr": 0.001, "seed": 0} | (config or {})
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (folder / "config.toml").write_text("\n".join(["[train]", f"run_dir = {json.dumps(run_dir)}", *lines]) + "\n")
    rows = [
        {"kind": "train", "step": step, "loss": 3 / step, "seconds": 0.5, "lr": 1e-3}
        for step in range(1, num_steps + 1)
    ]
    rows += [{"kind": "validation", "step": step, "tau": 1 + step / 10} for step in range(2, num_steps + 1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if num_parameters is not None:
        (folder / "draft").mkdir()
        own = {"fc.weight": torch.zeros(num_parameters), "embed_tokens.weight": torch.zeros(5, 2)}
        save_file(own, folder / "draft" / "model.safetensors")
    if evaluation is not None:
        write_evaluation(folder / "evaluation.json", evaluation)
    return folder


def report(*paths: Path, out: Path | None = None) -> Result:
    arguments = ["report", *map(str, paths), *([] if out is None else ["--out", str(out)])]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


class Page(HTMLParser):
    """The page as a browser reads it: texts, table rows, images, and whatever points elsewhere."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.headline = ""
        self._open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self._open == [], "a tag is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in {"meta", "img", "br", "wbr"}:
            return
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["p"] and next(t for t in self.tags[::-1] if t[0] == "p") == ("p", {"class": "headline"}):
            self.headline += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def read(*folders: Path) -> Comparison:
    return compare_runs(read_runs(folders))


# Statistics


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


def make_recipes(folder: Path, *gains: tuple[float, ...], num_samples: int = 30) -> list[Path]:
    """A recipe for each tuple, its lr the number of it, with a seed for each gain."""
    return [
        make_run(
            folder / f"seed={seed},lr={lr}",
            evaluate(gain=gain, num_samples=num_samples),
            config={"lr": float(lr), "seed": seed},
        )
        for lr, of_seeds in enumerate(gains, start=1)
        for seed, gain in enumerate(of_seeds)
    ]


def test_recipes_are_compared_by_the_mean_over_their_seeds(tmp_path: Path) -> None:
    """The best run is of the worse recipe here: one lucky seed does not make a recipe."""
    comparison = read(*make_recipes(tmp_path, (0.06, 0.05, 0.07), (0.09, 0.00, 0.01)))
    assert comparison.best is not None
    assert comparison.best.name == "seed=0,lr=2"
    first, second = comparison.recipes
    assert [run.name for run in first.runs] == ["seed=0,lr=1", "seed=1,lr=1", "seed=2,lr=1"]
    assert first.name == "lr 1"
    assert first.tau == pytest.approx(np.mean([run.tau for run in first.runs]))
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.mean == pytest.approx(first.tau - second.tau)
    assert second.difference.is_clear
    text = describe_recipes(comparison.recipes)
    assert text is not None
    assert re.fullmatch(
        r"Over seeds the best recipe is lr 1: mean tau [\d.]+ \(3 seeds, [\d.]+ to [\d.]+\)\. Next is lr 2: .* behind "
        r"\(paired difference 0\.0.*\), which is beyond the luck of these conversations, and their seeds overlap\.",
        text,
    )


def test_the_interval_of_recipes_is_that_of_the_mean_over_seeds_of_each_conversation(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.06, 0.08), (0.0, 0.01)))
    one, other = ([run.evaluation for run in recipe.runs if run.evaluation] for recipe in comparison.recipes)
    gains = [
        (samples[0].num_blocks, sum(s.tau for s in samples[:2]) / 2 - sum(s.tau for s in samples[2:]) / 2)
        for samples in zip(*(found.samples for found in (*one, *other)), strict=True)
    ]
    rng, means = np.random.default_rng(5), []
    for _ in range(2000):
        drawn = [gains[index] for index in rng.integers(len(gains), size=len(gains))]
        means.append(sum(n * d for n, d in drawn) / sum(n for n, _ in drawn))
    found = comparison.recipes[1].difference
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.005)


def test_recipes_are_shown_in_the_terminal_and_on_the_page(tmp_path: Path) -> None:
    folders = make_recipes(tmp_path, (0.06, 0.05), (0.0, 0.02), (0.01,))
    ended = report(*folders)
    assert "recipes over their seeds" in ended.output
    assert "Over seeds the best recipe is lr 1" in " ".join(ended.output.split())
    assert "only more seeds tell" not in ended.output
    page = Page(tmp_path / "report.html")
    start = next(place for place, row in enumerate(page.rows) if "mean tau" in row)
    recipes = page.rows[start + 1 : start + 4]
    assert [row[0] for row in recipes] == ["1", "2", "3"]
    assert [row[2] == "best" for row in recipes] == [True, False, False]
    assert re.fullmatch(r"0: [\d.]{5}, 1: [\d.]{5}", recipes[0][3])
    assert (recipes[2][1], recipes[2][2]) == ("", "one seed")


def test_a_lucky_seed_alone_is_no_best_recipe(tmp_path: Path) -> None:
    """Its other seeds were given up, so its mean is that of the survivor."""
    folders = make_recipes(tmp_path, (0.06, 0.05, 0.05), (0.2,))
    for seed in (1, 2):
        folder = make_run(tmp_path / f"seed={seed},lr=2", None, config={"lr": 2.0, "seed": seed})
        write_trial(folder, {"state": "pruned", "reason": "its tau was low"})
        folders.append(folder)
    comparison = read(*folders)
    assert [recipe.name for recipe in comparison.recipes] == ["lr 1", "lr 2"]
    assert comparison.recipes[1].num_missing == 2
    assert comparison.recipes[1].difference is None
    assert count_seeds(comparison.recipes[1]) == "1 of 3"
    text = describe_recipes(comparison.recipes)
    assert text is not None
    assert text.startswith("Over its seeds lr 1 has mean tau ")
    assert "only more seeds tell" in headline(comparison), "the best run has one seed"


def test_a_seed_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    folders = make_recipes(tmp_path, (0.06, 0.05), (0.0, 0.01))
    twice = make_run(tmp_path / "z-copy", evaluate(gain=0.2), config={"lr": 1.0, "seed": 0})
    assert [recipe.taus for recipe in read(*folders, twice).recipes] == [
        recipe.taus for recipe in read(*folders).recipes
    ]


def test_keys_that_change_no_draft_make_no_recipe(tmp_path: Path) -> None:
    for seed, every in ((0, 100), (1, 200)):
        for lr in (0.001, 0.002):
            config = {"lr": lr, "seed": seed, "checkpoint_every": every}
            make_run(tmp_path / f"{seed},{lr}", evaluate(gain=lr), config=config)
    assert [recipe.name for recipe in read(tmp_path).recipes] == ["lr 0.002", "lr 0.001"]


def test_drafts_of_other_data_are_other_recipes(tmp_path: Path) -> None:
    """Measured on one cache, but trained from two."""
    for seed in (0, 1):
        for name in ("own", "theirs"):
            folder = make_run(tmp_path / f"{name}{seed}", evaluate(gain=0.02 + seed / 100), config={"seed": seed})
            with (folder / "config.toml").open("a") as file:
                file.write(f'[data]\nfiles = ["{name}.jsonl"]\n')
    assert [recipe.name for recipe in read(tmp_path).recipes] == ["files ['own.jsonl']", "files ['theirs.jsonl']"]


def test_numbers_of_any_size_cost_no_page(tmp_path: Path) -> None:
    """Each damages one run of two; the page is written, and says what could not be drawn."""
    damaged = make_run(tmp_path / "damaged", evaluate())
    make_run(tmp_path / "sound", evaluate(gain=0.01))
    rows = [
        {"kind": "train", "step": step, "loss": loss, "seconds": math.inf}
        for step, loss in ((1, 1.7e308), (2, -1.7e308), (3, 10**400), (10**400, 1.0))
    ]
    (damaged / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (damaged / "config.toml").open("a") as file:
        file.write(f"huge = 0x{'f' * 6000}\n")
    numbers = json.loads((damaged / "evaluation.json").read_text())
    numbers["scheduling"]["outlook"]["concurrencies"][0]["num_requests"] = 10**400
    (damaged / "evaluation.json").write_text(json.dumps(numbers))
    result = report(tmp_path)
    assert result.exit_code == 0, result.output
    assert "cannot be drawn: " in (tmp_path / "report.html").read_text()


def test_names_do_not_steer_a_terminal() -> None:
    assert readable("a\x1b[31mb\u202ec") == "a?[31mb?c"


def test_several_seeds_of_one_config_are_summed_up(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.05, 0.06, 0.07)))
    text = describe_recipes(comparison.recipes)
    assert text is not None
    assert re.fullmatch(r"Over its seeds this config has mean tau [\d.]+ \(3 seeds, [\d.]+ to [\d.]+\)\.", text)
    assert "only more seeds tell" not in headline(comparison)


def test_without_two_seeds_there_are_no_recipes(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.05,), (0.0,)))
    assert comparison.recipes == ()
    assert describe_recipes(comparison.recipes) is None


@pytest.mark.parametrize(
    ("variants", "names"),
    [
        ([{}, {"lr": 0.002}, {"epochs": 2}], ["lr 0.001, epochs 1", "lr 0.002", "epochs 2"]),
        ([{}, {"lr": 0.002}, {"epochs": 2}, {"lr": 0.002, "epochs": 2}], [
            "lr 0.001, epochs 1", "lr 0.002, epochs 1", "lr 0.001, epochs 2", "lr 0.002, epochs 2",
        ]),
        ([{}, {"lr": 0.002}], ["lr 0.001", "lr 0.002"]),
        ([{}, {"lr": 0.00100004}], ["lr 0.001", "lr 0.00100004"]),
    ],
    ids=["variants of one", "a grid", "two", "look-alikes"],
)  # fmt: skip
def test_a_recipe_is_named_by_what_sets_it_apart(
    tmp_path: Path, variants: list[dict[str, Any]], names: list[str]
) -> None:
    for place, changes in enumerate(variants):
        for seed in (0, 1):
            config = {"epochs": 1, "seed": seed, **changes}
            make_run(tmp_path / f"{place}-{seed}", evaluate(gain=0.02 * (5 - place)), config=config)
    assert [recipe.name for recipe in read(tmp_path).recipes] == names


def test_recipes_of_few_conversations_have_no_difference(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.05, 0.06), (0.0, 0.01), num_samples=4))
    assert [recipe.difference for recipe in comparison.recipes] == [None, None]
    text = describe_recipes(comparison.recipes)
    assert text is not None
    assert "behind" not in text


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
    assert [row[3] for row in page.rows[1:4]] == ["best", "not comparable", "not comparable"]
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


@pytest.mark.parametrize("count", [0, 1])
def test_the_sentence_about_fewer_than_two_runs(tmp_path: Path, count: int) -> None:
    folder = make_run(tmp_path / "only", evaluate() if count else None)
    text = headline(read(folder))
    assert ("there is no other evaluated run" if count else "No run has been evaluated") in text


def test_an_interval_that_leaves_tau_out_by_a_last_bit_is_drawn(tmp_path: Path) -> None:
    found = evaluate(num_samples=1)
    folder = make_run(tmp_path / "run", found.model_copy(update={"tau_low": np.nextafter(found.tau, 9.0)}))
    assert report(folder).exit_code == 0


# Reading


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


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("accept_rate_per_pos", "accept_rate_per_pos: expected 3 slots, got 0"),
        ("conditional_accept_low_per_pos", "conditional_accept_low_per_pos: expected 3 slots, got 0"),
        ("scheduling.thresholds_after.accepted", "threshold curve: expected as many"),
        ("scheduling.reliability_after.survival.count", "reliability: expected as many"),
        ("scheduling.outlook.concurrencies.0.fixed", "outlook: expected fixed lengths"),
    ],
)
def test_an_evaluation_whose_parts_do_not_fit_is_listed_with_the_reason(
    tmp_path: Path, path: str, problem: str
) -> None:
    folder, other = make_run(tmp_path / "run", evaluate()), make_run(tmp_path / "other", evaluate())
    fields = json.loads((folder / "evaluation.json").read_text())
    *parents, last = path.split(".")
    part: Any = fields
    for name in parents:
        part = part[int(name) if isinstance(part, list) else name]
    part[last] = []
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


# The page


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "small", evaluate(gain=0.0), config={"lr": 0.003})
    make_run(folder / "large", evaluate(gain=0.1), config={"lr": 0.0007, "seed": 5})
    return folder


def test_the_page_has_the_runs_and_every_plot_in_it(two_runs: Path) -> None:
    result = report(two_runs / "small", two_runs / "large")
    assert f"page: {two_runs / 'report.html'}" in result.output.replace("\n", "")
    page = Page(two_runs / "report.html")
    assert page.headline.startswith("Ship large: tau ")
    assert page.headline in " ".join(result.output.split())
    head, *rows = page.rows[:3]
    assert head[:4] == ["run", "tau", "95 % interval", "against the best, paired"]
    assert head[4:6] == ["train.lr", "train.seed"]
    large, small = read_runs([two_runs])
    for run, row, lr, seed in ((large, rows[0], "0.0007", "5"), (small, rows[1], "0.003", "0")):
        assert run.evaluation is not None
        assert row[0].split()[0] == run.name
        assert row[1] == f"{run.evaluation.tau:.3f}"
        assert row[2] == f"{run.evaluation.tau_low:.3f} to {run.evaluation.tau_high:.3f}"
        assert row[4:6] == [lr, seed]
    assert "ship this" in rows[0][0]
    assert re.fullmatch(r"-0\.\d+ \(-0\.\d+ to -0\.\d+\)", rows[1][3])
    ids = {attributes.get("id") for tag, attributes in page.tags if tag == "h2"}
    assert ids >= PLOTS
    assert len(page.images) == len(PLOTS)
    files = {file.stem: file.read_bytes() for file in (two_runs / "report").glob("*.png")}
    assert files.keys() == PLOTS
    for image in page.images:
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) in files.values()
        assert image["alt"]


def test_the_page_needs_nothing_from_elsewhere(two_runs: Path, tmp_path: Path) -> None:
    report(two_runs, out=tmp_path)
    page = Page(tmp_path / "report.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_every_plot_names_its_runs(two_runs: Path, tmp_path: Path) -> None:
    report(two_runs, out=tmp_path)
    text = (tmp_path / "report.html").read_text()
    for start, end in pairwise(
        [*(text.index(f'<h2 id="{plot.key}"') for plot in draw_plots(read_runs([two_runs]))), -1]
    ):
        for name in ("small", "large"):
            assert f"<li>{two_runs / name}</li>" in text[start:end]


def test_what_a_user_or_a_file_chose_is_escaped(tmp_path: Path) -> None:
    base = tmp_path / "runs"
    hostile = make_run(base / NASTY.replace("/", "-"), evaluate(gain=0.1), config={"seed": NASTY})
    make_run(base / "_hidden\nname", evaluate(), config={"seed": "x"})
    failed = make_run(base / "failed", None)
    write_trial(failed, {"state": "failed", "reason": NASTY, "origin": {"revision": NASTY}})
    assert report(base).exit_code == 0
    page = Page(base / "report.html")
    text = (base / "report.html").read_text()
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert hostile.name in page.headline
    assert any(NASTY in cell for row in page.rows for cell in row)


def test_plots_without_data_are_left_out_with_a_reason(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", evaluate())
    assert report(folder).exit_code == 0
    assert len(list((folder / "report").glob("*.png"))) == len(PLOTS)
    write_evaluation(folder / "evaluation.json", evaluate(confidence=False))
    (folder / "metrics.jsonl").unlink()
    assert report(folder).exit_code == 0
    assert {file.stem for file in (folder / "report").glob("*.png")} == {"tau", "acceptance"}
    text = (folder / "report.html").read_text()
    assert text.count("Left out: no evaluated run has a confidence head") == 3
    assert "Left out: no run has metrics.jsonl." in text
    assert "Left out: no run was validated while it trained." in text


def test_a_report_is_made_anew_and_deleting_it_loses_nothing(two_runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(two_runs, copy, ignore=shutil.ignore_patterns("report*"))
    before = sorted(path for path in copy.rglob("*") if path.is_file())
    report(copy)
    page = (copy / "report.html").read_bytes()
    assert [file.name for file in (copy / "report").iterdir() if not file.name.endswith(".png")] == []
    report(copy)
    assert (copy / "report.html").read_bytes() == page
    shutil.rmtree(copy / "report")
    (copy / "report.html").unlink()
    assert sorted(path for path in copy.rglob("*") if path.is_file()) == before
    report(copy)
    assert (copy / "report.html").read_bytes() == page


def _fake_runs(count: int) -> list[Run]:
    return [
        Run(
            folder=Path(f"run{index}"), name=f"run{index}", config={}, evaluation=None, problem=None,
            train_rows=({"step": 1, "loss": float(index), "seconds": 1.0}, {"step": 2, "loss": 1.0, "seconds": 1.0}),
            validation_rows=(), trial={}, num_parameters=None, draft_bytes=None, cache_bytes=None,
        )
        for index in range(count)
    ]  # fmt: skip


def test_many_runs_are_drawn_and_the_first_have_colours(tmp_path: Path) -> None:
    runs = _fake_runs(40)
    styles = plan_styles(runs)
    assert [styles[run.folder].is_named for run in runs] == [True] * len(COLOURS) + [False] * (40 - len(COLOURS))
    (loss,) = (plot for plot in draw_plots(runs) if plot.key == "loss")
    assert loss.png is not None
    file = tmp_path / "loss.png"
    file.write_bytes(loss.png)
    with Image.open(file) as image:
        colours = {pixel for _, pixel in image.convert("RGB").getcolors(maxcolors=1_000_000) or []}
    for colour in COLOURS:
        assert tuple(bytes.fromhex(colour[1:])) in colours


def test_the_seeds_of_a_recipe_share_a_colour_and_a_name(tmp_path: Path) -> None:
    comparison = read(*make_recipes(tmp_path, (0.06, 0.05), (0.0, 0.02), (0.01,)))
    styles = plan_styles(comparison.runs, recipes=comparison.recipes)
    colours = {run.name: styles[run.folder].colour for run in comparison.runs}
    assert [colours[f"seed={seed},lr=1"] for seed in (0, 1)] == [COLOURS[0]] * 2
    assert [colours[f"seed={seed},lr=2"] for seed in (0, 1)] == [COLOURS[1]] * 2
    assert colours["seed=0,lr=3"] not in COLOURS, "its seed's luck is not told from its recipe"
    assert sorted(style.label for style in styles.values() if style.label) == ["lr 1 (2 seeds)", "lr 2 (2 seeds)"]


@pytest.mark.parametrize("arguments", [["nowhere"], []])
def test_folders_that_are_no_runs(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["report", *arguments])
    assert result.exit_code != 0
    assert ("nowhere: no such run" if arguments else "Missing argument") in result.output
