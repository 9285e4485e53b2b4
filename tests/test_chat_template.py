"""Chat templates: what transformers renders, and a bounded time and memory for what does not end or does not fit."""

import mmap
import pickle
import resource
import threading
import time
from functools import partial
from typing import Any

import pytest

from chat_families import CHATML, CHATML_MARKED, GPT_OSS, LLAMA3, MISTRAL, QWEN3, byte_level
from stages.chat_template import MAX_BYTES, ChatTemplate, ChatTemplateError
from stages.extract import ordered
from stages.extract.conversations import Chat
from stages.extract.rows import BadRowError
from stages.extract.tokenize import SampleTokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a\nb"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None, "é"]}}}],
    },
    {"role": "tool", "content": "r", "name": None},
    {"role": "assistant", "content": "one", "reasoning": "why"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
FEATURES = (
    "{{ tools | tojson(indent=2) }}{{ messages | length }}{{ messages | map(attribute='role') | join(', ') }}"
    "{% for m in messages %}{{ loop.index }}{% if loop.last %}{{ loop.length ~ '!' ~ m.role }}{% endif %}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}{% set n = namespace(a=2 ** 10 + 3 * 4) %}{{ n.a }}"
    "{{ '%s-%d' % ('a', 5) }}{{ [1, 2] | sum }}{{ dict(a=1) }}{{ 'x' * 3 }}{{ '{:>4}'.format(7) }}"
    "{{ documents is none }}"
)


@pytest.mark.parametrize("source", [CHATML, CHATML_MARKED, GPT_OSS, LLAMA3, MISTRAL, QWEN3, FEATURES])
@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("messages", [MESSAGES, [{"role": "user", "content": "hm"}]])
def test_it_renders_what_transformers_renders(source: str, messages: list[dict[str, Any]], *, ask: bool) -> None:
    tokenizer = byte_level(source, bos="<s>", eos="</s>")
    row = ChatTemplate(tokenizer).open_row(messages, tools=TOOLS)
    theirs = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=ask)
    assert row.render(row.messages, ask=ask) == theirs


ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "a list in each round": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "filters in each round": "{% for i in range(9999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "calls that double": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "comparisons of long texts": "{% set s = 'a' * 8000000 %}{% set t = s + '' + 'b' %}{% set u = s + 'c' %}"
    "{% for i in range(99999) %}{% if t == u %}{% endif %}{% endfor %}",
}
HUGE = {
    "a long text": "{{ 'A' * 10 ** 10 }}",
    "the other way round": "{{ 10 ** 10 * 'A' }}",
    "a long list": "{{ [1] * 10 ** 10 }}",
    "a long number": "{{ 10 ** (10 ** 10) }}",
    "products": "{% set n = namespace(x=7) %}{% for i in range(90) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "sums of texts": "{% set n = namespace(x='a') %}{% for i in range(90) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joined texts": "{% set n = namespace(x='a') %}{% for i in range(90) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a block in a block": "{% set n = namespace(x='a') %}{% for i in range(90) %}{% set t %}{{ n.x }}{{ n.x }}"
    "{% endset %}{% set n.x = t %}{% endfor %}",
    "a filter": "{{ 'a' | center(10 ** 10) }}",
    "a method": "{{ 'a'.ljust(10 ** 10) }}",
    "a replacement": "{% set s = 'a' * 1000000 %}{{ s.replace('a', s) }}",
    "a format": "{{ '%99999999999d' % 1 }}",
    "another format": "{{ '{:>9999999999}'.format(1) }}",
    "an indent": "{{ messages | tojson(indent=10 ** 10) }}",
    "many lines": "{% for i in range(99999) %}{{ messages | tojson(indent=1000) }}{% endfor %}",
    "sums of lists": "{{ ([[1] * 1000] * 9999) | sum(start=[]) }}",
    "calls without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "more rounds than jinja allows": "{% for i in range(10 ** 6) %}{% endfor %}",
}


GROW = "{% set n = namespace(a=(1,), b=(1,)) %}{% for i in range(60) %}"
NESTED = {  # lists of sixty parts, each twice in the next: 2 ** 60 for who walks them
    "equal": GROW + "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "contained": GROW + "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a in [n.b] }}",
    "printed": GROW + "{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
    "as JSON": GROW + "{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a | tojson }}",
    "pretty": GROW + "{% set n.a = {'a': n.a, 'b': n.a} %}{% endfor %}{{ n.a | pprint }}",
    "a key": GROW + "{% set n.a = (n.a, n.a) %}{% endfor %}{{ {n.a: 1} }}",
    "keys": GROW + "{% set n.a = ({(n.a, n.a): 1}.keys() | list)[0] %}{% endfor %}{{ n.a }}",
    "calls": GROW + "{% set n.a = dict(a=n.a, b=n.a) %}{% endfor %}{{ n.a | string }}",
    "sums": GROW + "{% set n.a = [n.a + n.a] %}{% endfor %}{{ n.a }}",
    "views": GROW + "{% set n.a = dict(a=n.a).items() %}{% set n.a = dict(a=n.a, b=n.a) %}{% endfor %}{{ n.a }}",
    "arguments": "{% macro f(m) %}{% set m.a = varargs %}{% endmacro %}"
    + GROW
    + "{{ f(n, n.a, n.a) }}{% endfor %}{{ n.a }}",
    "batches": GROW + "{% set n.a = [n.a, n.a] | batch(2) | list %}{% endfor %}{{ n.a }}",
    "texts": "{% set n = namespace(a=['a' * 1000000]) %}{% for i in range(9) %}{% set n.a = [n.a, n.a] %}{% endfor %}",
}


@pytest.mark.parametrize("name", NESTED)
def test_what_is_large_only_to_who_walks_it_is_a_bad_row(name: str) -> None:
    assert_bad_row(NESTED[name], seconds=5)


def test_a_namespace_is_printed_without_what_it_holds() -> None:
    grow = "{% set t = namespace(a=n.a, b=n.a) %}{% set n.a = t %}"
    source = "{% set n = namespace(a=1) %}{% for i in range(60) %}" + grow + "{% endfor %}{{ n.a }}"
    row = ChatTemplate(byte_level(source)).open_row(MESSAGES, tools=None)
    assert row.render(row.messages) == "<Namespace>"


def test_lists_that_are_shared_a_little_are_rendered() -> None:
    source = "{% set a = [messages, messages, (1, 2), {'a': messages[1:]}] %}{% set a = a + [a] %}{{ a[4] == a[:4] }}"
    row = ChatTemplate(byte_level(source)).open_row(MESSAGES, tools=TOOLS)
    assert row.render(row.messages) == "True"
    many = [{"role": "user", "content": ""}] * 200_000
    row = ChatTemplate(byte_level("{% set a = messages + [] %}{{ a | length }}")).open_row(many, tools=None)
    assert row.render(row.messages) == "200000"


def assert_bad_row(source: str, *, seconds: float) -> None:
    tokenizer = SampleTokenizer(byte_level(source), supervise="all", eos_token_ids=frozenset())
    before = resource.getrlimit(resource.RLIMIT_AS)
    start = time.thread_time()
    with pytest.raises(BadRowError, match="chat template: "):
        tokenizer(Chat(messages=MESSAGES))
    assert time.thread_time() - start < seconds
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("name", HUGE)
def test_what_does_not_fit_is_a_bad_row(name: str) -> None:
    assert_bad_row(HUGE[name], seconds=5)


@pytest.mark.parametrize("name", ["nested loops", "nested loops that write"])
def test_what_does_not_end_is_a_bad_row(name: str) -> None:
    assert_bad_row(ENDLESS[name], seconds=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_what_takes_long_is_a_bad_row(name: str) -> None:
    assert_bad_row(ENDLESS[name], seconds=20)


def test_the_bounds_hold_in_a_thread() -> None:
    found: list[str] = []

    def render() -> None:
        row = ChatTemplate(byte_level(HUGE["a filter"])).open_row(MESSAGES[1:2], tools=None)
        try:
            row.render(row.messages)
        except ChatTemplateError as error:
            found.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert found == ["takes too much memory for one row"]


def test_the_bounds_hold_in_worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "MIN_ITEMS", 4)
    work = partial(_reason, SampleTokenizer(byte_level(HUGE["a filter"]), supervise="all", eos_token_ids=frozenset()))
    found = list(ordered.map_ordered(work, [Chat(messages=MESSAGES)] * 8, num_processes=2))
    assert found == ["chat template: takes too much memory for one row"] * 8


def _reason(tokenizer: SampleTokenizer, row: Chat) -> str:
    try:
        tokenizer(row)
    except BadRowError as error:
        return str(error)
    return "none"


def test_a_template_travels_to_other_processes() -> None:
    template = pickle.loads(pickle.dumps(ChatTemplate(byte_level(CHATML))))
    row = template.open_row(MESSAGES[1:2], tools=None)
    assert row.render(row.messages) == "<|im_start|>user\na\nb<|im_end|>\n"


def test_names_are_given_to_a_template() -> None:
    tokenizer = byte_level("{{ bos_token ~ more ~ (tools is none) ~ documents }}", bos="<s>", eos="</s>")
    names = {"more": [1], "documents": [{"title": "t"}], "tools": "no", "messages": "no"}
    row = ChatTemplate(tokenizer).open_row(MESSAGES[1:2], tools=None, variables=names)
    assert row.render(row.messages) == "<s>[1]True[{'title': 't'}]"
    row = ChatTemplate(tokenizer).open_row(MESSAGES[1:2], tools=None, variables={"bos_token": "B", "more": 1})
    assert row.render(row.messages) == "B1TrueNone"


def test_memory_that_others_take_between_two_rows_does_not_count() -> None:
    template = ChatTemplate(byte_level("{% for i in range(9) %}{{ 'a' * 1000000 }}{% endfor %}"))
    row = template.open_row(MESSAGES[1:2], tools=None)
    row.render(row.messages)
    with mmap.mmap(-1, 3 * MAX_BYTES):
        row = template.open_row(MESSAGES[1:2], tools=None)
        assert len(row.render(row.messages)) == 9_000_000


def test_a_template_cannot_leave_its_sandbox() -> None:
    row = ChatTemplate(byte_level("{{ ''.__class__.__mro__[1].__subclasses__() }}")).open_row(MESSAGES, tools=None)
    with pytest.raises(ChatTemplateError, match="unsafe"):
        row.render(row.messages)
