"""Whole objects on a local or a shared POSIX file system."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dataengine._objects import Entry
from dataengine._patience import told
from dataengine._tars import Buffer

_PENDING = (".", ".tmp")
"""How the name of a file that `put` has not renamed yet begins and ends: never listed, `find` shows it to gc."""

_NO_FALLBACK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.EIO}
"""Why a nameless file may be refused although the file system could hold one: a named one would fare no better."""

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Disk:
    """The backend of a root on a file system: paths are relative to it."""

    def __init__(self, base: str) -> None:
        self._base = base

    def read(self, path: str) -> bytes:
        """The whole file."""
        with self._telling("reading", path):
            return Path(self._base, path).read_bytes()

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        with self._telling("looking for", path):
            return Path(self._base, path).is_file()

    def entries(self, folder: str) -> list[Entry]:
        """Name, size and tag of the files of a folder, by name."""
        out = []
        for entry in self._scan(folder):
            with suppress(FileNotFoundError):  # deleted since the folder was read
                if _listed(entry):
                    there = entry.stat()
                    out.append(Entry(entry.name, there.st_size, tag_of(there)))
        return sorted(out)

    def files(self, folder: str) -> list[str]:
        """The names of the files of a folder; quicker than `entries`."""
        return sorted(entry.name for entry in self._scan(folder) if _listed(entry))

    def folders(self, folder: str) -> list[str]:
        """The names of the folders of a folder."""
        return sorted(entry.name for entry in self._scan(folder) if entry.is_dir())

    def find(self) -> list[str]:
        """Every file under the root, whatever its name."""

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise told("listing", str(error.filename), error)

        found = os.walk(self._base, onerror=refuse, followlinks=True)
        return sorted(os.path.relpath(os.path.join(folder, n), self._base) for folder, _, names in found for n in names)

    def publish(self, path: str, data: Sequence[Buffer]) -> bool:
        """Written and synced without a name, then hard-linked to its name, which fails if that is taken."""
        target = Path(self._base, path)
        with self._telling("writing", path, missing=True):
            if target.exists():
                return False
            _make(target.parent)
            return _link(target, data)

    def put(self, path: str, data: bytes) -> None:
        """Written beside the target, then renamed; not synced: after a power failure the file may be old or empty."""
        target = Path(self._base, path)
        with self._telling("writing", path, missing=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=_PENDING[0], suffix=_PENDING[1])
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(data)
                    os.fchmod(handle, 0o644)
                os.replace(name, target)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise

    def append(self, path: str, line: str) -> None:
        """Add a line to a file."""
        target = Path(self._base, path)
        with self._telling("writing", path, missing=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("a") as stream:
                stream.write(line + "\n")

    def remove(self, path: str) -> None:
        """Delete a file; nothing happens when it is gone already."""
        with self._telling("deleting", path):
            Path(self._base, path).unlink(missing_ok=True)

    def take(self, path: str) -> bytes | None:
        """Delete a file and return what it held: it is moved aside first, to where `gc` finds what was left."""
        target = Path(self._base, path)
        aside = target.parent / ".staging" / uuid.uuid4().hex
        with self._telling("taking", path):
            aside.parent.mkdir(exist_ok=True)
            try:
                os.rename(target, aside)
            except FileNotFoundError:
                return None
            data = aside.read_bytes()
            aside.unlink()
            return data

    def remove_many(self, paths: list[str]) -> None:
        """Delete files."""
        for path in paths:
            self.remove(path)

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        with self._telling("listing", folder):
            try:
                with os.scandir(Path(self._base, folder)) as found:
                    return list(found)
            except (FileNotFoundError, NotADirectoryError):
                return []

    @contextmanager
    def _telling(self, operation: str, path: str, missing: bool = False) -> Iterator[None]:
        """Say clearly what failed. A missing file is an answer, but where one is made (`missing`) it is a failure."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not missing:
                raise
            raise told(operation, f"{self._base}/{path}", error) from error


def tag_of(there: os.stat_result) -> str:
    """What changes with a file: the tag that `entries` gives."""
    return f"{there.st_mtime_ns:x}-{there.st_size:x}-{there.st_ino:x}"


def _listed(entry: os.DirEntry[str]) -> bool:
    pending = entry.name.startswith(_PENDING[0]) and entry.name.endswith(_PENDING[1])
    return not pending and entry.is_file()


def _make(folder: Path) -> None:
    """Create a folder; the names of new ones are synced, so that no power failure forgets what is put in them."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(target: Path, data: Sequence[Buffer]) -> bool:
    with _written(target.parent, data) as (handle, source):
        # Linking by descriptor needs AT_SYMLINK_FOLLOW, which Python passes on only beside a directory.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.link(source, target, src_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            # NFS repeats a link whose answer was lost, and then answers that the name is taken: by this very file.
            return os.path.samestat(os.stat(target), os.fstat(handle))
        except OSError as error:
            if error.errno in _NO_LINKS:
                error.strerror = f"{error.strerror}: this file system has no hard links, which are needed to publish"
            raise
        finally:
            os.close(folder)
        _sync(target.parent)
    return True


@contextmanager
def _written(folder: Path, data: Sequence[Buffer]) -> Iterator[tuple[int, str]]:
    """A synced file with these bytes that has no name in `folder` yet: its descriptor and a path that can be linked.

    It is nameless where the file system can do that (O_TMPFILE), so that a killed process leaves nothing behind; else
    it lies in `.staging/` beside its target, where `gc` finds what was left.
    """
    try:
        handle, name = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o644), None
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", None) in _NO_FALLBACK:
            raise
        staging = folder / ".staging"
        staging.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=staging)
    try:
        with os.fdopen(handle, "wb", buffering=1 << 20) as stream:
            stream.writelines(data)
            stream.flush()
            os.fchmod(handle, 0o644)
            os.fsync(handle)
            yield handle, name or f"/proc/self/fd/{handle}"
    finally:
        if name is not None:
            os.unlink(name)
