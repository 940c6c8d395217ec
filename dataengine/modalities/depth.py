"""Depth along the optical axis."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Modality, Picture
from dataengine.modalities._maps import check_array


class Depth(Modality):
    """float32 (h, w) in 0..1, near is small; stored as 16-bit PNG, so within 1/131070. The unit is the labeler's."""

    kind = "map"
    suffix = "png"
    lossless = False

    def encode(self, value: np.ndarray) -> bytes:
        """value * 65535, rounded."""
        return codecs.encode_png(np.round(value.astype(np.float64) * 65535).astype(np.uint16))

    def decode(self, data: bytes) -> np.ndarray:
        """float32 (h, w)."""
        return codecs.decode_png(data, np.uint16, 1).astype(np.float32) / np.float32(65535)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """float32 (h, w), finite, in 0..1."""
        check_array(self.name, value, np.float32, size)
        if not (value >= 0).all() or not (value <= 1).all():
            raise ValueError(f"depth: expected values in 0..1, got {np.min(value)} to {np.max(value)}")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """Zeros."""
        return np.zeros(size, np.float32)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Uniform deviates."""
        return rng.random(size, np.float32)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """(side, side)."""
        return crop_map(value, crop, side, nearest=False)

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """Near is warm, over the range of this image."""
        low, high = float(value.min()), float(value.max())
        scaled = (255 * (1 - (value - low) / max(high - low, 1e-6))).astype(np.uint8)
        shown = cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
        return Picture(image=shown, text=f"{low:.3f} to {high:.3f}")
