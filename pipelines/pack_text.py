"""Pack texts alone (C4 and the like): rows of Parquet or JSON lines as the captions of samples that have nothing else.

ml-4m reads such a dataset (`type: huggingface`) as captions, unmodified, of which it keeps the first 256 ids.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from time import perf_counter

from dataengine import modalities, packed, storage, stored, texts
from dataengine.keys import make_key
from dataengine.manifest import Conflict, Dataset
from dataengine.modalities import TextLike
from dataengine.packed import Column
from dataengine.work import Report, Task, Work
from pipelines import pack
from pipelines.pack import CELL, Vocabulary

COUNTS = "runs/texts.json"
"""Rows of each file by its URL and version, as they were counted; losing it costs counting them again."""

ABOUT = "text"
"""The entry of a commit record's provenance: the file, its rows from and to, and how many were left out and why."""

_THREADS = 8
_SPARE = 16
"""Ids at the end of a cut text that may be others than those of the whole: names of two words, cut in the middle."""


@dataclass(frozen=True)
class Part:
    """The rows of one packed shard: `start` to `stop` of a file; `name` is what their keys begin with."""

    url: str
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class PackText:
    """The packing worker; a shard a task."""

    root: str
    text_tokenizer: str
    field: str
    columns: tuple[Column, ...]
    parts: tuple[Part, ...]

    def start(self, device: str) -> Work:
        """Load the text tokenizer; a file stays open between tasks, for the next one mostly goes on in it."""
        from model.tokenizers.text import TextTokenizer

        reading = _Reading(self.field)
        encode = TextTokenizer.load(Path(self.text_tokenizer)).encode
        return lambda task: _pack_shard(self, reading, encode, task)


def prepare(
    out: Dataset, source: Sequence[str], *, text_tokenizer: str, field: str = "text", rows: int = 10_000
) -> tuple[PackText, list[Task], dict[int, int]]:
    """What there is to pack of files, folders, globs or brace ranges, and the number of rows of each shard.

    `field` is the column, or the name in an object, of the text. The files are counted and cut into shards of `rows`
    rows, none of two files.
    """
    if out.planned:
        raise Conflict(f"{out.store.name} is a dataset of its own: pack texts into another folder")
    if rows < 1:
        raise ValueError(f"{rows} rows a shard, expected at least 1")
    urls = list(dict.fromkeys(url for one in source for url in storage.expand(one, texts.SUFFIXES)))
    if not urls:
        kinds = ", ".join(texts.SUFFIXES)
        raise ValueError(f"no files of texts at {', '.join(map(storage.redacted, source))}, expected {kinds}")
    vocabulary = Vocabulary.of(text_tokenizer)
    codec = modalities.load("caption")
    assert isinstance(codec, TextLike)
    columns = (pack.text_column(codec, vocabulary),)
    tags, counts = _counted(out, urls)
    names = _names(urls)
    parts = [
        Part(url, names[url], start, min(start + rows, counts[url]))
        for url in urls
        for start in range(0, counts[url], rows)
    ]
    _check_same(out, len(parts))
    tasks = []
    for shard, part in enumerate(parts):
        inputs = json.dumps([storage.redacted(part.url), tags[part.url], field, part.start, part.stop])
        task = pack.task_of(out, shard, columns, inputs)
        tasks += [task] if task else []
    worker = PackText(out.store.url, text_tokenizer, field, columns, tuple(parts))
    return worker, tasks, {task.shard: parts[task.shard].stop - parts[task.shard].start for task in tasks}


def _counted(out: Dataset, urls: Sequence[str]) -> tuple[dict[str, str], dict[str, int]]:
    """The version of each file, and its number of rows."""
    known: dict[str, int] = {}
    with suppress(FileNotFoundError, ValueError, AttributeError):
        known = {k: n for k, n in json.loads(out.store.read(COUNTS)).items() if type(n) is int and n >= 0}
    with ThreadPoolExecutor(_THREADS) as threads:
        tags = dict(zip(urls, threads.map(storage.tag, urls), strict=True))
        names = {url: f"{storage.redacted(url)}\n{tags[url]}" for url in urls}
        new = [url for url in urls if names[url] not in known]
        counted = dict(zip(new, threads.map(texts.count, new), strict=True))
    counts = {url: counted[url] if url in counted else known[names[url]] for url in urls}
    if new:
        out.store.put(COUNTS, (json.dumps({names[url]: n for url, n in counts.items()}, indent=1) + "\n").encode())
    return tags, counts


def _names(urls: Sequence[str]) -> dict[str, str]:
    """What tells the files apart: their paths below the folder that holds all."""
    parts = {url: url.split("/") for url in urls}
    levels = zip(*(part[:-1] for part in parts.values()), strict=False)
    alike = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return {url: texts.stem("/".join(part[alike:])) for url, part in parts.items()}


def _check_same(out: Dataset, count: int) -> None:
    there = out.committed(CELL)
    if not there:
        return
    record = out.commit(CELL, there[0])
    if record is None or ABOUT not in record.provenance or max(there) >= count:
        raise Conflict(f"{out.store.name} holds {len(there)} packed shards of something else: pack into another folder")


class _Reading:
    """A file that is being read, from one task to the next."""

    def __init__(self, field: str) -> None:
        self._field, self._url = field, ""
        self._rows: texts.Rows | None = None

    def take(self, part: Part) -> list[tuple[int, str, str]]:
        """(number, text, why there is none) of the rows of a part."""
        if self._rows is None or self._url != part.url or self._rows.position > part.start:
            self.close()
            self._rows, self._url = texts.rows(part.url, self._field, part.start), part.url
        try:
            self._rows.skip(part.start - self._rows.position)
            return [(row, *next(self._rows)) for row in range(part.start, part.stop)]
        except StopIteration:
            self.close()
            name = storage.redacted(part.url)
            raise ValueError(f"{name} has changed: it has no row {part.stop - 1} any more") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None


def _pack_shard(worker: PackText, reading: _Reading, encode: Callable[[str], list[int]], task: Task) -> Report:
    began = perf_counter()
    part, (column,) = worker.parts[task.shard], worker.columns
    found = reading.take(part)
    why = Counter(reason for _, _, reason in found if reason)
    kept = [(row, text) for row, text, reason in found if not reason]
    keys = [make_key(*part.name.split("/"), f"{row:09d}") for row, _ in kept]
    values = ([[cut(text, column.max_tokens, encode)]] for _, text in kept)
    batch = packed.build(worker.columns, 1, keys, {column.name: values})
    about = {"file": storage.redacted(part.url), "rows": [part.start, part.stop], "left_out": dict(sorted(why.items()))}
    provenance = {ABOUT: about, stored.ABOUT: stored.about(worker.columns, 1)}
    made = pack.publish(Dataset(worker.root), worker.columns, task, keys, packed.pieces(batch), provenance, began)
    cell = replace(made.cells[0], num_samples=len(found), num_invalid=sum(why.values()), reasons=dict(why))
    return replace(made, cells=(cell,))


def cut(text: str, max_tokens: int, encode: Callable[[str], list[int]]) -> list[int]:
    """The first ids of a text; of a long one no more is encoded than they need."""
    head = text[: 8 * max_tokens]
    if len(head) < len(text):
        ids = encode(head.rpartition(" ")[0])
        if len(ids) >= max_tokens + _SPARE:
            return ids[:max_tokens]
    return encode(text)[:max_tokens]
