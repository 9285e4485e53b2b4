"""What `dspark evaluate` does: measure a draft, keep the numbers, print them."""

from pathlib import Path

from rich.console import Console

from pipeline import show, show_decoding
from pipeline.config import Config
from pipeline.decoding import decode_draft
from pipeline.stage_two import evaluate_draft, is_evaluation_of, open_reader, save_evaluation
from stages.evaluate.calibration import read_calibration
from stages.evaluate.evaluation import Evaluation, read_evaluation
from stages.evaluate.records import EvaluationError
from stages.whole_files import write_json


def measure_from_cache(config: Config, *, draft: Path | None, console: Console, may_reuse: bool = False) -> Evaluation:
    """Acceptance on the held-out split; `draft` None: the run's own. Raises SettingError, CacheError.

    `may_reuse`: an `evaluation.json` of these very weights, blocks and settings is taken as it is.
    """
    draft_dir = draft or config.train.run_dir / "draft"
    file = _place_of_numbers(config, draft) / "evaluation.json"
    reader = open_reader(config.cache)
    evaluation = _read_own(config, file=file, draft_dir=draft_dir) if may_reuse else None
    if evaluation is None:
        evaluation = evaluate_draft(config, draft_dir=draft_dir, opened=reader)
        save_evaluation(evaluation, file=file, draft_dir=draft_dir)
    else:
        console.print(f"{file} is of these weights: not measured again", markup=False)
    token_bytes = reader.manifest.header.token_bytes
    show.evaluation(
        console, evaluation, draft_dir=draft_dir, file=file, cache=config.cache.path, token_bytes=token_bytes
    )
    return evaluation


def _read_own(config: Config, *, file: Path, draft_dir: Path) -> Evaluation | None:
    """The evaluation in the file, if it and the draft's calibration are what measuring would give again."""
    try:
        evaluation = read_evaluation(file)
        scheduling = evaluation.scheduling
        if scheduling is not None and read_calibration(draft_dir) != scheduling.calibration:
            return None
    except EvaluationError:
        return None
    return evaluation if is_evaluation_of(evaluation, config, draft_dir=draft_dir) else None


def measure_by_decoding(config: Config, *, draft: Path | None, estimate: Evaluation, console: Console) -> None:
    """Decoding with the real target, beside the cache's estimate. Raises SettingError, CacheError."""
    with show.progress_bar("decode") as progress:
        result = decode_draft(config, draft_dir=draft or config.train.run_dir / "draft", progress=progress)
    file = _place_of_numbers(config, draft) / "decoding.json"
    write_json(file, result.to_json())
    show_decoding.decoding(console, result, estimate=estimate, file=file)


def _place_of_numbers(config: Config, draft: Path | None) -> Path:
    """The run's folder, where reports look, for its own draft; else the folder of the draft."""
    if draft is None:
        return config.train.run_dir
    is_of_run = draft.resolve().name == "draft" and (draft.resolve().parent / "config.toml").is_file()
    return draft.parent if is_of_run else draft
