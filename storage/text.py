"""Text for people: what files and users bring is made fit for a terminal and a log, without anybody's password."""

import datetime
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
# Shorter secrets are words of their own right in other text: they are replaced only beside what they stand beside.
MIN_SECRET_CHARS = 6
MIN_TOKEN_CHARS = 16  # of a login without a name: shorter ones are names of users and containers (assumption)

# In these a number before a slash is a port; elsewhere, as in the address of a data base, it begins a password.
_PORTED = r"(?i:https?|s?ftp|ssh|s?webhdfs|hdfs|webdavs?|smb|git)://"
_SCHEME = r"(?<![A-Za-z0-9+.\-])[A-Za-z0-9+.\-]+://"
# Names of a parameter; or it has one of the second line in it.
_SENSITIVE = r"""(?:sig|sas|key|code|pass|odbc_connect
    |[\w.\-]*(?:token|secret|passw(?:or)?d|pwd|api[_-]?key|access[_-]?key|signature|credential|auth)[\w.\-]*)"""


def _login(space: str) -> re.Pattern[str]:
    """A scheme, then what stands before an @, without the characters of ``space``."""
    return re.compile(
        rf"""(?=(?P<ported>{_PORTED})?)({_SCHEME})
            (?:[^/?\#{space}]*                                      # all of the host's part,
              |[^/:@?\#{space}]+:(?!:)(?(ported)(?!\d{{1,5}}/))     # or a name and a secret with slashes in it
               [^@{space}]*(?:@[^@/?\#{space}]*)*)@
        """,
        re.VERBOSE,
    )


_LOGIN = _login(r"\s\"'")  # in running text
_WHOLE_LOGIN = _login("")  # where the address is all that there is
_ADDRESS = re.compile(rf"(?!(?:file|local)://){_SCHEME}[^\s\"']*")
_QUERY = re.compile(rf"([?&;\#]{_SENSITIVE}=)[^&;\#\s\"'<>]*", re.VERBOSE | re.IGNORECASE)
_WHOLE_QUERY = re.compile(rf"[?&;\#]({_SENSITIVE}=([^&\#]+))", re.VERBOSE | re.IGNORECASE)
_HOST = re.compile(r"(?:[^:\s]*|\[[^\]\s]*\])(?::\d*)?")
_remembered: dict[str, str] = {}  # secret: what is shown in its place


def remember_secrets(address: str) -> None:
    """Have the secrets of an address that a user gave hidden wherever `redact` meets them: libraries repeat them.

    Within one address they are told apart whatever they hold, spaces and quotes too. For this process, and its forks.
    """
    for part in re.split(r"::(?=[A-Za-z][A-Za-z0-9+.\-]*://)", address):
        for secret, shown in _secrets_of(part):
            if HIDDEN not in secret:
                _remembered.update(dict.fromkeys(_spellings(secret), shown))


def _secrets_of(address: str) -> Iterator[tuple[str, str]]:
    match = _WHOLE_LOGIN.match(address)
    login = match[0][len(match[2]) : -1] if match else ""
    name, colon, secret = login.partition(":")
    if secret:
        yield login, HIDDEN
        yield f":{secret}@", f":{HIDDEN}@"
    elif not colon and len(login) >= MIN_TOKEN_CHARS:
        yield login, HIDDEN
    for piece in {secret, *re.split(r"[/?#]", secret)}:  # at these a library may take it apart
        if len(piece) >= MIN_SECRET_CHARS and piece != name:
            yield piece, HIDDEN
    if "://" not in address or re.match(r"(?:file|local)://", address):
        return
    for pair, value in _WHOLE_QUERY.findall(address):
        yield pair, pair[: -len(value)] + HIDDEN
        if len(value) >= MIN_SECRET_CHARS:
            yield value, HIDDEN


def _spellings(secret: str) -> set[str]:
    """As libraries and files write it: encoded for an address or not, and escaped."""
    found = {secret, unquote(secret), quote(secret), quote(secret, safe="")}
    return {*found, *(repr(text)[1:-1] for text in found), *(json.dumps(text)[1:-1] for text in found)}


def redact(text: str) -> str:
    """The text without the logins of its addresses (`scheme://name:secret@host`) and secrets in their queries."""
    for secret in sorted(_remembered, key=len, reverse=True):
        text = text.replace(secret, _remembered[secret])
    text = _LOGIN.sub(rf"\2{HIDDEN}@", text)
    return _ADDRESS.sub(lambda match: _QUERY.sub(rf"\1{HIDDEN}", match[0]), text)


def redact_values(value: Any) -> Any:
    """A copy of what JSON can hold, its strings redacted; keys stay. Redacted JSON text would be none any more."""
    match value:
        case str():
            return redact(value)
        case dict():
            return {key: redact_values(item) for key, item in value.items()}
        case list() | tuple():
            return [redact_values(item) for item in value]
    return value


def without_login(address: str) -> str:
    """What may be shown of one address that a user gave, well formed or not: neither login nor query."""
    scheme, separator, rest = redact(address).partition("://")
    if not separator:
        scheme, rest = "", scheme
    rest = re.split(r"[?#]", rest)[0]
    host, slash, path = rest.partition("/")
    host = host.rpartition("@")[2]
    is_sound = separator and _HOST.fullmatch(host)
    return scheme + separator + (host + slash + path if is_sound else rest.rpartition("@")[2])


def printable(text: str, *, lines: bool = False, mark: str | None = None) -> str:
    """Text that a damaged or hostile file may have chosen, without what a terminal would obey or refuse.

    Such a character is shown as its escape sequence, or as ``mark``; ``lines`` keeps the ends of lines.
    """

    def show(char: str) -> str:
        if char.isprintable() or (lines and char == "\n"):
            return char
        return repr(char)[1:-1] if mark is None else mark

    return "".join(map(show, text))


def plain(text: str) -> str:
    """What may be shown of any text, in lines: printable, and without secrets."""
    return printable(redact(text), lines=True)


def format_duration(seconds: float) -> str:
    """As `01:02:03`, from a day on as `3 days, 01:02:03`; never negative."""
    days, rest = divmod(max(int(seconds), 0), 86_400)
    clock = f"{datetime.timedelta(seconds=rest)!s:0>8}"
    return clock if not days else f"{days:,} day{'' if days == 1 else 's'}, {clock}"


def format_bytes(count: int) -> str:
    """In the largest unit that it fills, from MB on."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,} bytes"
