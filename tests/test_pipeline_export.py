"""`dspark export` over a real run: both forms, the model card, and what must not be said."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from draft_reference import tiny_config
from pipeline.cli import main
from pipeline.config import to_toml
from pipeline.model_card import ExportedDraft, is_hub_id, render_card
from pipeline.run_facts import RunFacts
from pipeline.serving_commands import ServedDraft, describe_serving
from served_draft import load_served
from stages.evaluate.evaluation import read_evaluation
from stages.evaluate.records import EvaluationError
from stages.train.export import Form, ServedTarget
from tiny_target import make_config


def dspark(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with checkpoints at the second and the third, evaluated."""
    folder = tmp_path_factory.mktemp("exported")
    config = make_config(folder, train__max_steps=3, train__checkpoint_every=2)
    (folder / "config.toml").write_text(to_toml(config))
    assert dspark("train", "--extract", folder / "config.toml").exit_code == 0
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A copy of the run, which may be damaged; its cache is shared."""
    return Path(shutil.copytree(base / "run", tmp_path / "run"))


def card_of(folder: Path) -> tuple[dict[str, object], str]:
    """Front matter and body."""
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_run_knows(base: Path, run: Path, tmp_path: Path) -> None:
    assert dspark("export", run / "draft", tmp_path / "out").exit_code == 0
    head, card = card_of(tmp_path / "out")
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model", "dspark"],
    }
    identity = json.loads((base / "cache" / "manifest.json").read_text())["header"]["identity"]
    numbers = json.loads((run / "evaluation.json").read_text())
    for expected in (
        "# DSpark draft for target\n",
        "| architecture | Qwen3ForCausalLM |",
        f"| weights digest | {identity['target_weights_digest']} |",
        f"| data digest | {identity['data_digest']} |",
        "| optimizer steps | 3 |",
        "| states | bf16, from a target in bfloat16, at most 1,024 tokens |",
        "conversations, ", " tokens |", f"| measured on | {numbers['num_samples']} conversations, ",
        "`target` stands for the target's folder or hub id",
        f"| tau | {numbers['tau']:.3f} (95 % interval {numbers['tau_low']:.3f} to {numbers['tau_high']:.3f}) |",
        "| acceptance by slot | " + " ".join(f"{rate:.3f}" for rate in numbers["accept_rate_per_pos"]),
        f"| tau, greedy draft | {numbers['tau_greedy']:.3f} (95 % interval {numbers['tau_greedy_low']:.3f} to ",
        "| acceptance by slot, greedy draft | " + " ".join(f"{x:.3f}" for x in numbers["greedy_accept_rate_per_pos"]),
        "| target layers | -1, 1, 3 (k:", "| mask token id | 4080 |", "| block size | 4 |",
        "vllm serve target --speculative-config "
        '\'{"method": "dspark", "model": "./out", "num_speculative_tokens": 4, '
        '"draft_sample_method": "probabilistic"}\'',
        "decoding_type: DSpark", "max_draft_len: 4\n", "`max_draft_len` must be 4",
        "None of these commands was run with this draft", "It cannot be loaded by SGLang (refuses -1, ",
        "## Licence\n\nNot stated.",
    ):  # fmt: skip
        assert expected in card, expected
    assert "sglang.launch_server" not in card, "the draft sees the embeddings"
    assert str(base) not in card, "a path of this machine"
    assert str(tmp_path) not in card
    load_served(tmp_path / "out")


def test_the_calibration_travels_with_the_weights_it_is_of(run: Path, tmp_path: Path) -> None:
    file = run / "draft" / "calibration.json"
    given = json.loads(file.read_text())
    for checkpoint, is_of_it in (
        ("draft", True),
        ("checkpoints/step_00000003", True),
        ("checkpoints/step_00000002", False),
    ):
        out = tmp_path / Path(checkpoint).name
        assert dspark("export", run / checkpoint, out).exit_code == 0
        assert (out / "calibration.json").exists() == is_of_it
        assert ("`calibration.json` has a temperature" in card_of(out)[1]) == is_of_it
    assert json.loads((tmp_path / "draft" / "calibration.json").read_text()) == given
    shown = f"Its calibration error is {given['after']['ece']:.3f}, without them {given['before']['ece']:.3f}."
    assert shown in card_of(tmp_path / "draft")[1]
    kept = [slot for slot, temperature in enumerate(given["temperatures"]) if temperature == 1]
    assert given["kept_slots"] == kept, "few conversations"
    note = f"Temperature 1 at slots {', '.join(map(str, kept))}: too few conversations"
    assert (note in card_of(tmp_path / "draft")[1]) == bool(kept)
    unsealed = {name: value for name, value in given.items() if name != "crc32c"}  # as earlier versions wrote it
    file.write_text(json.dumps(unsealed | {"temperatures": given["temperatures"][:1]}))
    result = dspark("export", run / "draft", tmp_path / "short")
    assert result.exit_code == 0
    assert "it has 1 temperatures for 4 slots" in result.output
    assert not (tmp_path / "short" / "calibration.json").exists()
    assert "`calibration.json`" not in card_of(tmp_path / "short")[1]
    file.write_text("{")
    result = dspark("export", run / "draft", tmp_path / "broken")
    assert result.exit_code == 0
    assert "goes without the calibration" in result.output
    assert not (tmp_path / "broken" / "calibration.json").exists()


def test_the_speculators_form(base: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--format", "speculators", "--without-target-weights", "--dtype", "float32")
    assert dspark("export", run / "draft", out, *arguments, "--target", "Some-Org/Big-Model").exit_code == 0
    fields = json.loads((out / "config.json").read_text())
    assert fields["speculators_config"]["verifier"] == {
        "name_or_path": "Some-Org/Big-Model",
        "architectures": ["Qwen3ForCausalLM"],
    }
    assert fields["aux_hidden_state_layer_ids"] == [0, 2, 4]
    head, card = card_of(out)
    assert head["base_model"] == "Some-Org/Big-Model"
    assert head["library_name"] == "speculators"
    assert "vllm serve Some-Org/Big-Model" in card
    assert "left out" in card
    assert "speculators 0.9.0, which vLLM alone reads" in card
    assert "loaded drafts of dspark-offline in this form unchanged" in card
    assert not any(name in card for name in ("launch_server", "trtllm-serve", "convert_hf_to_gguf"))
    assert "stands for the target's folder" not in card
    result = dspark("export", run / "draft", tmp_path / "own", *arguments)
    assert result.exit_code == 0
    assert f"config.json names the target as {base / 'target'}, which servers elsewhere do not have" in result.output
    own = json.loads((tmp_path / "own" / "config.json").read_text())
    assert own["speculators_config"]["verifier"]["name_or_path"] == str(base / "target")
    assert "base_model" not in card_of(tmp_path / "own")[0]


def test_a_folder_of_another_day_is_not_taken_for_a_hub_id(base: Path, run: Path, tmp_path: Path) -> None:
    config, own = run / "config.toml", f'model = "{base / "target"}"'
    given = config.read_text()
    assert own in given
    named = ("--target", "models/qwen")
    for name, lines, arguments, expected in (
        ("path", 'model = "models/qwen"', (), None),
        ("revision", 'model = "models/qwen"\nrevision = "main"', (), "models/qwen"),
        ("named", 'model = "models/qwen"', named, "models/qwen"),
    ):
        config.write_text(given.replace(own, lines))
        assert dspark("export", run / "draft", tmp_path / name, *arguments).exit_code == 0
        assert card_of(tmp_path / name)[0].get("base_model") == expected
    refused = dspark("export", run / "draft", tmp_path / "evil", "--target", "evil\n# x")
    assert refused.exit_code == 1
    assert "expected printable characters, got 'evil\\n# x'" in refused.output
    assert not (tmp_path / "evil").exists()


def test_metrics_are_those_of_the_exported_weights(run: Path, tmp_path: Path) -> None:
    for step, is_final in ((2, False), (3, True)):
        out = tmp_path / f"step{step}"
        assert dspark("export", run / "checkpoints" / f"step_{step:08d}", out).exit_code == 0
        card = card_of(out)[1]
        assert f"| optimizer steps | {step} |" in card
        assert ("| tau |" in card) == is_final
        assert ("not known to be of these weights" in card) != is_final
    shutil.rmtree(run / "draft")  # a run that is not finished: its evaluation is of something else
    assert dspark("export", run / "checkpoints" / "step_00000003", tmp_path / "open").exit_code == 0
    assert "| tau |" not in card_of(tmp_path / "open")[1]


def test_an_evaluation_of_other_weights_is_not_shown(run: Path, tmp_path: Path) -> None:
    """The run went on, and nobody measured again."""
    weights = load_file(run / "draft" / "model.safetensors")
    weights["fc.weight"] += 1
    save_file(weights, run / "draft" / "model.safetensors", metadata={"format": "pt"})
    result = dspark("export", run / "draft", tmp_path / "out")
    assert result.exit_code == 0
    assert "was measured on other weights than those in" in result.output
    assert "| tau |" not in card_of(tmp_path / "out")[1]


def test_an_evaluation_may_say_more_and_must_not_be_broken(run: Path, tmp_path: Path) -> None:
    file = run / "evaluation.json"
    numbers = json.loads(file.read_text()) | {"format_version": 2, "per_slot": [{"ece": None}]}
    del numbers["crc32c"]  # as earlier versions wrote it
    file.write_text(json.dumps(numbers))
    assert dspark("export", run / "draft", tmp_path / "more").exit_code == 0
    assert "| tau |" in card_of(tmp_path / "more")[1]
    for name, text in (("cut", '{"tau": 1'), ("nan", json.dumps(numbers | {"tau": float("nan")})), ("list", "[]")):
        file.write_text(text)
        result = dspark("export", run / "draft", tmp_path / name)
        assert result.exit_code == 0
        assert "| tau |" not in card_of(tmp_path / name)[1]
        assert "says nothing of" in result.output


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("evaluation.json", "tau", 9.0, "| tau |"),
        ("evaluation.json", "num_blocks", 10**6, "| tau |"),
        ("evaluation.json", "weights_digest", None, "| tau |"),
        ("draft/calibration.json", "temperatures", [5.0] * 4, "`calibration.json`"),
        ("draft/calibration.json", "num_fitted_samples", 10**6, "`calibration.json`"),
        ("checkpoints/step_00000003/trainer_state.json", "step", 9, "| optimizer steps |"),
        (
            "checkpoints/step_00000003/trainer_state.json",
            "made_from",
            {"cache.identity": "0" * 64},
            "| cache identity |",
        ),
    ],
)
def test_numbers_that_are_not_the_ones_that_were_written_are_not_published(
    run: Path, tmp_path: Path, name: str, path: str, value: object, said: str
) -> None:
    assert dspark("export", run / "draft", tmp_path / "sound").exit_code == 0
    assert said in card_of(tmp_path / "sound")[1]
    fields = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(fields | {path: value}))
    result = dspark("export", run / "draft", tmp_path / "out")
    assert result.exit_code == 0
    assert (str(run / name) if "step" not in name else "trainer_state.json") in "".join(result.output.split("\n"))
    assert "crc32c" in result.output
    assert said not in card_of(tmp_path / "out")[1]
    assert (tmp_path / "out" / "calibration.json").exists() == (name != "draft/calibration.json")


@pytest.mark.parametrize("changes", [{"tau": 9.0}, {"tau_low": 4.5}, {"accept_rate_per_pos": [1.5, 0.5, 0.5, 0.5]}])
def test_numbers_of_earlier_versions_must_be_plausible(run: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    file = run / "evaluation.json"
    fields = json.loads(file.read_text())
    del fields["crc32c"]
    file.write_text(json.dumps(fields))
    assert dspark("export", run / "draft", tmp_path / "sound").exit_code == 0
    assert "| tau |" in card_of(tmp_path / "sound")[1]
    file.write_text(json.dumps(fields | changes))
    assert dspark("export", run / "draft", tmp_path / "out").exit_code == 0
    assert "| tau |" not in card_of(tmp_path / "out")[1]
    with pytest.raises(EvaluationError, match=r"expected rates|interval"):
        read_evaluation(file)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("evaluation.json", 0),
        ("draft/calibration.json", 0),
        ("config.toml", 0),
        ("checkpoints/step_00000003/trainer_state.json", 0),
        ("draft/config.json", 1),
    ],
)
def test_a_file_that_claims_to_be_huge_is_not_read(run: Path, tmp_path: Path, name: str, status: int) -> None:
    with (run / name).open("ab") as stream:
        stream.truncate(40 << 30)
    result = dspark("export", run / "draft", tmp_path / "out")
    assert result.exit_code == status, result.output
    assert "has 42,949,672,960 bytes, expected " in " ".join(result.output.split())
    assert (tmp_path / "out").exists() == (status == 0)


def test_a_draft_away_from_its_run(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "draft", tmp_path / "alone"))
    assert dspark("export", alone, tmp_path / "out").exit_code == 0
    card = card_of(tmp_path / "out")[1]
    assert "a target that is not named" in card
    assert "Not known: exported without its run." in card
    assert "`calibration.json` has a temperature" in card
    assert (tmp_path / "out" / "calibration.json").exists()
    result = dspark("export", alone, tmp_path / "spec", "--format", "speculators")
    assert result.exit_code == 1
    assert "add --target with the hub id or path" in result.output
    assert not (tmp_path / "spec").exists()


def test_another_cache_is_not_taken_for_the_run_s(base: Path, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base / "cache", tmp_path / "cache"))
    text = (run / "config.toml").read_text().replace(str(base / "cache"), str(other))
    (run / "config.toml").write_text(text)
    state_file = run / "checkpoints" / "step_00000003" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state["made_from"]["cache.identity"] = "0" * 64
    del state["crc32c"]
    compact = json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
    state_file.write_text(json.dumps(state | {"crc32c": google_crc32c.value(compact)}))
    result = dspark("export", run / "draft", tmp_path / "out")
    assert result.exit_code == 0
    assert "is another one" in result.output
    card = card_of(tmp_path / "out")[1]
    assert "weights digest" not in card
    assert f"| cache identity | {'0' * 64} |" in card
    shutil.rmtree(other)
    assert "is not at" in dspark("export", run / "draft", tmp_path / "again").output


def test_what_is_for_servers_is_neither_evaluated_nor_exported_again(base: Path, run: Path, tmp_path: Path) -> None:
    thin, form = tmp_path / "thin", tmp_path / "form"
    assert dspark("export", run / "draft", thin, "--without-target-weights").exit_code == 0
    assert dspark("export", run / "draft", form, "--format", "speculators").exit_code == 0
    for folder, message in ((thin, "lacks the target's"), (form, "is in the speculators form")):
        evaluated = dspark("evaluate", base / "config.toml", "--draft", folder)
        assert (evaluated.exit_code, message in evaluated.output) == (1, True)
        again = dspark("export", folder, tmp_path / "again")
        assert (again.exit_code, message in again.output) == (1, True)
        trained = dspark(
            "train", base / "config.toml", "--set", f"draft.init_from={folder}",
            "--set", f"train.run_dir={tmp_path / 'new'}",
        )  # fmt: skip
        assert (trained.exit_code, f"draft.init_from: {folder}: {message}" in trained.output) == (1, True)


def test_a_whole_export_is_a_draft_like_any_other(base: Path, run: Path, tmp_path: Path) -> None:
    assert dspark("export", run / "draft", tmp_path / "out", "--dtype", "float32").exit_code == 0
    assert dspark("evaluate", base / "config.toml", "--draft", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == json.loads(
        (run / "evaluation.json").read_text()
    )
    assert dspark("export", tmp_path / "out", tmp_path / "twice").exit_code == 0
    assert "| tau |" in card_of(tmp_path / "twice")[1]
    assert "exists already" in dspark("export", run / "draft", tmp_path / "out").output


SCALED, CAPPED = "`markov_head.markov_w2` is written divided by it", "neither vLLM nor SGLang caps the draft's"


@pytest.mark.parametrize(
    ("form", "changes", "commands", "says"),
    [
        ("dspark", {}, {"vllm", "sglang", "trtllm", "llama"}, "their readers fit the files"),
        ("dspark", {"markov_head_type": "gated"}, {"sglang"}, "vLLM (vanilla Markov heads only, this is `gated`)"),
        ("dspark", {"markov_head_type": "rnn"}, {"sglang"}, "TensorRT-LLM (vanilla Markov heads only, this is `rnn`)"),
        ("dspark", {"markov_rank": 0}, {"vllm", "sglang", "trtllm", "llama"}, "rank 1 whose weights are zero"),
        ("dspark", {"target_layer_ids": [-1, 3]}, {"vllm", "trtllm", "llama"}, "SGLang (refuses -1"),
        ("dspark", {"target_layer_ids": [0, 5]}, {"vllm", "trtllm", "llama"}, "SGLang (cannot capture the output of"),
        ("dspark", {"target_layer_ids": [-1, 3], "markov_head_type": "rnn"}, set(), "No server that is known loads"),
        ("dspark", {"enable_confidence_head": False}, {"vllm", "sglang", "trtllm", "llama"}, "No confidence head: SG"),
        ("speculators", {}, {"vllm"}, "export with `--format dspark`"),
        ("speculators", {"markov_head_type": "gated"}, set(), "export with `--format dspark`"),
        ("dspark", {"logit_scale": 0.5}, {"vllm", "sglang", "trtllm", "llama"}, SCALED),
        ("dspark", {"final_logit_softcapping": 30.0}, {"vllm", "sglang", "trtllm", "llama"}, CAPPED),
        (
            "dspark", {"final_logit_softcapping": 30.0, "logit_scale": 0.5}, {"vllm", "sglang", "trtllm", "llama"},
            "scales by 0.5 (vLLM: the Markov bias too, SGLang: neither) and caps its logits at 30;",
        ),
    ],
)  # fmt: skip
def test_the_card_offers_the_commands_of_servers_that_take_the_draft(
    form: Form, changes: dict[str, Any], commands: set[str], says: str
) -> None:
    of_target = {name: changes.pop(name) for name in [*changes] if name in ("logit_scale", "final_logit_softcapping")}
    config = tiny_config(**changes)
    for name, value in of_target.items():
        setattr(config, name, value)
    card = render_card(
        ExportedDraft(
            form=form, config=config, dtype="bfloat16", with_target_weights=True,
            target=ServedTarget(name="some/target"), name="out",
        ),
        RunFacts(),
    )  # fmt: skip
    marks = {
        "vllm": '"num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}',
        "sglang": "--speculative-draft-model-path ./out --speculative-dspark-block-size 3",
        "trtllm": 'speculative_model: "./out"',
        "llama": "convert_hf_to_gguf.py ./out --target-model-dir",
    }
    assert {name for name, mark in marks.items() if mark in card} == commands
    assert says in card
    assert (SCALED in card) == (of_target == {"logit_scale": 0.5})
    assert ("No confidence head: SGLang" in card) == ("enable_confidence_head" in changes)
    assert "CALIBRATION" not in card
    assert "calibration.json" not in card, "none is there"


def test_sglang_s_command_takes_the_calibration() -> None:
    served = ServedDraft(
        form="dspark", config=tiny_config(), target="some/target", folder="./my draft", has_calibration=True
    )
    (command,) = (part for part in describe_serving(served) if "confidence-sts-path" in part)
    words = shlex.split(command.strip("`"))
    assert words[0] == "SGLANG_RAGGED_VERIFY_MODE=compact"
    assert words[words.index("--speculative-dspark-confidence-sts-path") + 1] == "./my draft/calibration.json"
    assert words[words.index("--speculative-draft-model-path") + 1] == "./my draft"
    assert words[words.index("--speculative-dspark-sps-table-path") + 1] == "COST_TABLE.json"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Qwen/Qwen3-4B", True), ("a/b.c_d", True), ("/models/x", False), ("x", False), ("a/b/c", False), ("./a", False)],
)
def test_names_of_the_hub(name: str, expected: bool) -> None:
    assert is_hub_id(name) == expected
