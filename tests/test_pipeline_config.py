"""The config file: what it derives, what it refuses and how it says so."""

from pathlib import Path

import pytest

from pipeline.config import ConfigError, load_config, to_toml
from pipeline.embedded import CONVERSATIONS_FILE, TARGET_DIR

ROOT = Path(__file__).parent.parent
THREE_LINES = '[target]\nmodel = "some/model"\n[data]\nfiles = ["a.jsonl"]\n[cache]\npath = "c"\n'


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return file


def test_three_lines_are_enough_and_give_the_reference_recipe(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, THREE_LINES))
    assert (config.draft.num_layers, config.draft.block_size, config.draft.num_anchors) == (5, 7, 512)
    assert (config.draft.markov_rank, config.draft.markov_head_type) == (256, "vanilla")
    assert (config.train.lr, config.train.betas, config.train.weight_decay) == (6e-4, (0.9, 0.95), 0.0)
    assert (config.train.warmup_fraction, config.train.clip_norm, config.train.epochs) == (0.04, 1.0, 10)
    assert (config.train.global_batch_size, config.data.max_length, config.data.min_supervised_tokens) == (
        512,
        None,
        14,
    )
    objective = config.objective
    assert (objective.loss_decay_gamma, objective.ce_loss_alpha, objective.l1_loss_alpha) == (4.0, 0.1, 0.9)


@pytest.mark.parametrize("name", ["embedded", "qwen3-4b"])
def test_the_shipped_configs_load(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.toml")
    if name == "embedded":
        assert config.target.model == str(TARGET_DIR)
        assert config.data.files == (str(CONVERSATIONS_FILE),)
    else:
        assert config.cache.layers == (1, 9, 17, 25, 33)


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, THREE_LINES), ["objective.loss_decay_gamma=inf", "cache.layers=[1, 2]"])
    assert load_config(write(tmp_path, to_toml(config))) == config


def test_overrides_take_toml_values_and_bare_words(tmp_path: Path) -> None:
    overrides = ["train.lr=1e-3", "draft.markov_head_type=gated", "data.files=['x.jsonl', 'y.jsonl']", "train.epochs=2"]
    config = load_config(write(tmp_path, THREE_LINES), overrides)
    assert (config.train.lr, config.draft.markov_head_type, config.train.epochs) == (1e-3, "gated", 2)
    assert config.data.files == ("x.jsonl", "y.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.max_lenght=5", r"unknown key data\.max_lenght; did you mean max_length\?"),
        ("dtaa.max_length=5", r"unknown key dtaa; did you mean data\?"),
        ("train.lr=fast", r"train\.lr: .*number.*'fast'"),
        ("train.epochs=1.5", r"train\.epochs: .*integer"),
        ("train.epochs=0", r"train\.epochs: .*greater than or equal to 1"),
        ("draft.markov_head_type=lstm", r"'vanilla', 'gated' or 'rnn'"),
        ("cache.layers=[3, 1]", r"expected ascending, distinct layer ids"),
        ("data.files=[]", r"data\.files: .*at least 1"),
        ("decode.temperatures=[0.0, 1e-320]", r"decode\.temperatures.*expected 0 \(greedy\) or at least 0\.001"),
        ("train", r"expected section\.key=value"),
        ("train.x.y=1", r"unknown key train\.x\.y"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, THREE_LINES), [change])


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (
            '"train.lr" = { low = 1.0, high = 0.1 }',
            ['sweep.parameters.train.lr: low must be below high, got { "low" = 1.0, "high" = 0.1 }'],
        ),
        (
            '"train.lr" = { lo = 0.1, high = 1.0 }',
            [
                "sweep.parameters.train.lr.low is required",
                "unknown key sweep.parameters.train.lr.lo; did you mean low?",
            ],
        ),
        ('"train.lr" = { low = "a", high = 1.0 }', ["sweep.parameters.train.lr.low: expected a number, got 'a'"]),
        (
            '"train.lr" = 3',
            [
                "sweep.parameters: train.lr: expected a list of values, or a table with low and high, "
                'got { "train.lr" = 3 }'
            ],
        ),
        (
            "train.lr = [1, 2]",
            [
                "sweep.parameters: train: expected a list of values, or a table with low and high; a key with a point "
                'stands in quotes, as "train.lr", got { "train" = { "lr" = [1, 2] } }'
            ],
        ),
        (
            '"train.lr" = { low = 0.1, high = 1.0 }',
            ['sweep: train.lr: a grid needs lists; write sampler = "random" or "tpe" for ranges'],
        ),
    ],
)
def test_a_wrong_sweep_is_told_by_its_own_keys(tmp_path: Path, lines: str, messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, f"{THREE_LINES}[sweep.parameters]\n{lines}\n"))
    assert [line.split(": ", 1)[1] for line in str(error.value).splitlines()] == messages


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, '[target]\nmodle = "a/b"\n[data]\nfiles = ["a"]\n'))
    lines = str(error.value).splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        "target.model is required (three lines are enough: target.model, data.files, cache.path)",
        "unknown key target.modle; did you mean model?",
        "cache is required (three lines are enough: target.model, data.files, cache.path)",
    ]


def test_a_missing_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_config(write(tmp_path, "[target\n"))


@pytest.mark.parametrize("text", ["x = " + "[" * 3000 + "]" * 3000, "x = " + "{a = " * 3000 + "1" + "}" * 3000])
def test_values_nested_too_deeply_are_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.toml: arrays or tables that are nested too deeply"):
        load_config(file)
    file.write_text("")
    with pytest.raises(ConfigError, match=r"--set data\.files: arrays or tables that are nested too deeply"):
        load_config(file, ["data.files" + text[1:]])
