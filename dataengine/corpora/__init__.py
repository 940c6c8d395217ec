"""Where images come from: one corpus format a file. A corpus splits itself cheaply and reads each split in a worker."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataengine import plugins
from dataengine.storage import redacted


@dataclass(frozen=True)
class Split:
    """What becomes one shard: items `start` to `stop` (exclusive) of a source (a path, a tar, a row group, seeds)."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class RawSample:
    """One item of a corpus as it lies there: encoded image bytes, or an exact canonical image in `values["rgb"]`.

    `key` is valid and unique in the corpus (`make_key`); `source` says where it came from, for provenance and
    quarantine. `values` are exact labels that come with the corpus, by modality. `error` is set, and `image` empty,
    when the item could not even be read.
    """

    key: str
    source: str
    image: bytes = b""
    captions: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


class Corpus(ABC):
    """A corpus format. `location` is what follows the colon on the command line, e.g. `folder:LOCATION`.

    A subclass is one file in this folder; its file name is the format's name.
    """

    emits: tuple[str, ...] = ()
    """Modalities beyond rgb, caption and crop_settings whose exact values come with each sample, in `values`."""

    def __init__(self, location: str) -> None:
        self.location = location

    @abstractmethod
    def splits(self, shard_size: int) -> list[Split]:
        """The shards-to-be, at most `shard_size` items each: the same list every time, without reading any image."""

    @abstractmethod
    def read(self, split: Split) -> Iterator[RawSample]:
        """The items of one split in their order, the same every time. An unreadable item is yielded with `error`."""

    @classmethod
    def example(cls, folder: str) -> Corpus:
        """A corpus of at least 5 small items, written to `folder` if it needs files: what the contract tests read."""
        raise TypeError(f"{cls.__name__} gives no example")


def load(spec: str) -> Corpus:
    """The corpus of a `format:location` string such as `folder:photos/` or `scenes:1000?size=64`."""
    name, colon, location = spec.partition(":")
    if not colon:
        known = ", ".join(plugins.names(__name__))
        raise ValueError(f"corpus {redacted(spec)!r}: expected FORMAT:LOCATION, with a format of {known}")
    kind: type[Corpus] = plugins.load(__name__, name, Corpus)
    return kind(location)


def shown(spec: str) -> str:
    """A corpus as plans, records and messages name it: without user, password and signatures; its options stay."""
    options = re.search(r"\?\w+=[^?]*$", spec)
    if options is None:
        return redacted(spec)
    return redacted(spec[: options.start()]) + (redacted(options[0]) if "://" in options[0] else options[0])
