"""The only module that touches fsspec: whole objects in, whole objects out, each appearing under its name at once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


class Store:
    """A dataset root on a local disk or an object store; paths are relative to it, with forward slashes."""

    def __init__(self, root: str | Path) -> None:
        self.fs, base = url_to_fs(str(root))
        self.base = base.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.url = self.base if self.local else str(root).rstrip("/")

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def read(self, path: str) -> bytes:
        """The whole object; FileNotFoundError when there is none."""
        data: bytes = self.fs.cat_file(f"{self.base}/{path}")
        return data

    def local_path(self, path: str) -> Path:
        """A file of this machine with the object's bytes: itself on a local disk, else a cached copy."""
        return Path(self.base, path) if self.local else cached(f"{self.url}/{path}")

    def exists(self, path: str) -> bool:
        """Whether an object of this name is there, asked of the store and not of a cache."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(f"{self.base}/{path}"))

    def files(self, folder: str) -> list[str]:
        """Names of the objects directly in a folder, sorted; empty when there is no such folder."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(f"{self.base}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder, sorted; empty when there is no such folder."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(f"{self.base}/{folder}", detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "directory")

    def find(self) -> Iterator[str]:
        """Every object under the root, as sorted relative paths."""
        self.fs.invalidate_cache()
        for name in sorted(self.fs.find(self.base)):
            yield name[len(self.base) :].lstrip("/")

    def publish(self, path: str, data: bytes) -> bool:
        """Make a whole object appear under `path`; False, and nothing changed, when one is already there.

        Local disk: written and synced without a name, hard-linked to its name (which fails if it is taken), folder
        synced. Object store: one conditional put.
        """
        if self.local:
            return self._link(path, data)
        try:
            self.fs.pipe_file(f"{self.base}/{path}", data, mode="create")
        except FileExistsError:
            return False
        return True

    def _link(self, path: str, data: bytes) -> bool:
        target = Path(self.base, path)
        if target.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _written(target.parent, data) as source:
                # Linking by descriptor needs AT_SYMLINK_FOLLOW, which Python passes on only beside a directory.
                folder = os.open(target.parent, os.O_RDONLY)
                try:
                    os.link(source, target, src_dir_fd=folder, follow_symlinks=True)
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except FileExistsError:
            return False
        return True

    def append(self, path: str, line: str) -> None:
        """Add a line to a log on a local disk; object stores keep no logs. Never needed for correctness."""
        if self.local:
            target = Path(self.base, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("a") as stream:
                stream.write(line + "\n")

    def remove(self, path: str) -> None:
        """Delete one object."""
        self.fs.rm_file(f"{self.base}/{path}")


@contextmanager
def _written(folder: Path, data: bytes) -> Iterator[str]:
    """A synced file with these bytes that has no name in `folder` yet, as a path that can be linked to one.

    It is nameless where the file system can do that (O_TMPFILE), so that a killed process leaves nothing behind; else
    it lies in `.staging/` beside its target, where `gc` finds what was left.
    """
    try:
        handle, name = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o644), None
    except (OSError, AttributeError):
        staging = folder / ".staging"
        staging.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=staging)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(handle, 0o644)
            os.fsync(handle)
            yield name or f"/proc/self/fd/{handle}"
    finally:
        if name is not None:
            os.unlink(name)


def split_url(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it."""
    fs, path = url_to_fs(url)
    return fs, path


def open_url(url: str) -> IO[bytes]:
    """Open any fsspec URL or local path for reading bytes."""
    stream: IO[bytes] = fsspec.open(url, "rb").open()
    return stream


def expand(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """The URLs that a file, a folder, a glob or a brace range (`{000..012}`) names, sorted, kept when a suffix fits.

    A name that exists as it stands is taken literally; what a brace range names need not exist.
    """
    fs, path = url_to_fs(url)
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
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dataengine"
    target = base / hashlib.sha256(url.encode()).hexdigest()[:24] / url.rsplit("/", 1)[-1]
    if not target.exists():
        if not download:
            raise FileNotFoundError(f"{url} is not on this machine, and downloads are off")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        with open_url(url) as source, partial.open("wb") as sink:
            while block := source.read(1 << 22):
                sink.write(block)
        partial.replace(target)
    return target
