"""A bounded cache of whole files of a store on this machine, shared by every process that names its folder.

A file is named by what it holds (`Remote.digest`), so one that changed in the store is another one. Whoever downloads
it holds a lock (flock: a killed process lets go of it), so it is downloaded once; it appears under its name when it is
whole and checked. Files that are mapped are held by shared locks: they are evicted last, and stay readable even then.
What was fetched ahead is `<digest>.ahead` until it is taken up, and not evicted for more of that kind.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import tenacity

from dataengine._patience import StoreError, told
from dataengine.storage import Store, redacted

LEFT_FREE = 0.1
"""The part of what is free on its disk, its own copies counted as free, that a cache without a limit leaves."""

_PARTIAL, _AHEAD = ".partial", ".ahead"
_TICK = 0.05
_PATIENCE = 600.0
"""Seconds for which room is waited for while others download: longer than any shard takes."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Remote:
    """An object of a store: its root and path, the bytes it must have, and their sha256, or `tag` where none is known.

    `tag` is the store's mark of the version (`Entry.tag`).
    """

    root: str
    path: str
    num_bytes: int
    sha256: str = ""
    tag: str = ""

    @property
    def digest(self) -> str:
        """The name of its copy: 64 hexadecimal digits, of the content or else of what names the version."""
        if self.sha256:
            return self.sha256
        named = "\n".join((self.root, self.path, self.tag, str(self.num_bytes)))
        return hashlib.sha256(named.encode()).hexdigest()

    @property
    def name(self) -> str:
        """Where it lies, for people."""
        return redacted(f"{self.root}/{self.path}")


@dataclass(frozen=True)
class ShardCache:
    """A folder for at most `max_bytes` of copies; by default for nine tenths of what is free on its disk or held by it.

    What is evicted while a process has it mapped stays on the disk until that process lets go of it.
    """

    folder: str = ""
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes {self.max_bytes}, expected at least 1")

    @classmethod
    def of_machine(cls) -> ShardCache:
        """The one that DATAENGINE_CACHE (a folder) and DATAENGINE_CACHE_GB (a limit) of the environment say."""
        said = os.environ.get("DATAENGINE_CACHE_GB", "")
        try:
            limit = int(float(said) * 1e9) if said else None
        except (ValueError, OverflowError):
            raise ValueError(f"DATAENGINE_CACHE_GB is {said!r}, expected a number of gigabytes") from None
        return cls(os.environ.get("DATAENGINE_CACHE", ""), limit)

    @property
    def base(self) -> Path:
        """The folder of the copies: `folder`, or `dataengine/shards` among the user's caches."""
        if self.folder:
            return Path(self.folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dataengine" / "shards"

    def has(self, remote: Remote) -> bool:
        """Whether a copy is there at this moment."""
        target = self._target(remote)
        return target.exists() or target.with_suffix(_AHEAD).exists()

    def open(self, remote: Remote) -> int:
        """A descriptor of a whole copy, downloaded if need be and held until it is closed: evicted after all others.

        StoreError when it cannot be had, ValueError when it is larger than the cache or not what it should be.
        """
        target = self._target(remote)
        while True:
            self.fetch(remote)
            try:
                with suppress(FileNotFoundError):
                    os.replace(target.with_suffix(_AHEAD), target)
                handle = os.open(target, os.O_RDONLY)
            except FileNotFoundError:  # evicted just now
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_SH)
                there = os.fstat(handle)
                if there.st_size == remote.num_bytes and there.st_nlink:
                    os.utime(handle)
                    return handle
                if there.st_nlink:
                    target.unlink(missing_ok=True)  # not ours: something else has changed it
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def fetch(self, remote: Remote, *, ahead: bool = False) -> bool:
        """Have a copy, and say whether there is one: True, unless it is fetched `ahead` and there is no room to spare.

        Ahead, nothing is evicted that somebody has mapped or that was fetched ahead, and nothing is waited for.
        """
        if self.has(remote):
            return True
        limit = self._limit()
        if remote.num_bytes > limit:
            raise ValueError(
                f"{remote.name} has {remote.num_bytes} bytes, the cache {self.base} may hold {limit}: allow it "
                "more (DATAENGINE_CACHE_GB), free some space, or make smaller shards"
            )
        with self._telling(remote):
            self.base.mkdir(parents=True, exist_ok=True)
            with locked(self._lock(remote.digest), wait=not ahead) as mine:
                return self.has(remote) or (mine and self._download(remote, ahead))

    def num_bytes(self) -> int:
        """Bytes of all that is there, downloads that are under way included."""
        return sum(size for _, size, _ in self._files())

    # -- downloading --------------------------------------------------------------------------------------------------

    def _download(self, remote: Remote, ahead: bool) -> bool:
        target = self._target(remote)
        partial = target.with_suffix(_PARTIAL)
        room = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda found: not found),
            wait=tenacity.wait_fixed(_TICK),
            stop=tenacity.stop_after_delay(0 if ahead else _PATIENCE),
            retry_error_callback=lambda state: False,
        )
        if not room(self._reserve, remote, partial, ahead):
            if ahead:
                return False
            raise StoreError(f"{remote.name}: no room in {self.base} after {_PATIENCE:.0f} s: others download into it")
        try:
            again = tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(_Other), stop=tenacity.stop_after_attempt(2), reraise=True
            )
            again(_copy, remote, partial)
            os.replace(partial, target.with_suffix(_AHEAD) if ahead else target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return True

    def _reserve(self, remote: Remote, partial: Path, ahead: bool) -> bool:
        """Make room for a download, whose file is given its size at once so that others count it; False if none is."""
        with locked(self.base / "locks" / "budget"):
            files = self._files()
            room = self._limit() - sum(size for _, size, _ in files) - remote.num_bytes
            done = sorted((path.suffix, used, path, size) for path, size, used in files if path.suffix != _PARTIAL)
            some = [(path, size) for suffix, _, path, size in done if not (ahead and suffix)]
            for in_use in (False,) if ahead else (False, True):
                for path, size in some:
                    if room < 0 and path.exists() and (in_use or _unused(path)):
                        path.unlink(missing_ok=True)
                        room += size
            if room < 0:
                return False
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                if remote.num_bytes:
                    os.posix_fallocate(handle, 0, remote.num_bytes)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            finally:
                os.close(handle)
            return True

    def _files(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, when it was last taken up) of each file; what killed downloads left is deleted on the way."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self.base) as entries:
            for entry in entries:
                path = Path(entry.path)
                with suppress(FileNotFoundError):
                    if not entry.is_file():
                        continue
                    if path.suffix == _PARTIAL:
                        with locked(self._lock(path.stem), wait=False) as abandoned:
                            if abandoned:
                                path.unlink()
                                continue
                    there = path.stat()
                    found.append((path, there.st_size, there.st_mtime))
        return found

    def _limit(self) -> int:
        """Bytes that may be here: of what the disk has free, what is here counted as free, a part or `max_bytes`.

        Not a part of the whole disk: one that others have nearly filled still has room for some shards.
        """
        there = self.base
        while not there.exists():
            there = there.parent
        disk = os.statvfs(there)
        room = disk.f_bavail * disk.f_frsize + self.num_bytes()
        return int((1 - LEFT_FREE) * room) if self.max_bytes is None else min(room, self.max_bytes)

    def _target(self, remote: Remote) -> Path:
        return self.base / remote.digest

    def _lock(self, digest: str) -> Path:
        # As many as two digits can say: there is nothing to clean up, and two downloads hardly ever share one.
        return self.base / "locks" / digest[:2]

    @contextmanager
    def _telling(self, remote: Remote) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise StoreError(
                f"{remote.name} is not there any more: it was made anew or deleted since it was listed; start again"
            ) from error
        except OSError as error:
            full = f" (the cache may take {self._limit()} bytes; give it less, or another disk)"
            where = f"{self.base}{full if error.errno in _NO_ROOM else ''}"
            raise told(f"caching {remote.name} in", where, error) from error


class _Other(ValueError):
    """What came is not what the record says."""


def _copy(remote: Remote, partial: Path) -> None:
    """Download into a file, check what came, and sync it: after a power failure it must not be there without bytes."""
    handle = os.open(partial, os.O_RDWR)
    try:
        store = Store(remote.root)
        size = store.copy(remote.path, handle)
        os.ftruncate(handle, size)  # of the room that was taken, or of a longer version before
        found = str(size) if not remote.sha256 else _sha256(handle)
        if size != remote.num_bytes or (remote.sha256 and found != remote.sha256):
            expected = f"{remote.num_bytes} bytes" + (f" of sha256 {remote.sha256[:12]}" if remote.sha256 else "")
            got = f"{size} bytes" + (f" of sha256 {found[:12]}" if remote.sha256 else "")
            raise _Other(
                f"{remote.name} has {got}, expected {expected}: it was changed, made anew or damaged since it was "
                "committed; start again, and if that does not help, see `dataengine verify`"
            )
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    with os.fdopen(os.dup(handle), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is made if need be; False where somebody else has it and it is not waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _unused(path: Path) -> bool:
    """Whether nobody has it mapped."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
