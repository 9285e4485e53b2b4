"""Which prompt a row answers, as a short hash: by it rows are held out, equal prompts on one side of the split."""

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BYTES = 8
COLUMN = "dspark_prompt"
"""Of regenerated rows, in hexadecimal: all rows of one conversation have its first prompt's."""


def hash_prompt(input_ids: np.ndarray | Sequence[int]) -> bytes:
    """Of the prompt's token ids [T]."""
    return hashlib.blake2b(np.asarray(input_ids, dtype="<i4").tobytes(), digest_size=HASH_BYTES).digest()
