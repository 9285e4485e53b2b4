"""What is stored of a draft, and how often: the target's own tensors once, and a record by which damage is found."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from draft_reference import tiny_model
from pipeline.cli import main
from pipeline.config import Config, to_toml
from pipeline.stage_one import settings_of
from pipeline.stage_two import evaluate_draft, train_draft
from stages.errors import SettingError
from stages.extract.run import extract
from stages.target_head import TargetHead
from stages.train import Qwen3DSparkModel
from stages.train.draft_folder import read_draft
from stages.train.export import dspark_fields, export_weights, write_export
from stages.train.metrics import read_metrics
from stages.train.warm_start import load_initial_weights
from storage import CacheReader
from storage.temps import temp_path
from tiny_target import make_config, save_tiny_target

ROOT = Path(__file__).resolve().parents[1]
TRAINED_AND_CONFIG = ["config.json", "model.safetensors"]


def names_in(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir) if row["kind"] == "train"]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run over the cache of a target whose embedding is its head."""
    folder = tmp_path_factory.mktemp("tied")
    save_tiny_target(folder / "target")
    config = Qwen3Config.from_pretrained(folder / "target")
    config.tie_word_embeddings = True
    torch.manual_seed(3)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "target")
    settings = make_config(folder)
    extract(settings_of(settings))
    train_draft(settings)
    return settings


def test_one_tensor_is_stored_once_wherever_it_lies(tied: Config, tmp_path: Path) -> None:
    run = tied.train.run_dir
    with CacheReader(tied.cache.path) as reader:
        assert names_in(reader.target_dir / "head.safetensors") == {"embed_tokens.weight", "norm.weight"}
    assert names_in(run / "target_head.safetensors") == {"embed_tokens.weight"}
    frozen = {"embed_tokens.weight", "lm_head.weight"}
    for checkpoint in (run / "checkpoints").iterdir():
        assert not names_in(checkpoint / "model.safetensors") & frozen
    assert names_in(run / "draft" / "model.safetensors") & frozen == {"embed_tokens.weight"}
    whole = CliRunner().invoke(main, ["export", str(run / "checkpoints" / "step_00000008"), str(tmp_path / "out")])
    assert whole.exit_code == 0, whole.output
    assert names_in(tmp_path / "out" / "model.safetensors") & frozen == {"embed_tokens.weight"}
    embedding = load_file(tied.target.model + "/model.safetensors")["model.embed_tokens.weight"]
    for folder in (run / "draft", run / "checkpoints" / "step_00000008", tmp_path / "out"):
        model = read_draft(folder)
        assert model.lm_head.weight is model.embed_tokens.weight
        assert not model.lm_head.weight.requires_grad
        assert torch.equal(model.lm_head.weight, embedding.float())
        assert read_draft(folder, dtype=torch.bfloat16).is_tied
        assert Qwen3DSparkModel.from_pretrained(folder).is_tied


def test_a_tied_draft_trains_and_scores_as_one_with_two_tensors(
    tied: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches of version 1 hold the tensor twice, and are recognised; two tensors in memory compute the same."""
    other = {
        "target__model": tied.target.model,
        "cache__path": tmp_path / "cache",
        "data__files": list(tied.data.files),
    }
    config = make_config(tied.cache.folder.parent, train__run_dir=tmp_path / "run", **other)
    with monkeypatch.context() as earlier:
        earlier.setattr("stages.extract.target.join_head", lambda one, two: TargetHead(one, two.clone()))
        extract(settings_of(config))
    assert names_in(tmp_path / "cache" / "target" / "head.safetensors") >= {"embed_tokens.weight", "lm_head.weight"}
    train_draft(config)
    assert read_draft(config.train.run_dir / "draft").is_tied
    untied = make_config(tied.cache.folder.parent, train__run_dir=tmp_path / "two", **other)
    monkeypatch.setattr("stages.target_head.join_head", TargetHead)
    train_draft(untied)
    assert not read_draft(untied.train.run_dir / "draft").is_tied
    runs = [tied, config, untied]
    assert losses(tmp_path / "run") == losses(tmp_path / "two") == losses(tied.train.run_dir)
    assert len({evaluate_draft(run, draft_dir=run.train.run_dir / "draft").tau for run in runs}) == 1


def test_a_checkpoint_is_whole_with_its_run_alone(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "step_00000008"
    assert names_in(trained / "target_head.safetensors") == {"embed_tokens.weight", "lm_head.weight"}
    whole = dict(read_draft(trained / "draft").state_dict())
    part = dict(read_draft(checkpoint).state_dict())
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    away = shutil.copytree(checkpoint, tmp_path / "away")
    with pytest.raises(SettingError, match=r"lacks the target's embed_tokens\.weight and lm_head\.weight.* a run in"):
        read_draft(away)


def test_old_checkpoints_that_hold_everything_are_resumed(cached: Path, tmp_path: Path) -> None:
    whole = make_config(cached, train__run_dir=tmp_path / "whole")
    train_draft(whole)
    old = make_config(cached, train__run_dir=tmp_path / "old", train__keep_last=5)
    train_draft(old)
    for name in ("step_00000006", "step_00000008"):
        shutil.rmtree(tmp_path / "old" / "checkpoints" / name)
    checkpoint = tmp_path / "old" / "checkpoints" / "step_00000003"
    head = load_file(tmp_path / "old" / "target_head.safetensors")
    weights = load_file(checkpoint / "model.safetensors") | {name: head[name].float() for name in head}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    content = (checkpoint / "model.safetensors").read_bytes()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["files"]["model.safetensors"] = {"bytes": len(content), "crc32c": google_crc32c.value(content)}
    del state["crc32c"]
    seal = google_crc32c.value(json.dumps(state, sort_keys=True, separators=(",", ":")).encode())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "crc32c": seal}))
    (tmp_path / "old" / "target_head.safetensors").unlink()
    assert read_draft(checkpoint).block_size == 4
    assert not train_draft(old).was_complete
    assert losses(tmp_path / "old") == losses(tmp_path / "whole")
    assert (tmp_path / "old" / "target_head.safetensors").is_file()


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", TRAINED_AND_CONFIG)
@pytest.mark.parametrize("kind", ["draft", "export", "checkpoints/step_00000008", "checkpoints/step_00000006"])
def test_a_flipped_byte_is_found(trained: Path, tmp_path: Path, kind: str, name: str) -> None:
    """At the file's edges, in its record, and at places over all of it."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    folder = run / kind
    if kind == "export":
        assert CliRunner().invoke(main, ["export", str(run / "draft"), str(folder)]).exit_code == 0
    read_draft(folder)
    content = (folder / name).read_bytes()
    places = {0, 7, 8, len(content) - 1, *range(11, len(content), max(len(content) // 40, 1))}
    places |= (
        set(range(content.find(b"crc32c"), content.find(b"crc32c") + 60)) if name == "model.safetensors" else set()
    )
    for place in sorted(places):
        flip(folder / name, place)
        with pytest.raises(SettingError, match=f"{folder.name}: (is damaged|cannot be read as a draft|is in|lacks)"):
            read_draft(folder)
        (folder / name).write_bytes(content)
    read_draft(folder)


@pytest.mark.parametrize("kind", ["draft", "checkpoints/step_00000008"])
def test_damage_is_found_by_every_command(cached: Path, trained: Path, tmp_path: Path, kind: str) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    flip(run / kind / "model.safetensors", (run / kind / "model.safetensors").stat().st_size - 5)
    config = make_config(cached, train__run_dir=tmp_path / "new")
    (tmp_path / "c.toml").write_text(to_toml(config))
    commands = {
        "export": ["export", str(run / kind), str(tmp_path / "out")],
        "evaluate": ["evaluate", str(tmp_path / "c.toml"), "--draft", str(run / kind)],
        "decode": ["evaluate", str(tmp_path / "c.toml"), "--draft", str(run / kind), "--decode"],
        "train": ["train", str(tmp_path / "c.toml"), "--set", f"draft.init_from={run / kind}"],
    }
    for name, command in commands.items():
        result = CliRunner().invoke(main, command)
        assert result.exit_code != 0, name
        assert "is damaged" in result.output.replace("\n", " "), name
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_or_head_of_a_checkpoint_is_found(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    checkpoint = run / "checkpoints" / "step_00000008"
    state = (checkpoint / "trainer_state.json").read_bytes()
    flip(checkpoint / "trainer_state.json", state.find(b"step") + 8)
    with pytest.raises(SettingError, match=r"step_00000008: is damaged: .*trainer_state\.json|is damaged"):
        read_draft(checkpoint)
    (checkpoint / "trainer_state.json").write_bytes(state)
    flip(run / "target_head.safetensors", (run / "target_head.safetensors").stat().st_size - 9)
    with pytest.raises(SettingError, match=r"step_00000008: is damaged: target_head\.safetensors: expected the crc32c"):
        read_draft(checkpoint)


def test_a_run_mends_its_copy_of_the_targets_head(cached: Path, tmp_path: Path) -> None:
    config = make_config(cached, train__run_dir=tmp_path / "run", train__max_steps=2)
    train_draft(config)
    head = tmp_path / "run" / "target_head.safetensors"
    content = head.read_bytes()
    flip(head, len(content) - 9)
    assert train_draft(config).was_complete
    assert head.read_bytes() == content


def test_drafts_without_a_record_are_read_with_a_warning(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = Path(shutil.copytree(trained / "draft", tmp_path / "old"))
    save_file(load_file(old / "model.safetensors"), old / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        read_draft(old)
    assert f"{old}: has no record of its checksums, so that damage to it cannot be found" in caplog.text
    caplog.clear()
    read_draft(trained / "draft")
    assert not [record for record in caplog.records if record.name.startswith("stages")]


def export(model: Qwen3DSparkModel, out: Path) -> None:
    weights = export_weights(model, dtype=torch.float32, with_target_weights=True)
    write_export(out, fields=dspark_fields(model.config, dtype=torch.float32), weights=weights, texts={})


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_next_export_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """Of killed processes alone: one that writes at this moment keeps what it has."""
    earlier, alive = tmp_path / f".out.{dead_process()}.partial", tmp_path / f".out.{os.getpid()}.partial"
    other = tmp_path / f".other.{dead_process()}.partial"
    for folder in (earlier, alive, other, temp_path(tmp_path / "out")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    mine = {path.name for path in tmp_path.iterdir()} - {earlier.name}
    code = "import sys, time; from pathlib import Path; from storage.temps import temp_path\n" \
           "temp_path(Path(sys.argv[1])).mkdir(); print('there', flush=True); time.sleep(60)"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        export(tiny_model(), tmp_path / "first")
        left = {path.name for path in tmp_path.iterdir()} - mine - {"first", earlier.name}
        assert len(left) == 1  # the other process is at work on it
        process.send_signal(signal.SIGKILL)
    export(tiny_model(), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == mine | {"first", "out"}


def test_a_training_removes_what_a_killed_one_left(cached: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".metrics.jsonl.0123abcd.tmp").write_text("{")
    code = "import sys; from pathlib import Path; from storage.temps import temp_path\n" \
           "temp_path(Path(sys.argv[1])).write_text('{')"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(run / "metrics.jsonl")], check=True, env=environment)
    assert len(list(run.iterdir())) == 2
    train_draft(make_config(cached, train__run_dir=run, train__max_steps=2))
    assert not [path.name for path in run.iterdir() if "tmp" in path.name]


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))
        weights = load_file(folder / "model.safetensors")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})  # as another project writes it

    return change


MEANINGS: dict[str, tuple[dict[str, object], str]] = {
    "anchor": ({"sample_from_anchor": False}, "sample_from_anchor: it has False, this draft True"),
    "sliding": (
        {"layer_types": ["sliding_attention"], "sliding_window": 8, "use_sliding_window": True},
        r"layer_types: it has \['sliding_attention'\], this draft \['full_attention'\]",
    ),
    "causal": ({"is_causal": True}, "is_causal: it has True, this draft False"),
    "eps": ({"rms_norm_eps": 1e-3}, "rms_norm_eps: it has 0.001, this draft 1e-06"),
    "soft-cap": ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping: it has 30\.0, this draft None"),
    "scale": ({"logit_scale": 0.5}, r"logit_scale: it has 0\.5, this draft 1\.0"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: it has gelu, this draft silu"),
    "rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 5e5},
        r"rope_parameters: it has \{.*500000\.0.*\}, this draft \{.*10000\.0.*\}",
    ),
    "scaled rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        r"rope_parameters: it has \{'rope_type': 'linear'.*\}, this draft \{'rope_type': 'default'",
    ),
    "heads": ({"num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 2}, "head_dim: it has 8, this draft 16"),
    "bias": ({"attention_bias": True}, "attention_bias: it has True, this draft False"),
    "layers": ({"target_layer_ids": [0, 1, 3]}, r"target_layer_ids: it has \[0, 1, 3\], this draft \[-1, 1, 3\]"),
    "mask": ({"mask_token_id": 7}, "mask_token_id: it has 7, this draft "),
    "export for servers": ({"markov_bias_in_logit_scale": True}, "markov_bias_in_logit_scale: it has True, this draft"),
}


@pytest.mark.parametrize("kind", MEANINGS)
def test_a_draft_that_means_something_else_is_no_start(cached: Path, trained: Path, tmp_path: Path, kind: str) -> None:
    changes, message = MEANINGS[kind]
    folder = Path(shutil.copytree(trained / "draft", tmp_path / "other"))
    model = read_draft(trained / "draft").float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change_config()(folder)
    load_initial_weights(model, folder)  # what says nothing else goes over
    change_config(**changes)(folder)
    with pytest.raises(SettingError, match=message):
        load_initial_weights(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (MEANINGS["sliding"][0], "layer_types: expected full_attention in every layer, got sliding_attention"),
        (MEANINGS["anchor"][0], "sample_from_anchor is false"),
        (MEANINGS["causal"][0], "is_causal is true"),
    ],
)
def test_a_draft_is_not_computed_as_another(
    cached: Path, trained: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = Path(shutil.copytree(trained / "draft", tmp_path / "other"))
    change_config(**changes)(folder)
    with pytest.raises(SettingError, match=message):
        read_draft(folder)
    config = make_config(cached, train__run_dir=tmp_path / "run")
    (tmp_path / "c.toml").write_text(to_toml(config))
    for command in (
        ["export", str(folder), str(tmp_path / "out")],
        ["evaluate", str(tmp_path / "c.toml"), "--draft", str(folder)],
        ["evaluate", str(tmp_path / "c.toml"), "--draft", str(folder), "--decode"],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code != 0
        assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_a_tied_draft_as_one_process_does(tied: Config, tmp_path: Path, parallel: str) -> None:
    changes = {"train__run_dir": tmp_path / "run", "train__parallel": parallel, "target__model": tied.target.model}
    config = make_config(tied.cache.folder.parent, **changes)
    (tmp_path / "c.toml").write_text(to_toml(config))
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(ROOT / "tests" / "rank_worker.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, *command, str(tmp_path / "c.toml")], check=True, timeout=200, env=environment, cwd=ROOT
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(tied.train.run_dir), rel=1e-4)
    weights = load_file(tmp_path / "run" / "draft" / "model.safetensors")
    expected = load_file(tied.train.run_dir / "draft" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert torch.equal(weights["embed_tokens.weight"], expected["embed_tokens.weight"])
