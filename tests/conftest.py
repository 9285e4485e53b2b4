"""What holds for every test, and what several files begin with."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pipeline.stage_one import settings_of
from pipeline.stage_two import train_draft
from stages.extract.run import extract
from storage import text
from tiny_target import make_config

# Beside other tests on a busy machine an example takes as long as it takes; pytest-timeout ends what hangs.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would everything that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_secrets_of_other_tests() -> Iterator[None]:
    yield
    text._remembered.clear()


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target and its cache, with 16 training samples; no test may damage it."""
    folder = tmp_path_factory.mktemp("cached")
    extract(settings_of(make_config(folder)))
    return folder


@pytest.fixture(scope="module")
def trained(cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps over that cache."""
    config = make_config(cached, train__run_dir=tmp_path_factory.mktemp("trained") / "run")
    train_draft(config)
    return config.train.run_dir
