"""What is logged, and that libraries keep quiet: of the command line, and of the processes that it starts."""

import logging
import os
import sys

from storage.text import plain

LIBRARIES = (
    "transformers", "huggingface_hub", "fsspec", "httpx", "httpx2", "openai", "torch", "aiobotocore", "botocore",
)  # fmt: skip


def configure_logs(*, verbose: bool) -> None:
    """Messages to standard output; `verbose` shows debug messages and the libraries' own."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(message)s", stream=sys.stdout, force=True
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_PlainFormatter("%(message)s"))
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for library in LIBRARIES:
            logging.getLogger(library).setLevel(logging.ERROR)
        _quiet_transformers()


class _PlainFormatter(logging.Formatter):
    """Messages name what files and users bring: shown without what a terminal obeys, and without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
