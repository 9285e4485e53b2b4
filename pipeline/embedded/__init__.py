"""The embedded default: a small real target, its tokenizer and its own conversations.

`target/` and `conversations.jsonl.gz` are shipped; the modules beside them made them, in this order:

    python -m pipeline.embedded.train_target      corpus -> tokenizer and weights   (about 45 minutes on 2 cores)
    python -m pipeline.embedded.answer_questions  target -> conversations           (about 5 minutes on 2 cores)
"""

from pathlib import Path

EMBEDDED = "embedded"  # what a config writes for `target.model` and in `data.files`

TARGET_DIR = Path(__file__).parent / "target"
CONVERSATIONS_FILE = Path(__file__).parent / "conversations.jsonl.gz"
