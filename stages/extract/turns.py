"""Where the assistant turns of a rendered chat are: from what asks for them to the token that ends them.

Everything is decided on the whole chat, since a template may show a turn otherwise once others follow: it cuts
thinking, moves the system prompt, ends the last answer with another token. Marks in the messages say where each of them
has gone; what the template writes to ask for a turn, after the message before it, is looked for after that message.
"""

import re
from bisect import bisect_left

from stages.chat_template import ChatRow
from stages.extract.marks import Marks, Message, Reading
from stages.extract.rows import BadRowError

Span = tuple[int, int]


class RenderedChat:
    """A chat as text, and what its parts look like when they are rendered alone."""

    def __init__(self, row: ChatRow) -> None:
        self.messages = row.messages
        self.text = row.render(row.messages)
        self._row = row
        self._marks = Marks(row.messages, taken=row.seen + self.text)
        self._reading = self._marks.settle(self._render_marked, text=self.text)
        self._renders: dict[tuple[int, bool], str] = {}

    def render(self, messages: list[Message]) -> str:
        """Other messages in the row's place."""
        return self._row.render(messages)

    def free_mark(self, number: int) -> str:
        """A character that the chat does not have. Raises NoMarksError where there are not so many."""
        return self._marks.free_character(number)

    @property
    def free_marks(self) -> re.Pattern[str]:
        """One of the characters that the chat does not have, as a group."""
        return self._marks.pattern

    @property
    def generated(self) -> list[Span]:
        """Spans of the `{% generation %}` blocks, in their order."""
        return sorted(self._reading.generated)

    def after(self, index: int) -> int | None:
        """The place right after the marked letter of the message; None if it has none, or is not shown."""
        return self._reading.after.get(index)

    def place(self, anchor: int) -> int:
        """The place right after the marked letter of a message that is shown; -1: the beginning."""
        return 0 if anchor < 0 else self._reading.after[anchor]

    def begins_as(self, upto: int) -> bool:
        """Whether the chat begins as one of `upto` messages does."""
        return self.text.startswith(self._unmarked(self._render_upto(upto, ask=False)))

    def content_start(self, index: int) -> int | None:
        """Where the content begins, white space aside; None where that is not certain."""
        mark, after = self._marks.chosen[index], self.after(index)
        if mark is None or mark.offset is None or after is None:
            return None
        head = self.messages[index]["content"][: mark.offset].lstrip()
        end = after - len(mark.original)
        return end - len(head) if self.text.endswith(head, 0, end) else None

    def content_end(self, index: int) -> int | None:
        """Where what the mark shows of the message ends, white space aside: no less than `after`."""
        mark, after = self._marks.chosen[index], self.after(index)
        if mark is None or mark.offset is None or after is None:
            return after
        rest = self.messages[index]["content"][mark.offset + 1 :].rstrip()
        return after + len(rest) if self.text.startswith(rest, after) else after

    def anchor(self, upto: int, *, ask: bool) -> tuple[int, str]:
        """The last message before `upto` that is marked here and in a chat of `upto` messages, and what follows there.

        -1 and the whole text where there is none.
        """
        rendered = self._render_upto(upto, ask=ask)
        for index in range(upto - 1, -1, -1):
            place = rendered.rfind(self._marks.character(index))
            if place >= 0 and self.after(index) is not None:
                return index, self._unmarked(rendered[place + 1 :])
        return -1, self._unmarked(rendered)

    def tail(self, upto: int, *, ask: bool, anchor: int) -> str | None:
        """What follows the marked letter of message `anchor` in a chat of `upto` messages."""
        rendered = self._render_upto(upto, ask=ask)
        place = -1 if anchor < 0 else rendered.rfind(self._marks.character(anchor))
        return None if place < 0 <= anchor else self._unmarked(rendered[place + 1 :])

    def plain_header(self, index: int, *, anchor: int) -> str | None:
        """What stands between the marked letter of message `anchor` and the answer, if turn `index` were mere text."""
        mark = self._marks.character(index)
        messages = self._marks.messages()
        answer = {"role": "assistant", "content": mark}
        for following in (messages[index + 1 :], []):
            try:
                rendered = self._row.render([*messages[:index], answer, *following])
            except ValueError:  # a template may refuse a tool's result after an answer without calls
                continue
            end = rendered.rfind(mark)
            start = 0 if anchor < 0 else rendered.rfind(self._marks.character(anchor), 0, max(end, 0)) + 1
            if end >= 0 and (start or anchor < 0):
                return self._unmarked(rendered[start:end])
        return None

    def question_prompt(self) -> str:
        """What the template writes to ask for an answer to a first question, for example `<|im_start|>assistant\\n`."""
        question = [{"role": "user", "content": "a"}]
        try:
            opened, closed = self._row.render(question, ask=True), self._row.render(question)
        except ValueError:  # a template may want more than a question
            return ""
        return opened[common_prefix(opened, closed) :]

    def _render_marked(self, messages: list[Message]) -> str:
        return self._row.render(messages, generation_marks=self._marks.generation_marks)

    def _render_upto(self, upto: int, *, ask: bool) -> str:
        if (upto, ask) not in self._renders:
            self._renders = {key: text for key, text in self._renders.items() if key[0] == upto}
            self._renders[upto, ask] = self._row.render(self._marks.messages()[:upto], ask=ask)
        return self._renders[upto, ask]

    def _unmarked(self, rendered: str) -> str:
        reading = self._marks.read(rendered)
        assert isinstance(reading, Reading), "no generation marks were asked for"
        return reading.text


class TurnFinder:
    """Character spans of assistant turns, the token that ends each included where its text is known."""

    def __init__(self, *, eos_texts: tuple[str, ...], added_tokens: list[str]) -> None:
        self._eos_texts = eos_texts
        longest_first = sorted(filter(None, added_tokens), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def find(self, chat: RenderedChat, turns: list[int]) -> dict[int, list[Span]]:
        """The span of each turn, as a list of one. Raises BadRowError, ChatTemplateError."""
        spans: dict[int, list[Span]] = {}
        floor = 0
        for index in turns:
            start = self._find_start(chat, index) if index else self._find_leading_start(chat)
            end = self._find_end(chat, index, start)
            if not floor <= start <= end:
                raise BadRowError(f"chat template: message {index} was not found after the one before it")
            spans[index], floor = [(start, end)], end
        return spans

    def _find_start(self, chat: RenderedChat, index: int) -> int:
        """Where the answer begins: after what the template writes to ask for it."""
        anchor, opened = chat.anchor(index, ask=True)
        origin = chat.place(anchor)
        start = origin + common_prefix(opened, chat.text[origin : origin + len(opened)])
        is_whole = start == origin + len(opened)
        content = chat.content_start(index)
        if is_whole and content is not None and content >= start and not chat.text[start:content].strip():
            return start
        if chat.tail(index, ask=False, anchor=anchor) == opened:
            plain = chat.plain_header(index, anchor=anchor)
            if is_whole and plain is not None and plain.rstrip() == opened.rstrip():
                return start
            rewrites = "" if chat.begins_as(index) else " rewrites earlier turns and"
            raise BadRowError(f"chat template{rewrites} has no generation prompt; it needs {{% generation %}} markers")
        if is_whole:
            return start
        limit = start if content is None else min(start, content)
        return origin + self._find_partial_start(chat, index, anchor=anchor, opened=opened[: limit - origin])

    def _find_partial_start(self, chat: RenderedChat, index: int, *, anchor: int, opened: str) -> int:
        """Where the prompt goes on as the text does not: it opens a thinking block that this turn does not show.

        `opened`: what both share. The answer may begin with the letters that the prompt goes on with, so what stands
        before mere text decides.
        """
        plain = chat.plain_header(index, anchor=anchor) or ""
        closed = chat.tail(index, ask=False, anchor=anchor) or ""
        place, floor = common_prefix(opened, plain), common_prefix(opened, closed)
        between = plain[place:].strip()
        if not opened[floor:place].strip() or (between and "think" not in between):
            raise BadRowError(f"chat template: the beginning of an assistant turn was not found (message {index})")
        return place

    def _find_leading_start(self, chat: RenderedChat) -> int:
        """Where the answer of a turn begins that nobody asked for, by what asks for an answer elsewhere."""
        prompt = chat.question_prompt()
        plain = chat.plain_header(0, anchor=-1) or ""
        header = chat.text[: common_prefix(plain, chat.text)]
        if prompt.strip() and (found := header.rfind(prompt)) >= 0:
            return found + len(prompt)
        # The prompt opens a thinking block that this turn does not show.
        shown = next((cut for cut in range(len(prompt) - 1, 0, -1) if header.endswith(prompt[:cut])), 0)
        if header != plain or not prompt[:shown].strip() or "think" not in prompt[shown:]:
            raise BadRowError("chat template: the beginning of a leading assistant turn was not found")
        return len(header)

    def _find_end(self, chat: RenderedChat, index: int, start: int) -> int:
        """Where the turn ends: after the first end-of-turn token that follows what it says."""
        low = max(start, chat.content_end(index) or 0)
        bound = self._find_next(chat, index, low)
        ends = [(place, eos) for eos in self._eos_texts if (place := chat.text.find(eos, low, bound)) >= 0]
        if ends:
            place, eos = min(ends, key=lambda end: (end[0], -len(end[1])))
            return place + len(eos)
        if index + 1 == len(chat.messages):
            return max(start, len(chat.text.rstrip()))
        return self._find_end_without_eos(chat, index, low)

    def _find_next(self, chat: RenderedChat, index: int, low: int) -> int:
        """Where the next message says something that is certainly its own."""
        for following in range(index + 1, len(chat.messages)):
            after = chat.after(following)
            if after is not None and after > low:
                start = chat.content_start(following)
                return after if start is None or start < low else start
        return len(chat.text)

    def _find_end_without_eos(self, chat: RenderedChat, index: int, low: int) -> int:
        """The end of the turn by what it looks like as the last one of its chat, or the added token it ends in there.

        gpt-oss closes the last answer with an end-of-turn token, and every other one with `<|end|>`.
        """
        anchor, closed = chat.anchor(index + 1, ask=False)
        origin = chat.place(anchor)
        if chat.text.startswith(closed.rstrip(), origin):
            return max(low, origin + len(closed.rstrip()))
        here = self._added.match(chat.text, low)
        there = self._added.match(closed, low - origin) if low >= origin else None
        opened = chat.anchor(index + 1, ask=True)[1]
        prompt = self._added.search(opened, common_prefix(opened, closed))
        if here and there and (prompt is None or prompt.group() != here.group()):
            return here.end()
        raise BadRowError(
            f"chat template: the end of an assistant turn was not found (message {index}); it has no end-of-turn token"
        )


def spans_of_markers(chat: RenderedChat, turns: list[int], *, eos_texts: tuple[str, ...]) -> dict[int, list[Span]]:
    """The `{% generation %}` blocks of each turn: after its header, up to its end-of-turn token. Raises BadRowError."""
    indexes = range(len(chat.messages))
    shown = sorted((place, index) for index in indexes if (place := chat.after(index)) is not None)
    spans: dict[int, list[Span]] = {index: [] for index in turns}
    for span in chat.generated:
        index = _find_turn(chat, span, shown)
        if index in spans:
            spans[index].append(span)
    if empty := [index for index, found in spans.items() if not found]:
        raise BadRowError(
            f"loss mask all zero: no assistant token found in message {empty[0]}, for which the chat template has no "
            "generation block"
        )
    return {index: _cut_blocks(chat, index, found, eos_texts=eos_texts) for index, found in spans.items()}


def _cut_blocks(chat: RenderedChat, index: int, blocks: list[Span], *, eos_texts: tuple[str, ...]) -> list[Span]:
    """The blocks of a turn without its header, and without what follows the token that ends it."""
    (first, end), *others = blocks
    cut = [(_find_header_end(chat, index, (first, end)), end), *others]
    low = max(cut[0][0], chat.content_end(index) or 0)
    for number, (start, end) in enumerate(cut):
        places = ((chat.text.find(eos, max(low, start), end), eos) for eos in eos_texts)
        if found := [(place, -len(eos)) for place, eos in places if place >= 0]:
            place, length = min(found)
            return [*cut[:number], (start, place - length)]
    return cut


def _find_header_end(chat: RenderedChat, index: int, block: Span) -> int:
    """Where the block goes on after what asks for the turn; its beginning where it does not hold that."""
    start, end = block
    content = chat.content_start(index)
    head = chat.text[start : end if content is None else max(start, min(content, end))]
    prompt = chat.question_prompt().lstrip() if head.strip() else ""
    if not prompt:
        return start
    for header in (prompt, prompt.split("<think>")[0]):  # this turn may not show the thinking that the prompt opens
        place = head.find(header) if header.strip() else -1
        if place >= 0 and (content is not None or not head[:place].strip()):
            return start + place + len(header)
    if head.lstrip().startswith(prompt.splitlines()[0]):
        raise BadRowError(f"chat template: a generation block holds a header that asks for no turn (message {index})")
    return start


def _find_turn(chat: RenderedChat, span: Span, shown: list[tuple[int, int]]) -> int:
    """The turn to which a generation block belongs: the one whose mark it holds, else the only one thereabouts.

    `shown`: the places of all marks, and their messages.
    """
    low, high = (bisect_left(shown, (place + 1,)) for place in span)
    inside = {index for _, index in shown[low:high]}
    if any(chat.messages[index]["role"] != "assistant" for index in inside):
        raise BadRowError("chat template: a generation block holds a message that is not the assistant's")
    before = shown[low - 1][1] if low else 0
    behind = shown[high][1] if high < len(shown) else len(chat.messages) - 1
    near = inside or {i for i in range(before, behind + 1) if chat.messages[i]["role"] == "assistant"}
    if len(near) != 1:
        raise BadRowError("chat template: it is not certain to which assistant turn a generation block belongs")
    return near.pop()


def common_prefix(left: str, right: str) -> int:
    """Number of characters that both texts begin with."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
