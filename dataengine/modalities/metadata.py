"""Numbers that describe the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from dataengine import codecs, plugins
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Picture, Piece, TextLike
from dataengine.modalities import _checks as expect
from dataengine.modalities._text import INT, NUM_BINS, quoted, until_end

_SIZE_STEP = 32
_RANGE_BINS = 50


@dataclass(frozen=True)
class MetadataKind:
    """One kind of number and how it is binned (ml-4m's MetadataTransform); its id is its place in `KINDS`.

    size: whole pixels in steps of 32. count: a whole number, 0..999. range: `low`..`high` in 50 bins. edges: how many
    of `edges` it has reached.
    """

    key: str
    rule: Literal["size", "count", "range", "edges"]
    low: float = 0.0
    high: float = 0.0
    edges: tuple[float, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether values are ints."""
        return self.rule in ("size", "count")

    @property
    def num_bins(self) -> int:
        """Bins are 0..num_bins - 1."""
        return {"range": _RANGE_BINS, "edges": len(self.edges) + 1}.get(self.rule, NUM_BINS)

    def to_bin(self, value: float) -> int:
        """The bin of a value; what lies outside is clipped."""
        if self.rule == "edges":
            return sum(value >= edge for edge in self.edges)
        if self.rule == "range":
            share = (max(self.low, min(value, self.high)) - self.low) / (self.high - self.low)
            return int(share * (_RANGE_BINS - 1))
        return max(0, min(int(value) // (_SIZE_STEP if self.rule == "size" else 1), NUM_BINS - 1))

    def from_bin(self, index: int) -> int | float:
        """A value for a bin: its lower end for a size, the count, low + (high - low) * bin / 50 for a range.

        The last divides by 50 where `to_bin` multiplies by 49, as ml-4m does; of edges the bin itself is the value.
        """
        if self.rule == "range":
            return (self.high - self.low) * (index / _RANGE_BINS) + self.low
        return index * _SIZE_STEP if self.rule == "size" else index


KINDS: tuple[MetadataKind, ...] = (
    MetadataKind("original_width", "size"),
    MetadataKind("original_height", "size"),
    MetadataKind("caption_n_chars", "count"),
    MetadataKind("caption_n_words", "count"),
    MetadataKind("caption_n_sentences", "count"),
    MetadataKind("n_humans", "count"),
    MetadataKind("n_sam_instances", "count"),
    MetadataKind("n_coco_instances", "count"),
    MetadataKind("coco_instance_diversity", "count"),
    MetadataKind("colorfulness", "range", 0, 150),
    MetadataKind("brightness", "range", 0, 255),
    MetadataKind("contrast", "range", 0, 127),
    MetadataKind("saturation", "range", 0, 255),
    MetadataKind("entropy", "range", 0, 10),
    MetadataKind("walkability", "range", 0, 1),
    MetadataKind("objectness", "range", 0, 1),
    MetadataKind("semantic_diversity", "count"),
    MetadataKind("geometric_complexity", "range", 0, 0.75),
    MetadataKind("occlusion_score", "range", 0, 0.25),
    MetadataKind("watermark_score", "edges", edges=(0.5,)),
    MetadataKind("aesthetic_score", "edges", edges=(4.5, 5.5)),
)
"""The kinds by id."""

_IDS = {kind.key: i for i, kind in enumerate(KINDS)}


class Metadata(TextLike):
    """A flat dict of any of the 21 `KINDS` as JSON: ints for sizes and counts, else numbers."""

    kind: ClassVar[Kind] = "text"
    suffix: ClassVar[str] = "json"
    choice: ClassVar[Literal["crop", "any"]] = "any"
    shuffle: ClassVar[bool] = True
    chunked: ClassVar[bool] = True
    max_tokens: ClassVar[int] = 40

    def encode(self, value: dict[str, Any]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> dict[str, Any]:
        """The dict."""
        value = codecs.decode_json(data)
        expect.dictionary(self.name, value, ())
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """Known keys, ints where a kind is whole (ml-4m breaks on 3.0), finite numbers elsewhere."""
        expect.dictionary(self.name, value, ())
        for key, number in value.items():
            if key not in _IDS:
                raise ValueError(f"{self.name}: unknown key {key!r:.40}{plugins.nearest(str(key), list(_IDS))}")
            if KINDS[_IDS[key]].is_whole and (not isinstance(number, int) or isinstance(number, bool)):
                raise ValueError(f"{self.name}: expected an int for {key}, got {number!r:.40}")
            if not expect.is_number(number):
                raise ValueError(f"{self.name}: expected a finite number for {key}, got {number!r:.40}")

    def placeholder(self, size: tuple[int, int]) -> dict[str, Any]:
        """No number."""
        return {}

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
        """All kinds, over their ranges."""
        whole = {k.key: int(rng.integers(0, 900)) for k in KINDS if k.is_whole}
        return {
            **whole,
            **{k.key: float(rng.uniform(k.low, k.high or 10)) for k in KINDS if not k.is_whole},
        }

    def crop(self, value: dict[str, Any], crop: Crop, size: tuple[int, int], side: int) -> dict[str, Any]:
        """Unchanged: it is of the whole image."""
        return value

    def variants(self, value: dict[str, Any], crops: Sequence[Crop], size: tuple[int, int]) -> list[list[Piece]]:
        """One variant of pieces `v1=<id> v0=<bin>`, by id."""
        return [[f"v1={i} v0={k.to_bin(value[k.key])}" for i, k in enumerate(KINDS) if k.key in value]]

    def parse(self, text: str) -> tuple[dict[str, Any], list[str]]:
        """The kinds that the text names, by id, as the values of their bins; the first of two of a kind counts."""
        before, *chunks = re.split(r"(?:^|\s+)(?=v1=)", " ".join(until_end(text).split()))
        complaints = [f"expected a pair to begin with v1=, got {quoted(before)}"] if before else []
        bins: dict[int, int] = {}
        for chunk in chunks:
            match = re.fullmatch(f"v1={INT} v0={INT}", chunk)
            if match is None:
                complaints.append(f"expected v1= v0=, got {quoted(chunk)}")
                continue
            i, index = int(match[1]), int(match[2])
            if i >= len(KINDS):
                complaints.append(f"expected v1=0 to v1={len(KINDS) - 1}, got {quoted(chunk)}")
            elif index >= KINDS[i].num_bins:
                complaints.append(f"expected a bin below {KINDS[i].num_bins} for {KINDS[i].key}, got {quoted(chunk)}")
            elif i in bins:
                complaints.append(f"{KINDS[i].key} a second time: {quoted(chunk)}")
            else:
                bins[i] = index
        return {KINDS[i].key: KINDS[i].from_bin(bins[i]) for i in sorted(bins)}, complaints

    def picture(self, value: dict[str, Any], rgb: np.ndarray) -> Picture:
        """A table by id."""
        known = [(k.key, value[k.key]) for k in KINDS if k.key in value]
        return Picture(table=tuple((key, f"{v:.4g}" if isinstance(v, float) else str(v)) for key, v in known))
