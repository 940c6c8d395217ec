"""webdataset:URL - tars of `<key>.jpg` with `<key>.txt` or `<key>.json`, as img2dataset and webdataset write them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from dataengine import _tars
from dataengine._tars import Header
from dataengine.corpora import Corpus, RawSample, Split, _items, _location, _reach
from dataengine.keys import make_key

# webdataset's rule: the key is the path up to the first dot of the file's name, what follows is the suffix.
_MEMBER = re.compile(r"(?:\./)*((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass
class _Item:
    name: str
    repeat: int
    members: dict[str, Header] = field(default_factory=dict)
    """By lower-case suffix."""
    error: str = ""


class WebDataset(Corpus):
    """A tar, a folder of tars, a glob or a brace range, on any filesystem. A tar's headers are read, then its members.

    Options: `image` and `caption` name the suffixes to take, for tars with several (`?image=left.jpg`). Members of one
    key need not be neighbours. A damaged tar gives its readable items and then one error. A name is only ever a name:
    nothing is written or followed by it, and an item whose image or caption is a link or a device is an error.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._url, self._options = _location.parse(location, {"image": "", "caption": ""})

    def _files(self) -> _location.Files:
        return _location.Files(self._url, (".tar",))

    def splits(self, shard_size: int) -> list[Split]:
        """Each tar in the fewest even pieces; tars are indexed a few at a time."""
        files = self._files()
        names = files.names()
        with ThreadPoolExecutor(8) as threads:
            counts = threads.map(lambda name: len(_index_file(files, name)), names)
            return [
                s for n, count in zip(names, counts, strict=True) for s in _location.pieces(n, [(0, count)], shard_size)
            ]

    def read(self, split: Split) -> Iterator[RawSample]:
        """The items of a tar in the order of their first members; ValueError when it has fewer than were split."""
        files = self._files()
        items = _index_file(files, split.source)
        if len(items) < split.stop:
            raise ValueError(f"{split.source} has changed: it had at least {split.stop} items and now has {len(items)}")
        tar = split.source.removesuffix(".tar").split("/")
        try:
            stream = files.open(split.source)
        except FileNotFoundError:
            stream = io.BytesIO()
        with stream:
            for item in items[split.start : split.stop]:
                repeat = [f"#{item.repeat}"] if item.repeat else []
                key = make_key(*tar, *item.name.split("/"), *repeat)
                source = f"{split.source}/{item.name}"
                yield _items.attempt(key, source, partial(self._load, stream, item))

    def _load(self, stream: IO[bytes], item: _Item) -> tuple[bytes, tuple[str, ...]]:
        if item.error:
            raise ValueError(item.error)
        wanted = self._options["image"].lower()
        images = [s for s in item.members if (s == wanted if wanted else f".{s}".endswith(_items.IMAGE_SUFFIXES))]
        if not images:
            raise ValueError(f"no {wanted or 'image'} among {', '.join(item.members)}")
        # The plain `jpg` is meant where there also is, say, a `mask.png`.
        image = min(images, key=lambda s: s.count("."))
        return _member(stream, item.members[image]), self._captions(stream, item)

    def _captions(self, stream: IO[bytes], item: _Item) -> tuple[str, ...]:
        wanted = (self._options["caption"],) if self._options["caption"] else ("txt", "caption", "json")
        for suffix in wanted:
            if suffix in item.members:
                data = _member(stream, item.members[suffix])
                found = _items.json_captions(data) if suffix.endswith("json") else _items.captions(data)
                if found:
                    return found
        return ()

    @classmethod
    def example(cls, folder: str) -> WebDataset:
        """Two tars of five items in all."""
        from PIL import Image

        rng = np.random.default_rng(0)
        for number, count in enumerate((3, 2)):
            with tarfile.open(Path(folder, f"{number:05d}.tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
                for i in range(count):
                    image = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(image, "JPEG")
                    key = f"{number:05d}{i:04d}"
                    row = {"key": key, "caption": f"image {i} of tar {number}", "status": "success"}
                    for suffix, data in (("jpg", image.getvalue()), ("json", json.dumps(row).encode())):
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        return cls(folder)


def _member(stream: IO[bytes], header: Header) -> bytes:
    if header.kind != "file":
        raise ValueError(f"{header.name!r} is a {header.kind}, expected a regular file")
    _reach.hold_to_limit(header.size)
    stream.seek(header.offset)
    return stream.read(header.size)


def _index_file(files: _location.Files, name: str) -> list[_Item]:
    try:
        with files.open(name) as stream:
            return _index(stream)
    except FileNotFoundError:
        return [_Item("missing tar", 0, error="there is no such tar")]


def _index(stream: IO[bytes]) -> list[_Item]:
    """The items of a tar by its headers alone; the last one is an error when the tar is damaged."""
    items: dict[tuple[str, int], _Item] = {}
    seen: Counter[tuple[str, str]] = Counter()
    damage = []
    try:
        for header in _tars.in_file(stream):
            if header.kind != "folder" and (found := _MEMBER.fullmatch(header.name)):
                name, suffix = found[1], found[2].lower()
                # The same name a second time begins another item, so that no image is lost.
                repeat = seen[name, suffix]
                seen[name, suffix] += 1
                items.setdefault((name, repeat), _Item(name, repeat)).members[suffix] = header
    except _tars.DamagedTar as error:
        damage = [_Item("damaged tar", 0, error=f"the tar is damaged: {error}")]
    return [*items.values(), *damage]
