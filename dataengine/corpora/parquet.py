"""parquet:URL - tables with a column of images (bytes, a path, a URL, or {bytes, path}) and one of captions."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import plugins, storage
from dataengine.corpora import Corpus, RawSample, Split, _items, _location, _reach
from dataengine.keys import make_key

_IMAGE_NAMES = ("image", "jpg", "png", "img", "image_bytes", "bytes", "image_path", "path", "file_name", "url", "URL")
_BATCH = 64  # rows in memory at a time
_BATCH_BYTES = 1 << 26
_MAX_ROWS = 100_000_000
"""Rows that the footer of one file may declare: what it says is believed when splits are made."""
_DOWNLOADS = 16  # at a time


class Parquet(Corpus):
    """A file, a folder of them, a glob or a brace range. Paths in a table are relative to its file.

    Options: `image` and `caption` name the columns, else the usual names are looked for. What lies below the corpus's
    own folder is read; `files=FOLDER` allows paths into that one, `fetch=yes` URLs (`any`: of private addresses too).
    Splits are pieces of row groups, or several whole ones where they are small.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._url, options = _location.parse(location, {"image": "", "caption": "", "fetch": "no", "files": ""})
        self._image, self._caption, fetch, self._extra = options.values()
        self._fetch = _reach.reach_of(fetch, f"parquet:{location}")

    def _files(self) -> _location.Files:
        return _location.Files(self._url, (".parquet", ".pq"))

    def splits(self, shard_size: int) -> list[Split]:
        """Ranges of rows, by the files' footers; a file that is no Parquet is one item with an error."""
        files = self._files()
        out = []
        for name in files.names():
            try:
                with files.open(name) as stream, pq.ParquetFile(stream) as table:
                    self._columns(name, table.schema_arrow.names)
                    bounds = _bounds(table, shard_size)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
                    raise  # the disk or the network: not a word about the file
                bounds = [(0, 1)]
            out += _location.pieces(name, bounds, shard_size)
        return out

    def read(self, split: Split) -> Iterator[RawSample]:
        """The rows of a split; those of a damaged page, and all after it, are errors."""
        files = self._files()
        read = 0
        try:
            with files.open(split.source) as stream:
                for cells in self._rows(stream, split):
                    yield from self._items(files, split, split.start + read, cells)
                    read += len(cells)
            if read < split.stop - split.start:
                raise ValueError(f"{split.source} has changed: row {split.start + read} is not there any more")
        except (OSError, pa.ArrowException) as error:
            for row in range(split.start + read, split.stop):
                key, source = _names(split.source, row)
                yield RawSample(key, source, error=storage.redacted(f"{type(error).__name__}: {error}"))

    def _rows(self, stream: IO[bytes], split: Split) -> Iterator[list[tuple[Any, Any]]]:
        """(image cell, caption cell) of the split's rows, at most `_BATCH` at a time, fewer where they are large."""
        with pq.ParquetFile(stream) as table:
            image, caption = self._columns(split.source, table.schema_arrow.names)
            edges = _edges(table)
            groups = [i for i, (a, b) in enumerate(pairwise(edges)) if a < split.stop and b > split.start]
            columns = [image] if caption is None else [image, caption]
            position = edges[groups[0]] if groups else 0
            waiting: list[tuple[Any, Any]] = []
            size = 0
            # One row at a time: a dictionary page makes any number of large values of a few bytes.
            for batch in table.iter_batches(1, row_groups=groups, columns=columns, use_threads=False):
                if split.start <= position < split.stop:
                    text = None if caption is None else batch.column(caption)[0].as_py()
                    waiting.append((batch.column(image)[0].as_py(), text))
                    size += batch.nbytes
                position += len(batch)
                if len(waiting) == _BATCH or size > _BATCH_BYTES:
                    yield waiting
                    waiting, size = [], 0
                if position >= split.stop:
                    break
            if waiting:
                yield waiting

    def _items(
        self, files: _location.Files, split: Split, first: int, cells: list[tuple[Any, Any]]
    ) -> Iterator[RawSample]:
        beside = files.fs.unstrip_protocol(files.path(split.source)).rpartition("/")[0]
        local = files.fs.protocol[0] == "file"
        root = files.root if local else files.fs.unstrip_protocol(files.root)
        reach = _reach.Reach(beside, (root, *filter(None, [self._extra])), self._fetch)

        def load(numbered: tuple[int, tuple[Any, Any]]) -> RawSample:
            row, (image, text) = numbered
            key, source = _names(split.source, row)
            return _items.attempt(key, source, lambda: (_items.image_bytes(image, reach), _items.captions(text)))

        if self._fetch == "no":
            yield from map(load, enumerate(cells, start=first))
            return
        with ThreadPoolExecutor(_DOWNLOADS) as threads:
            yield from threads.map(load, enumerate(cells, start=first))

    def _columns(self, name: str, found: list[str]) -> tuple[str, str | None]:
        """The image column and the caption column, if any; ValueError when a named or needed one is missing."""
        image = self._image or next((n for n in _IMAGE_NAMES if n in found), "")
        caption = self._caption or next((n for n in _items.CAPTION_NAMES if n in found), None)
        for column, option in ((image, "image"), (caption, "caption")):
            if column is not None and column not in found:
                hint = plugins.nearest(column, found)
                raise ValueError(
                    f"{name}: no {option} column {column!r}{hint}; say ?{option}= one of {', '.join(found)}"
                )
        return image, caption

    @classmethod
    def example(cls, folder: str) -> Parquet:
        """Six rows in two row groups, bytes and captions."""
        import io

        from PIL import Image

        rng = np.random.default_rng(0)
        rows = []
        for i in range(6):
            sink = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(sink, "PNG")
            rows.append({"image": {"bytes": sink.getvalue(), "path": None}, "caption": f"row {i}"})
        pq.write_table(pa.Table.from_pylist(rows), Path(folder, "rows.parquet"), row_group_size=4)
        return cls(folder)


def _names(name: str, row: int) -> tuple[str, str]:
    """(key, source) of a row."""
    return make_key(*name.rpartition(".")[0].split("/"), f"{row:09d}"), f"{name}#{row}"


def _edges(table: pq.ParquetFile) -> list[int]:
    """Where row groups begin and end, in rows; ArrowInvalid for a footer that cannot be true."""
    metadata = table.metadata
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) > _MAX_ROWS:
        raise pa.ArrowInvalid(f"a footer that declares {sum(counts)} rows, at most {_MAX_ROWS} are believed")
    return [0, *accumulate(counts)]


def _bounds(table: pq.ParquetFile, shard_size: int) -> list[tuple[int, int]]:
    """Ranges of whole row groups: as many together as fit a shard, or a single larger one."""
    out: list[tuple[int, int]] = []
    for start, stop in pairwise(_edges(table)):
        if out and stop - out[-1][0] <= shard_size:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out
