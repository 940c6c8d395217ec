"""The colours an image is made of: palettes of one to seven."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Picture, TextLike

SIZES = tuple(str(n) for n in range(1, 8))
_HEAD = re.compile(r"v1=(\d+)")
_VALUE = re.compile(r"v0=(\d+)")


class ColorPalette(TextLike):
    """ml-4m's JSON, `[{"1": [[r, g, b]], ..., "7": [7 x [r, g, b]]}]`: all seven palettes, integers 0..255."""

    kind = "text"
    suffix = "json"
    max_tokens = 23

    def encode(self, value: list[dict[str, list[list[int]]]]) -> bytes:
        """JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[dict[str, list[list[int]]]]:
        """The list with its one object."""
        value: list[dict[str, list[list[int]]]] = codecs.decode_json(data)
        self.check(value, (0, 0))
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """One object with palettes 1..7, each of as many colours as its key says."""
        if (
            not isinstance(value, list)
            or len(value) != 1
            or not isinstance(value[0], dict)
            or set(value[0]) != set(SIZES)
        ):
            raise ValueError(f"color_palette: expected a list of one object with keys 1..7, got {value!r:.100}")
        for count, colours in value[0].items():
            numbers = [v for colour in colours for v in colour]
            if len(colours) != int(count) or any(len(c) != 3 for c in colours):
                raise ValueError(f"color_palette: expected {count} colours of 3 numbers, got {colours!r:.100}")
            if not all(isinstance(v, int) and 0 <= v <= 255 for v in numbers):
                raise ValueError(f"color_palette: expected integers 0..255, got {colours!r:.100}")

    def placeholder(self, size: tuple[int, int]) -> list[dict[str, list[list[int]]]]:
        """All black."""
        return [{n: [[0, 0, 0]] * int(n) for n in SIZES}]

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> list[dict[str, list[list[int]]]]:
        """Random colours."""
        return [{n: rng.integers(0, 256, (int(n), 3)).tolist() for n in SIZES}]

    def crop(self, value: Any, crop: Crop, size: tuple[int, int], side: int) -> Any:
        """Unchanged: it describes the whole image."""
        return value

    def picture(self, value: list[dict[str, list[list[int]]]], rgb: np.ndarray) -> Picture:
        """A row of swatches for each palette."""
        rows = [np.array(value[0][n], np.uint8)[None] for n in SIZES if n in value[0]]
        if not rows:
            return Picture(text="no palette")
        height = 105 // len(rows)
        strips = [cv2.resize(row, (105, height), interpolation=cv2.INTER_NEAREST) for row in rows]
        return Picture(image=np.vstack(strips))

    def variants(
        self, value: list[dict[str, list[list[int]]]], crops: Sequence[Crop], size: tuple[int, int]
    ) -> list[list[str]]:
        """Seven variants, one piece each: `v1=n` and then `v0=r v0=g v0=b` for each of n colours."""
        out = []
        for n in SIZES:
            colours = [f"v0={round(v)}" for colour in value[0][n] for v in colour]
            out.append([" ".join([f"v1={n}", *colours])])
        return out

    def parse(self, text: str) -> tuple[list[dict[str, list[list[int]]]], list[str]]:
        """The one palette that a text has; complaints when its count or a number is off."""
        words = text.replace("[EOS]", "").split()
        complaints, numbers = [], []
        head = _HEAD.fullmatch(words[0]) if words else None
        if head is None:
            complaints.append(f"expected v1=COUNT first, got {words[:1]}")
        for word in words[1 if head else 0 :]:
            match = _VALUE.fullmatch(word)
            if match is None or int(match[1]) > 255:
                complaints.append(f"not a colour value: {word!r}")
            else:
                numbers.append(int(match[1]))
        colours = [numbers[i : i + 3] for i in range(0, len(numbers) - len(numbers) % 3, 3)]
        if head is not None and (len(colours) != int(head[1]) or len(numbers) % 3):
            complaints.append(f"said {head[1]} colours, gave {len(numbers)} values")
        return [{str(len(colours)): colours}] if colours else [{}], complaints
