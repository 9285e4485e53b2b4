"""Chats and texts to token ids and loss mask, by the target's own tokenizer and chat template."""

from functools import cached_property
from typing import Any

import numpy as np

from stages.chat_template import ChatTemplate, ChatTemplateError
from stages.extract.align import AlignedText, Aligner
from stages.extract.conversations import Chat, Text, Tokens
from stages.extract.marks import NoMarksError
from stages.extract.rows import BadRowError, DataError
from stages.extract.shown import check_all_shown, check_answer, check_no_end
from stages.extract.tools_and_thinking import show_to_template
from stages.extract.turns import RenderedChat, Span, TurnFinder, spans_of_markers


class SampleTokenizer:
    """Token ids and loss mask of one row.

    The mask covers what the target itself would have to generate: every assistant turn, or the last one, its
    end-of-turn token included. A template with `{% generation %}` markers says so itself; for any other, the spans are
    found by rendering the conversation, and what asks for each turn. A turn that is to be supervised and is not found,
    or not shown whole, makes the row a bad one.
    """

    def __init__(self, tokenizer: Any, *, supervise: str, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._eos_token_ids = eos_token_ids | ({tokenizer.eos_token_id} - {None})
        if not tokenizer.is_fast:
            raise DataError("the target's tokenizer has no fast version, so loss masks cannot be aligned; provide one")
        self._template = ChatTemplate(tokenizer)
        self._align = Aligner(tokenizer)
        self._eos_texts = tuple(tokenizer.decode([token]) for token in sorted(self._eos_token_ids))
        self._added = [added.content for added in tokenizer.added_tokens_decoder.values()]
        self._finder = TurnFinder(eos_texts=self._eos_texts, added_tokens=self._added)

    def __call__(self, row: Chat | Text | Tokens) -> Tokens:
        """`input_ids` [T] int32 and `loss_mask` [T] uint8. Raises BadRowError."""
        if isinstance(row, Tokens):
            return self._check_ids(row)
        if isinstance(row, Text):
            return self._tokenize_text(row)
        try:
            return self._tokenize_chat(row)
        except ChatTemplateError as error:
            raise BadRowError(f"chat template: {error}") from error
        except NoMarksError as error:
            raise BadRowError(str(error)) from error

    def _check_ids(self, row: Tokens) -> Tokens:
        highest = int(row.input_ids.max())
        if highest >= len(self._tokenizer):
            raise BadRowError(f"token id outside the target's vocabulary of {len(self._tokenizer)}")
        return row

    def _tokenize_text(self, row: Text) -> Tokens:
        """The text between the tokenizer's own special tokens, where it does not have them already."""
        ids = [int(token) for token in self._tokenizer(row.text, add_special_tokens=False)["input_ids"]]
        prefix, suffix = self._special_tokens
        bare = row.text.strip()
        stripped = ids if bare == row.text else list(self._tokenizer(bare, add_special_tokens=False)["input_ids"])
        if all(token in (*prefix, *suffix) for token in stripped):
            raise BadRowError("text of nothing but special tokens and white space")
        if prefix and ids[:1] != prefix[:1] == stripped[:1]:
            raise BadRowError("text with white space before the special token that begins it; remove the white space")
        begins, ends = ids[:1] == prefix[:1], ids[-1:] == suffix[-1:]
        whole = np.asarray([*prefix * (not begins), *ids, *suffix * (not ends)], dtype=np.int32)
        return Tokens(input_ids=whole, loss_mask=np.ones(len(whole), dtype=np.uint8))

    @cached_property
    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer("a")["input_ids"]
        places = range(len(whole) - len(bare) + 1)
        start = next((place for place in places if whole[place : place + len(bare)] == bare), 0)
        return whole[:start], whole[start + len(bare) :]

    def _tokenize_chat(self, row: Chat) -> Tokens:
        turns = self._choose_turns(row)
        try:
            row = show_to_template(row, self._render)
            rendered = self._template.open_row(row.messages, tools=row.tools)
        except (ChatTemplateError, BadRowError):
            raise
        except ValueError as error:
            raise DataError(
                "the rows are chats, but the tokenizer has no chat template, or none named default; "
                "name a Jinja file in data.chat_template"
            ) from error
        chat = RenderedChat(rendered)
        check_no_end(chat.messages, turns, eos_texts=[eos for eos in self._eos_texts if eos in self._added])
        if (0, len(chat.text)) in chat.generated:
            raise BadRowError("loss mask all one: the template marks the whole chat as generated")
        spans = self._find_spans(chat, turns, is_marked=rendered.marks_generation)
        tokens = self._mask(chat, spans)
        last_question = max((i for i, message in enumerate(chat.messages) if message["role"] == "user"), default=-1)
        whole = {index: (spans[index][0][0], spans[index][-1][1]) for index in turns}
        for index, (start, end) in whole.items():
            check_answer(chat.messages, index, chat.text[start:end], is_past=index < last_question)
        check_all_shown(chat, whole)
        return tokens

    def _find_spans(self, chat: RenderedChat, turns: list[int], *, is_marked: bool) -> dict[int, list[Span]]:
        if is_marked:
            return spans_of_markers(chat, turns, eos_texts=self._eos_texts)
        return self._finder.find(chat, turns)

    def _render(self, row: Chat) -> str:
        rendered = self._template.open_row(row.messages, tools=row.tools)
        return rendered.render(rendered.messages)

    def _choose_turns(self, row: Chat) -> list[int]:
        """Indexes of the messages that are to be supervised."""
        turns = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
        if self._supervise == "last":
            turns = turns[-1:]
        chosen = [index for index in turns if index not in row.unsupervised]
        if not chosen:
            raise BadRowError("the row itself leaves every turn that would be supervised out")
        return chosen

    def _mask(self, chat: RenderedChat, spans: dict[int, list[Span]]) -> Tokens:
        try:
            chat.text.encode()  # what tokenizers say of a surrogate differs between releases
        except UnicodeEncodeError as error:
            raise BadRowError("chat template: the text has an unpaired surrogate") from error
        aligned = self._align(chat.text, spans=[span for places in spans.values() for span in places])
        mask = np.zeros(len(aligned.ids), dtype=np.uint8)
        counts = dict.fromkeys(spans, 0)
        for index, places in spans.items():
            found = [self._find_tokens(aligned, span) for span in places]
            tokens = np.unique(np.concatenate([np.arange(first, last) for first, last in found]))
            mask[tokens] = 1
            ids = aligned.ids[tokens]
            counts[index] = len(ids)
            if np.isin(ids[:-1], list(self._eos_token_ids)).any():
                raise BadRowError(f"an end-of-turn token in the midst of an assistant turn (message {index})")
        if not mask.any():
            raise BadRowError("loss mask all zero: no assistant token found")
        if mask.all():
            raise BadRowError("loss mask all one: the template marks the whole chat as generated")
        if empty := [index for index, count in counts.items() if not count]:
            raise BadRowError(f"chat template: no token of an assistant turn was found (message {empty[0]})")
        return Tokens(input_ids=aligned.ids, loss_mask=mask)

    def _find_tokens(self, aligned: AlignedText, span: Span) -> tuple[int, int]:
        """The tokens of a span, and the end-of-turn token where it stands right behind the span and not in it."""
        first, last = aligned.find(span)
        ids, eos = aligned.ids, self._eos_token_ids
        has_end = last > first and int(ids[last - 1]) in eos
        return first, last + (not has_end and last < len(ids) and int(ids[last]) in eos)
