"""Runs made without training, for tests of reports, and the page as a browser reads it."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from pipeline.cli import main
from pipeline.report.compare import Comparison, compare_runs
from pipeline.report.runs import read_runs
from pipeline.report.words import readable
from stages.evaluate.calibration import Origin
from stages.evaluate.evaluation import Evaluation, evaluate_fully, write_evaluation
from stages.evaluate.throughput import assumed_table
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
    sections: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """A run's folder with everything that a report reads, where nothing was trained."""
    folder.mkdir(parents=True)
    run_dir = readable(str(folder))
    values = {"lr": 0.001, "seed": 0} | (config or {})
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    for section, table in (sections or {}).items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
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
        self.title = ""
        self.facts: dict[str, str] = {}
        self.text = ""
        """All that is read, with the alternative texts of images."""
        self._open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self._open == [], "a tag is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += dict(attrs).get("alt") or ""
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
        if self._open[-1:] == ["dt"]:
            self._name = data
            self.facts[data] = ""
        if self._open[-1:] == ["dd"]:
            self.facts[self._name] += data
        if self._open[-1:] == ["title"]:
            self.title += data
        if self._open[-1:] != ["style"]:
            self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def read(*folders: Path) -> Comparison:
    return compare_runs(read_runs(folders))
