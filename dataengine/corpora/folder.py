"""folder:PATH - the images below a folder, in the order of their names, with captions beside them or in one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import storage
from dataengine.corpora import Corpus, RawSample, Split, _items, _location, _reach
from dataengine.keys import make_key

_TABLES = ("captions.json", "captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
_PATH_NAMES = ("file_name", "image", "path", "file")


class Folder(Corpus):
    """Images by their extension, however deep and in either case; names that begin with a dot are left out.

    Captions: `<stem>.txt` (one) or `<stem>.json` beside the image, else the root's `captions.json` (path to captions),
    or `captions.jsonl`, `captions.csv`, `metadata.jsonl`, `metadata.csv` with a path and a caption in each row.
    Option: `links=yes` follows symbolic links that lead out of the folder, which are errors else.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._url, options = _location.parse(location, {"links": "no"})
        self._links = options["links"] == "yes"
        if options["links"] not in ("yes", "no"):
            raise ValueError(f"folder:{storage.redacted(location)}: links is {options['links']!r}, expected yes or no")

    def __getstate__(self) -> dict[str, Any]:
        # What was listed stays in this process: another one asks the filesystem itself.
        return {"location": self.location, "_url": self._url, "_links": self._links}

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The filesystem and the folder's path in it."""
        fs, root = storage.split_url(self._url)
        if not fs.isdir(root):
            raise ValueError(f"folder:{storage.redacted(self.location)}: expected a folder, found none")
        return fs, root.rstrip("/")

    @cached_property
    def _names(self) -> frozenset[str]:
        fs, root = self._place
        names = (path[len(root) :].lstrip("/") for path in fs.find(root))
        return frozenset(n for n in names if not any(part.startswith(".") for part in n.split("/")))

    @cached_property
    def _images(self) -> list[str]:
        return sorted(n for n in self._names if n.lower().endswith(_items.IMAGE_SUFFIXES))

    @cached_property
    def _table(self) -> dict[str, tuple[str, ...]]:
        """Captions by relative path, of every table in the root."""
        out: dict[str, tuple[str, ...]] = {}
        for name in _TABLES:
            if name in self._names:
                for path, texts in _rows(name, self._read(name).decode("utf-8-sig")):
                    known = path.removeprefix("./")
                    out[known] = out.get(known, ()) + texts
        if out and self._images and out.keys().isdisjoint(self._images):
            place = storage.redacted(self._url)
            raise ValueError(f"no image below {place} has a caption: {next(iter(out))!r}, but {self._images[0]!r}")
        return out

    def splits(self, shard_size: int) -> list[Split]:
        """Runs of consecutive names; the first name of a run is its source."""
        runs = _location.pieces("", [(0, len(self._images))], shard_size)
        self._table  # noqa: B018 - a table that cannot be read is told before the work starts
        return [Split(self._images[run.start], run.start, run.stop) for run in runs]

    def read(self, split: Split) -> Iterator[RawSample]:
        """The images of a run; ValueError when the folder is not the one that was split."""
        names = self._images[split.start : split.stop]
        if len(names) != split.stop - split.start or names[0] != split.source:
            found = names[0] if names else "nothing"
            place = storage.redacted(self._url)
            raise ValueError(f"{place} has changed: item {split.start} was {split.source!r} and is now {found!r}")
        for name in names:
            folders, _, file = name.rpartition("/")
            stem, _, suffix = file.rpartition(".")
            key = make_key(*folders.split("/"), stem, suffix) if folders else make_key(stem, suffix)
            yield _items.attempt(key, name, partial(self._load, name))

    def _load(self, name: str) -> tuple[bytes, tuple[str, ...]]:
        return self._read(name), self._captions(name)

    def _read(self, name: str) -> bytes:
        fs, root = self._place
        if fs.protocol[0] == "file":
            return _reach.read_local(f"{root}/{name}", ("/",) if self._links else (root,))
        return _reach.read_remote(fs, f"{root}/{name}")

    def _captions(self, name: str) -> tuple[str, ...]:
        stem = name.rpartition(".")[0]
        if f"{stem}.txt" in self._names:
            return _items.captions(self._read(f"{stem}.txt"))
        if f"{stem}.json" in self._names and f"{stem}.json" not in _TABLES:
            return _items.json_captions(self._read(f"{stem}.json"))
        return self._table.get(name, ())

    @classmethod
    def example(cls, folder: str) -> Folder:
        """Six images in two folders, captioned in both ways."""
        from PIL import Image

        rng = np.random.default_rng(0)
        root = Path(folder)
        for i in range(6):
            place = root / ("cats" if i % 2 else "dogs")
            place.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
            image.save(place / f"{i:03d}{('.jpg', '.png', '.JPG')[i % 3]}")
            if i % 2:
                (place / f"{i:03d}.txt").write_text(f"cat number {i}\n")
        table = {f"dogs/{i:03d}{('.jpg', '.png', '.JPG')[i % 3]}": [f"dog number {i}", "a dog"] for i in (0, 2, 4)}
        (root / "captions.json").write_text(json.dumps(table))
        return cls(folder)


def _rows(name: str, text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(path, captions) of every row of a table; ValueError, with its number, for one that has no path."""
    if name.endswith(".json"):
        table = json.loads(text)
        if not isinstance(table, dict):
            raise ValueError(f"{name}: expected an object of path to caption, got {type(table).__name__}")
        yield from ((path, _items.captions(value)) for path, value in table.items())
        return
    rows: Iterator[Mapping[str, Any]]
    rows = (
        csv.DictReader(io.StringIO(text))
        if name.endswith(".csv")
        else map(json.loads, filter(str.strip, text.split("\n")))
    )
    for number, row in enumerate(rows, start=1):
        path = next((row[n] for n in _PATH_NAMES if row.get(n)), None)
        if not isinstance(path, str):
            raise ValueError(f"{name}, row {number}: expected a path under {' or '.join(_PATH_NAMES)}, got {list(row)}")
        yield path, _items.captions(dict(row))
