"""Whole objects on S3 and on what speaks its protocol: conditional puts, parallel ranges, aborted uploads."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import tenacity

from dataengine._objects import PARALLEL, RANGE, Entry, completed, probed, written
from dataengine._patience import Changed, Passing, StoreError, code, patiently, status

log = logging.getLogger(__name__)
T = TypeVar("T")

MULTIPART = 64 << 20
"""Objects from this size on are uploaded in parts: below it, one conditional put has fewer ways to fail."""

MAX_PARTS = 10_000  # of S3


def _again(operation: str, name: str, call: Callable[..., T], *args: Any) -> T:
    """Begin anew when an object was replaced, or an upload aborted, under way; three times, something else is wrong."""
    anew = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(3), retry=tenacity.retry_if_exception_type(Changed), reraise=True
    )
    try:
        return anew(call, *args)
    except Changed:
        raise StoreError(f"{operation} {name} failed: somebody else changed it three times meanwhile") from None


class Bucket:
    """The backend of a root on S3. `fs` is an s3fs filesystem that does not retry; `base` is bucket/prefix."""

    def __init__(self, fs: Any, base: str, name: str) -> None:
        self._fs, self._name = fs, name
        self._bucket, self._prefix, _ = fs.split_path(f"{base}/x")
        self._prefix = self._prefix[:-1]

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """One request for a small object, parallel ranges for the rest of a large one; all of the same version."""
        found = _again("reading", self._at(path), self._read, path, lambda start, data: data)
        return found[0] if len(found) == 1 else b"".join(found)

    def copy(self, path: str, handle: int) -> int:
        """Write the object over the beginning of an open file, piece by piece as they come; its size."""

        def copied() -> int:
            return sum(self._read(path, lambda start, data: written(handle, start, data)))

        return _again("reading", self._at(path), copied)

    def _read(self, path: str, take: Callable[[int, bytes], T]) -> list[T]:
        """What `take` makes of each piece, given where it begins; it is called by several threads."""
        first = self._call("reading", path, self._get, path, 0, RANGE)
        total, tag = _announced(first)
        if total <= RANGE or "ContentRange" not in first:
            return [take(0, bytes(self._call("reading", path, self._body, path, 0, total, tag, [first])))]

        def piece(start: int) -> T:
            opened, stop = [first] if start == 0 else [], min(start + RANGE, total)
            return take(start, bytes(self._call("reading", path, self._body, path, start, stop, tag, opened)))

        with ThreadPoolExecutor(PARALLEL) as threads:
            return completed([threads.submit(piece, start) for start in range(0, total, RANGE)])

    def _get(self, path: str, start: int, stop: int) -> Any:
        try:
            return self._s3("get_object", path, Range=f"bytes={start}-{max(stop, start + 1) - 1}")
        except Exception as error:
            if status(error) == 416 and start == 0:  # no range of an empty object can be had
                return self._s3("get_object", path)
            raise

    def _body(self, path: str, start: int, stop: int, tag: str, opened: list[Any]) -> bytes:
        """The bytes of a range; the first attempt takes them from an answer that is `opened` already."""
        answer = opened.pop() if opened else self._get(path, start, stop)
        try:
            data = bytes(asyncio.run_coroutine_threadsafe(answer["Body"].read(), self._fs.loop).result())
        finally:
            answer["Body"].close()
        if _announced(answer)[1] != tag:
            raise Changed
        if len(data) != stop - start:
            raise Passing(f"got {len(data)} of {stop - start} bytes")
        return data

    def exists(self, path: str) -> bool:
        """Whether the object is there."""
        try:
            self._head(path)
        except FileNotFoundError:
            return False
        return True

    def tag(self, path: str) -> str:
        """The tag that `entries` gives; FileNotFoundError when there is no such object."""
        return str(self._head(path)["ETag"])

    def entries(self, folder: str) -> list[Entry]:
        """The objects directly in a folder, by name."""
        return sorted(self._list(f"{folder}/".lstrip("/"), "/")[0])

    def files(self, folder: str) -> list[str]:
        """The names of `entries`."""
        return [entry.name for entry in self.entries(folder)]

    def folders(self, folder: str) -> list[str]:
        """The names of the folders directly in a folder."""
        return sorted(self._list(f"{folder}/".lstrip("/"), "/")[1])

    def find(self) -> list[str]:
        """Every object under the root."""
        return sorted(entry.name for entry in self._list("", "")[0])

    def _list(self, folder: str, delimiter: str) -> tuple[list[Entry], list[str]]:
        prefix, objects, folders = self._prefix + folder, [], []
        for page in self._pages("list_objects_v2", "listing", folder, Prefix=prefix, Delimiter=delimiter):
            objects += [
                Entry(found["Key"][len(prefix) :], int(found["Size"]), str(found["ETag"]))
                for found in page.get("Contents", [])
                if not found["Key"].endswith("/")  # consoles mark folders by empty objects
            ]
            folders += [found["Prefix"][len(prefix) : -1] for found in page.get("CommonPrefixes", [])]
        return objects, folders

    def _pages(self, method: str, operation: str, path: str, **options: Any) -> Iterator[dict[str, Any]]:
        more: dict[str, str] = {}
        while True:
            try:
                page = self._call(operation, path, self._s3, method, None, **options, **more)
            except FileNotFoundError:  # no such bucket
                if more:
                    raise
                return
            yield page
            if not page.get("IsTruncated"):
                return
            names = {"NextContinuationToken": "ContinuationToken", "NextKeyMarker": "KeyMarker"}
            names["NextUploadIdMarker"] = "UploadIdMarker"
            more = {argument: page[field] for field, argument in names.items() if page.get(field)}

    # -- writing ------------------------------------------------------------------------------------------------------

    def publish(self, path: str, data: bytes) -> bool:
        """One conditional put, or a multipart upload that is completed on the same condition."""
        mine = uuid.uuid4().hex
        conditional = self._is_conditional()
        if not conditional and self.exists(path):
            return False
        send = self._upload if len(data) >= MULTIPART else self._put
        condition = {"IfNoneMatch": "*"} if conditional else {}
        try:
            won = _again("writing", self._at(path), send, path, data, mine, condition)
        except StoreError:
            # Every answer may have been lost, or another have won meanwhile: one look more.
            with suppress(Exception):
                there = self._s3("head_object", path)
                if there["ContentLength"] == len(data) or there["Metadata"]["writer"] != mine:
                    return bool(there["Metadata"]["writer"] == mine)
            raise
        return won if conditional else bool(self._is_mine(path, data, mine, True))

    def put(self, path: str, data: bytes) -> None:
        """One put."""
        self._call("writing", path, self._s3, "put_object", path, missing=True, Body=data, ContentMD5=_md5(data))

    def remove(self, path: str) -> None:
        """Delete an object; nothing happens when it is gone already."""
        self._call("deleting", path, self._s3, "delete_object", path, missing=True)

    def remove_many(self, paths: Sequence[str]) -> None:
        """Delete objects by the thousand, or one by one where the store cannot do that."""
        for start in range(0, len(paths), 1000):
            some = paths[start : start + 1000]
            names = {"Objects": [{"Key": self._prefix + p} for p in some], "Quiet": True}
            try:
                answer = self._call("deleting", some[0], self._s3, "delete_objects", None, missing=True, Delete=names)
            except StoreError:
                for path in some:
                    self.remove(path)
                continue
            for refused in answer.get("Errors", []):
                self.remove(refused["Key"][len(self._prefix) :])  # alone, it is tried again, and tells why

    def _put(self, path: str, data: bytes, mine: str, condition: dict[str, str]) -> bool:
        body = {"Body": data, "ContentMD5": _md5(data), "Metadata": {"writer": mine}}
        return self._create(path, data, mine, lambda: self._s3("put_object", path, **body, **condition))

    def _create(self, path: str, data: bytes, mine: str, send: Callable[[], Any]) -> bool:
        """Send what makes the object visible until it is there or another's is; whose it is, its metadata tell."""
        failed = False

        def attempt() -> bool:
            nonlocal failed
            try:
                send()
            except Exception as error:
                if status(error) == 412 or code(error) == "NoSuchUpload":
                    won = self._is_mine(path, data, mine, failed)
                    if won is None and status(error) == 412:
                        raise Passing("412 for an object that is not there") from error
                    if won is not None:
                        return won
                failed = True
                raise
            return True

        return bool(self._call("writing", path, attempt, missing=True))

    def _is_mine(self, path: str, data: bytes, mine: str, failed: bool) -> bool | None:
        """Whether the object that is there is the one this call wrote; None when there is none.

        A store that keeps no metadata is asked for the bytes: they are ours if an attempt of ours failed in a way that
        may have been a success.
        """
        try:
            there = self._head(path)
            if "writer" in there.get("Metadata", {}):
                if there["Metadata"]["writer"] != mine:
                    return False
                if there["ContentLength"] != len(data):
                    raise StoreError(f"{self._at(path)} has {there['ContentLength']} of the {len(data)} bytes sent")
                return True
            return failed and self.read(path) == data
        except FileNotFoundError:
            return None

    def _upload(self, path: str, data: bytes, mine: str, condition: dict[str, str]) -> bool:
        """A multipart upload: visible when completed, aborted on every failure, with no part of it still on its way."""
        tries: list[str] = []

        def create() -> str:
            tries.append(path)
            answer = self._s3("create_multipart_upload", path, Metadata={"writer": mine})
            return str(answer["UploadId"])

        upload = self._call("writing", path, create, missing=True)
        try:
            parts = self._send_parts(path, data, upload)
            done = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
            if condition and self.exists(path):  # a store may know the condition of a put, and not this one
                won = bool(self._is_mine(path, data, mine, False))
            else:
                won = self._create(
                    path, data, mine, lambda: self._s3("complete_multipart_upload", path, **done, **condition)
                )
            if not won:
                self._abort(path, upload)
        except BaseException:
            self._abort(path, upload)
            raise
        finally:
            if len(tries) > 1:
                # An attempt to begin may have begun an upload whose id never came back. That of another writer may be
                # aborted with it: it then finds the object, or begins again.
                with suppress(StoreError):
                    for other in self._unfinished(path):
                        if other["Key"] == self._prefix + path:
                            self._abort(path, other["UploadId"])
        return won

    def _send_parts(self, path: str, data: bytes, upload: str) -> list[dict[str, Any]]:
        size = max(RANGE, -(-len(data) // MAX_PARTS))

        def send(number: int, start: int) -> dict[str, Any]:
            part = data[start : start + size]
            body = {"Body": part, "ContentMD5": _md5(part), "UploadId": upload, "PartNumber": number}
            answer = self._call("writing", path, self._s3, "upload_part", path, missing=True, **body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        # Leaving the pool waits for the parts under way: one that came after the abort would stay, and be billed.
        with ThreadPoolExecutor(PARALLEL) as threads:
            return completed([threads.submit(send, i + 1, start) for i, start in enumerate(range(0, len(data), size))])

    def _abort(self, path: str, upload: str) -> None:
        try:
            self._call("aborting the upload of", path, self._s3, "abort_multipart_upload", path, UploadId=upload)
        except FileNotFoundError:
            return
        except StoreError as error:
            log.warning("%s: an unfinished upload is left, which is billed until it is aborted", error)

    def abort_uploads(self, under: str = "", older: float = 0.0) -> list[str]:
        """Abort the unfinished uploads below a path that began more than `older` seconds ago; their paths."""
        out, now = [], datetime.now(UTC)
        for found in self._unfinished(under):
            if (now - found["Initiated"]).total_seconds() >= older:
                path = found["Key"][len(self._prefix) :]
                self._abort(path, found["UploadId"])
                out.append(path)
        return sorted(out)

    def _unfinished(self, under: str) -> list[dict[str, Any]]:
        pages = self._pages("list_multipart_uploads", "listing the uploads of", under, Prefix=self._prefix + under)
        return [upload for page in pages for upload in page.get("Uploads", [])]

    # -- what the store can do ----------------------------------------------------------------------------------------

    def _is_conditional(self) -> bool:
        """Whether the store heeds If-None-Match, found out once per process with a throw-away object."""
        key = (str(getattr(self._fs, "endpoint_url", "")), self._bucket)

        def create(path: str) -> bool:
            body = {"Body": b"", "ContentMD5": _md5(b""), "IfNoneMatch": "*"}
            try:
                self._call("trying a conditional put of", path, self._s3, "put_object", path, missing=True, **body)
            except OSError as error:  # StoreError or, where the answer names the condition, FileExistsError
                if status(error) == 412:
                    return False
                raise
            return True

        return probed(key, self._name, create, self.remove)

    # -- calls --------------------------------------------------------------------------------------------------------

    def _head(self, path: str) -> Any:
        return self._call("looking for", path, self._s3, "head_object", path)

    def _s3(self, method: str, path: str | None, **options: Any) -> Any:
        key = {} if path is None else {"Key": self._prefix + path}
        return self._fs.call_s3(method, Bucket=self._bucket, **key, **options)

    def _call(self, operation: str, path: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """With retries; where an object is made (`missing`), a bucket that is not there is a failure, no answer."""
        missing = options.pop("missing", False)
        try:
            return patiently(operation, self._at(path), lambda: call(*args, **options))
        except FileNotFoundError as error:
            if code(error) == "NoSuchUpload" and operation == "writing":
                raise Changed from error
            if missing:
                raise StoreError(f"{operation} {self._at(path)} failed: there is no bucket {self._bucket}") from error
            raise

    def _at(self, path: str) -> str:
        return f"{self._name}/{path}"


def _announced(answer: Any) -> tuple[int, str]:
    """The size of the whole object and its version, of an answer to a get."""
    total = answer["ContentRange"].rpartition("/")[2] if "ContentRange" in answer else answer["ContentLength"]
    return int(total), str(answer.get("ETag", ""))


def _md5(data: bytes) -> str:
    """The one checksum that every store of this protocol verifies before an object becomes visible."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
