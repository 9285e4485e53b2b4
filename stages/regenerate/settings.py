"""Config section of the regeneration: `[regenerate]`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.section import Section


class RegenerateSection(Section):
    """Which turns the target answers anew, and how its answers are sampled."""

    path: Path | None = None
    """Folder of the answers; `--out` names another."""
    turns: Literal["all", "last"] = "all"
    """Every assistant turn in order, each behind the new ones before it; or the last alone, the others as they are."""
    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    """0 takes the most likely token; 1 samples from the target's own distribution."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the likeliest tokens that have this share of the probability."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of an answer at most. Default: what its prompt leaves of `data.max_length`, where the cache cuts."""
    truncated: Literal["drop", "keep"] = "drop"
    """Answers that did not end within their tokens; a kept one is cached without an end, as it was sampled."""
    seed: int = Field(default=0, ge=0)
    """Seeds every answer, together with its row and turn."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, for example `{ enable_thinking = false }`."""

    served_model: str | None = None
    """The model's name at the endpoint. Default: `target.model` as the config has it."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """More fields of each request to an endpoint, for example `{ top_k = -1 }`. They are recorded: no secrets."""
    concurrency: int = Field(default=64, ge=1)
    """Conversations asked of an endpoint at a time."""
    timeout_seconds: float = Field(default=600.0, gt=0.0)
    """How long an endpoint may take for one answer."""
    max_retries: int = Field(default=8, ge=0)
    """Times that a request is sent again after 429, 5xx, a timeout or a lost connection: 8 take about 40 s."""

    batch_size: int = Field(default=32, ge=1)
    """Conversations that the local target answers together. A part of what is recorded: batches round otherwise."""
