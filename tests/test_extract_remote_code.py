"""Targets whose classes are Python of their repository: cached with the user's leave, trained from without it."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Config, to_toml
from pipeline.stage_one import settings_of
from pipeline.stage_two import train_draft
from stages.extract.model_files import TargetError
from stages.extract.run import estimate, extract
from storage import CachePlan
from tiny_target import make_config, save_tiny_target

ROOT = Path(__file__).parent.parent
CONFIG_CODE = """
import os
from transformers import Qwen3Config
os.close(os.open(os.environ.get("RAN", os.devnull), os.O_CREAT | os.O_WRONLY))
class MyConfig(Qwen3Config):
    model_type = "mynew"
"""
MODEL_CODE = """
from transformers import Qwen3ForCausalLM
from .configuration_my import MyConfig
class MyForCausalLM(Qwen3ForCausalLM):
    config_class = MyConfig
"""
AUTO_MAP = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyForCausalLM"}


@pytest.fixture(autouse=True)
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies such code into a folder of the user's, and imports it from there."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


def make_remote(folder: Path) -> Config:
    """A config whose target is of a class in its own folder."""
    target = save_tiny_target(folder / "target")
    fields = json.loads((target / "config.json").read_text())
    fields |= {"model_type": "mynew", "architectures": ["MyForCausalLM"], "auto_map": AUTO_MAP}
    (target / "config.json").write_text(json.dumps(fields))
    (target / "configuration_my.py").write_text(CONFIG_CODE)
    (target / "modeling_my.py").write_text(MODEL_CODE)
    return make_config(folder, target__trust_remote_code=True)


def test_a_cache_of_a_target_with_code_is_trained_from_without_it(tmp_path: Path) -> None:
    config = make_remote(tmp_path)
    estimate(settings_of(config))
    extract(settings_of(config))
    os.rename(tmp_path / "target", tmp_path / "elsewhere")
    assert train_draft(config).num_steps == 8


def test_without_leave_it_is_refused_in_a_line(tmp_path: Path) -> None:
    config = make_remote(tmp_path)
    distrusting = config.model_copy(update={"target": config.target.model_copy(update={"trust_remote_code": False})})
    with pytest.raises(TargetError, match=r"set target\.trust_remote_code = true") as caught:
        estimate(settings_of(distrusting))
    assert "\n" not in str(caught.value)


def answer_yes(arguments: list[str], environment: dict[str, str]) -> int:
    """Run a command on a terminal whose user says yes to everything."""
    leader, follower = pty.openpty()
    os.write(leader, b"y\n" * 64)
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    process.communicate(timeout=300)
    os.close(leader)
    os.close(follower)
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True], ids=["now", "older-cache"])
def test_code_in_a_caches_folder_is_never_run(is_old: bool, tmp_path: Path) -> None:
    """Whatever is answered: a cache is somebody's data, and its target's folder holds their files."""
    config = make_config(tmp_path)
    extract(settings_of(config))
    plant(config.cache.folder, keep_shape=not is_old)
    os.rename(tmp_path / "target", tmp_path / "elsewhere")
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config))
    ran = tmp_path / "ran"
    environment = os.environ | {"RAN": str(ran), "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")}
    for arguments in (["inspect", str(config.cache.path)], ["train", str(file)], ["evaluate", str(file)]):
        assert answer_yes(arguments, environment) == 0, arguments
    assert not ran.exists()


def plant(cache: Path, *, keep_shape: bool) -> None:
    """Put code beside the config and the tokenizer of a cache's target, and seal the manifest over it."""
    target = cache / "target"
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((target / name).read_text())
        fields["auto_map"] = {**AUTO_MAP, "AutoTokenizer": ["configuration_my.MyConfig", None]}
        (target / name).write_text(json.dumps(fields))
    (target / "configuration_my.py").write_text(CONFIG_CODE)
    if not keep_shape:
        (target / "shape.json").unlink()
    reseal(cache)


def reseal(cache: Path) -> None:
    from storage.files import hash_inside
    from storage.manifest import FileRecord, seal_manifest

    manifest = CachePlan.read(cache).manifest
    files = {name: record for name, record in manifest.files.items() if not name.startswith("target/")}
    for file in sorted((cache / "target").iterdir()):
        num_bytes, crc32c = hash_inside(cache, f"target/{file.name}")
        files[f"target/{file.name}"] = FileRecord(num_bytes=num_bytes, crc32c=crc32c)
    sealed = seal_manifest(
        manifest.header, manifest.plan, plan_digest=manifest.plan_digest, files=dict(sorted(files.items()))
    )
    (cache / "manifest.json").write_bytes(sealed.render())
