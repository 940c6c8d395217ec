"""Where the files of a corpus are: a file, a folder, a glob or a brace range on any filesystem, and its `?options`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qsl

from dataengine import plugins, storage
from dataengine.corpora import Split

_OPTIONS = re.compile(r"\?(\w+=[^?]*)$")
_PATTERN = re.compile(r"[*?\[{]")


def parse(text: str, defaults: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The URL of a `URL?name=value&name=value` location, and its options; ValueError for an unknown one."""
    options = dict(defaults)
    found = _OPTIONS.search(text)
    if found is None:
        return text, options
    for name, value in parse_qsl(found[1], keep_blank_values=True):
        if name not in options:
            hint = plugins.nearest(name, sorted(options))
            raise ValueError(
                f"{storage.redacted(text)}: unknown option {name!r}{hint}; known: {', '.join(options) or 'none'}"
            )
        options[name] = value
    return text[: found.start()], options


class Files:
    """The files of a location by names relative to its root, which does not depend on the machine or on what is there.

    The root is the folder itself, the folder of a single file, or the part of a pattern before its first wildcard.
    """

    def __init__(self, url: str, suffixes: tuple[str, ...]) -> None:
        self.url = url
        self.suffixes = suffixes
        self.fs, path = storage.split_url(url)
        # A signed link: what it signs is one file, whose name stands before the query.
        self._query = ""
        if "http" in self.fs.protocol:
            path, mark, query = path.partition("?")
            self._query = mark + query
        pattern = _PATTERN.search(path)
        if pattern and not self.fs.exists(path):
            self.root = path[: pattern.start()].rpartition("/")[0]
        elif path.lower().endswith(suffixes):
            self.root = path.rpartition("/")[0]
        else:
            self.root = path.rstrip("/")

    def names(self) -> list[str]:
        """Every file, sorted; ValueError when there is none. A brace range is taken at its word."""
        if self._query:
            name = self.url.partition("?")[0].rpartition("/")[2]
            if name.lower().endswith(self.suffixes):
                return [name]
            raise ValueError(f"{storage.redacted(self.url)}: expected a file ending in {' '.join(self.suffixes)}")
        with without_secrets():
            paths = [storage.split_url(url)[1] for url in storage.expand(self.url, self.suffixes)]
        found = sorted(path[len(self.root) :].lstrip("/") for path in paths)
        if not found:
            raise ValueError(
                f"{storage.redacted(self.url)}: expected files ending in {' '.join(self.suffixes)}, found none"
            )
        return found

    def path(self, name: str) -> str:
        """The path, in the filesystem, of a relative name."""
        return f"{self.root}/{name}{self._query}"

    def open(self, name: str) -> Any:
        """A file as a seekable binary stream."""
        with without_secrets():
            return self.fs.open(self.path(name), "rb")


@contextmanager
def without_secrets() -> Iterator[None]:
    """Errors of a filesystem quote the whole URL: one that holds a secret is raised again without it."""
    try:
        yield
    except Exception as error:
        said = storage.redacted(error)
        if said == str(error):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(said or type(error).__name__) from None


def pieces(source: str, bounds: Iterable[tuple[int, int]], shard_size: int) -> list[Split]:
    """Cut each range of items into the fewest splits of at most `shard_size`, all of nearly the same size."""
    if shard_size < 1:
        raise ValueError(f"shard size {shard_size}: expected at least 1")
    out = []
    for start, stop in bounds:
        count = -(-(stop - start) // shard_size)
        edges = [start + (stop - start) * i // count for i in range(count + 1)] if count else []
        out += [Split(source, a, b) for a, b in pairwise(edges)]
    return out
