"""Text for people: what files and users bring is made fit for a terminal and a log, without anybody's password."""

import datetime
import re

_LOGIN = re.compile(
    r"""([A-Za-z][A-Za-z0-9+.\-]*://)                # a scheme, then what stands before an @:
        (?:[^/\s"'?\#]*                              # all of the host's part,
          |[^/\s:@"'?\#]+:(?!\d{1,5}/)[^\s"'@]*)@    # or a name and a secret with slashes in it; a port is no secret
    """,
    re.VERBOSE,
)
_QUERY = re.compile(
    r"""([?&;#](?:sig|key                            # a parameter of one of these names, or with one of these in it
        |[\w.\-]*(?:token|secret|passw(?:or)?d|pwd|api[_-]?key|access[_-]?key|signature|credential|auth)[\w.\-]*)=)
        [^&;\#\s"']*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_HOST = re.compile(r"(?:[^:\s]*|\[[^\]\s]*\])(?::\d*)?")
HIDDEN = "***"


def redact(text: str) -> str:
    """The text without the logins of its addresses (`scheme://name:secret@host`) and secrets in their queries."""
    return _QUERY.sub(rf"\1{HIDDEN}", _LOGIN.sub(rf"\1{HIDDEN}@", text))


def login_of(address: str) -> str:
    """What `redact` hides before the @ of an address, or nothing: libraries repeat it without the scheme."""
    match = _LOGIN.match(address)
    return match[0][len(match[1]) : -1] if match else ""


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
