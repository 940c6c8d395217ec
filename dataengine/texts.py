"""Rows of texts in Parquet and in JSON lines, packed or not, at any fsspec URL: counted, and read from any row on."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate, islice
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import storage

_PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".parquet", ".pq", *(f"{lines}{packed}" for lines in _LINES for packed in ("", *_PACKED)))
"""What a file of texts may be called."""

MAX_LINE = 64 << 20
"""Bytes of a line of JSON; a longer one is not read into memory."""

_BATCH = 64  # rows of a table at a time: of a dictionary, they may be large

Row = tuple[str, str]
"""(text, ""), or ("", why there is none)."""


class Rows(Protocol):
    """The rows of a file that is open, from where it stands."""

    position: int
    """The next row."""

    def __next__(self) -> Row: ...

    def skip(self, count: int) -> None:
        """Go on, without looking at that many rows."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def count(url: str) -> int:
    """The number of rows: by the footer of a table, by going through lines."""
    with ExitStack() as opened, _telling(url):
        if _is_table(url):
            return int(_table(url, opened).metadata.num_rows)
        lines = _lines(url, opened)
        return sum(1 for _ in lines)


def rows(url: str, column: str, start: int) -> Rows:
    """The rows of a file from `start` on; ValueError when it has no such column, or is not what its name says."""
    found: Rows = _Table(url, column, start) if _is_table(url) else _Json(url, column)
    found.skip(start - found.position)
    return found


def stem(name: str) -> str:
    """A name without the suffixes that `SUFFIXES` knows."""
    suffix = max((s for s in SUFFIXES if name.lower().endswith(s)), key=len, default="")
    return name[: len(name) - len(suffix)]


class _Json:
    def __init__(self, url: str, column: str) -> None:
        self._url, self._column, self.position = url, column, 0
        self._opened = ExitStack()
        with _telling(url):
            self._found = _lines(url, self._opened)

    def __next__(self) -> Row:
        with _telling(self._url):
            line = next(self._found)
        self.position += 1
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return "", "no JSON"
        if not isinstance(value, dict):
            return "", "no object"
        return _row(value.get(self._column))

    def skip(self, count: int) -> None:
        """See `Rows`."""
        with _telling(self._url):
            deque(islice(self._found, count), maxlen=0)
        self.position += count

    def close(self) -> None:
        """See `Rows`."""
        self._opened.close()


class _Table:
    def __init__(self, url: str, column: str, start: int) -> None:
        self._url = url
        self._opened = ExitStack()
        with _telling(url):
            table = _table(url, self._opened)
            if column not in table.schema_arrow.names:
                self.close()
                names = ", ".join(table.schema_arrow.names)
                raise ValueError(f"no column {column!r}, expected one of {names}: name it with --column")
            groups = table.metadata.num_row_groups
            ends = [0, *accumulate(table.metadata.row_group(i).num_rows for i in range(groups))]
            first = next((i for i in range(groups) if ends[i + 1] > start), groups)
            self.position = ends[first]
            batches = table.iter_batches(_BATCH, row_groups=range(first, groups), columns=[column], use_threads=False)
            self._values = (value.as_py() for batch in batches for value in batch.column(0))

    def __next__(self) -> Row:
        with _telling(self._url):
            value = next(self._values)
        self.position += 1
        return _row(value)

    def skip(self, count: int) -> None:
        """See `Rows`."""
        with _telling(self._url):
            deque(islice(self._values, count), maxlen=0)
        self.position += count

    def close(self) -> None:
        """See `Rows`."""
        self._opened.close()


def _row(value: Any) -> Row:
    if value is None:
        return "", "null"
    if not isinstance(value, str):
        return "", "no text"
    if not value.strip():
        return "", "empty"
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        return "", "no Unicode"
    return value, ""


def _is_table(url: str) -> bool:
    return url.lower().endswith((".parquet", ".pq"))


def _table(url: str, opened: ExitStack) -> pq.ParquetFile:
    table = opened.enter_context(pq.ParquetFile(opened.enter_context(storage.open_url(url))))
    if table.metadata.num_rows < 0:
        raise ValueError(f"{table.metadata.num_rows} rows")
    return table


def _lines(url: str, opened: ExitStack) -> Iterator[bytes]:
    """The lines that are not blank."""
    stream: IO[bytes] = opened.enter_context(storage.open_url(url))
    packed = next((name for suffix, name in _PACKED.items() if url.lower().endswith(suffix)), None)
    source = opened.enter_context(pa.input_stream(stream, compression=packed))
    return _each_line(io.BufferedReader(source, 1 << 20))


def _each_line(stream: io.BufferedReader) -> Iterator[bytes]:
    first = True
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"a line of more than {MAX_LINE} bytes")
        if not line.isspace():
            if first and line.lstrip().startswith(b"["):
                raise ValueError("begins with a list, expected JSON lines: one object a line")
            first = False
            yield line


class _telling:
    """Say of what file an error is."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, FileNotFoundError | StopIteration) or error is None:
            return
        if isinstance(error, pa.ArrowException | ValueError | OSError) and not getattr(error, "errno", None):
            raise ValueError(f"{storage.redacted(self._url)}: {error}") from error
