"""Dense network features on a grid over the image: what CLIP and DINOv2 maps share."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect

_SHOWN = 224  # pixels: about what a picture of a grid is enlarged to


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
