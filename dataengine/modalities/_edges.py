"""Binary edge maps: what canny_edge and sam_edge share."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Kind, Modality, Picture
from dataengine.modalities import _checks as expect


class Edges(Modality):
    """Edges uint8 (h, w), 255 on an edge and 0 elsewhere, stored as an 8-bit grey PNG."""

    kind: ClassVar[Kind] = "map"
    suffix: ClassVar[str] = "png"

    def encode(self, value: np.ndarray) -> bytes:
        """An 8-bit grey PNG."""
        return codecs.encode_png(value)

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (h, w)."""
        return codecs.decode_png(data, np.uint8)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """uint8 (h, w) of 0 and 255."""
        expect.array(self.name, value, np.uint8, size)
        expect.ids(self.name, value, 0, "0 and 255")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """No edge anywhere."""
        return np.zeros(size, dtype=np.uint8)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """One pixel in ten is an edge."""
        return (rng.random(size) < 0.1).astype(np.uint8) * np.uint8(255)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """uint8 (side, side) of 0 and 255: resized as grey, then cut at a threshold that keeps thin lines whole.

        When the crop shrinks by s, a line one pixel wide covers 1/s of the cells it crosses, and at least half of that
        in one of two neighbours: an edge is where the mean is at least 127.5 / s. Lone pixels fade beyond s = 2.
        """
        grey = crop_map(value.astype(np.float32), crop, side, nearest=False)
        shrink = max(crop.height / side, crop.width / side, 1.0)
        # A line that falls on two cells in equal parts must not be lost to the rounding of a weight.
        return (grey >= 127.5 / shrink - 1e-3).astype(np.uint8) * np.uint8(255)

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """White on black."""
        return Picture(image=np.repeat(value[:, :, None], 3, axis=2))
