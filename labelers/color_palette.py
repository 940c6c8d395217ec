"""The main colours of the image: seeded k-means of a thumbnail, for one to seven colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample

NUM_PALETTES = 7


@dataclass(frozen=True, kw_only=True)
class Palette(Labeler):
    """Palettes of k = 1..7 colours: `[{"1": [[r, g, b]], ..., "7": [...]}]`, ints 0..255, the largest cluster first.

    Colours are the centres of Lloyd's k-means with k-means++ seeds in RGB (pypalette's method) of an area-averaged
    `side` x `side` thumbnail; for k = 1 that is the mean colour. An image of fewer colours repeats some. The search
    goes on until no centre moves by half a level, or for `iterations` rounds; PyPalette itself ends sooner, see
    `labelers/pypalette.py`, which makes its very colours.
    """

    inputs = ("rgb",)
    emits = ("color_palette",)
    batch_size = 32

    side: int = 64
    iterations: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        expect_side("color_palette", self.side)

    def load(self, device: str) -> Loaded:
        """Nothing to load; the device is not used."""

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [{"color_palette": self._palettes(sample.rgb)} for sample in samples]

        return label

    def _palettes(self, rgb: np.ndarray) -> list[dict[str, list[list[int]]]]:
        pixels = thumbnail(rgb, self.side).astype(np.float32)
        return [{str(k): self._palette(pixels, k) for k in range(1, NUM_PALETTES + 1)}]

    def _palette(self, pixels: np.ndarray, k: int) -> list[list[int]]:
        stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, self.iterations, 0.5)
        # OpenCV keeps one random state a thread; seeding it before each call makes the result a function of the pixels.
        cv2.setRNGSeed(self.seed)
        _, labels, centers = cv2.kmeans(pixels, k, None, stop, 1, cv2.KMEANS_PP_CENTERS)  # type: ignore[call-overload]
        return ordered(centers, np.bincount(labels.ravel(), minlength=k))


def expect_side(who: str, side: int) -> None:
    """ValueError when a thumbnail has fewer pixels than the largest palette has colours."""
    if side**2 < NUM_PALETTES:
        raise ValueError(f"{who}: expected a thumbnail side of at least 3 pixels, got {side}")


def thumbnail(rgb: np.ndarray, side: int) -> np.ndarray:
    """The pixels uint8 (side * side, 3) of the image, averaged over areas."""
    return cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA).reshape(-1, 3)


def ordered(centres: np.ndarray, counts: np.ndarray) -> list[list[int]]:
    """Centres (k, 3) as whole levels 0..255, that of the most pixels first, equal ones by their colour."""
    colours = np.clip(np.rint(centres), 0, 255).astype(int).tolist()
    return [colour for _, colour in sorted(zip((-counts).tolist(), colours, strict=True))]
