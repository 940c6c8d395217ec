"""Surface normals."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Modality, Picture
from dataengine.modalities._maps import check_array


class Normal(Modality):
    """Unit vectors float32 (h, w, 3): x right, y up, z towards the camera, so that a frontal wall is (0, 0, 1).

    Stored as 8-bit RGB PNG, (n + 1) / 2 * 255; what comes back is a unit vector within half a degree.
    """

    kind = "map"
    suffix = "png"
    lossless = False

    def encode(self, value: np.ndarray) -> bytes:
        """Rounded to 255 steps."""
        return codecs.encode_png(np.round((value.astype(np.float64) + 1) * 127.5).astype(np.uint8))

    def decode(self, data: bytes) -> np.ndarray:
        """float32 (h, w, 3) of unit length."""
        return _unit(codecs.decode_png(data, np.uint8, 3).astype(np.float32) / np.float32(127.5) - 1)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """float32 (h, w, 3), of unit length within 1 %."""
        check_array(self.name, value, np.float32, (*size, 3))
        length = np.linalg.norm(value, axis=-1)
        if not (np.abs(length - 1) < 0.01).all():
            raise ValueError(f"normal: expected unit vectors, got lengths {np.min(length)} to {np.max(length)}")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """A frontal wall."""
        return np.broadcast_to(np.array([0, 0, 1], np.float32), (*size, 3)).copy()

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Random directions."""
        return _unit(rng.standard_normal((*size, 3)).astype(np.float32))

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """(side, side, 3) of unit length; a mirror negates x."""
        cut = _unit(crop_map(value, crop, side, nearest=False))
        return cut * np.array([-1, 1, 1], np.float32) if crop.hflip else cut

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """Directions as colours."""
        return Picture(image=np.round((value + 1) * 127.5).astype(np.uint8))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scaled to unit length; what has no length faces the camera."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    facing = np.array([0, 0, 1], np.float32)
    return np.where(length > 1e-3, vectors / np.maximum(length, 1e-3), facing).astype(np.float32)
