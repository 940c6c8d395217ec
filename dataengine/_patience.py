"""Which failures of a store pass by themselves, how long they are waited for, and how the others are told."""

from __future__ import annotations

import asyncio
import errno
import http.client
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import tenacity

from dataengine._redact import redacted

log = logging.getLogger(__name__)
T = TypeVar("T")

_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_PASSING_CODES = {
    *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "RequestLimitExceeded", "TooManyRequests"),
    *("Throttling", "ThrottlingException", "RequestThrottled", "BandwidthLimitExceeded", "RequestTimeTooSkewed"),
    # An upload that was cut or damaged on its way.
    *("IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),
    # 409: somebody else is writing the same object at this moment.
    *("ConditionalRequestConflict", "OperationAborted"),
}

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, it resumes",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again, it resumes",
    errno.EFBIG: "the file is larger than the system allows here: raise the limit (ulimit -f) and run it again",
    errno.EROFS: "the file system is mounted read-only: mount it writable, or use another root",
    errno.EACCES: "no permission: run as a user who may write there, or use another root",
    errno.EPERM: "not permitted: run as a user who may write there, or use another root",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.EIO: "the disk reports a fault",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder is needed"),
}


class StoreError(OSError):
    """A store did not do what was asked, after every retry that made sense: operation, path and cause are in the text.

    Nothing is half-written under a final name. `errno` is the system's error number, None for an object store.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, int | None]]:
        return type(self), (str(self.args[0]), self.errno)


class Passing(ConnectionError):
    """What no library calls an error, and yet is: a body shorter than announced, a condition refused on no grounds."""


class Changed(Exception):
    """An object was replaced while its parts were read, or an upload was aborted by somebody else under way."""


@dataclass(frozen=True)
class Patience:
    """How often and how long a call is tried: waits grow from `first` to `longest` seconds, each drawn from 0 to that.

    Half a minute to a minute in all: longer than a throttled prefix or a failing-over server needs, and short enough
    that a store which is really gone is reported before the lease of a worker runs out.
    """

    attempts: int = 8
    seconds: float = 60.0
    first: float = 0.5
    longest: float = 20.0


patience = Patience()
"""The one retry layer: botocore and s3fs are told to try once, so that attempts do not multiply."""


def patiently(operation: str, name: str, call: Callable[[], T]) -> T:
    """Call until it succeeds or fails for good: StoreError then, naming what was done to what. It must be repeatable.

    FileNotFoundError and FileExistsError are answers, not failures.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(patience.attempts) | tenacity.stop_after_delay(patience.seconds),
        wait=tenacity.wait_random_exponential(multiplier=patience.first, max=patience.longest),
        retry=tenacity.retry_if_exception(passing),
        before_sleep=lambda state: log.info("%s %s: try %d: %s", operation, redacted(name), *_failed(state)),
        reraise=True,
    )
    try:
        return retrying(call)
    except (FileExistsError, StoreError, Changed):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not passing(error):
            raise FileNotFoundError(errno.ENOENT, "is not there", redacted(name)) from _shown(error)
        times = retrying.statistics.get("attempt_number", 1)
        raise _told(operation, name, error, f" (tried {times} times)" if times > 1 else "") from _shown(error)


def _failed(state: tenacity.RetryCallState) -> tuple[int, str]:
    error = state.outcome.exception() if state.outcome else None
    return state.attempt_number, f"{type(error).__name__}: {redacted(error)}"


def _told(operation: str, name: str, error: BaseException, tried: str = "") -> StoreError:
    number = error.errno if isinstance(error, OSError) and error.__cause__ is None else None
    advice = f": {_ADVICE[number]}" if number in _ADVICE else ""
    cause = redacted(error) or type(error).__name__
    return StoreError(f"{operation} {redacted(name)} failed{tried}: {type(error).__name__}: {cause}{advice}", number)


def told(operation: str, name: str, error: OSError) -> StoreError:
    """The clear form of an error of the local file system."""
    return error if isinstance(error, StoreError) else _told(operation, name, error)


def _shown(error: BaseException) -> BaseException | None:
    """The error as a cause, unless printing it would show a secret."""
    return error if redacted(error) == str(error) else None


def passing(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, FileNotFoundError):
        # fsspec's filesystem of web servers says so of every failure, and of what kind it was by the cause.
        return error.__cause__ is not None and passing(error.__cause__)
    if isinstance(error, (FileExistsError, StoreError, Changed)):
        return False
    if status(error) is not None and not isinstance(error, Passing):
        return status(error) in _PASSING_STATUS or code(error) in _PASSING_CODES
    return isinstance(error, _passing_types())


def status(error: BaseException) -> int | None:
    """The HTTP status that an error of s3fs, botocore, aiohttp, gcsfs or adlfs carries; None when it carries none."""
    response = _response(error)
    found: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if response else None
    for name in ("status", "status_code", "code"):
        found = found if found is not None else getattr(error, name, None)
    return int(found) if isinstance(found, int) or (isinstance(found, str) and found.isdigit()) else None


def code(error: BaseException) -> str:
    """The error code in the body of an S3 answer, such as SlowDown; empty when there is none."""
    response = _response(error)
    return str(response.get("Error", {}).get("Code", "")) if response else ""


def _response(error: BaseException) -> dict[str, Any] | None:
    # s3fs turns botocore's ClientError into the nearest OSError, and keeps it as the cause; so do we.
    cause: BaseException | None = error
    while cause is not None:
        found = getattr(cause, "response", None)
        if isinstance(found, dict):
            return found
        cause = cause.__cause__
    return None


def _passing_types() -> tuple[type[BaseException], ...]:
    import aiohttp  # here: a dataset on a local disk needs neither
    from botocore import exceptions, parsers

    return (
        *(ConnectionError, TimeoutError, asyncio.TimeoutError, EOFError, http.client.HTTPException),
        *(aiohttp.ClientConnectionError, aiohttp.ClientPayloadError),
        *(exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError),
        parsers.ResponseParserError,  # a throttling gateway may answer no XML
    )
