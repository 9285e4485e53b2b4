"""An endpoint that misbehaves in every way we know of, and transformers' own server that does not."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from bad_server import Seen, bad_server
from pipeline import regeneration
from pipeline.config import Config, to_toml
from pipeline.embedded import TARGET_DIR
from stages.errors import SettingError
from stages.regenerate import endpoint as endpoints
from stages.regenerate.prompts import seed_of
from stages.regenerate.settings import RegenerateSection
from stages.regeneration_record import RegenerationError
from tiny_target import make_config, write_jsonl

ROOT = Path(__file__).parent.parent
KEY = "sk-a-secret-of-the-environment"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoints, "GRACE_SECONDS", 2.0)


@pytest.fixture
def server() -> Iterator[tuple[str, Seen]]:
    with bad_server() as running:
        yield running


def ask_for(folder: Path, questions: list[str | list[str]], **section: Any) -> Config:
    """A run over these questions; several in a list are the turns of one conversation."""
    rows = []
    for question in questions:
        turns = [question] if isinstance(question, str) else question
        messages = [
            message
            for turn in turns
            for message in ({"role": "user", "content": turn}, {"role": "assistant", "content": "recorded"})
        ]
        rows.append({"messages": messages})
    config = make_config(folder)
    write_jsonl(folder / "chats.jsonl", rows)
    fields = {"path": folder / "out", "max_retries": 2, "timeout_seconds": 5.0, **section}
    return config.model_copy(update={"regenerate": RegenerateSection(**fields)})


def run(config: Config, url: str) -> Any:
    return regeneration.regenerate(config, endpoint=url, is_local=False)


def read_answers(folder: Path) -> dict[int, list[dict[str, Any]]]:
    rows = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    assert len({row["row"] for row in rows}) == len(rows), "no row twice"
    return {row["row"]: row["messages"] for row in rows}


def read_failures(folder: Path) -> dict[int, tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "work" / "failures.jsonl").read_text().splitlines()]
    return {row["row"]: (row["kind"], row["reason"]) for row in rows}


def test_what_passes_is_asked_again_until_it_is_answered(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, seen = server
    modes = ["429", "500", "503", "reset", "truncated", "garbage", "html", "nochoices", "list", "slow", "fine"]
    questions: list[str | list[str]] = [f"{mode} please" for mode in modes]
    result = run(ask_for(tmp_path, questions, timeout_seconds=0.4), url)
    answers = read_answers(tmp_path / "out")
    assert {row: messages[-1]["content"] for row, messages in answers.items()} == {
        row: f"answer to {question}" for row, question in enumerate(questions)
    }
    assert seen.attempts() == {question: 1 if question == "fine please" else 2 for question in questions}
    first, second = seen.times["429 please"]
    assert second - first >= 1.0, "Retry-After"
    first, second = seen.times["500 please"]
    assert second - first > 0.3
    assert result.manifest.counts.failed == {}
    assert read_failures(tmp_path / "out") == {}


def test_what_does_not_pass_is_listed_with_its_cause_and_asked_again_by_the_next_run(
    tmp_path: Path, server: tuple[str, Seen]
) -> None:
    url, seen = server
    config = ask_for(tmp_path, ["always500 a", "fine b", "400 c", "noise d", "fine e"], max_retries=1)
    result = run(config, url)
    assert sorted(read_answers(tmp_path / "out")) == [1, 4]
    failures = read_failures(tmp_path / "out")
    assert failures[0][0] == failures[2][0] == failures[3][0] == "failed"
    assert failures[0][1].startswith("status 500: ")
    assert "broken for good" in failures[0][1]
    assert "maximum context length" in failures[2][1]
    assert failures[3][1] == "malformed answer: content that is no text"
    assert result.manifest.counts.failed == {"status 500": 1, "status 400": 1, "malformed answer": 1}
    assert seen.attempts() == {"always500 a": 2, "fine b": 1, "400 c": 1, "noise d": 2, "fine e": 1}
    again = run(config, url)
    assert again.num_recorded == 3
    assert seen.attempts() == {"always500 a": 4, "fine b": 1, "400 c": 2, "noise d": 4, "fine e": 1}
    assert sorted(read_answers(tmp_path / "out")) == [1, 4]


@pytest.mark.parametrize(
    ("mode", "message"),
    [("401", r"refuses the key \(401\): .*set OPENAI_API_KEY"), ("404", r"model '.*target' \(404\).*served_model")],
)
def test_what_every_row_would_meet_ends_the_run_at_once(
    tmp_path: Path, server: tuple[str, Seen], mode: str, message: str
) -> None:
    url, seen = server
    config = ask_for(tmp_path, ["fine a", f"{mode} b", *[f"fine {row}" for row in range(50)]], concurrency=1)
    with pytest.raises(RegenerationError, match=message) as caught:
        run(config, url)
    assert KEY not in str(caught.value)
    assert seen.attempts() == {"fine a": 1, f"{mode} b": 1}
    assert (tmp_path / "out" / "work" / "outcomes.log").read_bytes().count(b"\n") == 1
    assert not read_answers(tmp_path / "out")


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n", " "])
def test_a_key_is_sent_without_the_line_end_of_its_file(
    tmp_path: Path, server: tuple[str, Seen], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    url, seen = server
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}{end}")
    run(ask_for(tmp_path, ["fine a"]), url)
    assert seen.keys == {f"Bearer {KEY}"}


ODD = ['message "hello"', "message [1]", "message 5", "message true", "deep a", "charset rot13", "charset hex"]


def test_odd_answers_fail_their_rows_alone(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, _ = server
    config = ask_for(tmp_path, [*ODD, "count a", "fine b"], max_retries=0)
    counts = run(config, url).manifest.counts
    assert counts.failed == {"malformed answer": len(ODD)}
    assert sorted(read_answers(tmp_path / "out")) == [len(ODD), len(ODD) + 1]
    assert counts.num_tokens == 5, "a count that cannot be one is not added"
    assert run(config, url).num_recorded == len(ODD)


def test_a_template_that_refuses_an_answer_fails_its_row(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, _ = server
    config = ask_for(tmp_path, ["thinks a", "fine b"])
    template = tmp_path / "strict.jinja"
    refusal = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('a question must be last') }}{% endif %}"
    template.write_text(refusal + (TARGET_DIR / "chat_template.jinja").read_text())
    config = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": template})})
    assert run(config, url).manifest.counts.failed == {"chat template": 1}
    assert read_failures(tmp_path / "out")[0] == ("failed", "chat template: a question must be last")


@pytest.mark.parametrize("key", [f"{KEY}\r\n{KEY}", f"{KEY}\x7f{KEY}", f"{KEY}\u2019", f"\udc80{KEY}"])
def test_what_is_no_key_is_refused_before_any_request(
    tmp_path: Path, server: tuple[str, Seen], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    url, seen = server
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(
        SettingError, match=r"OPENAI_API_KEY: expected printable ASCII, got another .* position"
    ) as told:
        run(ask_for(tmp_path, ["fine a"]), url)
    assert KEY not in str(told.value)
    assert not seen.bodies
    assert not any(KEY.encode() in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())


@pytest.mark.parametrize("told", [str, repr, json.dumps, lambda header: repr(header.encode())])
def test_no_detail_holds_the_key_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[str], str]
) -> None:
    key = "sk-'a\\\"secret"
    monkeypatch.setenv("OPENAI_API_KEY", key)

    async def refuse(*_arguments: Any, **_options: Any) -> None:
        await asyncio.sleep(0)
        raise openai.APIConnectionError(request=None) from RuntimeError(told(f"Bearer {key}"))  # type: ignore[arg-type]

    monkeypatch.setattr("openai.resources.chat.completions.AsyncCompletions.create", refuse)
    with pytest.raises(RegenerationError, match="no conversation was answered"):
        run(ask_for(tmp_path, ["fine a"]), "http://127.0.0.1/v1")
    assert "secret" not in read_failures(tmp_path / "out")[0][1]


def test_one_failure_after_the_other_ends_the_run(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, seen = server
    config = ask_for(tmp_path, [f"400 {row}" for row in range(100)], concurrency=4)
    with pytest.raises(RegenerationError, match=r"32 rows in a row failed, the last with status 400"):
        run(config, url)
    assert seen.attempts().total() < 45


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(RegenerationError, match=r"no conversation was answered; the causes are in .*failures\.jsonl"):
        run(ask_for(tmp_path, ["fine a"], max_retries=0), url)
    assert read_failures(tmp_path / "out")[0][1].startswith("lost connection: ConnectError")


def test_answers_of_no_use_are_dropped_and_never_asked_again(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, seen = server
    config = ask_for(tmp_path, ["length a", "empty b", "calls c", ["fine d", "length e", "fine f"], "fine g"])
    counts = run(config, url).manifest.counts
    answers = read_answers(tmp_path / "out")
    assert [message["content"] for message in answers[3]] == ["fine d", "answer to fine d"]
    assert sorted(answers) == [3, 4]
    assert counts.dropped == {
        "the answer did not end within its tokens": 1,
        "empty answer": 1,
        "the target called a tool, and none is run here": 1,
    }
    assert (counts.num_cut, counts.num_turns) == (1, 2)
    assert run(config, url).num_recorded == 0
    assert seen.attempts().total() == 6


@pytest.mark.parametrize("end", ["abort", "error", "null", "rubbish"])
def test_an_end_that_is_none_is_asked_again(tmp_path: Path, server: tuple[str, Seen], end: str) -> None:
    url, seen = server
    counts = run(ask_for(tmp_path, [f"end1 {end}", f"end {end}", "fine c"]), url).manifest.counts
    answers = read_answers(tmp_path / "out")
    assert {row: messages[-1]["content"] for row, messages in answers.items()} == {
        0: f"answer to end1 {end}", 2: "answer to fine c",
    }  # fmt: skip
    assert seen.attempts() == {f"end1 {end}": 2, f"end {end}": 3, "fine c": 1}, "max_retries is 2"
    assert counts.failed == {"answer broken off": 1}
    said = "None" if end == "null" else end
    assert read_failures(tmp_path / "out")[1] == ("failed", f"answer broken off: finish_reason {said!r}")


@pytest.mark.parametrize("end", ["stop", "eos", "eos_token", "STOP"])
def test_known_ends_are_whole_answers(tmp_path: Path, server: tuple[str, Seen], end: str) -> None:
    url, seen = server
    counts = run(ask_for(tmp_path, [f"end {end}"]), url).manifest.counts
    assert (counts.num_answered, counts.num_unfinished, counts.num_text) == (1, 0, 1)
    assert seen.attempts().total() == 1


def test_what_a_filter_or_a_stop_text_cut_is_no_whole_answer(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, _ = server
    counts = run(ask_for(tmp_path, ["end content_filter", "stopped b", "fine c"]), url).manifest.counts
    assert counts.dropped == {"the server's filter cut the answer": 1, "the answer did not end within its tokens": 1}
    assert counts.num_unfinished == 1


THINKS = "inline Let me think.\n</think>\n\nfour"


def test_thinking_within_an_answer_that_the_template_cuts_is_refused(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, _ = server
    config = ask_for(tmp_path, [THINKS])
    template = tmp_path / "cuts.jinja"
    plain = (TARGET_DIR / "chat_template.jinja").read_text()
    template.write_text(plain.replace("{{ message['content'] +", "{{ message['content'].split('</think>')[-1] +"))
    assert template.read_text() != plain
    config = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": template})})
    with pytest.raises(RegenerationError, match=r"sends thinking before </think> in the answer.*leaves that out"):
        run(config, url)
    shown = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": None})})
    section = config.regenerate.model_copy(update={"path": tmp_path / "shown"})
    assert run(shown.model_copy(update={"regenerate": section}), url).manifest.counts.num_answered == 1


def test_truncated_answers_are_kept_on_demand(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, _ = server
    result = run(ask_for(tmp_path, ["length a"], truncated="keep"), url)
    assert read_answers(tmp_path / "out")[0][1]["content"] == "cut sh"
    assert result.manifest.counts.num_truncated == 1


def test_thinking_stays_beside_the_answer(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, _ = server
    config = ask_for(tmp_path, ["thinks a", "reasons b"])
    with pytest.raises(RegenerationError, match=r"does not render reasoning_content.*data\.chat_template"):
        run(config, url)
    template = tmp_path / "thinking.jinja"
    thinking = "{{ message.get('reasoning_content', '') + '</think>' + message['content'] }}"
    template.write_text(
        (TARGET_DIR / "chat_template.jinja").read_text().replace("{{ message['content'] +", thinking + "{{")
    )
    data = config.data.model_copy(update={"chat_template": template})
    config = config.model_copy(update={"data": data})
    config = config.model_copy(update={"regenerate": config.regenerate.model_copy(update={"path": tmp_path / "other"})})
    run(config, url)
    expected = {"role": "assistant", "content": "so", "reasoning_content": "hm"}
    assert [messages[1] for messages in read_answers(tmp_path / "other").values()] == [expected, expected]


def test_what_a_request_says(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, seen = server
    config = ask_for(
        tmp_path,
        [["fine a", "fine b"]],
        temperature=0.7,
        top_p=0.9,
        max_tokens=33,
        seed=5,
        served_model="named",
        chat_template_kwargs={"enable_thinking": False},
        extra_body={"top_k": -1},
    )
    run(config, url)
    first, second = seen.bodies
    assert first == {
        "model": "named",
        "messages": [{"role": "user", "content": "fine a"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 33,
        "seed": seed_of(5, row=0, turn=0),
        "chat_template_kwargs": {"enable_thinking": False},
        "top_k": -1,
        "return_token_ids": True,
    }
    assert [message["content"] for message in second["messages"]] == ["fine a", "answer to fine a", "fine b"]
    assert second["seed"] == seed_of(5, row=0, turn=1)
    assert seen.keys == {f"Bearer {KEY}"}
    everything = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert KEY.encode() not in everything


def test_as_many_at_a_time_as_asked_for_and_no_more(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, seen = server
    run(ask_for(tmp_path, [f"wait {row}" for row in range(12)], concurrency=4), url)
    assert seen.max_open == 4


def test_a_prompt_of_another_length_is_noticed(tmp_path: Path, server: tuple[str, Seen]) -> None:
    url, _ = server
    config = ask_for(tmp_path, ["long a"])
    assert run(config, url).manifest.counts.num_prompt_mismatches == 1


def test_an_address_and_one_back_end_are_needed(tmp_path: Path) -> None:
    config = ask_for(tmp_path, ["fine a"])
    for url in ("localhost:8000", "http://127.0.0.1:99999/v1", "http://[::1/v1", "http:///v1", "http://h:0/v1"):
        with pytest.raises(SettingError, match=r"--endpoint: expected an address such as http.*, got '") as told:
            run(config, url)
        assert repr(url) in str(told.value)
    for url, shown in (
        ("ftp://me:secret@host/v1", "ftp://host/v1"), ("me:secret@host/v1", "host/v1"),
        ("http:/me:secret@host/v1", "host/v1"), ("http://me:sec/ret@host/v1", "http://host/v1"),
    ):  # fmt: skip
        with pytest.raises(SettingError) as told:
            run(config, url)
        assert f"got '{shown}'" in str(told.value)
    with pytest.raises(SettingError, match=r"--endpoint http://a\.\..*/v1/@x: cannot be asked"):
        run(config, "http://me:secret@a..\u00e9/v1/@x?key=secret")
    with pytest.raises(SettingError, match=r"--endpoint http://a\.\..*/v1: cannot be asked: .*see to the address"):
        run(config, "http://a..\u00e9/v1")
    for endpoint, is_local in ((None, False), ("http://x/v1", True)):
        with pytest.raises(SettingError, match="name one back end"):
            regeneration.regenerate(config, endpoint=endpoint, is_local=is_local)
    nowhere = config.model_copy(update={"regenerate": RegenerateSection()})
    with pytest.raises(SettingError, match="give --out"):
        run(nowhere, "http://x/v1")


@pytest.mark.parametrize(
    ("name", "proxy", "message"),
    [
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:1", "a SOCKS proxy needs the package socksio"),
        ("HTTP_PROXY", "ftp://me:secret@127.0.0.1:1", "expected an address"),
        ("HTTPS_PROXY", "http://me:secret@127.0.0.1:99999", "expected an address"),
        ("all_proxy", "[::1", "expected an address"),
    ],
)
def test_a_proxy_of_no_use_is_named(
    tmp_path: Path, server: tuple[str, Seen], monkeypatch: pytest.MonkeyPatch, name: str, proxy: str, message: str
) -> None:
    url, seen = server
    monkeypatch.setattr(endpoints, "find_spec", lambda _name: None)
    monkeypatch.setenv(name, proxy)
    with pytest.raises(SettingError, match=f"{name.upper()} of the environment: {message}") as told:
        run(ask_for(tmp_path, ["fine a"]), url)
    assert "secret" not in str(told.value)
    assert not seen.bodies
    monkeypatch.setenv("NO_PROXY", "*")
    run(ask_for(tmp_path, ["fine a"]), url)


def start(config: Config, folder: Path, url: str, *options: str) -> subprocess.Popen[str]:
    file = folder / "config.toml"
    file.write_text(to_toml(config))
    command = [sys.executable, "-m", "pipeline.cli", "regenerate", str(file), "--endpoint", url, *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def await_questions(seen: Seen, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(seen.times) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_waits_for_what_is_on_its_way_and_a_kill_repeats_only_that(
    tmp_path: Path, server: tuple[str, Seen]
) -> None:
    url, seen = server
    config = ask_for(tmp_path, [f"wait {row}" for row in range(40)])
    process = start(config, tmp_path, url, "--concurrency", "3")
    await_questions(seen, 4, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    num_asked = len(seen.times)
    assert f"stopped: {num_asked} rows done by this run, {40 - num_asked} open; run the same command" in output
    assert "SIGINT: answers on their way" in errors
    process = start(config, tmp_path, url, "--concurrency", "3")
    await_questions(seen, num_asked + 5, process)
    process.kill()
    process.communicate(timeout=60)
    result = run(config, url)
    assert (result.num_open, len(read_answers(tmp_path / "out"))) == (0, 40)
    repeated = [question for question, count in seen.attempts().items() if count > 1]
    assert len(repeated) <= 3, "what was on its way at the kill"
    assert not set(repeated) & {f"wait {row}" for row in range(num_asked)}


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the embedded target, on a port that was free a moment ago."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(TARGET_DIR)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        await_health(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
        log.close()


def await_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)


def test_a_real_server_says_what_the_target_says_here(tmp_path: Path, real_server: str) -> None:
    """Without sampling, so that both back ends must give the same text; prompts are counted alike on both sides."""
    questions: list[str | list[str]] = [
        "How do I call sndhdr.test_sndr?",
        ["What is the signature of operator.ior?", "What does operator.ior do?"],
        "List the methods of codeop.Compile.",
    ]
    config = ask_for(
        tmp_path, questions, temperature=0.0, max_tokens=40, truncated="keep", served_model=str(TARGET_DIR)
    )
    target = config.target.model_copy(update={"model": str(TARGET_DIR), "dtype": "float32"})
    config = config.model_copy(update={"target": target})
    result = run(config, real_server)
    assert result.manifest.counts.num_prompt_mismatches == 0
    assert result.manifest.counts.num_turns == 4
    local = config.model_copy(update={"regenerate": config.regenerate.model_copy(update={"path": tmp_path / "local"})})
    regeneration.regenerate(local, endpoint=None, is_local=True)
    served, here = (
        {row: [message["content"].rstrip() for message in messages] for row, messages in read_answers(folder).items()}
        for folder in (tmp_path / "out", tmp_path / "local")
    )
    assert served == here, "that server strips what it says"


def test_a_real_server_refuses_another_model(tmp_path: Path, real_server: str) -> None:
    config = ask_for(tmp_path, ["How do I call f?"], served_model="nobody/knows")
    with pytest.raises(RegenerationError, match="no conversation was answered"):
        run(config, real_server)
    assert read_failures(tmp_path / "out")[0][1].startswith("status 400: ")
    assert "nobody/knows" in read_failures(tmp_path / "out")[0][1]


def test_an_address_with_secrets_leaves_none_and_is_continued(
    tmp_path: Path, server: tuple[str, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = server
    monkeypatch.delenv("OPENAI_API_KEY")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(ask_for(tmp_path, ["fine a", "echo b", "fine c"])))
    output = ""
    for secret in ("first5ecret", "second5ecret"):  # a new token makes no other answers
        address = url.replace("//", f"//user:{secret}@") + f"?version=v5&token={secret}"
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "--verbose", "regenerate", str(file), "--endpoint", address],
            capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        output += done.stdout + done.stderr
    assert seen.attempts() == {"fine a": 1, "echo b": 2, "fine c": 1}
    assert "no /v1/chat/completions?version=v5&token=*** for Basic ***" in read_failures(tmp_path / "out")[1][1]
    kept = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for secret in ("5ecret", *(b64encode(f"user:{which}5ecret".encode()).decode() for which in ("first", "second"))):
        assert secret not in output
        assert secret.encode() not in kept
