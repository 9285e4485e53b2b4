"""Numbers of a run: sums over the micro-batches of a step, and where they are written."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from stages.bounded_files import bounded_lines, open_plain
from stages.train.checkpoint import write_errors
from stages.train.module import DSparkStepMetrics
from stages.train.parallel import Ranks
from stages.whole_files import write_whole

MAX_ROW_BYTES = 1 << 20  # of metrics.jsonl; a row has a few numbers, and one a slot
PER_SLOT = ("accept_rate_per_pos_num", "accept_rate_per_pos_den")
SUMMED = (
    "loss_num",
    "loss_den",
    "ce_num",
    "l1_num",
    "confidence_num",
    "accept_rate_per_pos_num",
    "accept_rate_per_pos_den",
    "tau_num",
    "tau_den",
    "confidence_abs_error_num",
    "confidence_bias_num",
    "confidence_cumprod_bias_num",
    "confidence_diag_den",
)
# Numbers of this side of the device, which travel with them: `count_slots`'s, and those of `Stepper.step`.
COUNTED = (
    "num_tokens",
    "num_blocks",
    "num_slots",
    "num_supervised_tokens",
    "num_predicted_tokens",
    "num_asked_to_stop",
)

logger = logging.getLogger(__name__)


class StepTotals:
    """Sums of `DSparkStepMetrics` over micro-batches and ranks in one tensor; the ratios are taken once, at the end."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._counts = dict.fromkeys(COUNTED, 0)

    def add(self, metrics: DSparkStepMetrics) -> None:
        parts = torch.cat([getattr(metrics, name).detach().double().reshape(-1) for name in SUMMED])
        self._sum = parts if self._sum is None else self._sum + parts

    def count(self, **counts: int) -> None:
        """Add to numbers of `COUNTED`."""
        for name, count in counts.items():
            self._counts[name] += count

    def reduce(self, ranks: Ranks) -> None:
        """Add up the ranks' sums: the step's only reduction beside that of the gradients."""
        if self._sum is None:
            raise AssertionError("a step without a micro-batch")
        counts = torch.tensor([self._counts[name] for name in COUNTED], dtype=torch.double)
        self._sum = ranks.sum_(torch.cat([self._sum, counts.to(self._sum.device)]))

    def sums(self) -> dict[str, torch.Tensor]:
        """Each sum by its name in `DSparkStepMetrics` or in `COUNTED`, on the CPU, once they are reduced."""
        if self._sum is None:
            raise AssertionError("a step without a micro-batch")
        total, names = self._sum.cpu(), SUMMED + COUNTED
        block_size = (len(total) - len(names) + len(PER_SLOT)) // len(PER_SLOT)
        parts = torch.split(total, [block_size if name in PER_SLOT else 1 for name in names])
        return {name: part if name in PER_SLOT else part.squeeze(0) for name, part in zip(names, parts, strict=True)}

    def ratios(self) -> dict[str, Any]:
        """Losses, tau, and acceptance by slot, each the ratio of its sums; 0 where nothing was supervised.

        `coverage` is the share of the supervised tokens that at least one supervised slot predicts. Beside the ratios
        stand the counts of tokens, blocks and supervised slots.
        """
        sums = self.sums()
        weight = sums["loss_den"].clamp_min(1e-30)
        per_slot = sums["accept_rate_per_pos_num"] / sums["accept_rate_per_pos_den"].clamp_min(1e-30)
        diagnosed = sums["confidence_diag_den"].clamp_min(1e-30)
        return {
            "loss": float(sums["loss_num"] / weight),
            "ce_loss": float(sums["ce_num"] / weight),
            "l1_loss": float(sums["l1_num"] / weight),
            "confidence_loss": float(sums["confidence_num"] / weight),
            "tau": float(sums["tau_num"] / sums["tau_den"].clamp_min(1e-30)),
            "confidence_abs_error": float(sums["confidence_abs_error_num"] / diagnosed),
            "confidence_bias": float(sums["confidence_bias_num"] / diagnosed),
            "confidence_cumprod_bias": float(sums["confidence_cumprod_bias_num"] / diagnosed),
            "accept_rate_per_pos": [float(rate) for rate in per_slot],
            "coverage": float(sums["num_predicted_tokens"] / sums["num_supervised_tokens"].clamp_min(1)),
            **{name: int(sums[name]) for name in ("num_tokens", "num_blocks", "num_slots")},
        }


class MetricsLog:
    """`metrics.jsonl` and TensorBoard of a run; rows past the step that a resume starts from are cut off."""

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        self._file = run_dir / "metrics.jsonl"
        kept, self._written = [], set[tuple[str, int]]()
        for line, row in _parse_rows(self._file):
            if row["step"] <= resume_step:
                kept.append(line)
                self._written.add((str(row.get("kind")), row["step"]))
        with write_errors(self._file):
            for leftover in run_dir.glob(".metrics.jsonl.*.tmp"):  # of killed runs of earlier versions
                leftover.unlink()
            write_whole(self._file, "".join(kept))
            self._stream = self._file.open("a", buffering=1, encoding="utf-8")
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def has(self, kind: str, step: int) -> bool:
        """Whether a row was there when the log was opened."""
        return (kind, step) in self._written

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """One row; `row["step"]` counts the optimizer steps done."""
        with write_errors(self._file):
            self._stream.write(json.dumps({"kind": kind, **row}) + "\n")
            for key, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{kind}/{key}", value, row["step"])
                elif isinstance(value, list | tuple):
                    for slot, item in enumerate(value):
                        self._board.add_scalar(f"{kind}/{key}/{slot}", item, row["step"])

    def close(self) -> None:
        with write_errors(self._file):
            self._stream.close()
            self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All rows of a run's `metrics.jsonl`; a last line that a kill cut short and damaged lines are left out."""
    return [row for _, row in _parse_rows(run_dir / "metrics.jsonl")]


def _parse_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line and what it says; a line that is no row of ours is passed over with a warning."""
    if not file.is_file():
        return
    with open_plain(file) as stream:
        for number, data in enumerate(bounded_lines(stream, max_bytes=MAX_ROW_BYTES), start=1):
            if not data.endswith(b"\n"):  # cut short, or no line of ours: what follows is not looked for
                if len(data) == MAX_ROW_BYTES:
                    logger.warning("%s: from line %d on it is damaged, and left out", file, number)
                return
            line = data.decode("utf-8", errors="replace")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and type(row.get("step")) is int:
                yield line, row
            else:
                logger.warning("%s: line %d is not a row of metrics and is left out: %.60r", file, number, line)


logging.getLogger("tensorboard").setLevel(logging.ERROR)
