"""Questions and answers about the standard library of the running CPython, read from its source with `ast`.

Nothing is imported or executed, so the corpus is a pure function of the interpreter's `Lib` folder.
"""

import ast
import random
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "turtledemo", "__pycache__"}
MAX_ANSWER_CHARS = 1500  # longer answers are cut at a line; about 450 tokens of the embedded tokenizer

WHAT = ("What does {name} do?", "Explain {name}.", "Describe {name}.", "Tell me about {name}.", "What is {name}?")
SOURCE = ("Show the source of {name}.", "How is {name} implemented?", "Print the code of {name}.")
SIGNATURE = ("What is the signature of {name}?", "Which arguments does {name} take?", "How do I call {name}?")
MEMBERS = ("Which methods does {name} have?", "List the methods of {name}.")


class Pair(NamedTuple):
    """One question and its answer; `name` is the dotted name they are about."""

    name: str
    question: str
    answer: str


def read_pairs(*, seed: int = 0) -> list[Pair]:
    """Every question and answer that the standard library yields, in a fixed order."""
    rng = random.Random(seed)
    library = Path(sysconfig.get_paths()["stdlib"])
    pairs: list[Pair] = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_FOLDERS & set(parts) or parts[0] not in sys.stdlib_module_names:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        module = ".".join(part for part in parts if part != "__init__")
        pairs.extend(_pairs_of_module(module=module, source=source, rng=rng))
    return pairs


def _pairs_of_module(*, module: str, source: str, rng: random.Random) -> Iterator[Pair]:
    tree = ast.parse(source)
    if doc := ast.get_docstring(tree):
        yield Pair(module, f"What is the module {module} for?", _cut(doc))
    yield from _pairs_of_body(tree.body, prefix=module, lines=source.splitlines(), rng=rng)


def _pairs_of_body(body: list[ast.stmt], *, prefix: str, lines: list[str], rng: random.Random) -> Iterator[Pair]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{node.name}"
        if doc := ast.get_docstring(node):
            yield Pair(name, rng.choice(WHAT).format(name=name), _cut(doc))
        if isinstance(node, ast.ClassDef):
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
            if len(methods) > 1:
                listed = "\n".join(f"- {method}" for method in methods[:30])
                yield Pair(name, rng.choice(MEMBERS).format(name=name), f"{name} has these methods:\n{listed}")
            yield from _pairs_of_body(node.body, prefix=name, lines=lines, rng=rng)
            continue
        call = f"{name}({ast.unparse(node.args)})"
        yield Pair(name, rng.choice(SIGNATURE).format(name=name), f"```python\n{call}\n```")
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if len(code) < MAX_ANSWER_CHARS and "\n" in code:
            yield Pair(name, rng.choice(SOURCE).format(name=name), f"```python\n{code}\n```")


def _cut(text: str) -> str:
    """The first lines of `text`, at most `MAX_ANSWER_CHARS` characters of them."""
    text = text.strip()
    if len(text) <= MAX_ANSWER_CHARS:
        return text
    return text[:MAX_ANSWER_CHARS].rsplit("\n", 1)[0].rstrip()


def conversations(pairs: list[Pair], *, seed: int = 0, two_turn_share: float = 0.2) -> list[list[dict[str, str]]]:
    """Chats in OpenAI form, shuffled; a share of them puts two neighbouring questions into one chat."""
    rng = random.Random(seed)
    chats: list[list[dict[str, str]]] = []
    index = 0
    while index < len(pairs):
        turns = 2 if rng.random() < two_turn_share else 1
        chat = []
        for pair in pairs[index : index + turns]:
            chat.append({"role": "user", "content": pair.question})
            chat.append({"role": "assistant", "content": pair.answer})
        chats.append(chat)
        index += turns
    rng.shuffle(chats)
    return chats
