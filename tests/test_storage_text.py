"""What people read: no secrets, nothing that a terminal obeys, durations beyond a day."""

import io
import logging
import re
from pathlib import Path

import click
import pytest
from rich.console import Console

from pipeline import cli, show
from pipeline.config import load_config, to_toml
from pipeline.logs import PlainConsole, PlainFormatter
from pipeline.sweep.record import read_trial, write_trial
from stages.whole_files import write_whole
from storage import CacheReader, CacheReadError
from storage.errors import CacheUsageError
from storage.remote import RemoteStore
from storage.text import (
    format_bytes,
    format_duration,
    plain,
    printable,
    redact,
    redact_values,
    remember_secrets,
    without_login,
)
from storage_cache import LENGTHS, fill_cache, make_header, plan_cache


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00"), (-3, "00:00:00"), (59.9, "00:00:59"), (3_661, "01:01:01"), (86_399, "23:59:59"),
        (86_400, "1 day, 00:00:00"), (30 * 3600, "1 day, 06:00:00"), (72.5 * 3600, "3 days, 00:30:00"),
        (1_000 * 86_400 + 36_000, "1,000 days, 10:00:00"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_bytes() -> None:
    found = [format_bytes(count) for count in (999_999, 1_000_000, 2_340_000_000, 38_000_000_000_000)]
    assert found == ["999,999 bytes", "1.00 MB", "2.34 GB", "38.00 TB"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://user:pw@host/db", "postgresql://***@host/db"),
        ("postgresql+psycopg2://user:p@ss@host:5432/db", "postgresql+psycopg2://***@host:5432/db"),
        ("s3://KEY:SECRET@bucket/cache", "s3://***@bucket/cache"),
        ("s3://KEY:SE/CR+ET/x@bucket/cache", "s3://***@bucket/cache"),
        ("https://token@host/path", "https://***@host/path"),
        ("https://host/a?X-Amz-Signature=abc&part=2&token=t", "https://host/a?X-Amz-Signature=***&part=2&token=***"),
        ("https://host/a?sig=abc#x", "https://host/a?sig=***#x"),
        ("cannot open 's3://A:B@c', nor https://u:p@h/x", "cannot open 's3://***@c', nor https://***@h/x"),
        ('{"storage": "mysql://u:p@h/d"}', '{"storage": "mysql://***@h/d"}'),
        ("hf://datasets/org/name@main/file.jsonl", "hf://datasets/org/name@main/file.jsonl"),
        ("http://host:8000/v1/models/a@b", "http://host:8000/v1/models/a@b"),
        ("mail a@b.c, then run x", "mail a@b.c, then run x"),
        ("/data/a=b?c", "/data/a=b?c"),
        ("/data/x&max_tokens=5/run, /d/run#auth=2", "/data/x&max_tokens=5/run, /d/run#auth=2"),
        ("file:///data/x&max_tokens=5/run", "file:///data/x&max_tokens=5/run"),
        ("mysql://u:12345/SECRET@h/db", "mysql://***@h/db"),
        ("zip://x::s3://AK:SECRET@b/z.zip", "zip://x::s3://***@b/z.zip"),
        ("zip://a.json::https://h/z@1/z.zip", "zip://a.json::https://h/z@1/z.zip"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3DSECRET", "mssql+pyodbc:///?odbc_connect=***"),
        ("http://h/c?pass=a&sas=b&code=c", "http://h/c?pass=***&sas=***&code=***"),
        ("<td>https://h/?token=abc</td>", "<td>https://h/?token=***</td>"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    ("address", "repeated", "shown"),
    [
        ("mysql://u:12345/S3CRET@h/db", "denied: u:12345/S3CRET", "denied: ***"),
        ("mysql://u:S3CR ET@h/db", "cannot parse 'mysql://u:S3CR ET@h/db'", "cannot parse 'mysql://***@h/db'"),
        ('mysql://u:S3CRET"x@h/db', 'mysql://u:S3CRET"x@h/db', "mysql://***@h/db"),
        ('mysql://u:S3CRET"x@h/db', r'{"storage": "mysql://u:S3CRET\"x@h/db"}', '{"storage": "mysql://***@h/db"}'),
        ("mssql+pyodbc://u:S3CRET?y#z@h/db", "password S3CRET?y#z", "password ***"),
        ("mysql://u:p@S3CRET@h/db", "p@S3CRET", "***"),
        ("postgresql+psycopg2://u:p%40S3CRET@h/db", "p@S3CRET or p%40S3CRET", "*** or ***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3DS3CRET", "no driver: UID=u;PWD=S3CRET", "no driver: ***"),
        ("zip://x::s3://AK:S3CRET@b/z.zip", "no bucket AK:S3CRET@b", "no bucket ***@b"),
        ("github://org:S3CRET@repo/x", "not found: /repos/org/S3CRET", "not found: /repos/org/***"),
        ("http://h/c?token=S3", "GET /c?token=S3 failed", "GET /c?token=*** failed"),
        ("http://u:pw@h/c", "pwd is up: u:pw@h", "pwd is up: ***@h"),
        ("s3://AKIA:ab/S3CRET+ef@bucket/x", "Key: S3CRET+ef@bucket/x", "Key: ***@bucket/x"),
        ("s3://postgres:postgres@b", "postgres", "postgres"),
        ("abfs://c@account/x", "abc@x", "abc@x"),
    ],
)
def test_what_libraries_repeat_of_an_address_is_hidden(address: str, repeated: str, shown: str) -> None:
    remember_secrets(address)
    assert plain(repeated) == shown


REASONS = [
    'cannot read "s3://b/x?token=abc": gone',
    "cannot load https://h/x?sig=ab\\cd of it",
    "https://h/a?token=x\nnext line matters",
    'got "https://h/?api_key=zz"',
]


@pytest.mark.parametrize("reason", REASONS)
def test_a_record_without_secrets_is_still_json(tmp_path: Path, reason: str) -> None:
    write_trial(tmp_path, {"number": 1, "state": "failed", "reason": reason})
    secret = re.compile(r"(token=|sig=|api_key=)[^\s\"]+")
    assert read_trial(tmp_path) == {
        "format_version": 1, "number": 1, "state": "failed", "reason": secret.sub(r"\1***", reason),
    }  # fmt: skip


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", "a?token=b\n")
    assert (tmp_path / "x").read_text() == "a?token=b\n"
    assert redact_values({"a": ["s3://k:v@b", 1, None]}) == {"a": ["s3://***@b", 1, None]}


def test_a_password_is_hidden_nowhere_in_a_local_path(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    run_dir = "/data/project12/x&max_tokens=5/run#auth=2"
    file.write_text(
        f'[target]\nmodel = "t"\n[data]\nfiles = ["a.jsonl"]\n[cache]\npath = "/c"\n[train]\nrun_dir = "{run_dir}"\n'
        '[sweep]\nstorage = "mysql://u:project12@h/db"\n[sweep.parameters]\n"train.seed" = [0, 1]\n'
    )
    text = to_toml(load_config(file))
    assert f'run_dir = "{run_dir}"' in text
    assert 'storage = "mysql://***@h/db"' in text


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:secret@host:8000/v1", "http://host:8000/v1"),
        ("http://secret@host/v1/@x", "http://host/v1/@x"),
        ("https://host/v1?code=secret#secret", "https://host/v1"),
        ("http://me:sec/ret@host/v1", "http://host/v1"),
        ("http://me:sec?ret#@host/v1", "http://host/v1"),
        ("http://me:sec ret@host/v1", "http://host/v1"),
        ("http://me:sec 'r/et@host/v1", "http://host/v1"),
        ("me:secret@host/v1", "host/v1"),
        ("http:/me:secret@host/v1", "host/v1"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
        ("http://[::1/v1", "http://[::1/v1"),
        ("host:8000", "host:8000"),
    ],
)
def test_an_address_is_shown_without_its_login(address: str, shown: str) -> None:
    assert without_login(address) == shown


def test_nothing_that_a_terminal_obeys() -> None:
    assert printable("a\x1b[31mb\u202e\nc\udc80") == "a\\x1b[31mb\\u202e\\nc\\udc80"
    assert printable("a\x1b\nb", lines=True) == "a\\x1b\nb"
    assert printable("a\x1b\nb", lines=True, mark="?") == "a?\nb"


HOSTILE = {"[/red]": "x[/y] \x1b[31m", "data": "[/] [bold] s3://KEY:SECRET@bucket \x1b]0;title\x07", "e": ""}


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_cache_of_hostile_words_is_shown_as_it_is(tmp_path: Path, is_plain: bool) -> None:
    cache = tmp_path / "x[/y]"
    plan_cache(cache, LENGTHS, make_header().model_copy(update={"provenance": HOSTILE}))
    fill_cache(cache)
    stream = io.StringIO()
    console = (PlainConsole if is_plain else Console)(file=stream, width=300, force_terminal=True)
    show.remote_cache(console, CacheReader(f"file://{cache}", staging=tmp_path / "s"))
    console.print(show._table("[/red]\x1b[5m"))
    shown = stream.getvalue()
    assert "made from: [/red]" in shown
    assert "x[/y] \\x1b[31m" in shown
    assert "s3://***@bucket \\x1b]0;title\\x07" in shown
    assert "SECRET" not in shown
    assert "\x1b[5m" not in shown
    assert "\x1b]0" not in shown


def test_an_address_without_samples_is_shown(tmp_path: Path) -> None:
    plan_cache(tmp_path / "c", LENGTHS)
    stream = io.StringIO()
    reader = CacheReader(f"file://{tmp_path / 'c'}", staging=tmp_path / "s", partial=True)
    show.remote_cache(Console(file=stream, width=200), reader)
    assert "11 planned, 0 readable" in stream.getvalue()


def test_log_lines_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.makeLogRecord({"msg": "%s", "args": ("s3://K:S@b \x1b[2J",)})
    assert PlainFormatter("%(message)s").format(record) == "s3://***@b \\x1b[2J"
    monkeypatch.setattr(cli, "load_config", lambda *_: (_ for _ in ()).throw(OSError("https://u:p@h \x1b[31m")))
    with pytest.raises(click.ClickException) as error:
        cli.main.main(["estimate", str(tmp_path / "c.toml")], standalone_mode=False)
    assert error.value.message == "https://***@h \\x1b[31m"


def test_a_saved_config_has_no_secrets_and_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        '[target]\nmodel = "t"\n[data]\nfiles = ["https://u:pw@host/a.jsonl?token=abc"]\n[cache]\npath = "/c"\n'
        '[sweep]\nstorage = "postgresql://user:pw@host/db"\n[sweep.parameters]\n"train.seed" = [0, 1]\n'
    )
    text = to_toml(load_config(file))
    assert "pw" not in text
    assert "abc" not in text
    (tmp_path / "saved.toml").write_text(text)
    assert to_toml(load_config(tmp_path / "saved.toml")) == text
    assert load_config(file).sweep.storage == "postgresql://user:pw@host/db", "what is used is what was given"


def test_an_address_whose_login_was_hidden_is_refused() -> None:
    with pytest.raises(CacheUsageError, match="its login was hidden"):
        RemoteStore("s3://***@bucket/cache")


def test_a_store_names_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore("s3://KEY:SE/CRET@bucket/cache")
    assert store.where("manifest.json") == "s3://***@bucket/cache/manifest.json"

    class Failing:
        def info(self, path: str) -> None:
            raise ValueError(f"no such thing: {path}")

    monkeypatch.setattr(store, "_connect", lambda: (Failing(), "KEY:SE/CRET@bucket/cache"))
    with pytest.raises(CacheReadError) as error:
        store.size("x")
    assert "SE/CRET" not in str(error.value)
    assert plain(str(error.value)).startswith("s3://***@bucket/cache/x: ValueError: no such thing: ***@bucket")
