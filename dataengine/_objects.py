"""What every object store has in common, and the backend of any fsspec filesystem that has none of its own."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from dataengine._patience import Passing, StoreError, code, patiently, status
from dataengine._redact import redacted

log = logging.getLogger(__name__)
T = TypeVar("T")

RANGE = 16 << 20
"""Bytes of one request of a read or of a multipart upload: large, so that the time to its first byte (10-100 ms) is
small beside its transfer; what fits into one is read by one request. S3 takes no part below 5 MiB."""

PARALLEL = 8
"""Requests in flight for one object: a connection to S3 carries 50-90 MB/s, a network card of a GPU node several."""

_PIECEMEAL = {"ftp", "sftp", "ssh", "smb", "hdfs", "webhdfs", "webdav", "http", "https", "zip", "tar", "github", "git"}
"""Where a file grows under its name, or none can be written: nobody could tell a cut one from a whole one."""

_conditional: dict[tuple[str, str], bool] = {}
_probing = threading.Lock()


class Entry(NamedTuple):
    """An object of a folder. `tag` changes whenever the object does; `size` in bytes."""

    name: str
    size: int
    tag: str


class Filesystem:
    """The backend of a root on any other fsspec filesystem: its own calls, with retries and checked lengths."""

    def __init__(self, fs: Any, base: str, name: str) -> None:
        self._fs, self._base, self._name = fs, base, name

    def read(self, path: str) -> bytes:
        """The whole object, in parallel ranges when it is large."""
        found = self._read(path, lambda start, data: data)
        return found[0] if len(found) == 1 else b"".join(found)

    def copy(self, path: str, handle: int) -> int:
        """Write the object over the beginning of an open file, piece by piece as they come; its size."""
        return sum(self._read(path, lambda start, data: written(handle, start, data)))

    def _read(self, path: str, take: Callable[[int, bytes], T]) -> list[T]:
        """What `take` makes of each piece, given where it begins; it is called by several threads."""
        size = self._call("reading", path, self._fs.size)
        if size is None:
            return [take(0, bytes(self._call("reading", path, self._fs.cat_file)))]

        def piece(start: int) -> T:
            stop = min(start + RANGE, size)

            def get(full: str) -> bytes:
                data = bytes(
                    self._fs.cat_file(full, start=start, end=stop) if size > RANGE else self._fs.cat_file(full)
                )
                if len(data) != stop - start:
                    raise Passing(f"got {len(data)} of {stop - start} bytes")
                return data

            return take(start, bytes(self._call("reading", path, get)))

        if size <= RANGE:
            return [piece(0)]
        with ThreadPoolExecutor(PARALLEL) as threads:
            return completed([threads.submit(piece, start) for start in range(0, size, RANGE)])

    def exists(self, path: str) -> bool:
        """Whether the object is there."""
        try:
            return bool(self._call("looking for", path, self._fs.info)["type"] == "file")
        except FileNotFoundError:
            return False

    def tag(self, path: str) -> str:
        """The tag that `entries` gives; FileNotFoundError when there is no such object."""
        return _tag(self._call("looking for", path, self._fs.info))

    def entries(self, folder: str) -> list[Entry]:
        """The objects directly in a folder, by name."""
        found = (e for e in self._list(folder) if e["type"] == "file")
        return sorted(Entry(_last(e), int(e["size"] or 0), _tag(e)) for e in found)

    def files(self, folder: str) -> list[str]:
        """The names of `entries`."""
        return [entry.name for entry in self.entries(folder)]

    def folders(self, folder: str) -> list[str]:
        """The names of the folders directly in a folder."""
        return sorted(_last(e) for e in self._list(folder) if e["type"] == "directory")

    def find(self) -> list[str]:
        """Every object under the root."""
        found = self._call("listing", "", lambda full: self._fs.find(full.rstrip("/")))
        return sorted(name[len(self._base) :].lstrip("/") for name in found)

    def publish(self, path: str, data: bytes) -> bool:
        """An exclusive put where the filesystem has one, else a put after a look, read back."""
        self._check_whole()
        failed = False

        def create(full: str) -> bool:
            nonlocal failed
            try:
                self._fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                return failed and self.read(path) == data
            except Exception:
                failed = True
                raise
            return True

        if probed((type(self._fs).__name__, self._name), self._name, self._try_create, self.remove):
            return bool(self._call("writing", path, create))
        if self.exists(path):
            return False
        self.put(path, data)
        return self.read(path) == data

    def put(self, path: str, data: bytes) -> None:
        """One put."""
        self._check_whole()
        self._call("writing", path, lambda full: self._fs.pipe_file(full, data))

    def remove(self, path: str) -> None:
        """Delete an object; nothing happens when it is gone already."""
        try:
            self._call("deleting", path, self._fs.rm_file)
        except FileNotFoundError:
            return

    def remove_many(self, paths: Sequence[str]) -> None:
        """Delete objects."""
        for path in paths:
            self.remove(path)

    def abort_uploads(self, under: str = "", older: float = 0.0) -> list[str]:
        """No other filesystem shows its unfinished uploads."""
        return []

    def _check_whole(self) -> None:
        protocol = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        if protocol & _PIECEMEAL:
            raise StoreError(
                f"writing to {self._name} failed: {min(protocol)} cannot make an object appear at once; "
                "mount it as a folder, or use an object store"
            )

    def _try_create(self, path: str) -> bool:
        try:
            self._call("trying an exclusive put of", path, lambda full: self._fs.pipe_file(full, b"", mode="create"))
        except FileExistsError:
            return False
        except StoreError as error:
            if isinstance(error.__cause__, (TypeError, ValueError, NotImplementedError)):
                raise NotImplementedError from error
            raise
        return True

    def _list(self, folder: str) -> list[dict[str, Any]]:
        try:
            found = self._call("listing", folder, lambda full: self._fs.ls(full.rstrip("/"), detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return list(found)

    def _call(self, operation: str, path: str, call: Callable[[str], Any]) -> Any:
        self._fs.invalidate_cache()
        return patiently(operation, f"{self._name}/{path}", lambda: call(f"{self._base}/{path}"))


def probed(key: tuple[str, str], name: str, create: Callable[[str], bool], remove: Callable[[str], None]) -> bool:
    with _probing:
        if key not in _conditional:
            _conditional[key] = _probe(name, create, remove)
        return _conditional[key]


def _probe(name: str, create: Callable[[str], bool], remove: Callable[[str], None]) -> bool:
    """Whether the second of two conditional puts of one object is refused."""
    path = f"runs/.probe-{uuid.uuid4().hex}"
    try:
        heeded = not (create(path) and create(path))
    except (StoreError, NotImplementedError) as error:
        if not (isinstance(error, NotImplementedError) or _not_implemented(error)):
            raise
        heeded = False
    with suppress(StoreError):  # who may write may not be allowed to delete
        remove(path)
    if not heeded:
        log.warning(
            "%s has no conditional put: of two processes that write one object at once, the later one wins, "
            "so leave the leases on and run one command at a time (docs/storage.md)",
            redacted(name),
        )
    return heeded


def _not_implemented(error: BaseException) -> bool:
    codes = ("NotImplemented", "InvalidArgument", "InvalidRequest", "UnsupportedHeader", "400")
    return status(error) == 501 or (status(error) == 400 and code(error) in codes)


def written(handle: int, start: int, data: bytes) -> int:
    """Write bytes at a place of an open file, all of them; how many they are."""
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, start)
        view, start = view[count:], start + count
    return len(data)


def completed(futures: Sequence[Future[T]]) -> list[T]:
    """The results; on the first failure nothing more is begun, and what was begun is waited for by its pool."""
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _tag(entry: dict[str, Any]) -> str:
    """What changes with the object: filesystems name it differently."""
    marks = ("etag", "ETag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "modified", "created")
    return " ".join([str(entry["size"]), *(str(entry[m]) for m in marks if m in entry)])


def _last(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]
