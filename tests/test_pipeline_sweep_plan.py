"""What a sweep will train: its parameters, the points known beforehand, folders, and what it refuses."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Config, ConfigError, load_config, to_toml
from pipeline.sweep.plan import (
    check_points,
    describe_sweep,
    name_trial,
    plan_distributions,
    plan_params,
    point_of,
    sweep_section,
    trial_config,
)
from pipeline.sweep.settings import SweepSection
from tiny_target import make_config

RANGES = """
[sweep]
sampler = "random"
num_trials = 40
[sweep.parameters]
"train.lr" = { low = 1e-4, high = 1e-1, log = true }
"objective.ce_loss_alpha" = { low = 0.0, high = 1.0, step = 0.25 }
"train.global_batch_size" = { low = 2, high = 6, step = 2 }
"draft.target_layer_ids" = [[1, 3], [-1, 1, 3]]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("base"))


def with_sweep(config: Config, sweep: str, tmp_path: Path) -> Config:
    file = tmp_path / "sweep.toml"
    file.write_text(f"{to_toml(config)}\n{sweep}\n")
    return load_config(file)


def trials(config: Config) -> list[Config]:
    sweep = sweep_section(config)
    return [
        trial_config(config, point_of(sweep, params), number=number) for number, params in enumerate(plan_params(sweep))
    ]


@pytest.mark.parametrize("table", ["[sweep.grid]", "[sweep.parameters]"])
def test_every_combination_of_a_grid_has_a_folder_of_its_own(base: Config, tmp_path: Path, table: str) -> None:
    config = with_sweep(base, f'{table}\n"draft.markov_rank" = [0, 8]\n"train.lr" = [1e-3, 1e-2, 1e-1]', tmp_path)
    found = trials(config)
    assert [(trial.draft.markov_rank, trial.train.lr) for trial in found] == list(
        itertools.product((0, 8), (1e-3, 1e-2, 1e-1))
    )
    assert len({trial.train.run_dir for trial in found}) == 6
    assert found[0].train.run_dir == base.train.run_dir / "markov_rank=0,lr=0.001"
    assert {trial.cache for trial in found} == {base.cache}
    assert {trial.sweep for trial in found} == {None}


def test_random_values_lie_where_the_ranges_say(base: Config, tmp_path: Path) -> None:
    found = trials(with_sweep(base, RANGES, tmp_path))
    assert len(found) == 40
    rates = [trial.train.lr for trial in found]
    assert all(1e-4 <= lr <= 1e-1 for lr in rates)
    assert {math.floor(math.log10(lr)) for lr in rates} == {-4, -3, -2}  # even on the logarithm, not all near the top
    assert {trial.objective.ce_loss_alpha for trial in found} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {trial.train.global_batch_size for trial in found} == {2, 4, 6}
    assert {trial.draft.target_layer_ids for trial in found} == {(1, 3), (-1, 1, 3)}
    assert len({trial.train.run_dir for trial in found}) == 40


def test_random_values_are_a_function_of_the_seed_and_more_trials_follow_the_first(
    base: Config, tmp_path: Path
) -> None:
    first = plan_params(sweep_section(with_sweep(base, RANGES, tmp_path)))
    more = plan_params(sweep_section(with_sweep(base, RANGES.replace("40", "60"), tmp_path)))
    other = plan_params(sweep_section(with_sweep(base, RANGES.replace("[sweep]", "[sweep]\nseed = 1"), tmp_path)))
    assert more[:40] == first
    assert other != first


def test_tpe_plans_nothing_beforehand(base: Config, tmp_path: Path) -> None:
    assert plan_params(sweep_section(with_sweep(base, RANGES.replace('"random"', '"tpe"'), tmp_path))) == [{}] * 40


values = st.lists(st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.lists(st.integers())), min_size=1)


@given(values=values)
def test_values_survive_the_way_through_optuna(values: list[object]) -> None:
    sweep = SweepSection(parameters={"train.seed": values})
    (distribution,) = plan_distributions(sweep).values()
    found = [
        point_of(sweep, {"train.seed": distribution.to_external_repr(distribution.to_internal_repr(param))})
        for param in [params["train.seed"] for params in plan_params(sweep)]
    ]
    assert [repr(point["train.seed"]) for point in found] == [repr(value) for value in values]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ('[sweep.grid]\n"cache.path" = ["a"]', "cannot vary over one cache"),
        ('[sweep.grid]\n"train.run_dir" = ["a"]', "cannot vary"),
        ('[sweep.grid]\n"train.device" = ["cpu"]', "cannot vary"),
        ('[sweep.grid]\n"draft.markov_rnak" = [1]', "did you mean markov_rank"),
        ('[sweep.grid]\n"train.lr" = ["fast"]', "train.lr"),
        ('[sweep.grid]\n"train.seed" = [1, 2, 1]', "a value twice"),
        ('[sweep.grid]\n"train.seed" = []', "at least 1 item"),
        ('[sweep]\nsampler = "grid"', "either parameters or grid"),
        ('[sweep.grid]\n"train.seed" = [1]\n[sweep.parameters]\n"train.lr" = [0.1]', "either parameters or grid"),
        ('[sweep.parameters]\n"train.lr" = {low = 1e-3, high = 1e-2}', "a grid needs lists"),
        ('[sweep]\nsampler = "tpe"\n[sweep.parameters]\n"train.lr" = [1e-3]', "num_trials is what random and tpe need"),
        ('[sweep]\nnum_trials = 3\n[sweep.parameters]\n"train.lr" = [1e-3]', "a grid must not have"),
        (RANGES.replace("high", "hgih"), "did you mean high"),
        (RANGES.replace("1e-1", "1e-5"), "low must be below high"),
        (RANGES.replace("log = true", "log = true, step = 0.1"), "no step"),
        (RANGES.replace("high = 1e-1", "high = inf"), "must be finite"),
        (RANGES.replace("low = 1e-4", "low = nan"), "must be finite"),
        (RANGES.replace("step = 0.25", "step = inf"), "must be finite"),
        (RANGES.replace("step = 2", "step = 0.5"), "whole numbers"),
        (RANGES.replace("low = 1e-4", "low = -1.0").replace(", log = true", ""), "train.lr: .* greater than 0"),
        (RANGES.replace("[1, 3], [-1", '[1, 3], ["x"'), "target_layer_ids"),
        (RANGES.replace("random", "rnadom"), "'random' or 'tpe'"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(
    base: Config, tmp_path: Path, sweep: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_points(with_sweep(base, sweep, tmp_path))


def test_a_config_without_a_sweep(base: Config) -> None:
    with pytest.raises(ConfigError, match="the config has none"):
        sweep_section(base)


def test_a_resolved_config_with_a_sweep_is_read_back(base: Config, tmp_path: Path) -> None:
    config = with_sweep(base, RANGES, tmp_path)
    file = tmp_path / "resolved.toml"
    file.write_text(to_toml(config))
    assert load_config(file) == config


def test_names_are_short_and_distinct() -> None:
    points = [{"draft.target_layer_ids": list(range(last)), "train.lr": 1 / last} for last in range(60, 80)]
    grid = SweepSection(grid={key: [point[key] for point in points] for key in points[0]})
    names = [name_trial(grid, point, number=number) for number, point in enumerate(points)]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 140
    drawn = SweepSection(
        sampler="random",
        num_trials=9,
        parameters={"train.lr": {"low": 0.0001, "high": 0.1}, "draft.target_layer_ids": [[-1, 3], [1]]},  # type: ignore[dict-item]
    )
    assert name_trial(drawn, {"train.lr": 0.00034567891, "draft.target_layer_ids": [-1, 3]}, number=6) == (
        "0007,lr=0.0003457,target_layer_ids=-1_3"
    )


@pytest.mark.parametrize(
    "values",
    [
        [0.0012345678, 0.0012345679],
        ["runs/a", "runs_a"],
        ["runs/a b", "runs/ab", 'runs/a"b'],
        ["a,b", "a_b"],
        [[1, 3], ["1_3"], [[1], 3]],
        [1, "1", 2],
        [{}, {"as": 1}, "as-it-is"],
    ],
)
def test_values_that_look_alike_get_folders_of_their_own(values: list[object]) -> None:
    sweep = SweepSection(grid={"draft.init_from": values, "train.seed": [0, 1]})
    names = [
        name_trial(sweep, point_of(sweep, params), number=number) for number, params in enumerate(plan_params(sweep))
    ]
    assert len(set(names)) == len(names) == 2 * len(values)
    assert not any("/" in name for name in names)
    other_way_round = SweepSection(grid={"draft.init_from": values[::-1], "train.seed": [0, 1]})
    point = {"draft.init_from": values[0], "train.seed": 1}
    assert name_trial(sweep, point, number=1) == name_trial(other_way_round, point, number=3)


def test_only_look_alikes_carry_a_digest() -> None:
    sweep = SweepSection(grid={"train.lr": [0.0012345678, 0.0012345679, 0.00234567]})
    assert name_trial(sweep, {"train.lr": 0.0012345678}, number=0).startswith("lr=0.001235-")
    assert name_trial(sweep, {"train.lr": 0.00234567}, number=2) == "lr=0.002346"


def test_what_describes_a_sweep_is_what_its_trials_depend_on(base: Config, tmp_path: Path) -> None:
    before = describe_sweep(with_sweep(base, RANGES, tmp_path))
    free = RANGES.replace("[sweep]", "[sweep]\nparallel = 2").replace("= 40", "= 50")
    moved = base.model_copy(update={"train": base.train.model_copy(update={"run_dir": tmp_path, "device": "cuda"})})
    assert describe_sweep(with_sweep(moved, free, tmp_path)) == before
    for changed in (RANGES.replace("1e-1", "2e-1"), RANGES.replace('"random"', '"tpe"')):
        assert describe_sweep(with_sweep(base, changed, tmp_path)) != before
    other = base.model_copy(update={"draft": base.draft.model_copy(update={"num_layers": 2})})
    differing = {
        key for key, text in describe_sweep(with_sweep(other, RANGES, tmp_path)).items() if before[key] != text
    }
    assert differing == {"draft.num_layers"}


def test_a_section_varies_several_keys_at_once(base: Config, tmp_path: Path) -> None:
    variants = "draft = [{}, { markov_rank = 0 }, { markov_rank = 8, num_layers = 2 }]"
    config = with_sweep(base, f'[sweep.parameters]\n{variants}\n"train.seed" = [0, 1]', tmp_path)
    found = trials(config)
    assert [(trial.draft.markov_rank, trial.draft.num_layers, trial.train.seed) for trial in found] == [
        (rank, layers, seed)
        for rank, layers in ((base.draft.markov_rank, base.draft.num_layers), (0, base.draft.num_layers), (8, 2))
        for seed in (0, 1)
    ]
    assert [trial.train.run_dir.name for trial in found[::2]] == [
        "draft=as-it-is,seed=0",
        "draft=markov_rank=0,seed=0",
        "draft=markov_rank=8+num_layers=2,seed=0",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("draft = [1, 2]", "draft is a section: expected a list of tables"),
        ("lr = [1, 2]", "lr: expected a section and a key with a point between"),
        ('"train." = [1]', "expected a section and a key with a point between"),
        ("draft = [{ lr = 1 }]", "unknown key draft.lr"),
        ("train = [{}, { run_dir = 'elsewhere' }]", "train.run_dir cannot vary"),
        ("cache = [{}, { path = 'elsewhere' }]", "cache.path cannot vary"),
        ("cache = [{}]", "cannot vary"),
        (
            "draft = [{}, { markov_rank = 0 }]\n'draft.markov_rank' = [0, 8]",
            "markov_rank is set by both draft and draft.",
        ),
        ("'draft.markov_rank' = [0, 8]\ndraft = [{}, { markov_rank = 0 }]", "set by both draft.markov_rank and draft;"),
    ],
)
def test_variants_of_a_section_are_checked(base: Config, tmp_path: Path, line: str, message: str) -> None:
    config = with_sweep(base, f"[sweep.parameters]\n{line}", tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_points(config)
