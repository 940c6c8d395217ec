"""Distance from the camera."""

from __future__ import annotations

from typing import Any, ClassVar

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Kind, Modality, Picture
from dataengine.modalities import _checks as expect

_STEPS = 65535


class Depth(Modality):
    """Depth float32 (h, w) in 0..1, small is near; the unit is the labeler's.

    Stored as a 16-bit grey PNG of value * 65535, rounded: what is read differs by at most 0.5 / 65535.
    """

    kind: ClassVar[Kind] = "map"
    suffix: ClassVar[str] = "png"
    lossless: ClassVar[bool] = False

    def encode(self, value: np.ndarray) -> bytes:
        """A 16-bit grey PNG."""
        return codecs.encode_png(codecs.rounded(value, _STEPS, np.uint16))

    def decode(self, data: bytes) -> np.ndarray:
        """float32 (h, w)."""
        return (codecs.decode_png(data, np.uint16) / np.float32(_STEPS)).astype(np.float32)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """float32 (h, w), finite, in 0..1."""
        expect.array(self.name, value, np.float32, size)
        expect.within(self.name, value, 0, 1)

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """All 1, the far end."""
        return np.ones(size, dtype=np.float32)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Uniform noise."""
        return rng.random(size, dtype=np.float32)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """float32 (side, side): averaged or interpolated, so an outline gets depths between its two sides."""
        return np.clip(crop_map(value, crop, side, nearest=False), 0, 1)

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """Near is warm, far is blue, over the range of this image."""
        low, high = float(value.min()), float(value.max())
        nearness = (high - value) / max(high - low, 1e-12)
        coloured = cv2.applyColorMap(np.rint(255 * nearness).astype(np.uint8), cv2.COLORMAP_TURBO)
        return Picture(image=cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB), text=f"{low:.3f} (warm) to {high:.3f} (blue)")
