"""The main colours of the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Picture, Piece, TextLike, _draw
from dataengine.modalities import _checks as expect
from dataengine.modalities._text import INT, quoted, until_end

SIZES = tuple(range(1, 8))
"""How many colours a palette has: one palette of each size."""


class ColorPalette(TextLike):
    """`[{"1": [[r, g, b]], "2": [[r, g, b], [r, g, b]], ..., "7": [...]}]` as JSON, 0..255, as in ml-4m.

    The text is any one of the seven, the same under every crop.
    """

    kind: ClassVar[Kind] = "text"
    suffix: ClassVar[str] = "json"
    choice: ClassVar[Literal["crop", "any"]] = "any"
    max_tokens: ClassVar[int] = 23

    def encode(self, value: list[dict[str, Any]]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[dict[str, Any]]:
        """The list of one dict."""
        value = codecs.decode_json(data)
        if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
            raise ValueError(f"{self.name}: expected a list of one dict, got {value!r:.80}")
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """All seven palettes, each colour three numbers in 0..255."""
        if not isinstance(value, list) or len(value) != 1:
            raise ValueError(f"{self.name}: expected a list of one dict, got {value!r:.80}")
        expect.dictionary(self.name, value[0], [str(n) for n in SIZES])
        for n in SIZES:
            palette = value[0][str(n)]
            if not isinstance(palette, list) or len(palette) != n:
                raise ValueError(f"{self.name}: expected {n} colours in palette {n}, got {palette!r:.80}")
            for colour in palette:
                expect.numbers(f"{self.name} {n}", colour, 3, 0, 255)

    def placeholder(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """All black."""
        return [{str(n): [[0, 0, 0]] * n for n in SIZES}]

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Random colours."""
        return [{str(n): rng.integers(0, 256, (n, 3)).tolist() for n in SIZES}]

    def crop(self, value: list[dict[str, Any]], crop: Crop, size: tuple[int, int], side: int) -> list[dict[str, Any]]:
        """Unchanged: it is of the whole image."""
        return value

    def variants(self, value: list[dict[str, Any]], crops: Sequence[Crop], size: tuple[int, int]) -> list[list[Piece]]:
        """Seven variants of one piece: `v1=n` and n times `v0=r v0=g v0=b`, each rounded to whole levels."""
        return [[self._text(value[0][str(n)])] for n in SIZES]

    @staticmethod
    def _text(palette: list[list[float]]) -> str:
        return " ".join([f"v1={len(palette)}", *(f"v0={round(level)}" for colour in palette for level in colour)])

    def parse(self, text: str) -> tuple[list[dict[str, Any]], list[str]]:
        """The one palette of the text, under its number of whole colours; `[{}]` when it has none."""
        first, *rest = until_end(text).split() or [""]
        complaints = []
        if not re.fullmatch("v1=[1-7]", first):
            complaints.append(f"expected v1=1 to v1=7 first, got {quoted(first)}")
        matches = [re.fullmatch(f"v0={INT}", word) for word in rest]
        levels = [int(m[1]) for m in matches if m and int(m[1]) <= 255]
        wrong = [w for w, m in zip(rest, matches, strict=True) if not (m and int(m[1]) <= 255)]
        complaints += [f"expected v0=0 to v0=255, got {quoted(word)}" for word in wrong]
        # After a word that is no level, nobody knows which channel the next one is.
        colours = [] if wrong else [levels[i : i + 3] for i in range(0, len(levels) - 2, 3)]
        if not complaints and len(levels) != 3 * int(first[3:]):
            complaints.append(f"expected {3 * int(first[3:])} levels after {first}, got {len(levels)}")
        colours = colours[: SIZES[-1]]
        return [{str(len(colours)): colours}] if colours else [{}], complaints

    def picture(self, value: list[dict[str, Any]], rgb: np.ndarray) -> Picture:
        """A row of swatches for each palette."""
        rows = []
        for _, palette in sorted(value[0].items()):
            edges = np.linspace(0, 240, len(palette) + 1).astype(int)
            row = np.repeat(np.rint(palette).astype(np.uint8), np.diff(edges), axis=0)
            rows += [np.tile(row, (28, 1, 1)), np.full((4, 240, 3), 255, np.uint8)]
        return Picture(image=_draw.enlarged(np.concatenate(rows[:-1]), 1)) if rows else Picture(text="no palette")
