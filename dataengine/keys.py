"""Key rules: a key names a sample in every tar of a dataset, so it must survive every reader of tars."""

from __future__ import annotations

import hashlib
import re

MAX_KEY_BYTES = 90
"""A USTAR name has 100 bytes, and the suffix must fit after the key: `.det.json`, `.safetensors`."""

_VALID = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_BYTES}}}")
_FOREIGN = re.compile(r"[^A-Za-z0-9_]+")
_CLEAN = re.compile(r"[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*")
_HASHED = re.compile(r"-[0-9a-f]{16}$")


def is_key(key: str) -> bool:
    """Whether a key is letters, digits, `_` and `-` only, and short enough for a tar header."""
    return _VALID.fullmatch(key) is not None


def make_key(source: str, *parts: str) -> str:
    """The key of the item that `parts` name inside `source`; different items get different keys, always the same.

    Clean names are joined by `--`: ("00007", "000070012") gives `00007--000070012`. A name with anything else in it is
    sanitised, and 64 bits of the sha256 of the exact names are appended, as they are when the key would be too long.
    """
    names = (source, *parts)
    plain = "--".join(names)
    # A clean name that ends like a hash would meet a hashed one, so it is hashed as well.
    if all(_CLEAN.fullmatch(n) for n in names) and is_key(plain) and not _HASHED.search(plain):
        return plain
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    readable = "--".join(filter(None, (_FOREIGN.sub("-", n).strip("-") for n in names)))
    return f"{readable[: MAX_KEY_BYTES - 17].rstrip('-') or 'x'}-{digest}"
