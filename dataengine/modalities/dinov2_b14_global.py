"""The global feature of DINOv2 ViT-B/14."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect

_COLUMNS = 64


class Dinov2B14Global(Modality):
    """DINOv2's class token after its last norm: float16 (channels,), 768 for the published network; stored as .npy."""

    kind: ClassVar[Kind] = "vector"
    suffix: ClassVar[str] = "npy"
    spelling: ClassVar[str] = "DINOv2-B14-global"

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
        return np.zeros(768, dtype=np.float16)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Normal noise."""
        return rng.standard_normal(768).astype(np.float16)

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
