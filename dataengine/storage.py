"""Where datasets and corpora are: any fsspec URL. The only module that touches fsspec.

A dataset's root is a `Store`: whole objects in, whole objects out, each appearing under its name at once. What it
promises on which kind of store: docs/storage.md.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.config import conf
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dataengine._disk import Disk
from dataengine._objects import Entry, Filesystem
from dataengine._objects import _tag as tag_of
from dataengine._patience import StoreError, patiently
from dataengine._redact import check_credentials, check_root, redacted
from dataengine._s3 import Bucket
from dataengine._tars import Buffer

__all__ = ["Entry", "Store", "StoreError", "cached", "expand", "open_url", "redacted", "split_url", "tag"]

_S3 = ("s3", "s3a")

_CONNECT = {"connect_timeout": 10, "read_timeout": 60, "max_pool_connections": 64}
"""Seconds without a connection or a byte until a call is tried again; connections for several objects at once."""


class Store:
    """A dataset root on a local disk or an object store; paths are relative to it, with forward slashes.

    `url` is what a worker needs to connect; `name` is the same for people: logs, plans, messages and pages show this
    one, which holds no secret. Every failure but a missing object is a StoreError.
    """

    def __init__(self, root: str | Path) -> None:
        check_root(root)
        self.fs, base = url_to_fs(str(root), **_s3_settings(str(root)))
        self.base = base.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.url = self.base if self.local else str(root).rstrip("/")
        self.name = redacted(self.url)
        self._objects: Disk | Bucket | Filesystem
        if self.local:
            self._objects = Disk(self.base)
        elif _is_s3(self.fs):
            self.fs.retries = 1  # dataengine/_patience.py is the one layer that retries
            self._objects = Bucket(self.fs, self.base, self.name)
        else:
            self._objects = Filesystem(self.fs, self.base, self.name)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """The whole object, never a part of it; FileNotFoundError when there is none."""
        return self._objects.read(path)

    def read_many(self, paths: Iterable[str], threads: int = 32) -> Iterator[tuple[str, bytes | None]]:
        """Many small objects, read in parallel and given in the order asked; None for one that is not there.

        Only a few hundred are held at a time, so that a slow consumer of a million fills no memory.
        """

        def read(some: Sequence[str]) -> list[tuple[str, bytes | None]]:
            return [(path, self._read_or_none(path)) for path in some]

        # A local read takes less time than a thread to be told of it.
        left, size = iter(paths), 64 if self.local else 4
        pending: deque[Future[list[tuple[str, bytes | None]]]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="read_many")
        try:
            while True:
                while len(pending) < 2 * threads and (some := list(islice(left, size))):
                    pending.append(pool.submit(read, some))
                if not pending:
                    return
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read_or_none(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def copy(self, path: str, handle: int) -> int:
        """Write the whole object over the beginning of an open file; its size. It is never all in memory.

        FileNotFoundError when there is none. Errors of the open file are raised as they are.
        """
        if isinstance(self._objects, Disk):
            with Path(self.base, path).open("rb") as source, os.fdopen(os.dup(handle), "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 22)
                return sink.tell()
        return self._objects.copy(path, handle)

    def local_path(self, path: str) -> Path:
        """A file of this machine with the object's bytes: itself on a disk, else a cached copy of this version."""
        if isinstance(self._objects, Disk):
            return Path(self.base, path)
        target = _cache_path(f"{self.url}/{path}", self._objects.tag(path))
        return target if target.exists() else _filled(target, iter([self.read(path)]))

    def exists(self, path: str) -> bool:
        """Whether an object of this name is there, asked of the store and not of a cache."""
        return self._objects.exists(path)

    def entries(self, folder: str) -> list[Entry]:
        """Name, size and tag of the objects directly in a folder, by name; empty when there is no such folder.

        One listing (of pages of a thousand objects, on S3). What a killed `put` left on a disk is not among them.
        """
        return self._objects.entries(folder)

    def files(self, folder: str) -> list[str]:
        """Names of the objects directly in a folder, sorted; empty when there is no such folder."""
        return self._objects.files(folder)

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder, sorted; empty when there is no such folder."""
        return self._objects.folders(folder)

    def find(self) -> Iterator[str]:
        """Every object under the root, as sorted relative paths."""
        yield from self._objects.find()

    # -- writing ------------------------------------------------------------------------------------------------------

    def publish(self, path: str, data: bytes | Sequence[Buffer]) -> bool:
        """Make a whole object appear under `path`; False, and nothing changed, when one is already there.

        Data in pieces is written piece by piece where the store allows that, and joined where not.

        Local disk: written and synced without a name, hard-linked to its name (which fails if it is taken), folder
        synced. Object store: one conditional put, or a multipart upload completed on that condition. After an error
        the object is there whole or not at all.
        """
        if isinstance(self._objects, Disk):
            return self._objects.publish(path, [data] if isinstance(data, bytes) else data)
        return self._objects.publish(path, data if isinstance(data, bytes) else b"".join(data))

    def put(self, path: str, data: bytes) -> None:
        """Make a whole small object appear under `path`, in place of what is there: heartbeats, status, caches.

        Not synced on a disk: after a power failure it may be old or empty, so a reader must bear what it cannot parse.
        """
        self._objects.put(path, data)

    def append(self, path: str, line: str) -> None:
        """Add a line to a log on a local disk; object stores keep no logs. Never needed for correctness."""
        if isinstance(self._objects, Disk):
            self._objects.append(path, line)

    def remove(self, path: str) -> None:
        """Delete one object; nothing happens when it is gone already."""
        self._objects.remove(path)

    def take(self, path: str) -> bytes | None:
        """Delete one object and return what it held; None when there was none.

        On a disk these are exactly the bytes that were deleted; on an object store another writer may come between.
        """
        if isinstance(self._objects, Disk):
            return self._objects.take(path)
        data = self._read_or_none(path)
        if data is not None:
            self.remove(path)
        return data

    def remove_many(self, paths: Iterable[str]) -> None:
        """Delete objects, a thousand at a time where the store can."""
        self._objects.remove_many(list(paths))

    def abort_uploads(self, older: float) -> list[str]:
        """Abort multipart uploads that began more than `older` seconds ago and never ended; the paths they were for.

        They are invisible but billed: what killed processes left on S3. Nothing to do on any other store.
        """
        return [] if isinstance(self._objects, Disk) else self._objects.abort_uploads(older=older)


def _s3_settings(url: str) -> dict[str, Any]:
    """Keyword arguments for s3fs, on top of what the user configured for fsspec: no retries of its own, few timeouts.

    The endpoint is named so that fsspec does not hand out the connection that it keeps for another one.
    """
    if url.partition("://")[0] not in _S3:
        return {}
    configured = {**conf.get("s3", {})}
    settings: dict[str, Any] = {
        "config_kwargs": {
            **_CONNECT,
            # Trailing checksums are unknown to many stores of this protocol; Content-MD5 is known to all.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            **configured.get("config_kwargs", {}),
            "retries": {"total_max_attempts": 1},
        }
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_url" not in configured:
        settings["endpoint_url"] = endpoint
    return settings


def _is_s3(fs: Any) -> bool:
    protocol = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return bool(set(protocol) & set(_S3))


def split_url(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it; ValueError for credentials that it would not use."""
    check_credentials(url)
    fs, path = url_to_fs(url)
    return fs, path


def tag(url: str) -> str:
    """What changes when a file does, without reading it: its size, with its ETag or the time it was written."""
    fs, path = split_url(url)
    fs.invalidate_cache()
    return tag_of(patiently("looking for", redacted(url), lambda: fs.info(path)))


def open_url(url: str) -> IO[bytes]:
    """Open any fsspec URL or local path for reading bytes."""
    check_credentials(url)
    stream: IO[bytes] = fsspec.open(url, "rb").open()
    return stream


def expand(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """The URLs that a file, a folder, a glob or a brace range (`{000..012}`) names, sorted, kept when a suffix fits.

    A name that exists as it stands is taken literally; what a brace range names need not exist.
    """
    fs, path = split_url(url)
    pattern = any(c in path for c in "*?[{") and not fs.exists(path)
    if pattern and "{" in url:
        import braceexpand

        each = (expand(u, suffixes) if any(c in u for c in "*?[") else [u] for u in braceexpand.braceexpand(url))
        return sorted(u for urls in each for u in urls if u.lower().endswith(suffixes))
    if pattern:
        found = fs.glob(path)
    elif fs.isfile(path):
        found = [path]
    else:
        found = fs.find(path)
    kept = sorted(f for f in found if f.lower().endswith(suffixes))
    return [f if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(f) for f in kept]


def cached(url: str, download: bool = True) -> Path:
    """A local copy of a remote file, kept in the user's cache; FileNotFoundError when it may not be downloaded."""
    target = _cache_path(url)
    if target.exists():
        return target
    if not download:
        raise FileNotFoundError(f"{redacted(url)} is not on this machine, and downloads are off")
    with open_url(url) as source:
        return _filled(target, iter(lambda: source.read(1 << 22), b""))


def _cache_path(url: str, tag: str = "") -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dataengine"
    name = url.partition("?")[0].rsplit("/", 1)[-1]  # a query may be a secret
    return base / hashlib.sha256(f"{url}{tag and chr(10)}{tag}".encode()).hexdigest()[:24] / name


def _filled(target: Path, blocks: Iterator[bytes]) -> Path:
    """The file with these bytes, which appears when it is whole; others may be making it at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as sink:
            for block in blocks:
                sink.write(block)
            os.fchmod(handle, 0o644)
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise
    return target
