"""Numbers that describe an image: ml-4m's metadata."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Picture, TextLike

FLOAT_BINS = 50
PIXELS_PER_BIN = 32
LARGEST = 999


@dataclass(frozen=True)
class Kind:
    """One kind of metadata: ml-4m's number and key, and how its value becomes one of the ids v0=0..999."""

    number: int
    key: str
    rule: Literal["pixels", "count", "range", "edges"]
    bounds: tuple[float, ...] = ()

    def encode(self, value: int | float) -> int:
        """pixels: // 32; count: as it is; range: 0..49, truncated; edges: how many edges it reaches."""
        if self.rule == "pixels":
            return int(np.clip(int(value) // PIXELS_PER_BIN, 0, LARGEST))
        if self.rule == "count":
            return int(np.clip(int(value), 0, LARGEST))
        if self.rule == "edges":
            return sum(value >= edge for edge in self.bounds)
        low, high = self.bounds
        return int((min(max(value, low), high) - low) / (high - low) * (FLOAT_BINS - 1))

    def decode(self, token: int) -> int | float:
        """As ml-4m shows it: a range divides by 50 where encoding multiplies by 49; edges stay a bin's number."""
        if self.rule == "pixels":
            return token * PIXELS_PER_BIN
        if self.rule != "range":
            return token
        low, high = self.bounds
        return (high - low) * (token / FLOAT_BINS) + low


KINDS = tuple(
    Kind(number, key, rule, bounds)
    for number, (key, rule, bounds) in enumerate(
        (
            ("original_width", "pixels", ()),
            ("original_height", "pixels", ()),
            ("caption_n_chars", "count", ()),
            ("caption_n_words", "count", ()),
            ("caption_n_sentences", "count", ()),
            ("n_humans", "count", ()),
            ("n_sam_instances", "count", ()),
            ("n_coco_instances", "count", ()),
            ("coco_instance_diversity", "count", ()),
            ("colorfulness", "range", (0.0, 150.0)),
            ("brightness", "range", (0.0, 255.0)),
            ("contrast", "range", (0.0, 127.0)),
            ("saturation", "range", (0.0, 255.0)),
            ("entropy", "range", (0.0, 10.0)),
            ("walkability", "range", (0.0, 1.0)),
            ("objectness", "range", (0.0, 1.0)),
            ("semantic_diversity", "count", ()),
            ("geometric_complexity", "range", (0.0, 0.75)),
            ("occlusion_score", "range", (0.0, 0.25)),
            ("watermark_score", "edges", (0.5,)),
            ("aesthetic_score", "edges", (4.5, 5.5)),
        )
    )
)
BY_KEY = {kind.key: kind for kind in KINDS}
_PAIR = re.compile(r"v1=(\d+)\s+v0=(\d+)")


class Metadata(TextLike):
    """A flat JSON object of ml-4m's keys, any subset: ints for counts and pixels, ints or floats for the others."""

    kind = "text"
    suffix = "json"
    shuffle = True
    chunked = True
    max_tokens = 40

    def encode(self, value: dict[str, int | float]) -> bytes:
        """JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> dict[str, int | float]:
        """The dictionary."""
        value: dict[str, int | float] = codecs.decode_json(data)
        self.check(value, (0, 0))
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """Known keys only; finite numbers, whole ones where ml-4m reads an int."""
        if not isinstance(value, dict):
            raise ValueError(f"metadata: expected an object, got {value!r:.100}")
        for key, number in value.items():
            if key not in BY_KEY:
                raise ValueError(f"metadata: unknown key {key!r}, expected some of {', '.join(BY_KEY)}")
            whole = BY_KEY[key].rule in ("pixels", "count")
            if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
                raise ValueError(f"metadata: expected {key} to be {'an int' if whole else 'a number'}, got {number!r}")
            if not np.isfinite(number):
                raise ValueError(f"metadata: expected a finite {key}, got {number}")

    def placeholder(self, size: tuple[int, int]) -> dict[str, int | float]:
        """Nothing known."""
        return {}

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> dict[str, int | float]:
        """Some of the keys, with values over their ranges."""
        chosen = rng.choice(len(KINDS), 8, replace=False)
        return {
            KINDS[i].key: float(rng.uniform(KINDS[i].bounds[0], KINDS[i].bounds[-1]))
            if KINDS[i].bounds
            else int(rng.integers(0, 900))
            for i in chosen
        }

    def crop(
        self, value: dict[str, int | float], crop: Crop, size: tuple[int, int], side: int
    ) -> dict[str, int | float]:
        """Unchanged: it describes the whole image."""
        return value

    def picture(self, value: dict[str, int | float], rgb: np.ndarray) -> Picture:
        """A table."""
        rows = [(k.key, value[k.key]) for k in KINDS if k.key in value]
        return Picture(table=tuple((key, f"{v:.3g}" if isinstance(v, float) else str(v)) for key, v in rows))

    def variants(self, value: dict[str, int | float], crops: Sequence[Crop], size: tuple[int, int]) -> list[list[str]]:
        """One variant: a piece `v1=kind v0=bin` for each key, in the order of ml-4m's numbers (a reader shuffles)."""
        present = [k for k in KINDS if k.key in value]
        return [[f"v1={k.number} v0={k.encode(value[k.key])}" for k in present]]

    def parse(self, text: str) -> tuple[dict[str, int | float], list[str]]:
        """The pairs that are whole and name a kind; complaints about the rest."""
        body = text.replace("[EOS]", "").strip()
        found: dict[str, int | float] = {}
        complaints, end = [], 0
        for match in _PAIR.finditer(body):
            if body[end : match.start()].strip():
                complaints.append(f"not a pair: {body[end : match.start()].strip()!r}")
            end = match.end()
            number = int(match[1])
            if number >= len(KINDS):
                complaints.append(f"no such kind: {match[0]!r}")
            elif KINDS[number].key in found:
                complaints.append(f"said twice: {match[0]!r}")
            else:
                found[KINDS[number].key] = KINDS[number].decode(int(match[2]))
        if body[end:].strip():
            complaints.append(f"not a pair: {body[end:].strip()!r}")
        return found, complaints
