"""Secrets in URLs: where they may stand, and how they are hidden from everything that is written or shown."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

HIDDEN = "***"

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>]+")
# Before the first slash stand a user and, after a colon, a password, which may hold slashes itself: AWS secrets do.
_PASSWORD = re.compile(r"://(?!arn:)[^/@:]*:[^@]*@(?:[^/@]*@)*")
_USER = re.compile(r"://[^/@:]+@")
_HOST = re.compile(r"://(?:\[[^\]/@]*\]|[^/@:]*)(?::\d+)?(?:[/?#]|$)")  # with its port, and no user before it
_VALUE = re.compile(r"([?&#;][^=&#;\s]*=)[^&#;\s]*")
_PAIR = re.compile(
    r"(?i)\b(aws_secret_access_key|aws_session_token|secret_?(?:access_?)?key|session_?token|access_?token|api_?key"
    r"|password|sas_?token|x-amz-(?:signature|security-token|credential)|authorization)"
    r"(['\"]?\s*[=:]\s*['\"]?)(?:(?:Bearer|Basic)\s+)?[^\s'\",;&]+"
)

_CONTAINER_AT_ACCOUNT = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes that write `container@account`: what stands before the @ is no user."""

_IN_ENVIRONMENT = {
    **dict.fromkeys(("s3", "s3a"), "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
    **dict.fromkeys(("gs", "gcs"), "GOOGLE_APPLICATION_CREDENTIALS"),
    **dict.fromkeys(("abfs", "abfss", "az", "wasb", "wasbs", "adl"), "AZURE_STORAGE_CONNECTION_STRING"),
    **dict.fromkeys(("hf",), "HF_TOKEN"),
}
"""Schemes whose fsspec filesystem takes no credentials from a URL (it would make them part of the bucket's name)."""


def redacted(text: object) -> str:
    """A text, an error or a URL with every secret of its URLs replaced by ***: user and password, values of a query."""
    shown = _URL.sub(lambda found: _hidden(found[0]), str(text))
    return _PAIR.sub(rf"\1\2{HIDDEN}", shown)


def _hidden(url: str) -> str:
    scheme = url.partition("://")[0].rpartition("::")[2].lower()
    # A bucket has no port: digits after its colon are a secret that begins with them.
    host = _HOST.search(url)
    if host is None or (scheme in _IN_ENVIRONMENT and ":" in host[0][3:]):
        shown = _PASSWORD.sub(f"://{HIDDEN}@", url, count=1)
        if shown == url and scheme not in _CONTAINER_AT_ACCOUNT:
            shown = _USER.sub(f"://{HIDDEN}@", url, count=1)
        url = shown
    return _VALUE.sub(rf"\1{HIDDEN}", url)


def check_credentials(url: str | Path) -> None:
    """ValueError for a URL with a user and password that its filesystem would not use, before anything is done."""
    text = str(url)
    scheme = text.partition("://")[0].rpartition("::")[2].lower()
    if scheme in _IN_ENVIRONMENT and _hidden(text).partition("?")[0] != text.partition("?")[0]:
        raise ValueError(
            f"{redacted(text)}: {scheme} takes no credentials from a URL; set {_IN_ENVIRONMENT[scheme]} instead, "
            "for every process that works on it"
        )


def check_root(url: str | Path) -> None:
    """ValueError for a URL that cannot be a dataset root: chained, or with a query."""
    check_credentials(url)
    if "::" in str(url):
        raise ValueError(f"{redacted(url)}: a dataset root is a plain URL, no chain of them")
    if "://" in str(url) and urlsplit(str(url)).query:
        raise ValueError(
            f"{redacted(url)}: a dataset root has no ?query; give signatures and tokens in the environment of its store"
        )
