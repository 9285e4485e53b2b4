"""Texts to token ids, and spans of their characters to spans of tokens."""

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import processors

from stages.extract.rows import BadRowError

TRIMS = b'"trim_offsets":true'
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class AlignedText:
    """A text's token ids [T] int32, and the characters from `starts` [T] to `ends` [T] that each token stands for.

    Tokens may share a character, where it takes several of them; characters that the tokenizer drops have none.
    """

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def find(self, span: Span) -> Span:
        """The tokens of a character span.

        A token that crosses an edge belongs to the side of which it holds more than white space, and to the span where
        that is neither. Raises BadRowError where it is both.
        """
        start, end = span
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, end, side="left"))
        while first < last and not self._is_own(first, start, end):
            first += 1
        while first < last and not self._is_own(last - 1, start, end):
            last -= 1
        return first, max(first, last)

    def _is_own(self, token: int, start: int, end: int) -> bool:
        left, right = int(self.starts[token]), int(self.ends[token])
        foreign = self.text[left:start] + self.text[max(end, left) : right]
        if not foreign.strip():
            return True
        if self.text[max(left, start) : min(right, end)].strip():
            merged = self.text[left:right]
            raise BadRowError(f"the tokenizer merges text of a turn and of what stands beside it ({merged!r})")
        return False

    def crossed(self, spans: list[Span], *, added: frozenset[int]) -> list[int]:
        """Edges of spans inside a token, but not ends where one of the `added` tokens swallows white space after it."""
        places = []
        for start, end in spans:
            first = int(np.searchsorted(self.ends, start, side="right"))
            last = int(np.searchsorted(self.starts, end, side="left")) - 1
            if first < len(self.starts) and self.starts[first] < start:
                places.append(start)
            rest = self.text[end : self.ends[last]] if last >= 0 else ""
            if rest.strip() or (rest and int(self.ids[last]) not in added):
                places.append(end)
        return places


class Aligner:
    """Tokenises texts whole, without special tokens of its own."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = _without_trimming(tokenizer)
        added = sorted(tokenizer.added_tokens_decoder.items())
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._separators = [
            (token_id, token.content)
            for token_id, token in added
            if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        ]

    def __call__(self, text: str, *, spans: list[Span]) -> AlignedText:
        """The text's tokens, of which none holds text of a span and of what stands beside it, if that can be had.

        Where the whole text has such a token, also one of white space alone, the text is cut there, as it is when a
        target is asked: it gets its prompt as tokens and goes on with tokens of its own.
        Raises BadRowError where the tokens' places are not in order.
        """
        whole = self._encode(text)
        crossed = whole.crossed(spans, added=self._added)
        if crossed and self._separators:
            cut = self._encode_in_parts(text, crossed)
            if self._adds_nothing(cut):
                return cut
        return whole

    def _encode(self, text: str) -> AlignedText:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        if (offsets[1:] < offsets[:-1]).any():
            raise BadRowError("the tokenizer does not say in order where its tokens are")
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        return AlignedText(text=text, ids=ids, starts=offsets[:, 0].copy(), ends=offsets[:, 1].copy())

    def _encode_in_parts(self, text: str, places: list[int]) -> AlignedText:
        """As if a special token, which nothing merges with, stood at each of the places."""
        token_id, separator = self._separators[0]
        edges = [0, *sorted(set(places)), len(text)]
        joined = self._encode(separator.join(text[a:b] for a, b in pairwise(edges)))
        put = np.asarray(edges[1:-1]) + len(separator) * np.arange(len(edges) - 2)
        keep = ~(np.isin(joined.starts, put) & (joined.ids == token_id))
        starts, ends = joined.starts[keep], joined.ends[keep]
        shift = len(separator) * np.searchsorted(put, starts, side="right")
        return AlignedText(text=text, ids=joined.ids[keep], starts=starts - shift, ends=ends - shift)

    def _adds_nothing(self, cut: AlignedText) -> bool:
        """Whether the tokens are the text's: some tokenizers begin each part with a space of their own."""
        decoded = self._tokenizer.decode(cut.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return len(decoded) <= len(cut.text) and "".join(decoded.split()) == "".join(cut.text.split())


def _without_trimming(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that does not cut white space from what it says about the places of its tokens.

    That is done by the post-processor, which adds nothing else where no special tokens are asked for.
    """
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None or TRIMS not in processor.__getstate__():
        return tokenizer
    whole = copy.deepcopy(tokenizer)
    whole.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return whole
