"""Chats and texts to token ids and loss mask, by the target's own tokenizer and chat template."""

import re
from typing import Any

import numpy as np

from stages.extract.conversations import Chat, Text, Tokens
from stages.extract.rows import BadRowError, DataError
from stages.extract.shown import show_all

THINKING_END = "</think>"
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class SampleTokenizer:
    """Token ids and loss mask of one row.

    The mask covers what the target itself would have to generate: every assistant turn, or the last one, its
    end-of-turn token included. A template with `{% generation %}` markers says so itself; for any other, the spans are
    found by rendering the conversation up to each turn and comparing texts.
    """

    def __init__(self, tokenizer: Any, *, supervise: str, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._eos_token_ids = eos_token_ids | ({tokenizer.eos_token_id} - {None})
        if not tokenizer.is_fast:
            raise DataError("the target's tokenizer has no fast version, so loss masks cannot be aligned; provide one")
        self._eos_texts = tuple(tokenizer.decode([token]) for token in sorted(self._eos_token_ids))

    def __call__(self, row: Chat | Text | Tokens) -> Tokens:
        """`input_ids` [T] int32 and `loss_mask` [T] uint8. Raises BadRowError."""
        if isinstance(row, Tokens):
            return self._check_ids(row)
        if isinstance(row, Text):
            ids = np.asarray(self._tokenizer(row.text)["input_ids"], dtype=np.int32)
            return Tokens(input_ids=ids, loss_mask=np.ones(len(ids), dtype=np.uint8))
        row = show_all(row, lambda chat: self._render(chat.messages, chat, tokenize=False), supervise=self._supervise)
        self._check_tool_calls(row)
        has_markers = _GENERATION_MARKER.search(self._template(row))
        tokens = self._mask_by_markers(row) if has_markers else self._mask_by_offsets(row)
        if not tokens.loss_mask.any():
            raise BadRowError("loss mask all zero: no assistant token found")
        if tokens.loss_mask.all():
            raise BadRowError("loss mask all one: the template marks the whole chat as generated")
        return tokens

    def _check_ids(self, row: Tokens) -> Tokens:
        highest = int(row.input_ids.max())
        if highest >= len(self._tokenizer):
            raise BadRowError(f"token id outside the target's vocabulary of {len(self._tokenizer)}")
        return row

    def _check_tool_calls(self, row: Chat) -> None:
        """A template that ignores tool calls would teach the draft to answer nothing instead."""
        lists = [message.get("tool_calls") or [] for message in row.messages]
        if not all(isinstance(calls, list) for calls in lists):
            raise BadRowError("tool_calls that are no list")
        calls = [call for calls in lists for call in calls]
        results = [message["content"].strip() for message in row.messages if message["role"] == "tool"]
        if calls or results:
            text = self._render(row.messages, row, tokenize=False)
            functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
            names = [function.get("name") for function in functions if isinstance(function, dict)]
            if len(names) < len(calls) or not all(isinstance(name, str) and name in text for name in names):
                raise BadRowError("tool calls that the chat template does not render")
            if not all(_is_rendered(result, text) for result in results):
                raise BadRowError("tool results that the chat template does not render")

    def _template(self, row: Chat) -> str:
        """The template's text; a tokenizer may have one more for rows with tools."""
        try:
            return str(self._tokenizer.get_chat_template(tools=row.tools))
        except ValueError as error:
            raise DataError(
                "the rows are chats, but the tokenizer has no chat template, or none named default; "
                "name a Jinja file in data.chat_template"
            ) from error

    def _render(self, messages: list[dict[str, Any]], row: Chat, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, tools=row.tools, **options)
        except Exception as error:  # a template is a program: it can raise anything
            raise BadRowError(f"chat template: {_first_line(error)}") from error

    def _mask_by_markers(self, row: Chat) -> Tokens:
        encoded = self._render(row.messages, row, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        mask = np.asarray(encoded["assistant_masks"], dtype=np.uint8)
        edges = np.flatnonzero(np.diff(mask, prepend=0, append=0).astype(np.int8))
        spans = [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
        spans = [(start, self._include_eos(ids, end)) for start, end in spans]
        return Tokens(input_ids=ids, loss_mask=self._mask_of_spans(spans, num_tokens=len(ids)))

    def _mask_by_offsets(self, row: Chat) -> Tokens:
        text = self._render(row.messages, row, tokenize=False)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRowError("chat template: the text has an unpaired surrogate") from error
        spans = self._find_spans(row, text)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        token_spans = []
        for start, end in spans:
            inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0]))
            if len(inside):
                token_spans.append((int(inside[0]), self._include_eos(ids, int(inside[-1]) + 1)))
        return Tokens(input_ids=ids, loss_mask=self._mask_of_spans(token_spans, num_tokens=len(ids)))

    def _find_spans(self, row: Chat, text: str) -> list[tuple[int, int]]:
        """Character spans of the assistant turns in the rendered chat, end-of-turn token included."""
        spans = []
        for index, message in enumerate(row.messages):
            if message["role"] == "assistant":
                start = self._find_start(row, index, text)
                spans.append((start, self._find_end(row, index, text, start)))
        return spans

    def _find_start(self, row: Chat, index: int, text: str) -> int:
        """Where the answer of turn `index` begins: behind what the template writes to ask for it."""
        content = row.messages[index]["content"].strip()
        if index == 0:
            header = self._header(row)
            found = text.find(header) if header else -1
            if found < 0:
                raise BadRowError("chat template: the beginning of a leading assistant turn was not found")
            return found + len(header)
        before = row.messages[:index]
        opened = self._render(before, row, tokenize=False, add_generation_prompt=True)
        closed = self._render(before, row, tokenize=False)
        start, floor = _common_prefix(opened, text), len(closed.rstrip())
        if start < floor:
            raise BadRowError("chat template rewrites earlier turns; it needs {% generation %} markers")
        if opened == closed and not text[start:].lstrip().startswith(content):
            raise BadRowError("chat template has no generation prompt; it needs {% generation %} markers")
        if start == len(opened):
            return start
        # The prompt goes on where the text does not: it opens a thinking block, or the header itself differs. The
        # answer may share its first letters with what the prompt goes on with, and be shown without its thinking.
        if not opened[floor:start].strip():
            raise BadRowError("chat template: the beginning of an assistant turn was not found")
        shown = tuple({content, content.split(THINKING_END)[-1].strip()} - {""})
        return next((place for place in range(start, floor - 1, -1) if text.startswith(shown, place)), start)

    def _find_end(self, row: Chat, index: int, text: str, start: int) -> int:
        """Where the turn ends: behind the last end-of-turn token before the next message's content."""
        bound, is_next_inside = len(text), False
        if index + 1 < len(row.messages):
            upto = self._render(row.messages[: index + 1], row, tokenize=False)
            if text.startswith(upto):
                bound = len(upto)
            else:  # the template renders a turn otherwise once it is no longer the last, as Qwen3 does with thinking
                bound, is_next_inside = self._find_next_content(row, index, text), True
        region = text[start:bound]
        ends = [region.rfind(eos) + len(eos) for eos in self._eos_texts if eos in region]
        if ends:
            content = row.messages[index]["content"].rstrip()
            if content.endswith(self._eos_texts):
                raise BadRowError("an answer ends in the text of an end-of-turn token")
            return start + self._first_of_run(region, max(ends))
        if is_next_inside:
            raise BadRowError("chat template: the end of an assistant turn was not found; it has no end-of-turn token")
        return start + len(region.rstrip())

    def _first_of_run(self, region: str, end: int) -> int:
        """The end of the first of the end-of-turn tokens that stand side by side up to `end`.

        A template may close the turn, and then the whole chat.
        """
        last = next(eos for eos in self._eos_texts if region.endswith(eos, 0, end))
        head = region[: end - len(last)].rstrip()
        return self._first_of_run(region, len(head)) if head.endswith(self._eos_texts) else end

    def _find_next_content(self, row: Chat, index: int, text: str) -> int:
        """Where the content of the message after turn `index` begins, told by rendering another in its place."""
        following = row.messages[index + 1]
        content = following["content"].lstrip()
        other = {**following, "content": "b" if content.startswith("a") else "a"}
        bound = _common_prefix(self._render([*row.messages[: index + 1], other], row, tokenize=False), text)
        if bound >= len(text):
            raise BadRowError("chat template: the end of an assistant turn was not found")
        return bound

    def _header(self, row: Chat) -> str:
        """What the template writes before an answer, for example `<|im_start|>assistant\\n`."""
        question = [{"role": "user", "content": "a"}]
        opened = self._render(question, row, tokenize=False, add_generation_prompt=True)
        closed = self._render(question, row, tokenize=False)
        return str(opened[len(closed) :]) if opened.startswith(closed) else ""

    def _include_eos(self, ids: np.ndarray, end: int) -> int:
        """`end`, or one more where the end-of-turn token stands right behind the span and not already in it."""
        eos = self._eos_token_ids
        is_behind = end < len(ids) and int(ids[end]) in eos and int(ids[end - 1]) not in eos
        return end + 1 if is_behind else end

    def _mask_of_spans(self, spans: list[tuple[int, int]], *, num_tokens: int) -> np.ndarray:
        mask = np.zeros(num_tokens, dtype=np.uint8)
        for start, end in spans[-1:] if self._supervise == "last" else spans:
            mask[start:end] = 1
        return mask


def _is_rendered(content: str, text: str) -> bool:
    """Whether the chat shows the content; templates may quote it as JSON, so its words are enough."""
    return all(word in text for word in re.findall(r"\w+", content))


def _common_prefix(left: str, right: str) -> int:
    """Number of characters that both texts begin with."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
