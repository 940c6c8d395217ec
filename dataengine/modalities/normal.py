"""Surface normals."""

from __future__ import annotations

from typing import Any, ClassVar

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Kind, Modality, Picture
from dataengine.modalities import _checks as expect

_FACING = np.array([0, 0, -1], dtype=np.float32)
"""A wall that faces the camera."""
_ROWS = 32


class Normal(Modality):
    """Unit vectors float32 (h, w, 3): x right, y down, z forward, pointing out of the surface.

    These are OpenCV's camera axes, in which ml-4m's published predictions are drawn: a wall that faces the camera is
    (0, 0, -1), a floor (0, -1, 0).

    Stored as an 8-bit RGB PNG of (n + 1) / 2 * 255, rounded, and scaled to unit length when read: what is read differs
    by at most 0.4 degrees.
    """

    kind: ClassVar[Kind] = "map"
    suffix: ClassVar[str] = "png"
    lossless: ClassVar[bool] = False

    def encode(self, value: np.ndarray) -> bytes:
        """An 8-bit RGB PNG."""
        return codecs.encode_png(_colours(value))

    def decode(self, data: bytes) -> np.ndarray:
        """float32 (h, w, 3) of unit length; no stored colour is the null vector."""
        return _unit(codecs.decode_png(data, np.uint8, 3).astype(np.float32) / 127.5 - 1)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """float32 (h, w, 3), finite, of length 1 within 1 %."""
        expect.array(self.name, value, np.float32, (*size, 3))
        # A few rows at a time, which stay in the processor's cache. A value that is nan makes a nan of both bounds.
        strips = (_squared_length(value[top : top + _ROWS]) for top in range(0, len(value), _ROWS))
        bounds = np.array([(strip.min(), strip.max()) for strip in strips])
        low, high = bounds[:, 0].min(), bounds[:, 1].max()
        if not (low > 0.99**2 and high < 1.01**2):
            expect.finite(self.name, value)
            raise ValueError(f"{self.name}: expected vectors of length 1, got {low**0.5:.3g}..{high**0.5:.3g}")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """A wall that faces the camera."""
        return np.broadcast_to(_FACING, (*size, 3)).copy()

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Uniform on the half of the sphere that faces the camera."""
        value = rng.standard_normal((*size, 3)).astype(np.float32)
        return _unit(np.concatenate([value[..., :2], -np.abs(value[..., 2:])], axis=2))

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """float32 (side, side, 3), again of unit length; a mirrored crop has x negated."""
        out = _unit(crop_map(value, crop, side, nearest=False))
        return out * np.array([-1, 1, 1], dtype=np.float32) if crop.hflip else out

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """Red is right, green is up, blue faces the camera."""
        return Picture(image=_colours(value))


def _squared_length(value: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.transform(np.square(value, order="C"), np.ones((1, 3), dtype=np.float32)))


def _colours(value: np.ndarray) -> np.ndarray:
    return codecs.rounded(value, 127.5, np.uint8, offset=1.0)


def _unit(value: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(value, axis=2, keepdims=True)
    # Opposite normals of one cell may cancel out; then the side that is seen is the one that faces the camera.
    return np.where(length > 1e-6, value / np.maximum(length, 1e-6), _FACING).astype(np.float32)
