"""A tokenizer's chat template, run with a bounded time and memory.

A template is a program that came with a target, and so is what it renders of a row. It runs in the sandbox of
transformers, with the same filters and names; what is added counts its steps, looks at the size of what it makes, and
knows where the `{% generation %}` blocks of the rendered text are.
"""

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from jinja2 import Template, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

if sys.platform.startswith("linux"):
    import resource  # not on every system

MAX_STEPS = 10_000_000  # calls, filters and rounds of loops for one row: a second or two
MAX_SECONDS = 10.0  # of processor time for one row
STEPS_A_PAIR, SECONDS_A_PAIR = 100, 1e-5  # more for each two messages: a chat of thousands is rendered for each turn
MAX_CHARACTERS = 2**24  # of a text, or of what a list holds; or ROW_FACTOR times the row, if that is more
ROW_FACTOR = 16
ITEM_CHARACTERS = 32  # that an item of a list stands for, whatever it is
MAX_NESTING = 256  # lists in each other; rows have 100 at most
MAX_INTEGER_BITS = 4096
MAX_BYTES = 2**30  # that a rendering may add to the process, where the system can hold it to that
STEPS_A_LOOK = 256  # between two looks at the clock

_GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS = (list, tuple, dict, MappingProxyType, *_VIEWS)
_WHAT_TEMPLATES_SEE = "{{ [messages, tools] | tojson }}"


class ChatTemplateError(ValueError):
    """A chat that the template does not render; the message says why, in one line."""


class ChatTooLargeError(ChatTemplateError):
    """A chat whose rendering takes too long or too much memory: most often every row's trouble."""


class _LimitError(RuntimeError):
    """A rendering that takes too long or makes too much."""


class _Budget:
    """What is left to the row at work: `row` are its messages and tools, all its text of so many characters."""

    def __init__(self, row: tuple[Any, Any] = ((), None), *, row_characters: int = 0) -> None:
        pairs = len(row[0]) ** 2
        self.steps = MAX_STEPS + STEPS_A_PAIR * pairs
        self.seconds = MAX_SECONDS + SECONDS_A_PAIR * pairs
        self.max_size = sys.maxsize
        self.address_space = _read_address_space() + MAX_BYTES
        self._start = time.thread_time()
        self._next_look = self.steps - STEPS_A_LOOK
        self._row = row  # kept, so that its parts are what their ids say
        self._known: dict[int, int] = {}
        weight = self._weigh(row, self._known, depth=0)
        self.max_size = max(MAX_CHARACTERS, ROW_FACTOR * row_characters, 2 * weight)

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < self._next_look:
            self._next_look = self.steps - STEPS_A_LOOK
            if self.steps < 0 or time.thread_time() - self._start > self.seconds:
                raise _LimitError("takes too many steps or too long for one row")

    def take(self, value: Any) -> Any:
        """The value, if it is no larger than a row's may be."""
        kind = type(value)
        size = len(value) if kind is str else 0
        if size > self.max_size:
            raise _LimitError(f"makes a text of more than {self.max_size:,} characters")
        if kind is int and value.bit_length() > MAX_INTEGER_BITS:
            raise _LimitError("makes a number of too many digits")
        self.spend(1 + (size >> 8))
        if isinstance(value, _CONTAINERS):
            self._weigh(value, {}, depth=0)
        return value

    def take_arguments(self, values: tuple[Any, ...]) -> None:
        """Look at what a call has for its macro, which sees all of them as one list."""
        if sum(isinstance(value, _CONTAINERS) for value in values) > 1:
            self.take(values)

    def _weigh(self, value: Any, seen: dict[int, int], *, depth: int) -> int:
        """Characters of all that a list holds, a part that it holds twice counted twice: as long takes who walks it."""
        if (known := seen.get(id(value)) or self._known.get(id(value))) is not None:
            return known
        mapping = value.mapping if isinstance(value, _VIEWS) else value
        is_mapping = isinstance(mapping, dict | MappingProxyType)
        parts = (*mapping.keys(), *mapping.values()) if is_mapping else mapping
        size = ITEM_CHARACTERS * (1 + len(parts))
        self.spend(1 + len(parts) // 4)
        for part in parts:
            if isinstance(part, str):
                size += len(part)
            elif isinstance(part, _CONTAINERS):
                size += self._weigh(part, seen, depth=depth + 1)
            if size > self.max_size:
                break
        if size > self.max_size or depth > MAX_NESTING:
            raise _LimitError(f"makes a list that holds more than {self.max_size:,} characters, or too deep a one")
        seen[id(value)] = size
        return size


class _Names(Namespace):
    """What `namespace` makes, without its content when it is printed."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, in which loops, calls, filters and operators draw on the row's budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self.budget = _Budget()
        self.generation_marks = ("", "")
        # The one way to the names that transformers gives to templates; the template itself does not matter.
        model = chat_template_utils._compile_jinja_template("").environment
        super().__init__(
            trim_blocks=model.trim_blocks,
            lstrip_blocks=model.lstrip_blocks,
            extensions=[_GenerationBlock, LoopControlExtension],
        )
        self.globals.update(model.globals)
        self.globals.pop("lipsum", None)  # random text, as much as is asked for
        self.globals["namespace"] = _Names
        self.filters = {name: self._bound(call) for name, call in model.filters.items()}
        self.filters |= {
            "_rounds": self._rounds,
            "_taken": self._taken,
            "_joined": self._joined,
            "sum": self._sum_numbers(model.filters["sum"]),
        }
        self.tests = {name: self._bound(call) for name, call in model.tests.items()}
        self.concat = self._joined  # type: ignore[method-assign]

    def compile_bounded(self, source: str) -> Template:
        """The template, whose loops are counted and whose `~` and lists are looked at as they are made."""
        tree = _Literals(self).visit(self.parse(source))
        for loop in tree.find_all(nodes.For):
            loop.iter = self.apply(loop.iter, "_rounds")
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [self.apply(nodes.List(concat.nodes, lineno=concat.lineno), "_joined")]
        template = self.from_string(tree)
        template.globals = dict(template.globals)  # jinja copies it for each rendering, a chain of maps slowly
        return template

    def apply(self, node: Any, name: str) -> nodes.Filter:
        """A node of the tree with a filter on it."""
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self)

    def _bound(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def bound(*args: Any, **kwargs: Any) -> Any:
            return self.budget.take(call(*args, **kwargs))

        return bound

    def _sum_numbers(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The filter `sum` without its use on lists, whose time no count of steps would show."""

        @functools.wraps(call)
        def bound(environment: Any, items: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
            if not isinstance(start, int | float):
                raise _LimitError("sums what is no number")
            return call(environment, self._rounds(items), attribute, start)

        return bound

    def _rounds(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.spend(1)
            yield item

    def _taken(self, value: Any) -> Any:
        return self.budget.take(value)

    def _joined(self, parts: Iterable[Any]) -> str:
        texts = [part if type(part) is str else str(part) for part in parts]
        if sum(map(len, texts)) > self.budget.max_size:
            raise _LimitError(f"makes a text of more than {self.budget.max_size:,} characters")
        return str(self.budget.take("".join(texts)))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # As in jinja: a template may name an argument `self`.
        __self.budget.spend(1 + (_size(getattr(__obj, "__self__", None)) >> 8))
        if args or kwargs:
            __self.budget.take_arguments((*args, *kwargs.values()))
        return __self.budget.take(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            self._check_power(left, right)
        return self.budget.take(self.binop_table[operator](left, right))

    def _check_power(self, left: Any, right: Any) -> None:
        are_integers = isinstance(left, int) and isinstance(right, int)
        if are_integers and left.bit_length() * abs(right) > MAX_INTEGER_BITS:
            raise _LimitError("makes a number of too many digits")

    def _check_product(self, left: Any, right: Any) -> None:
        for times, value in ((left, right), (right, left)):
            if isinstance(times, int) and _size(value) * times > self.budget.max_size:
                raise _LimitError(f"makes a text or a list of more than {self.budget.max_size:,}")


class _Literals(NodeTransformer):
    """Lists, tuples and dicts that a template writes, with a look at what they hold; constants alone need none."""

    def __init__(self, environment: _Environment) -> None:
        self._environment = environment

    def visit_List(self, node: nodes.Node) -> nodes.Node:  # noqa: N802
        node = self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        is_constant = all(isinstance(part, nodes.Const) for part in node.iter_child_nodes())
        return node if is_target or is_constant else self._environment.apply(node, "_taken")

    visit_Tuple = visit_Dict = visit_List  # noqa: N815


class _GenerationBlock(Extension):
    """`{% generation %}`: what is inside, between the two marks of the environment."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        environment: Any = self.environment
        opened, closed = environment.generation_marks
        return f"{opened}{caller()}{closed}"


class ChatTemplate:
    """Renders what `tokenizer.apply_chat_template` renders, row by row, and refuses what takes too much."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._environment = _Environment()
        self._names = {**tokenizer.special_tokens_map, "documents": None}
        self._compiled: dict[str, Template] = {}
        self._marks_generation: dict[str, bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer}  # compiled templates cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"])  # type: ignore[misc]

    def open_row(
        self, messages: list[dict[str, Any]], *, tools: list[Any] | None, variables: dict[str, Any] | None = None
    ) -> "ChatRow":
        """The row at work; its time and memory begin to count. Raises ChatTemplateError.

        `variables` are more names for the template. ValueError where the tokenizer has no template.
        """
        source = str(self._tokenizer.get_chat_template(tools=tools))  # it may have one more for rows with tools
        if source not in self._marks_generation:
            self._marks_generation[source] = _GENERATION_MARKER.search(source) is not None
        seen, shown_messages, shown_tools = self._prepare(messages, tools)
        self._environment.budget = _Budget((shown_messages, shown_tools), row_characters=len(seen))
        return ChatRow(
            messages=shown_messages,
            seen=seen,
            marks_generation=self._marks_generation[source],
            render=functools.partial(self._render, source, self._names | (variables or {}) | {"tools": shown_tools}),
        )

    def _prepare(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> tuple[str, list[dict[str, Any]], Any]:
        """All text of the row, and its messages and tools as transformers hands them to a template."""
        if tools is None and all(_is_plain(message) for message in messages):
            return "".join(message["content"] for message in messages), messages, None
        try:
            seen = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, chat_template=_WHAT_TEMPLATES_SEE
            )
        except Exception as error:
            raise ChatTemplateError(_first_line(error)) from error
        return seen, *json.loads(seen)

    def _render(
        self,
        source: str,
        names: dict[str, Any],
        messages: list[dict[str, Any]],
        *,
        ask: bool = False,
        generation_marks: tuple[str, str] = ("", ""),
    ) -> str:
        environment = self._environment
        environment.generation_marks = generation_marks
        try:
            with _bounded_memory(environment.budget.address_space):
                if source not in self._compiled:
                    self._compiled[source] = environment.compile_bounded(source)
                return self._compiled[source].render(names, messages=messages, add_generation_prompt=ask)
        except MemoryError:
            raise ChatTooLargeError("takes too much memory for one row") from None
        except _LimitError as error:
            raise ChatTooLargeError(_first_line(error)) from None
        except Exception as error:  # a template is a program: it can raise anything
            raise ChatTemplateError(_first_line(error)) from error


def _is_plain(message: dict[str, Any]) -> bool:
    """Whether a template sees the message as it is."""
    return len(message) == 2 and type(message.get("role")) is str and type(message.get("content")) is str


class Render(Protocol):
    """The text of messages, with the generation prompt where the target is asked (`ask`).

    Each `{% generation %}` block stands between two marks. Raises ChatTemplateError.
    """

    def __call__(
        self, messages: list[dict[str, Any]], *, ask: bool = ..., generation_marks: tuple[str, str] = ...
    ) -> str: ...


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """A row as its template sees it: `messages`, all that it holds as one JSON text (`seen`), and how to render it."""

    messages: list[dict[str, Any]]
    seen: str
    marks_generation: bool
    render: Render


def _read_address_space() -> int:
    """Bytes of this process's address space; 0 where no limit can be set."""
    if not sys.platform.startswith("linux"):
        return 0
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def _bounded_memory(limit: int) -> Iterator[None]:
    """So many bytes of address space at most. Linux alone holds processes to that."""
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
