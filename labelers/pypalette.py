"""The main colours of the image, found exactly as PyPalette does (Grieger 2015, adamgrieger/pypalette)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample
from labelers import color_palette

_MAX_ROUNDS = 10_000
"""No image takes that many: a guard against rounding that goes in circles."""


@dataclass(frozen=True, kw_only=True)
class PyPalette(Labeler):
    """Palettes of k = 1..7 colours with the method, and the quirks, that 4M-21 names; `color_palette` is the default.

    As `color_palette` of the same thumbnail, except that one draw of seeds is made by Python's own generator, and that
    the search ends as soon as the red of the first colour rests, whatever the others do: palettes are coarser and
    depend more on `seed`. PyPalette makes no palette of one colour (here it is the mean) and fails where there are
    fewer colours than asked for (here some are repeated). The largest cluster comes first.
    """

    inputs = ("rgb",)
    emits = ("color_palette",)
    batch_size = 32
    alternative = True

    side: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        color_palette.expect_side("pypalette", self.side)

    def load(self, device: str) -> Loaded:
        """Nothing to load; the device is not used."""

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [{"color_palette": self._palettes(sample.rgb)} for sample in samples]

        return label

    def _palettes(self, rgb: np.ndarray) -> list[dict[str, list[list[int]]]]:
        pixels = color_palette.thumbnail(rgb, self.side).astype(np.float64)
        sizes = range(1, color_palette.NUM_PALETTES + 1)
        return [{str(k): color_palette.ordered(*clustered(pixels, k, self.seed)) for k in sizes}]


def clustered(pixels: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (k, 3) of pixels float64 (n, 3) and the number of pixels of each, as PyPalette finds them."""
    centres = _drawn(pixels, k, random.Random(seed))
    for _ in range(_MAX_ROUNDS):
        nearest = np.argmin(_distances(pixels, centres), axis=1)
        counts = np.bincount(nearest, minlength=k)
        sums = np.stack([np.bincount(nearest, weights=pixels[:, channel], minlength=k) for channel in range(3)], axis=1)
        # A centre without pixels, which PyPalette divides by zero for, stays where it is.
        moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)
        at_rest = np.rint(moved[0, 0]) == np.rint(centres[0, 0])
        centres = moved
        if at_rest:
            return centres, counts
    raise ValueError(f"pypalette: {k} colours do not come to rest within {_MAX_ROUNDS} rounds")


def _drawn(pixels: np.ndarray, k: int, draws: random.Random) -> np.ndarray:
    """k-means++: the first centre is any pixel; the next are drawn by their squared distances from those there are."""
    chosen = [draws.choice(range(len(pixels)))]
    while len(chosen) < k:
        weights = _distances(pixels, pixels[chosen]).min(axis=1) ** 2
        upto = np.cumsum(weights)
        drawn = int(np.searchsorted(upto, draws.uniform(0, upto[-1]), side="right"))
        # Beyond the end where every pixel has been chosen already, by its colour.
        chosen.append(drawn if drawn < len(pixels) else chosen[0])
    return pixels[chosen]


def _distances(pixels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Euclidean distances (n, k), added up in PyPalette's order so that they round as its do."""
    red, green, blue = np.moveaxis((centres[None] - pixels[:, None]) ** 2, -1, 0)
    return np.sqrt(red + green + blue)
