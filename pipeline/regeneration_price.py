"""What it would cost to have the target answer prompts: told by `estimate` where no row has an answer yet."""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch

from pipeline.config import Config
from pipeline.regeneration import describe_target, name_files, read_prompts
from stages.device import choose_device
from stages.extract.ordered import map_ordered
from stages.extract.price import ASSUMED_DECODE_UTILISATION, count_forward_parameters, estimate_hours
from stages.extract.target import build_skeleton
from stages.regenerate.dialogue import Dialogue
from stages.regenerate.prompts import Prompt
from stages.regenerate.render import PromptRenderer, RenderError, plan_tokens


@dataclass(frozen=True, kw_only=True)
class RegenerationPrice:
    """Prompts, their tokens, and the tokens that their answers may have at most, by `regenerate.max_tokens` and
    `data.max_length`.

    `hours` on `device` are an upper bound too, where decoding reaches `utilisation` of its matrix rate. `unusable`
    counts rows by reason.
    """

    num_prompts: int
    num_prompt_tokens: int
    max_answer_tokens: int
    hours: float
    utilisation: float
    device: str
    unusable: dict[str, int]


def price_regeneration(config: Config) -> RegenerationPrice:
    """Tokenise every prompt; needs no weights and writes nothing. Raises StageError of some family."""
    asked = describe_target(config)
    bad: Counter[str] = Counter()
    prompts = read_prompts(name_files(config.data), section=config.regenerate, bad=bad)
    count = partial(_count_tokens, asked.renderer(config.regenerate))
    num_prompts = num_prompt_tokens = max_answer_tokens = 0
    for num_tokens in map_ordered(count, prompts, num_processes=config.data.num_processes):
        room = plan_tokens(num_tokens or 0, max_tokens=config.regenerate.max_tokens, max_length=asked.max_length)
        if num_tokens is None or room < 1:
            bad["cannot be rendered" if num_tokens is None else "leaves no room in data.max_length"] += 1
            continue
        num_prompts += 1
        num_prompt_tokens += num_tokens
        max_answer_tokens += room
    device = choose_device(config.extract.device)
    skeleton = build_skeleton(asked.folder, asked.config, target=config.target)
    parameters = count_forward_parameters(skeleton)
    hours = partial(estimate_hours, num_parameters=parameters, device=device, dtype=getattr(torch, config.target.dtype))
    return RegenerationPrice(
        num_prompts=num_prompts,
        num_prompt_tokens=num_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        hours=hours(num_tokens=num_prompt_tokens)
        + hours(num_tokens=max_answer_tokens, utilisation=ASSUMED_DECODE_UTILISATION),
        utilisation=ASSUMED_DECODE_UTILISATION,
        device=str(device),
        unusable=dict(bad),
    )


def _count_tokens(renderer: PromptRenderer, prompt: Prompt) -> int | None:
    """Tokens of the prompt of the first turn that is asked for; None where it cannot be rendered."""
    try:
        return len(renderer(Dialogue(prompt, keep_truncated=True).messages, tools=prompt.tools))
    except RenderError:
        return None
