"""What may be shown of text that comes from files, names, URLs and libraries; imports nothing.

Two things never reach a terminal or a message: characters that a terminal would act on, and what is secret in a URL
(user names and passwords, parameters, fragments).  Every error's message, every line of a report and everything that
the command line prints goes through the functions below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

SHORTEST = 4  # characters from which on a secret is searched for in a library's message; shorter ones are everywhere

# Patterns are text and compiled by their first use: few runs show a URL.
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{1,30}"
_START = rf"{_SCHEME}:/+(?=[^/\s])"  # one slash too: pathlib makes one of two
_STOP = r"[\s'\"<>`]"  # where a URL ends that stands in a text
_WITH_USER = r"(?i:https?|ftps?|sftp|ssh|webdavs?|smb)\b"  # schemes of URLs that may name a user and no password
_AT, _COLON = r"@|%(?:25)*40", r":|%(?:25)*3[aA]"
_TAIL = r"(?is)([?#]|%(?:25)*(?:3f|23))(?=.).*|(;|%(?:25)*3b)(?!…)[^/?#]+"
_HOST = r"(?i)(?:localhost|\d+\.\d+\.\d+\.\d+|\[[0-9a-f:.]+\])(?::\d+)?"
_NAMED = (
    r"(?i)\b((?:x-amz-[\w-]+|x-goog-[\w-]+|signature|sig|sas|(?:access_?|auth_?|api_?|secret_?)?(?:token|key)"
    r"|password|passwd|secret|authorization)['\"]?\s*(?:[=:]|%3d)\s*['\"]?(?:bearer |basic )?)[^\s&'\",;)}]+"
)
_IN_PATH = (
    r"(?i)\b((?:x-amz-[\w-]+|signature|sig|(?:access_?|auth_?)?token|(?:api|access|secret)_?key|password|secret)=)"
    r"[^/?#&;]+"
)
_USER = r"(?<![\w/:.-])[^\s/@:'\"<>=]+:[^\s/@'\"<>]+@(?=[A-Za-z\d\[])"  # of an address without a scheme, as of a proxy
_NAMED_HOST = r"(?i)(?:(?:[a-z0-9-]+\.)*[a-z][a-z0-9-]*|\d+\.\d+\.\d+\.\d+|\[[0-9a-f:.]+\])(?::\d+)?"
_NAMED_FILE = r"(?i)[^/]+\.(?:pth|pt|bin|ckpt|safetensors|tar|zip|pkl|th|json|toml|ya?ml|txt|model)"
_PLAIN_OPTIONS = {
    *("endpoint_url", "endpoint", "host", "port", "protocol", "target_protocol", "region_name", "region", "project"),
    *("revision", "repo_type", "version_aware", "cache_storage", "requester_pays", "signature_version", "mode"),
}


def visible(text: str) -> str:
    """A text in one line as a terminal may show it: characters that are not printable are escaped, line ends too.

    >>> visible("fc\\x1b[31m.bias"), visible("a\\u202eb")
    ('fc\\\\x1b[31m.bias', 'a\\\\u202eb')
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def visible_lines(text: str) -> str:
    """A text of several lines as a terminal may show it: only line feeds stay as they are.

    >>> visible_lines("fc\\x1b[31m\\nbias\\r")
    'fc\\\\x1b[31m\\nbias\\\\r'
    """
    if text.replace("\n", "").isprintable():
        return text
    return "\n".join(map(visible, text.split("\n")))


def without_secrets(text: str) -> str:
    """A text whose URLs have lost users, passwords, parameters and fragments, however they are spelled.

    >>> without_secrets("https://me:secret@host/model.pth?X-Amz-Signature=abc is missing")
    'https://host/model.pth?… is missing'
    """
    if ":/" not in text:
        return text
    begins, ends = re.compile(_START), re.compile(_STOP)
    done, at = [], 0
    while start := begins.search(text, at):
        stop = ends.search(text, start.end())
        url = text[start.start() : stop.start() if stop else len(text)].rstrip(").,:;")
        done += [text[at : start.start()], url_without_secrets(url)]
        at = start.start() + len(url)
    return "".join([*done, text[at:]])


def url_without_secrets(url: str) -> str:
    """A URL, or several that are chained, without what is secret in it; the whole text is taken for a URL.

    A password may hold characters that should have been escaped in it.  Where it is open whether something is part of
    one, it is left out, and an ellipsis says so.

    >>> url_without_secrets("http://user:s3/cr3t@host/a.pth#s3cr3t")
    'http://…@host/a.pth#…'
    >>> url_without_secrets("zip://a.pth::HTTPS://user:p@ss@host/a;sig=1/b.zip")
    'zip://a.pth::HTTPS://…@host/a;…/b.zip'
    """
    found = list(re.finditer(_START, url))
    if not found:
        return url
    ends = [*(start.start() for start in found[1:]), len(url)]
    parts = [_cleaned(start[0], url[start.end() : end]) for start, end in zip(found, ends, strict=True)]
    return url[: found[0].start()] + "".join(parts)


def _cleaned(scheme: str, rest: str) -> str:
    """What follows a scheme, without its secrets."""
    link = "::" if rest.endswith("::") else ""
    rest = rest.removesuffix("::") if link else rest
    authority = re.split(r"[/?#]|%(?:25)*(?:3f|23|2f)", rest, maxsplit=1, flags=re.I)[0]
    ats = list(re.finditer(_AT, rest))
    if ats and _may_be_user(scheme, authority, rest[ats[-1].end() :]):
        is_open = len(ats) > 1 or ats[0].start() > len(authority) or rest.startswith("…@")
        rest = "…@" * is_open + rest[ats[-1].end() :]
    return scheme + re.sub(_TAIL, lambda mark: f"{mark[1] or mark[2]}…", re.sub(_IN_PATH, r"\1…", rest)) + link


def _may_be_user(scheme: str, authority: str, after: str) -> bool:
    """Whether a URL with an ``@`` in it may have a user or a password.

    That is judged by what stands before its first slash, and by whether ``after`` its last ``@`` a host may follow.
    """
    has_colon = re.search(_COLON, authority) is not None
    takes_user = re.match(_WITH_USER, scheme) is not None
    if re.search(_AT, authority):
        return has_colon or takes_user
    if re.fullmatch(_HOST, authority):
        return False
    if has_colon or not takes_user:
        return has_colon
    host = re.split(r"[/?#]|%(?:25)*(?:3f|23|2f)", after, maxsplit=1, flags=re.I)[0]
    is_host = re.fullmatch(_NAMED_HOST, host) is not None and re.fullmatch(_NAMED_FILE, after) is None
    return is_host or "." not in authority


def secrets_of(url: str, options: Mapping[str, object]) -> list[str]:
    """The texts that are secret in a URL and in the options of its file system, longest first.

    >>> secrets_of("https://me:pass@host/a?sig=abcd", {"token": "efgh", "anon": True})
    ['sig=abcd', 'me:pass', 'abcd', 'efgh', 'pass']
    """
    found: set[str] = set(_texts(options))
    for part in re.split(rf"(?={_SCHEME}:/+)", url):
        rest = re.sub(rf"^{_SCHEME}:/+", "", part)
        user, at, _ = rest.rpartition("@")
        if at and _cleaned(part[: len(part) - len(rest)], rest) != part:
            found |= {user, *user.split(":", 1)[1:]}
        for tail in re.split(r"[?#;]", rest)[1:]:
            found |= {tail, *(pair.partition("=")[2] or pair for pair in re.split("[&/]", tail))}
    return sorted((text for text in found if len(text) >= SHORTEST), key=lambda text: (-len(text), text))


def _texts(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _texts(value)
        elif isinstance(value, tuple):  # such as aiohttp's BasicAuth
            yield from _texts({f"{name}.{index}": each for index, each in enumerate(value)})
        elif isinstance(value, (str, bytes)) and name not in _PLAIN_OPTIONS:
            yield value if isinstance(value, str) else value.decode("latin-1")


def without_these(text: str, secrets: Iterable[str]) -> str:
    """A library's message without the secrets that it was given, in whatever spelling, nor values that look like one.

    >>> without_these("GET /a?X-Amz-Signature=abc by me%3Apass failed", ["me:pass"])
    'GET /a?X-Amz-Signature=… by … failed'
    """
    from urllib.parse import quote, quote_plus, unquote

    spellings = (str, unquote, quote_plus, quote, lambda secret: repr(secret)[1:-1])
    for spelled in (spell(secret) for secret in secrets for spell in spellings):
        if len(spelled) >= SHORTEST:
            text = text.replace(spelled, "…")
    return re.sub(_USER, "…@", re.sub(_NAMED, r"\1…", without_secrets(text)))
