"""The target in this process: what a plain loop says, whatever the batch and wherever it was interrupted."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import regeneration
from pipeline.config import Config, to_toml
from pipeline.embedded import TARGET_DIR
from pipeline.regeneration_price import price_regeneration
from pipeline.stage_one import settings_of
from stages.extract.run import extract
from stages.extract.settings import ExtractSection
from stages.regenerate import work
from stages.regenerate.dialogue import Dialogue
from stages.regenerate.local import LocalTarget, StopAskedError, answer_batch, plan_batches
from stages.regenerate.prompts import Prompt, plan_prompt, seed_of
from stages.regenerate.publish import write_manifest
from stages.regenerate.render import NO_ROOM, PromptRenderer
from stages.regenerate.sampling import draw_uniforms, pick_tokens
from stages.regenerate.settings import RegenerateSection
from stages.regeneration_record import RegenerationError, parse_manifest
from tiny_target import make_chats, make_config, save_tiny_target, write_jsonl

ROOT = Path(__file__).parent.parent
CONVERSATIONS = "conversations-00000.jsonl"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with random weights in float32, where a batch rounds too little to matter."""
    folder = save_tiny_target(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_target(model: Any, **section: Any) -> LocalTarget:
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    return LocalTarget(
        model=model,
        device=torch.device("cpu"),
        renderer=PromptRenderer(tokenizer, variables={}),
        # Token 2 ends an answer; random weights rarely say it, so that these do too.
        end_ids=frozenset({2, *range(300, 500)}),
        section=RegenerateSection(**{"max_tokens": 12, "truncated": "keep", "seed": 3, **section}),
        max_length=300,
    )


def make_prompts(count: int = 9) -> list[Prompt]:
    return [plan_prompt(row, chat["messages"], turns="all") for row, chat in enumerate(make_chats(count))]


def answer_plainly(target: LocalTarget, prompt: Prompt) -> list[str]:
    """The texts of a row's turns."""
    return [text for text, _, _ in say_plainly(target, prompt)]


def say_plainly(target: LocalTarget, prompt: Prompt) -> list[tuple[str, list[int], list[int]]]:
    """One row alone, one token at a time, without a cache: text, prompt and new tokens of its turns."""
    section = target.section
    messages: list[dict[str, Any]] = []
    turns: list[tuple[str, list[int], list[int]]] = []
    for message in prompt.messages:
        if message is not None:
            messages.append(message)
            continue
        ids = target.renderer(messages, tools=None)
        seed = seed_of(section.seed, row=prompt.row, turn=len(turns))
        uniforms = torch.rand(
            section.max_tokens or 0, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        new: list[int] = []
        for uniform in uniforms.tolist():
            with torch.inference_mode():
                logits = target.model(torch.tensor([ids + new])).logits[0, -1].double()
            new.append(sample_plainly(logits, uniform, temperature=section.temperature, top_p=section.top_p))
            if new[-1] in target.end_ids:
                break
        text = target.renderer.decode([token for token in new if token not in target.end_ids])
        if not text.strip():
            break
        turns.append((text, ids, new))
        messages.append({"role": "assistant", "content": text})
    return turns


def sample_plainly(logits: torch.Tensor, uniform: float, *, temperature: float, top_p: float) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    nucleus, total = set(), 0.0
    for token in order:
        if total >= top_p:
            break
        nucleus.add(token)
        total += float(probabilities[token])
    aim, passed = uniform * total, 0.0
    for token, probability in enumerate(probabilities.tolist()):
        passed += probability if token in nucleus else 0.0
        if token in nucleus and passed > aim:
            return token
    raise AssertionError("the nucleus has all of its probability")


def answer(target: LocalTarget, prompts: list[Prompt]) -> list[list[str]]:
    dialogues = [Dialogue(prompt, keep_truncated=True) for prompt in prompts]
    answer_batch(target, dialogues, is_stopped=lambda: False)
    assert all(dialogue.outcome().reason in (None, "empty answer") for dialogue in dialogues)
    return [
        [message["content"] for message in dialogue.messages if message["role"] == "assistant"]
        for dialogue in dialogues
    ]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (0.0, 1.0)], ids=str)
def test_batches_say_what_a_plain_loop_says(tiny: Any, temperature: float, top_p: float) -> None:
    target = make_target(tiny, temperature=temperature, top_p=top_p)
    prompts = make_prompts()
    expected = [answer_plainly(target, prompt) for prompt in prompts]
    assert answer(target, prompts) == expected
    assert answer(target, prompts[::-2]) == expected[::-2]
    assert len({len(text) for texts in expected for text in texts}) > 3, "answers of different lengths"


def test_rows_hold_the_sampled_tokens_behind_what_was_shown(tiny: Any) -> None:
    target, prompts = make_target(tiny), make_prompts()
    dialogues = [Dialogue(prompt, keep_truncated=True) for prompt in prompts]
    answer_batch(target, dialogues, is_stopped=lambda: False)
    num_turns = num_retokenised = num_cut = 0
    for prompt, dialogue in zip(prompts, dialogues, strict=True):
        turns = say_plainly(target, prompt)
        outcome = dialogue.outcome()
        found = [(row.input_ids or [], row.loss_mask or []) for row in outcome.rows]
        assert not outcome.has_text
        for text, shown, new in turns:
            holders = [ids for ids, mask in found if is_supervised(ids, mask, shown=shown, new=new)]
            assert len(holders) == 1, "each turn is supervised once"
            num_retokenised += target.renderer.encode(text) != [token for token in new if token not in target.end_ids]
            num_cut += new[-1] not in target.end_ids
        assert sum(sum(mask) for _, mask in found) == sum(len(new) for _, _, new in turns), "and nothing else is"
        num_turns += len(turns)
    assert min(num_retokenised, num_cut, num_turns - num_cut) > 0


def is_supervised(ids: list[int], mask: list[int], *, shown: list[int], new: list[int]) -> bool:
    end = len(shown) + len(new)
    return ids[:end] == shown + new and all(mask[len(shown) : end]) and not any(mask[end : end + 1])


def test_seeds_change_what_is_said(tiny: Any) -> None:
    prompts = make_prompts(2)
    assert answer(make_target(tiny), prompts) != answer(make_target(tiny, seed=4), prompts)
    same = [replace(prompts[1], row=row) for row in range(4)]
    assert len({texts[0] for texts in answer(make_target(tiny), same)}) == 4


def test_samples_are_of_the_distribution() -> None:
    """40,000 draws against the probabilities: the largest deviation is that of a fair sampler."""
    torch.manual_seed(0)
    logits_V = torch.randn(50) * 2
    uniforms = draw_uniforms(5, 40_000)
    picked = pick_tokens(logits_V.expand(40_000, 50), uniforms)
    frequencies = torch.bincount(picked, minlength=50) / 40_000
    assert float((frequencies - logits_V.softmax(-1)).abs().max()) < 0.01


def test_the_ends_of_the_interval_pick_a_possible_token() -> None:
    logits_BV = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]]).expand(2, 5)
    assert pick_tokens(logits_BV, torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64)).tolist() == [1, 3]


def test_what_the_models_generation_config_says_changes_nothing(tiny: Any) -> None:
    prompts = make_prompts(3)
    plain = answer(make_target(tiny), prompts)
    tiny.generation_config.update(repetition_penalty=5.0, top_k=1, max_length=20, do_sample=True)
    assert answer(make_target(tiny), prompts) == plain


def test_a_prompt_without_room_is_not_asked_and_the_others_are(tiny: Any) -> None:
    long = plan_prompt(50, [{"role": "user", "content": "long " * 400}], turns="all")
    dialogues = [Dialogue(prompt, keep_truncated=True) for prompt in (long, make_prompts(1)[0])]
    answer_batch(make_target(tiny), dialogues, is_stopped=lambda: False)
    assert [dialogue.outcome().kind for dialogue in dialogues] == ["dropped", "answered"]
    assert dialogues[0].outcome().reason == NO_ROOM


def test_answers_end_where_the_cache_cuts(tiny: Any) -> None:
    target = replace(make_target(tiny, max_tokens=None), end_ids=frozenset({2}), max_length=60)
    dialogues = [Dialogue(prompt, keep_truncated=True) for prompt in make_prompts(5)[1:3]]
    lengths = [len(target.renderer(dialogue.messages, tools=None)) for dialogue in dialogues]
    answer_batch(target, dialogues, is_stopped=lambda: False)
    assert [dialogue.outcome().num_tokens for dialogue in dialogues] == [60 - length for length in lengths]


def test_a_stop_gives_up_the_batch(tiny: Any) -> None:
    asked: list[int] = []

    def is_stopped() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(StopAskedError):
        answer_batch(make_target(tiny), [Dialogue(make_prompts(1)[0], keep_truncated=True)], is_stopped=is_stopped)
    assert len(asked) == 4, "asked once a token"


def test_batches_are_the_same_whatever_is_done_already(tiny: Any) -> None:
    renderer, prompts = make_target(tiny).renderer, make_prompts(100)
    whole = list(plan_batches(renderer, prompts, batch_size=4, is_done=lambda prompt: False))
    assert sorted(prompt.row for batch in whole for prompt in batch) == list(range(100))
    done = {prompt.row for batch in whole[::2] for prompt in batch} | {whole[1][0].row}
    rest = list(plan_batches(renderer, prompts, batch_size=4, is_done=lambda prompt: prompt.row in done))
    assert rest == whole[1::2]
    widths = [len(renderer([batch[0].messages[0] or {}], tools=None)) for batch in whole[:16]]
    assert widths == sorted(widths)


def make_run(folder: Path, num_chats: int = 24, **section: Any) -> Config:
    config = make_config(folder, num_chats=num_chats, target__dtype="float32")
    fields = {"path": folder / "out", "max_tokens": 6, "truncated": "keep", "batch_size": 5, **section}
    return config.model_copy(update={"regenerate": RegenerateSection(**fields)})


def run(config: Config, *, is_stopped: Callable[[], bool] | None = None) -> Any:
    return regeneration.regenerate(config, endpoint=None, is_local=True, is_stopped=is_stopped)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_outputs(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_run(tmp_path_factory.mktemp("undisturbed"))
    result = run(config)
    assert (result.num_recorded, result.num_open, result.was_stopped) == (24, 0, False)
    return config


def test_again_nothing_is_asked(undisturbed: Config) -> None:
    assert undisturbed.regenerate.path is not None
    before = read_outputs(undisturbed.regenerate.path)
    assert list(before) == ["conversations-00000.jsonl", "regeneration.json"]
    result = run(undisturbed)
    assert result.num_recorded == 0
    assert read_outputs(undisturbed.regenerate.path) == before


@pytest.mark.parametrize("num_lines", [0, 1, 7, 23])
def test_a_run_goes_on_from_any_line_to_the_same_bytes(undisturbed: Config, tmp_path: Path, num_lines: int) -> None:
    assert undisturbed.regenerate.path is not None
    lines = (undisturbed.regenerate.path / "work" / "outcomes.log").read_bytes().splitlines(keepends=True)
    config = with_path(undisturbed, tmp_path / "out")
    (tmp_path / "out" / "work").mkdir(parents=True)
    (tmp_path / "out" / "work" / "outcomes.log").write_bytes(b"".join(lines[:num_lines]) + lines[num_lines][:-9])
    result = run(config)
    assert result.num_recorded == 24 - num_lines
    assert read_outputs(tmp_path / "out") == read_outputs(undisturbed.regenerate.path)
    journal = (tmp_path / "out" / "work" / "outcomes.log").read_bytes().splitlines()
    assert len(journal) == 24, "no row twice"


def with_path(config: Config, path: Path) -> Config:
    return config.model_copy(update={"regenerate": config.regenerate.model_copy(update={"path": path})})


def test_a_kill_while_publishing_costs_nothing(undisturbed: Config, tmp_path: Path) -> None:
    """Conversations are there, the manifest says that none are: no model is loaded, the files are put in order."""
    assert undisturbed.regenerate.path is not None
    config = with_path(undisturbed, tmp_path / "out")
    shutil.copytree(undisturbed.regenerate.path, tmp_path / "out")
    manifest = parse_manifest((tmp_path / "out" / "regeneration.json").read_bytes(), where="")
    write_manifest(tmp_path / "out", manifest.model_copy(update={"counts": None, "files": {}}))
    (tmp_path / "out" / "conversations-00000.jsonl").write_text("of an earlier run\n")
    assert run(config.model_copy(update={"extract": ExtractSection(device="cuda:99")})).num_recorded == 0
    assert read_outputs(tmp_path / "out") == read_outputs(undisturbed.regenerate.path)


def test_other_settings_and_other_prompts_are_refused(undisturbed: Config, tmp_path: Path) -> None:
    warmer = undisturbed.regenerate.model_copy(update={"temperature": 1.5})
    with pytest.raises(RegenerationError, match=r"temperature: the folder has 1\.0, this run has 1\.5"):
        run(undisturbed.model_copy(update={"regenerate": warmer}))
    other = write_jsonl(tmp_path / "other.jsonl", make_chats(25)[1:])
    data = undisturbed.data.model_copy(update={"files": (str(other),)})
    with pytest.raises(RegenerationError, match="prompts_digest"):
        run(undisturbed.model_copy(update={"data": data}))


def test_rows_that_hold_no_conversation_are_counted(tmp_path: Path) -> None:
    rows = [*make_chats(3), {"text": "no chat"}, {"messages": [{"role": "user", "content": "unanswered"}]}]
    config = make_run(tmp_path)
    write_jsonl(tmp_path / "chats.jsonl", rows)
    with pytest.raises(ValueError, match=r"1 of 5 rows hold no conversation(.|\n)*1 x no column messages"):
        run(config)
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_fraction": 0.5})})
    result = run(lenient)
    answered = read_rows(result.folder / "conversations-00000.jsonl")
    assert sorted({row["row"] for row in answered}) == [0, 1, 2, 4]


KILLED_AT_ITS_START = """
import os, signal, sys
from pathlib import Path
from stages.regenerate import publish
from stages.regeneration_record import parse_manifest
publish.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
publish.prepare_folder(folder, parse_manifest(Path(sys.argv[2]).read_bytes(), where=""))
"""


def test_a_folder_of_a_run_that_was_killed_at_its_start_is_taken(undisturbed: Config, tmp_path: Path) -> None:
    assert undisturbed.regenerate.path is not None
    manifest = undisturbed.regenerate.path / "regeneration.json"
    command = [sys.executable, "-c", KILLED_AT_ITS_START, str(tmp_path / "out"), str(manifest)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    left = [file.name for file in (tmp_path / "out").iterdir() if file.is_file()]
    assert len(left) == 1
    assert left[0].endswith("-regeneration.json")
    assert run(with_path(undisturbed, tmp_path / "out")).num_open == 0
    assert read_outputs(tmp_path / "out") == read_outputs(undisturbed.regenerate.path)


def test_a_stop_keeps_what_is_finished_in_the_batch(undisturbed: Config, tmp_path: Path) -> None:
    """One batch of all rows, stopped in the middle of an answer; the rest has the bytes of an undisturbed run."""
    whole = make_run(tmp_path / "whole", num_chats=12, batch_size=12, max_tokens=40)
    run(whole)
    config = with_path(whole, tmp_path / "out")
    asked: list[int] = []

    def is_stopped() -> bool:
        asked.append(1)
        return len(asked) > 45  # once before the batch, then once a token

    stopped = run(config, is_stopped=is_stopped)
    assert 0 < stopped.num_recorded < 12
    result = run(config)
    assert result.num_recorded == 12 - stopped.num_recorded
    assert read_outputs(tmp_path / "out") == read_outputs(tmp_path / "whole" / "out")


def test_a_line_of_progress_within_a_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "PROGRESS_SECONDS", 0.0)
    caplog.set_level("INFO")
    run(make_run(tmp_path, num_chats=4, batch_size=4, max_tokens=8))
    lines = [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()]
    tokens = [int(line.split(" tokens ")[0].split()[-1]) for line in lines]
    cut = [int(line.split("cut")[1].split()[0]) for line in lines]
    assert tokens[:7] == [4 * step for step in range(1, 8)], "four rows, a line each token"
    assert "ETA unknown" in lines[0]
    assert re.search(r"ETA \d\d:\d\d:\d\d", lines[-1])
    assert tokens == sorted(tokens)
    assert cut == sorted(cut)
    assert cut[-1] == json.loads((tmp_path / "out" / "regeneration.json").read_text())["counts"]["num_unfinished"] > 0


def start(config: Config, folder: Path) -> subprocess.Popen[str]:
    file = folder / "config.toml"
    file.write_text(to_toml(config))
    command = [sys.executable, "-m", "pipeline.cli", "regenerate", str(file), "--local"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def await_lines(log: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_terminated_run_gives_up_its_batch_and_goes_on_to_the_undisturbed_bytes(tmp_path: Path) -> None:
    config = make_run(tmp_path, num_chats=60, max_tokens=30)
    log = tmp_path / "out" / "work" / "outcomes.log"
    process = start(config, tmp_path)
    await_lines(log, 5, process)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "SIGTERM: answers on their way" in errors
    num_kept = log.read_bytes().count(b"\n")
    assert 5 <= num_kept < 60
    assert f"stopped: {num_kept} rows done by this run, {60 - num_kept} open; run the same command" in output
    assert not list((tmp_path / "out").glob("conversations*"))
    assert run(config).num_recorded == 60 - num_kept
    whole = with_path(config, tmp_path / "whole")
    run(whole)
    assert read_outputs(tmp_path / "out") == read_outputs(tmp_path / "whole")


def test_extraction_reads_the_answers_and_says_what_made_them(
    undisturbed: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert undisturbed.regenerate.path is not None
    data = undisturbed.data.model_copy(
        update={"files": (f"{undisturbed.regenerate.path}/*.jsonl",), "min_supervised_tokens": 2}
    )
    cache = undisturbed.cache.model_copy(update={"path": tmp_path / "cache"})
    config = undisturbed.model_copy(update={"data": data, "cache": cache})
    result = extract(settings_of(config))
    said = result.plan.header.provenance["regeneration"]
    assert said.startswith("1 of 1 files: [{")
    assert '"temperature": 1.0' in said
    assert '"backend": "local"' in said
    assert result.plan.manifest.plan.num_samples == len(read_rows(undisturbed.regenerate.path / CONVERSATIONS))
    assert "not made by this target" not in caplog.text
    other = save_tiny_target(tmp_path / "other", seed=1)
    target = config.target.model_copy(update={"model": str(other)})
    cache = cache.model_copy(update={"path": tmp_path / "cache-of-another"})
    extract(settings_of(config.model_copy(update={"target": target, "cache": cache})))
    assert "not made by this target as it is configured here: target_weights_digest differ" in caplog.text


def test_a_warning_where_only_last_turns_are_the_targets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_run(tmp_path, num_chats=4, turns="last")
    result = run(config)
    files = (str(result.folder / "conversations-00000.jsonl"),)
    rows = [row["messages"] for row in read_rows(Path(files[0]))]
    recorded = [chat["messages"] for chat in make_chats(4)]
    assert [chat[:-1] for chat in rows] == [chat[:-1] for chat in recorded]
    assert all(new[-1] != old[-1] for new, old in zip(rows, recorded, strict=True))
    data = config.data.model_copy(update={"files": files, "min_supervised_tokens": 2})
    extract(settings_of(config.model_copy(update={"data": data})))
    assert "supervise" not in caplog.text, "the rows' own masks cover the answers alone"
    text = result.manifest.model_copy(update={"counts": result.manifest.counts.model_copy(update={"num_text": 4})})
    write_manifest(result.folder, text)
    cache = config.cache.model_copy(update={"path": tmp_path / "cache-of-text"})
    extract(settings_of(config.model_copy(update={"data": data, "cache": cache})))
    assert "set data.supervise = last" in caplog.text


def test_thinking_switches_reach_the_template(tiny: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking is false %}</think>{% endif %}"
    plain, off = (PromptRenderer(tokenizer, variables=extra) for extra in ({}, {"enable_thinking": False}))
    messages = [{"role": "user", "content": "why"}]
    assert off(messages, tools=None) == plain(messages, tools=None) + tokenizer("</think>")["input_ids"]


def test_a_hostile_template_ends_the_run_and_the_estimate(tmp_path: Path) -> None:
    config = make_run(tmp_path, num_chats=9)
    template = tmp_path / "t.jinja"
    template.write_text("{{ 'a'.ljust(10 ** 10) }}")
    config = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": template})})
    for ask in (run, price_regeneration):
        with pytest.raises(RegenerationError, match=r"chat template takes too much memory .* 8 conversations in a row"):
            ask(config)
