"""Which token of the target a draft will read as a slot to fill: rows that contain it are bad."""

import logging
import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from stages.extract.model_files import TargetError

_MASK_LIKE = re.compile(r"[^a-z]+mask([_ -]?token)?[^a-z]+", re.IGNORECASE)  # <mask>, <|mask|>, [MASK], <mask_token>

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MaskToken:
    """`token_id`, if it is known before any row is read; else special tokens by id, of which an unused one will do."""

    token_id: int | None
    candidates: dict[int, str]

    def choose(self, unseen: AbstractSet[int]) -> int | None:
        """The id, once it is known which candidates no sample contains; None where all of them occur."""
        if self.token_id is not None:
            return self.token_id
        chosen = min(unseen & self.candidates.keys(), default=None)
        if chosen is None:
            logger.warning(
                "the tokenizer has no mask token, uses every id, and conversations contain each of its special tokens: "
                "to train on this cache, name an id that none of them contains in draft.mask_token_id"
            )
        else:
            logger.warning(
                "the tokenizer has no mask token and uses every id; drafts will read %s (id %d), which no conversation "
                "contains, as a slot to fill; draft.mask_token_id names another",
                self.candidates[chosen], chosen,
            )  # fmt: skip
        return chosen


def find_mask_token(
    tokenizer: Any, *, vocab_size: int, wanted: int | None, eos_token_ids: AbstractSet[int] = frozenset()
) -> MaskToken:
    """The configured token; else the tokenizer's own; else an added token that looks like one (`<|mask|>`); else the
    first id that the embedding has and the tokenizer does not use; else candidates among the special tokens.

    Raises TargetError for a configured id that the embedding does not have.
    """
    if wanted is not None and not 0 <= wanted < vocab_size:
        raise TargetError(f"draft.mask_token_id: expected 0 to {vocab_size - 1}, got {wanted}")
    added = {token: str(entry) for token, entry in sorted(tokenizer.added_tokens_decoder.items())}
    like = (token for token, text in added.items() if _MASK_LIKE.fullmatch(text))
    used = set(tokenizer.get_vocab().values())
    free = (token for token in range(vocab_size) if token not in used)
    known = (token for token in (wanted, tokenizer.mask_token_id, *like) if token is not None and token < vocab_size)
    token_id = next(known, None)
    if token_id is None:
        token_id = next(free, None)
    special = {*tokenizer.all_special_ids, *(t for t, entry in tokenizer.added_tokens_decoder.items() if entry.special)}
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    spare = sorted(token for token in special - taken - eos_token_ids if token < vocab_size)
    names = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in spare}
    return MaskToken(token_id=token_id, candidates=names if token_id is None else {})
