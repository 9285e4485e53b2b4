"""The embedded default is what the README says: small, trained, on-policy, and rebuilt by the scripts beside it."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from pipeline.config import load_config
from pipeline.embedded import CONVERSATIONS_FILE, TARGET_DIR
from pipeline.embedded.corpus import MAX_ANSWER_CHARS, conversations, read_pairs
from pipeline.embedded.train_target import CHAT_TEMPLATE, VOCAB_SIZE, build_target, pack_windows
from pipeline.stage_one import settings_of
from pipeline.stage_two import evaluate_draft, train_draft
from stages.extract.mask_token import find_mask_token
from stages.extract.run import extract

ROOT = Path(__file__).parent.parent


def read_conversations() -> list[list[dict[str, str]]]:
    with gzip.open(CONVERSATIONS_FILE, "rt", encoding="utf-8") as stream:
        return [json.loads(line)["messages"] for line in stream]


def test_everything_shipped_stays_below_ten_megabytes() -> None:
    files = [CONVERSATIONS_FILE, *TARGET_DIR.iterdir()]
    assert sum(file.stat().st_size for file in files) < 10_000_000


def test_the_target_is_trained_and_the_conversations_are_its_own() -> None:
    """Over its own answers the target's mean negative log-likelihood is its entropy: far below a uniform guess."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    model = AutoModelForCausalLM.from_pretrained(TARGET_DIR, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for chat in read_conversations()[:40]:
        encoded = tokenizer.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"].bool()
        with torch.inference_mode():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(1, ids[0, 1:, None])[:, 0][mask[0, 1:]]
        total, count = total - float(picked.sum()), count + len(picked)
    assert 0.2 < total / count < 2.5, "nats a token; a uniform guess has 8.3"


def test_the_conversations_are_a_few_thousand_chats_of_one_and_two_rounds() -> None:
    chats = read_conversations()
    assert len(chats) > 2000
    assert {len(chat) for chat in chats} == {2, 4}
    assert all(message["content"] for chat in chats for message in chat)


def test_the_mask_token_is_the_first_unused_id() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    assert tokenizer.mask_token_id is None
    found = find_mask_token(tokenizer, vocab_size=VOCAB_SIZE, wanted=None)
    assert found.token_id == len(tokenizer) == 4080
    full = find_mask_token(tokenizer, vocab_size=4080, wanted=None)
    assert (full.token_id, full.candidates) == (None, {1: tokenizer.convert_ids_to_tokens(1)})


def test_the_shipped_files_are_those_that_the_scripts_make() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET_DIR)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    shipped, built = Qwen3Config.from_pretrained(TARGET_DIR), build_target(tokenizer).config
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_parameters"):
        assert getattr(shipped, field) == getattr(built, field), field


def test_the_corpus_is_a_function_of_the_interpreter() -> None:
    pairs = read_pairs()
    assert pairs == read_pairs()
    assert len(pairs) > 10_000
    assert any(pair.name == "textwrap.dedent" and "common leading whitespace" in pair.answer for pair in pairs)
    assert max(len(pair.answer) for pair in pairs) < MAX_ANSWER_CHARS + 100
    chats = conversations(pairs)
    assert sum(len(chat) for chat in chats) == 2 * len(pairs)
    windows = pack_windows([[1, 2, 3]] * 1000, generator=torch.Generator().manual_seed(0))
    assert windows.shape == (5, 512)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two where nothing else runs
def test_a_draft_of_the_embedded_target_learns(tmp_path: Path) -> None:
    """A short version of `make train`, on a part of the conversations and with half the anchors."""
    part = tmp_path / "part.jsonl"
    part.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in read_conversations()[:400]))
    overrides = [f"data.files=['{part}']", f"cache.path='{tmp_path}/cache'", f"train.run_dir='{tmp_path}/run'"]
    overrides += ["draft.num_anchors=24", "train.max_steps=120"]
    config = load_config(ROOT / "configs" / "embedded.toml", overrides)
    extract(settings_of(config))
    evaluation = evaluate_draft(config, draft_dir=train_draft(config).draft_dir)
    assert evaluation.tau_low > 1.15, "an untrained draft has 1.0, one that knows only how often tokens are 1.1"
    assert evaluation.accept_rate_per_pos[0] > 0.15
