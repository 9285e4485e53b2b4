"""The target behind an OpenAI-compatible endpoint: many conversations at a time, each turn a chat completion.

The client repeats what may pass (429, 5xx, 408, 409, timeouts, lost connections) with exponential backoff and jitter,
and waits as long as `Retry-After` says, up to two minutes. What is left is told apart here: an error of the row, or one
that every row would meet, which ends the run.
"""

import asyncio
import base64
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit
from urllib.request import getproxies

import openai
from openai import AsyncOpenAI

from stages.errors import SettingError
from stages.regenerate.completion import AskError, MalformedError, parse_completion
from stages.regenerate.dialogue import THINKING_END, THINKING_START, Answer, Dialogue, Outcome
from stages.regenerate.prompts import Message, Prompt, seed_of
from stages.regenerate.render import NO_ROOM, PromptRenderer, RenderError, plan_tokens, to_request
from stages.regenerate.settings import RegenerateSection
from stages.regenerate.work import Work
from stages.regeneration_record import RegenerationError
from storage.text import HIDDEN, redact, remember_secrets, without_login

GRACE_SECONDS = 10.0  # how long a stopped run waits for answers that are on their way; batch systems give 30
POLL_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 8.0  # as the client's
# Fewer failures in a row may be the rows' own; more mean that the endpoint is gone, or refuses all of them.
MIN_FAILURES_TO_STOP = 32
FIRST = asyncio.FIRST_COMPLETED
MAX_DETAIL_CHARS = 300
MIN_SECRET_CHARS = 4  # a shorter part of an address would be hidden in the middle of words
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")  # the client's
NO_KEY = "none"  # servers without a key ignore it, and the client wants one


@dataclass(frozen=True, kw_only=True)
class Form:
    """Fields that not every server takes: the name of the token limit, and vLLM's request for token ids."""

    limit: str = "max_tokens"
    asks_ids: bool = True

    def after(self, refusal: openai.APIStatusError) -> "Form | None":
        """The form in which to ask instead, if the refusal names a field of this one."""
        if refusal.status_code not in (400, 422):
            return None
        said = refusal.response.text
        if self.asks_ids and "return_token_ids" in said:
            return replace(self, asks_ids=False)
        if self.limit == "max_tokens" and ("max_tokens" in said or "max_completion_tokens" in said):
            return replace(self, limit="max_completion_tokens")
        return None


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask, and how. `model` is the name that the endpoint knows the target by."""

    client: AsyncOpenAI
    model: str
    section: RegenerateSection
    max_length: int
    renderer: PromptRenderer
    end_ids: frozenset[int]
    """Tokens that end an answer of the target."""
    forms: list[Form] = field(default_factory=lambda: [Form()])
    """The last is what the server took."""

    async def ask(self, messages: list[Message], *, tools: list[Any] | None, max_tokens: int, seed: int) -> Answer:
        """One answer. Raises AskError for this row's trouble, RegenerationError for everybody's."""
        request = plan_request(self, messages, tools=tools, seed=seed)
        for attempt in range(self.section.max_retries + 1):
            try:
                return await self._complete(request, form=self.forms[-1], max_tokens=max_tokens)
            except openai.OpenAIError as error:
                raise self._explain(error) from error
            except MalformedError:
                if attempt == self.section.max_retries:
                    raise
                await asyncio.sleep(min(0.5 * 2**attempt, MAX_BACKOFF_SECONDS) * random.uniform(0.75, 1.0))  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    async def _complete(self, request: dict[str, Any], *, form: Form, max_tokens: int) -> Answer:
        """Asks in another form where a refusal names one, and remembers what was taken. Raises OpenAIError and
        MalformedError."""
        asked = {"extra_body": ({"return_token_ids": True} if form.asks_ids else {}) | request["extra_body"]}
        try:
            completion = await self.client.chat.completions.create(**request | asked | {form.limit: max_tokens})
        except openai.APIStatusError as error:
            if (other := form.after(error)) is None:
                raise
            return await self._complete(request, form=other, max_tokens=max_tokens)
        except openai.OpenAIError:
            raise
        except Exception as error:  # no JSON, too deep, an unknown charset: each decoder has errors of its own
            raise MalformedError(f"malformed answer: {self._scrub(str(error) or type(error).__name__)}") from error
        if form != self.forms[-1]:
            self.forms.append(form)
        return parse_completion(completion, renderer=self.renderer, end_ids=self.end_ids)

    async def converse(self, prompt: Prompt) -> Outcome:
        """Ask for one turn after the other. Raises RegenerationError for trouble that every row would meet."""
        section = self.section
        dialogue = Dialogue(prompt, keep_truncated=section.truncated == "keep")
        while dialogue.is_open:
            try:
                rendered = self.renderer(dialogue.messages, tools=dialogue.tools)
                room = plan_tokens(len(rendered), max_tokens=section.max_tokens, max_length=self.max_length)
                if room < 1:
                    dialogue.end(NO_ROOM)
                    break
                seed = seed_of(section.seed, row=dialogue.row, turn=dialogue.turn)
                answer = await self.ask(dialogue.messages, tools=dialogue.tools, max_tokens=room, seed=seed)
                dialogue.take(self._settle(answer, dialogue, rendered=rendered), rendered=rendered)
            except (RenderError, AskError) as error:
                dialogue.fail(str(error))
        return dialogue.outcome()

    def _settle(self, answer: Answer, dialogue: Dialogue, *, rendered: list[int]) -> Answer:
        """The answer as it can be cached where its ids are not known: a text that the template shows whole; as ids of
        its own one that was cut, since rendering would give it an end that nobody sampled, and one whose prompt
        extraction would render otherwise.

        Raises RegenerationError for thinking that the cache would lack."""
        if answer.is_exact or answer.calls_tool or answer.fault:
            return answer
        if answer.is_complete:
            if answer.content.strip() and self.renderer.knows_more(dialogue.messages, tools=dialogue.tools):
                return replace(answer, ids=self._spell_out(answer, dialogue), prompt_ids=rendered)
            self._check_thinking(answer, dialogue)
            return answer
        if answer.reasoning and self.section.truncated == "keep":
            return replace(answer, fault="a cut answer whose thinking came apart from it, without token ids")
        return replace(answer, ids=self.renderer.encode(answer.content), prompt_ids=rendered)

    def _spell_out(self, answer: Answer, dialogue: Dialogue) -> list[int]:
        """Ids of a text with the end that the template gives it. Raises RegenerationError where none can be told."""
        said = [*dialogue.messages, {"role": "assistant", "content": answer.content}]
        shown = answer.content.rpartition(THINKING_END)[2]
        end = self.renderer.find_end(said, shown, tools=dialogue.tools, end_ids=self.end_ids)
        if answer.reasoning or end is None:
            what = "thinking apart from the answer" if answer.reasoning else "an answer whose end cannot be told"
            raise RegenerationError(
                f"{self.url}: sends {what}, without token ids, and extraction renders without "
                "regenerate.chat_template_kwargs, so the cache would hold another prompt; take a server that gives "
                "token ids (vLLM), start this one without a reasoning parser, or write the variables into a template, "
                "which you name to the server and in data.chat_template"
            )
        return [*self.renderer.encode(answer.content), end]

    def _check_thinking(self, answer: Answer, dialogue: Dialogue) -> None:
        """An answer that the cache would hold without the thinking before it is none that the target gives."""
        thought, _, _ = answer.content.rpartition(THINKING_END)
        thought = answer.reasoning or thought.replace(THINKING_START, "")
        if not thought.strip():
            return
        said = {"role": "assistant", "content": answer.content}
        said |= {"reasoning_content": answer.reasoning} if answer.reasoning else {}
        if self.renderer.shows([*dialogue.messages, said], thought, tools=dialogue.tools):
            return
        if answer.reasoning:
            what, advice = "apart from the answer", "does not render reasoning_content"
        else:
            what, advice = f"before {THINKING_END} in the answer", "leaves that out"
        raise RegenerationError(
            f"{self.url}: sends thinking {what}, and the target's chat template {advice}, so the cache would lack it; "
            "take a server that gives token ids (vLLM), start this one without a reasoning parser, switch thinking off "
            "in regenerate.chat_template_kwargs, or name a template that renders it in data.chat_template"
        )

    def _explain(self, error: openai.OpenAIError) -> Exception:
        """The error of a row, or of the run."""
        # The client's own message leaves out bodies that are not of OpenAI's form.
        detail = self._scrub(error.response.text if isinstance(error, openai.APIStatusError) else str(error))
        match error:
            case openai.AuthenticationError():
                return RegenerationError(
                    f"{self.url}: refuses the key (401): {detail}; set OPENAI_API_KEY to a valid one"
                )
            case openai.NotFoundError():
                return RegenerationError(
                    f"{self.url}: does not know the path or the model {self.model!r} (404): {detail}; an address "
                    "mostly ends in /v1, and regenerate.served_model must be the name that the server gives the target"
                )
            case openai.APITimeoutError():
                return AskError(f"no answer in time: {self.section.timeout_seconds:g} s")
            case openai.APIStatusError(status_code=status):
                return AskError(f"status {status}: {detail}")
            case openai.APIConnectionError():
                return AskError(f"lost connection: {self._scrub(repr(error.__cause__ or error))}")
        return AskError(f"client error: {detail}")

    def _scrub(self, text: str) -> str:
        """A detail short enough to be kept, without the key and the secrets of the address."""
        for secret in _secrets(self.client):  # within a repr or JSON, backslashes stand before some of its characters
            letters = [re.escape(letter) for letter in secret if letter != "\\"]
            text = re.sub(r"\\*".join(letters), HIDDEN, text)
        return redact(text)[:MAX_DETAIL_CHARS].encode(errors="replace").decode()

    @property
    def url(self) -> str:
        """The address, for messages."""
        return without_login(str(self.client.base_url))


def run_endpoint(endpoint: Endpoint, prompts: Iterable[Prompt], work: Work) -> None:
    """The back end. Raises RegenerationError when going on is of no use; what was answered is recorded by then."""
    waiting = (prompt for prompt in prompts if not work.is_finished(prompt))
    asyncio.run(_converse_all(endpoint, waiting, work))


async def _converse_all(endpoint: Endpoint, waiting: Iterator[Prompt], work: Work) -> None:
    pending: set[asyncio.Task[Outcome]] = set()
    watch = _FailureWatch(limit=max(MIN_FAILURES_TO_STOP, 2 * endpoint.section.concurrency))
    async with endpoint.client:
        try:
            while True:
                while len(pending) < endpoint.section.concurrency and not work.is_stopped():
                    if (prompt := next(waiting, None)) is None:
                        break
                    pending.add(asyncio.create_task(endpoint.converse(prompt)))
                if not pending:
                    return
                is_last = work.is_stopped()
                timing = {"timeout": GRACE_SECONDS} if is_last else {"timeout": POLL_SECONDS, "return_when": FIRST}
                done, pending = await asyncio.wait(pending, **timing)
                watch.check(_record(done, work), url=endpoint.url)
                work.tell()
                if is_last:
                    return
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)


def _record(done: set[asyncio.Task[Outcome]], work: Work) -> list[Outcome]:
    """Record what went well before the first error is raised."""
    errors = [error for task in done if (error := task.exception()) is not None]
    outcomes = [task.result() for task in done if task.exception() is None]
    work.record(outcomes)
    if errors:
        raise errors[0]
    return outcomes


class _FailureWatch:
    """Ends a run in which one row after the other fails: the endpoint is gone, or refuses all of them."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._num_in_a_row = 0

    def check(self, outcomes: list[Outcome], *, url: str) -> None:
        for outcome in outcomes:
            self._num_in_a_row = self._num_in_a_row + 1 if outcome.kind == "failed" else 0
            if self._num_in_a_row >= self._limit:
                raise RegenerationError(
                    f"{url}: {self._num_in_a_row} rows in a row failed, the last with {outcome.reason}; see to the "
                    "endpoint and run the same command again: it asks only for what has no answer"
                )


def open_client(url: str, *, section: RegenerateSection) -> AsyncOpenAI:
    """A client with key and proxies of the environment. Raises SettingError for what is no address, key or proxy."""
    remember_secrets(url)
    if not _is_address(url, schemes=("http", "https")):
        raise SettingError(f"--endpoint: expected an address such as http://host:8000/v1, got {without_login(url)!r}")
    _check_proxies(getproxies())
    key = parse_key(os.environ.get("OPENAI_API_KEY", ""))
    parts = urlsplit(url)  # the client appends its paths to the address, which would put them into the query
    try:
        return AsyncOpenAI(
            base_url=urlunsplit((*parts[:3], "", "")), default_query=dict(parse_qsl(parts.query)), api_key=key,
            timeout=section.timeout_seconds, max_retries=section.max_retries,
        )  # fmt: skip
    except Exception as error:  # an address or a file of certificates; the errors have no common base
        raise SettingError(f"--endpoint {without_login(url)}: cannot be asked: {error}; see to the address") from error


def _secrets(client: AsyncOpenAI) -> Iterator[str]:
    """What an endpoint may repeat and nobody may keep: the key, the address' login as it is sent, its query."""
    if client.api_key != NO_KEY:
        yield client.api_key
    address = client.base_url
    if address.userinfo:
        yield base64.b64encode(f"{address.username}:{address.password}".encode()).decode()
    for value in (address.password, *map(str, client.default_query.values())):
        if len(value) >= MIN_SECRET_CHARS:
            yield value


def _is_address(text: str, *, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, brackets that do not close
        return False


def _check_proxies(proxies: dict[str, str]) -> None:
    """Refuse what the client would trip over. A proxy may hold a password, so no message shows one."""
    if "*" in (host.strip() for host in proxies.get("no", "").split(",")):
        return
    for name in ("http", "https", "all"):
        proxy = proxies.get(name, "")
        address = proxy if "://" in proxy else f"http://{proxy}"
        if proxy and not _is_address(address, schemes=PROXY_SCHEMES):
            raise SettingError(
                f"{name.upper()}_PROXY of the environment: expected an address such as http://host:3128; mend or unset "
                "it, or name the endpoint's host in NO_PROXY"
            )
        if address.startswith("socks") and find_spec("socksio") is None:
            raise SettingError(
                f"{name.upper()}_PROXY of the environment: a SOCKS proxy needs the package socksio, which is not "
                "installed; install it, or unset the variable"
            )


def parse_key(text: str) -> str:
    """The key without the blanks and line ends of the file that it was read from; `NO_KEY` for none.

    Raises SettingError, which does not show the key: a header that cannot be sent is quoted by whoever refuses it.
    """
    key = text.strip()
    strange = [position for position, letter in enumerate(key, start=1) if not " " <= letter <= "~"]
    if strange:
        raise SettingError(
            f"OPENAI_API_KEY: expected printable ASCII, got another character at position {strange[0]} of {len(key)}; "
            "set it to the key alone"
        )
    return key or NO_KEY


def plan_request(endpoint: Endpoint, messages: list[Message], *, tools: list[Any] | None, seed: int) -> dict[str, Any]:
    """The fields of one request that every server takes."""
    section = endpoint.section
    variables = {"chat_template_kwargs": section.chat_template_kwargs} if section.chat_template_kwargs else {}
    request = {
        "model": endpoint.model,
        "messages": [to_request(message) for message in messages],
        "temperature": section.temperature,
        "top_p": section.top_p,
        "seed": seed,
        "extra_body": variables | section.extra_body,
    }
    return request | ({"tools": tools} if tools else {})
