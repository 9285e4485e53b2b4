"""The command line `dspark`: every command reads one config file, and the make targets are thin calls of it."""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from pipeline import show
from pipeline.config import Config, ConfigError, load_config, to_toml
from pipeline.logs import clear_bar, configure_logs, console
from stages.extract.rows import find_files
from stages.extract.settings import CacheSection
from stages.extract.share import ALONE, Share
from stages.whole_files import write_json
from storage import CacheError
from storage.remote import is_remote
from storage.text import plain, redact_values, remember_secrets

if TYPE_CHECKING:
    from stages.train.export import Form
    from stages.train.parallel import Ranks

DEFAULT_CONFIG = Path("configs/embedded.toml")
DEFAULT_SWEEP = Path("configs/sweep.toml")

SHOWS_CONFIG = "dspark.show_config"


class _PathOrAddress(click.Path):
    """A path, or an address as it is written: a `Path` would make one slash of its two."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_remote(value):
            remember_secrets(value)
            return value
        return super().convert(value, param, ctx)


def _with_config(command: Callable[..., None], *, default: Path = DEFAULT_CONFIG) -> Callable[..., None]:
    """The argument and the options that every command has."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a config value; repeatable."
    )(command)
    command = click.option(
        "--show-config",
        is_flag=True,
        expose_value=False,
        callback=lambda context, _parameter, value: context.meta.update({SHOWS_CONFIG: value}),
        help="First print the resolved config with its defaults; keys without a value are left out.",
    )(command)
    return click.argument("config", type=_PathOrAddress(path_type=Path), default=default)(command)


_may_extract = click.option(
    "--extract/--no-extract", "extract_missing", default=False, help="First extract what the cache lacks."
)


class _Group(click.Group):
    """Turns the errors that a user or a disk causes into one message and exit status 1; bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from stages.errors import StageError

        try:
            with _heeding_sigterm():
                return super().invoke(ctx)
        except (ConfigError, CacheError, StageError) as error:
            raise click.ClickException(plain(str(error))) from error
        except OSError as error:  # no permission, a file where a folder should be, no such file
            raise click.ClickException(plain(str(error))) from error
        except MemoryError as error:
            raise click.ClickException("out of memory; see what else runs on this machine") from error
        except KeyboardInterrupt as error:
            clear_bar()
            is_terminated = isinstance(error, _TerminatedError)
            word = "terminated" if is_terminated else "interrupted"
            click.echo(f"{word}; the same command continues from the last shard or checkpoint", err=True)
            if is_terminated:  # whoever sent it sees that it was obeyed
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)
            sys.exit(130)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does; those that finish a step first have handlers of their own."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="dspark-offline")
@click.option("--verbose", is_flag=True, help="Show debug messages and the libraries' own.")
def main(verbose: bool) -> None:
    """Train DSpark speculative-decoding drafts from cached target hidden states."""
    configure_logs(verbose=verbose)


@main.command()
@_with_config
def estimate(config: Path, overrides: tuple[str, ...]) -> None:
    """Print what an extraction would cost: samples, tokens, bytes, hours. Needs no weights."""
    settings = _load(config, overrides, reads_data=True)
    from pipeline import stage_one

    priced = stage_one.estimate(settings)
    if isinstance(priced, tuple):
        show.price(console, *priced)
    else:
        show.regeneration_price(console, priced)


@main.command()
@_with_config
@click.option("--endpoint", metavar="URL", help="Ask an OpenAI-compatible server, as http://host:8000/v1.")
@click.option("--local", is_flag=True, help="Run the target here, through transformers.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the answers. Default: regenerate.path.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Conversations asked of the endpoint at a time.")
def regenerate(config: Path, overrides: tuple[str, ...], endpoint: str | None, local: bool, **options: Any) -> None:
    """Let the target itself answer the conversations of data.files; continues where an earlier run stopped.

    The key of an endpoint is OPENAI_API_KEY of the environment. SIGTERM, or Ctrl-C, ends it; a second one at once.
    """
    loaded = _load(config, overrides, reads_data=True)
    from pipeline import regeneration

    settings = regeneration.with_options(loaded, **options)
    regeneration.show_result(console, regeneration.regenerate(settings, endpoint=endpoint, is_local=local))


@main.command()
@_with_config
@click.option("--part", metavar="I/N", help="Compute the I-th of N parts, to be merged with those of other machines.")
def extract(config: Path, overrides: tuple[str, ...], part: str | None) -> None:
    """Run the target once and cache its hidden states; continues where an earlier run stopped.

    Under torchrun the ranks share the work.
    """
    settings = _load(config, overrides, reads_data=True)
    from pipeline import ranks

    share = Share.of_torchrun() if part is None else Share.parse_part(part)
    ranks.leave_to_child(settings.cache.folder)
    _extract(settings, share=share)


def _parse_layers(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(layer) for layer in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected numbers with commas between, as 2,10,18, got {text!r}") from error


@main.command("import")
@_with_config
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--from", "peer", type=click.Choice(["deepspec", "speculators"]), required=True, help="Whose cache it is."
)
@click.option("--dataset", type=click.Path(path_type=Path), help="speculators: the Arrow dataset of the rows.")
@click.option("--layers", callback=_parse_layers, help="speculators: its layer ids as 2,10,18, without the last state.")
def import_(
    config: Path,
    overrides: tuple[str, ...],
    source: Path,
    peer: str,
    dataset: Path | None,
    layers: tuple[int, ...] | None,
) -> None:
    """Write the cache from SOURCE, a cache that another project made for the config's target; continues as extract."""
    from pipeline import stage_one

    settings = _load(config, overrides)
    opened = stage_one.open_source(peer, source, dataset=dataset, layers=layers)
    show_price = partial(show.price, console)
    show.extraction(console, stage_one.import_cache(settings, opened, show_price=show_price))


@main.command()
@click.argument("cache", type=_PathOrAddress(path_type=Path))
@click.argument("url")
def push(cache: Path, url: str) -> None:
    """Copy the cache in folder CACHE to an address such as s3://bucket/name; again: what is missing there."""
    from storage import push_cache

    show.transfer(console, push_cache(cache, url), source=cache, destination=url)


@main.command()
@click.argument("url")
@click.argument("cache", type=_PathOrAddress(path_type=Path))
def pull(url: str, cache: Path) -> None:
    """Copy the cache at an fsspec address to folder CACHE, every byte checked; again: what is missing here."""
    from storage import pull_cache

    show.transfer(console, pull_cache(url, cache), source=url, destination=cache)


@main.command()
@_with_config
@click.option("--quick", is_flag=True, help="Records, metadata and sizes only; do not read states, samples, target.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--report", "report_file", type=click.Path(path_type=Path), help="Also write the report as JSON to FILE.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads. Default: one per processor, at most 8.")
@click.option("--repair", is_flag=True, help="Drop damaged shards, so that extract computes just these again.")
def verify(
    config: Path,
    overrides: tuple[str, ...],
    quick: bool,
    as_json: bool,
    report_file: Path | None,
    workers: int | None,
    repair: bool,
) -> None:
    """Check every byte of the cache against its checksums. CONFIG may also be the cache's own folder.

    Exit status 1 if it is not whole, also after a repair.
    """
    from storage import repair_cache, verify_cache

    path = _cache_section(config, overrides).path
    with show.progress_bar("verify") as progress:
        report = verify_cache(path, quick=quick, num_workers=workers, progress=progress)
    repaired = None
    try:
        repaired = repair_cache(path, report) if repair else None
    finally:  # the report is of use also where the cache cannot be repaired
        fields = show.report_to_json(report, repaired)
        if report_file is not None:
            write_json(report_file, fields)
        if as_json:
            click.echo(json.dumps(redact_values(fields), indent=2))
        else:
            show.verify_report(console, report)
    if repaired is not None and not as_json:
        show.repair_report(console, repaired)
    if not report.ok:
        sys.exit(1)


@main.command()
@_with_config
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def inspect(config: Path | str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a cache is, unfinished ones too: identity, sizes, lengths, masks, norms, tokens, exclusions.

    CONFIG may also be the cache's own place; at an address, only what its plan says is shown.
    """
    from pipeline.inspection import inspect_cache
    from pipeline.stage_two import open_reader

    section = _cache_section(config, overrides)
    if not isinstance(section.path, Path):
        show.remote_cache(console, open_reader(section, partial=True))
        return
    found = inspect_cache(section.path)
    if as_json:
        click.echo(json.dumps(redact_values(found.to_json()), indent=2))
    else:
        show.cache(console, found)


@main.command()
@_with_config
@_may_extract
@click.option("--evaluate/--no-evaluate", "then_evaluate", default=True, help="Evaluate the draft at the end.")
@click.option("--profile", "profiled", is_flag=True, help="Write a trace of a few steps to RUN/profile.")
def train(config: Path, overrides: tuple[str, ...], extract_missing: bool, then_evaluate: bool, profiled: bool) -> None:
    """Train a draft from the cache; continues where an earlier run stopped. Under torchrun the ranks share each step.

    SIGTERM, or Ctrl-C, ends it behind the step in progress with a checkpoint; a second one at once.
    """
    from pipeline import stage_two

    settings = _load(config, overrides)
    if extract_missing:
        _extract_missing(settings)
    with _joined(settings) as ranks:
        if then_evaluate:
            ranks.on_first(lambda: stage_two.check_evaluation(settings))
        is_trained = _train(settings, ranks=ranks, profiled=profiled)
    if is_trained and then_evaluate and ranks.is_first:
        from pipeline.measure import measure_from_cache

        measure_from_cache(settings, draft=None, console=console)


@main.command()
@_with_config
@click.option("--draft", type=click.Path(path_type=Path), help="A draft folder. Default: RUN/draft of the config.")
@click.option("--decode", "decoded", is_flag=True, help="Then decode with the real target, as [decode] says.")
def evaluate(config: Path, overrides: tuple[str, ...], draft: Path | None, decoded: bool) -> None:
    """Measure the draft's acceptance on the held-out split, from the cache alone."""
    from pipeline.measure import measure_by_decoding, measure_from_cache

    settings = _load(config, overrides)
    evaluation = measure_from_cache(settings, draft=draft, console=console, may_reuse=decoded)
    if decoded:
        measure_by_decoding(settings, draft=draft, estimate=evaluation, console=console)


@main.command()
@partial(_with_config, default=DEFAULT_SWEEP)
@_may_extract
@click.option("--retry-failed", is_flag=True, help="Also try again the trials that failed.")
def sweep(config: Path, overrides: tuple[str, ...], extract_missing: bool, retry_failed: bool) -> None:
    """Train and evaluate the trials that [sweep] describes over one cache, and report on them; again: what is left.

    The report is a table here and report.html in train.run_dir; a sweep that is stopped prints the table alone. Several
    such commands share the trials. Under torchrun the ranks take every trial together.
    """
    from pipeline.sweep.command import sweep as run_sweep
    from pipeline.sweep.run import check_extraction, check_sweep

    settings = _load(config, overrides)
    if extract_missing:
        share = Share.of_torchrun()
        if share.rank == 0:  # before what takes long
            check_sweep(settings, world=share.world)
            check_extraction(settings)
        _extract_missing(settings)
    with _joined(settings) as ranks:
        run_sweep(settings, ranks=ranks, console=console, retries_failed=retry_failed)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["dspark", "speculators"]), default="dspark", help="The layout.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
@click.option(
    "--with-target-weights/--without-target-weights", default=True, help="The target's embedding and head, too."
)
@click.option("--target", metavar="NAME", help="Hub id or path that servers load. Default: target.model of the run.")
def export(
    checkpoint: Path, out: Path, form: "Form", dtype: str, with_target_weights: bool, target: str | None
) -> None:
    """Write a run's draft or checkpoint to the new folder OUT, as servers load it, with model card and calibration."""
    from pipeline.export import export_draft

    export_draft(checkpoint, out, form=form, dtype=dtype, with_target_weights=with_target_weights, target=target)
    console.print(f"draft: {out} ({form}, {dtype})", markup=False)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the page. Default: the sweep's, or the runs'.")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Compare runs, or the trials of a sweep, the best tau first: a table here, and report.html with the plots."""
    from pipeline.report.command import report as write_report

    write_report(runs, out=out, console=console)


def _load(file: Path, overrides: tuple[str, ...], *, reads_data: bool = False) -> Config:
    """The config; what `reads_data` looks for its files before it imports what takes seconds."""
    config = load_config(file, overrides)
    if reads_data:
        find_files(config.data.files, config.data.validation_files)
    if click.get_current_context().meta[SHOWS_CONFIG] and Share.of_torchrun().rank == 0:
        click.echo(to_toml(config))
    return config


def _cache_section(config: Path | str, overrides: tuple[str, ...]) -> CacheSection:
    """The cache of a TOML file, or that in the folder or at the address which `config` is itself."""
    if isinstance(config, Path) and config.suffix == ".toml":
        return load_config(config, overrides).cache
    return CacheSection(path=config)


def _extract(settings: Config, *, share: Share = ALONE) -> None:
    from pipeline import stage_one

    result = stage_one.extract(
        settings, show_price=lambda price, counts: show.price(console, price, counts), share=share
    )
    show.extraction(console, result)


def _extract_missing(settings: Config) -> None:
    """What a training needs of a cache that is not another project's; the ranks of torchrun share the work."""
    from pipeline import stage_two
    from pipeline.cached_values import adopt_cache

    if not stage_two.is_imported(settings):
        _extract(adopt_cache(settings), share=Share.of_torchrun())


@contextmanager
def _joined(settings: Config) -> Iterator["Ranks"]:
    """The ranks of a training; those after the first only print what is wrong."""
    from stages.train.parallel import join_ranks

    with join_ranks(settings.train) as ranks:
        if not ranks.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        yield ranks
    if not ranks.is_first:
        _leave()


def _leave() -> None:
    """End a rank that is done, without taking the interpreter down: gloo's threads may outlive their group, and one
    that then asks for the interpreter would abort the process, and with it the job."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _train(settings: Config, *, ranks: "Ranks", profiled: bool = False) -> bool:
    """Train, and say what came of it; False if it was asked to stop, so that nothing is to follow."""
    from pipeline import stage_two

    run_dir = settings.train.run_dir
    result = stage_two.train_draft(settings, profiled=profiled, ranks=ranks)
    if result.was_stopped or not ranks.is_first:
        return not result.was_stopped
    if result.was_complete:
        console.print(f"{run_dir} is trained already ({result.num_steps} steps); set train.run_dir for a new run")
    console.print(f"draft: {result.draft_dir}", markup=False)
    return True


if __name__ == "__main__":
    main()
