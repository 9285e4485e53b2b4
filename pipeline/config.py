"""The config: one TOML file plus `--set` overrides, parsed into the stages' own typed sections."""

import difflib
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.embedded import CONVERSATIONS_FILE, EMBEDDED, TARGET_DIR
from pipeline.sweep.settings import RangeTable, SweepSection
from stages.evaluate.settings import DecodeSection, EvaluateSection
from stages.extract.settings import CacheSection, DataSection, ExtractSection, TargetSection
from stages.regenerate.settings import RegenerateSection
from stages.section import Section
from stages.train.settings import DraftSection, ObjectiveSection, TrainSection
from storage.text import redact, remember_secrets

REQUIRED = ("target", "data", "cache")


class ConfigError(ValueError):
    """The config cannot be used; the message names file, key, what was expected and what it got."""


class Config(Section):
    """The whole config. `target`, `data` and `cache` are required, the rest has the reference recipe's defaults."""

    target: TargetSection
    data: DataSection
    cache: CacheSection
    extract: ExtractSection = ExtractSection()
    draft: DraftSection = DraftSection()
    objective: ObjectiveSection = ObjectiveSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    decode: DecodeSection = DecodeSection()
    regenerate: RegenerateSection = RegenerateSection()
    sweep: SweepSection | None = None


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Read `file`, apply `section.key=value` overrides (TOML values), and check everything that needs no other file.

    Raises ConfigError.
    """
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such config file; configs/ has examples") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: arrays or tables that are nested too deeply") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}; strings need quotes") from error
    for override in overrides:
        _apply_override(tables, override)
    _remember(tables)
    return parse_config(tables, where=f"{file} with --set" if overrides else str(file))


def parse_config(tables: dict[str, Any], *, where: str) -> Config:
    """Typed config from TOML tables. Raises ConfigError listing every problem, unknown keys with the nearest known."""
    try:
        config = Config.model_validate_json(_to_json(tables, where=where))
    except ValidationError as error:
        problems = dict.fromkeys(_describe(problem) for problem in error.errors())
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems)) from error
    return _resolve_embedded(config)


def _remember(value: Any) -> None:
    """Hide the secrets of its addresses from here on. A string without a scheme has none."""
    if isinstance(value, str):
        if "://" in value:
            remember_secrets(value)
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _remember(item)


def _to_json(tables: dict[str, Any], *, where: str) -> str:
    try:
        return json.dumps(tables, default=str)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: a value that no config can hold: {error}") from error


def to_toml(config: Config) -> str:
    """The resolved config as TOML that `load_config` reads back, without secrets; keys without a value are left out."""
    lines: list[str] = []
    for section, table in config.model_dump(mode="python", exclude_none=True).items():
        lines.append(f"[{section}]")
        lines.extend(f"{key} = {_toml_value(value)}" for key, value in table.items())
        lines.append("")
    return "\n".join(lines)


def _apply_override(tables: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not separator or not dot or not key:
        raise ConfigError(f"--set {override}: expected section.key=value")
    table = tables.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override}: {section} is no section")
    try:
        table[key] = tomllib.loads(f"value = {text}")["value"]
    except RecursionError as error:
        raise ConfigError(f"--set {path.strip()}: arrays or tables that are nested too deeply") from error
    except tomllib.TOMLDecodeError:
        table[key] = text.strip()  # a bare word is a string


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    if not location:
        return str(problem["msg"])
    if location[:2] == ["sweep", "parameters"]:
        del location[3:4]  # which form of values was taken for meant
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
        return f"unknown key {key}{hint}"
    if problem["type"] == "missing":
        enough = " (three lines are enough: target.model, data.files, cache.path)" if location[0] in REQUIRED else ""
        return f"{key} is required{enough}"
    message, given = problem["msg"].removeprefix("Value error, "), problem["input"]
    if location[-1] in ("int", "float"):  # a key that takes both has a problem with each
        key, message = ".".join(location[:-1]), "expected a number"
    if isinstance(given, dict):
        return f"{key}: {message}" + (f", got {_toml_value(given)}" if len(location) > 1 else "")
    return f"{key}: {message}, got {given!r}"


def _known_keys(location: list[str]) -> list[str]:
    if not location:
        return list(Config.model_fields)
    if location[0] == "sweep":
        return list((RangeTable if len(location) > 1 else SweepSection).model_fields)
    section = Config.model_fields[location[0]].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else []


def _resolve_embedded(config: Config) -> Config:
    """Put the shipped target and conversations where the config writes `embedded`."""
    target, data = config.target, config.data
    if target.model == EMBEDDED:
        target = target.model_copy(update={"model": str(TARGET_DIR)})
    files = tuple(str(CONVERSATIONS_FILE) if file == EMBEDDED else file for file in data.files)
    return config.model_copy(update={"target": target, "data": data.model_copy(update={"files": files})})


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    text = str(value)
    return json.dumps(redact(text) if "://" in text else text, ensure_ascii=False)  # a path is read back as it is
