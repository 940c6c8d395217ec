"""Network features of an image, on a grid over it or of the whole: what CLIP, DINOv2 and others share."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect

_SHOWN = 224  # pixels: about what a picture of a grid is enlarged to
_COLUMNS = 64  # values in a row of the picture of a vector


class FeatureGrid(Modality):
    """Features float16 (rows, columns, channels), rows from the top, of the network's own view of the whole image.

    Stored as .npy. `shape` is that of the published network; others are valid, as other checkpoints have others.
    """

    kind: ClassVar[Kind] = "grid"
    suffix: ClassVar[str] = "npy"
    shape: ClassVar[tuple[int, int, int]]

    def encode(self, value: np.ndarray) -> bytes:
        """A NumPy file."""
        return codecs.encode_npy(value)

    def decode(self, data: bytes) -> np.ndarray:
        """float16 (rows, columns, channels)."""
        value = codecs.decode_npy(data)
        expect.array(self.name, value, np.float16, ("rows", "columns", "channels"))
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """float16 (rows, columns, channels), finite."""
        expect.array(self.name, value, np.float16, ("rows", "columns", "channels"))
        expect.finite(self.name, value)

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """Zeros."""
        return np.zeros(self.shape, dtype=np.float16)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Normal noise."""
        return rng.standard_normal(self.shape).astype(np.float16)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """Unchanged: a network's features of a crop are not a crop of its features, and mirroring changes them too."""
        return value

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """The three principal axes as red, green and blue."""
        image = _draw.enlarged(_draw.principal(value), max(1, round(_SHOWN / max(value.shape[:2]))))
        return Picture(image=image, text=f"{' x '.join(map(str, value.shape))}, principal axes as colours")


class FeatureVector(Modality):
    """Features float16 (channels,) of the network's own view of the whole image; stored as .npy.

    `width` is that of the published network; others are valid, as other checkpoints have others.
    """

    kind: ClassVar[Kind] = "vector"
    suffix: ClassVar[str] = "npy"
    width: ClassVar[int]

    def encode(self, value: np.ndarray) -> bytes:
        """A NumPy file."""
        return codecs.encode_npy(value)

    def decode(self, data: bytes) -> np.ndarray:
        """float16 (channels,)."""
        value = codecs.decode_npy(data)
        expect.array(self.name, value, np.float16, ("channels",))
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """float16 (channels,), finite."""
        expect.array(self.name, value, np.float16, ("channels",))
        expect.finite(self.name, value)

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """Zeros."""
        return np.zeros(self.width, dtype=np.float16)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Normal noise."""
        return rng.standard_normal(self.width).astype(np.float16)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """Unchanged: it is of the whole image."""
        return value

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """The values in rows of 64 from the top left: blue below zero, white at zero, red above."""
        padded = np.zeros(-(-value.size // _COLUMNS) * _COLUMNS)
        padded[: value.size] = value
        largest = float(np.abs(padded).max()) or 1.0
        share = (padded / largest).reshape(-1, _COLUMNS, 1)
        faded = 255 * (1 - np.abs(share))
        red, green, blue = np.where(share > 0, 255, faded), faded, np.where(share < 0, 255, faded)
        image = np.rint(np.concatenate([red, green, blue], axis=2)).astype(np.uint8)
        return Picture(image=_draw.enlarged(image, 6), text=f"{value.size} values, ±{largest:.3g}")
