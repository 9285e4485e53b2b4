"""Imports run one way: pipeline -> stages -> storage, and the stages never import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "stages", "storage")
STAGES = ("extract", "train", "evaluate", "regenerate")
FORBIDDEN_IN_STORAGE = {"transformers", "click", "safetensors", "rich"}


def imported_modules(file: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_prefixes(file: Path) -> tuple[str, ...]:
    parts = file.relative_to(ROOT).parts
    if parts[0] == "storage":
        return ("pipeline", "stages", *FORBIDDEN_IN_STORAGE)
    if parts[0] == "stages":
        own = parts[1]
        # What lies in stages/ itself is shared by the stages, so it knows none of them.
        others = [stage for stage in STAGES if stage != own]
        return ("pipeline", *(f"stages.{stage}" for stage in others))
    return ()


def source_files() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("file", source_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    wrong = [
        module
        for module in imported_modules(file)
        for prefix in forbidden_prefixes(file)
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert not wrong, f"{file} imports {wrong}"


def test_there_is_no_fourth_package() -> None:
    found = {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES)


def test_the_rule_notices_a_wrong_import(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("def f():\n    from stages.train import model\n")
    assert "stages.train.model" in set(imported_modules(file))
    assert "stages.train" in forbidden_prefixes(ROOT / "stages" / "extract" / "run.py")
