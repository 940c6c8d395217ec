"""The canonical image."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect


class Rgb(Modality):
    """The image uint8 (h, w, 3), RGB, upright; a member is a JPEG or a PNG.

    Ingest stores the bytes of the source where it can, so `encode` (a JPEG of quality 95, full chroma) is for images
    that have none. It is lossy: a few grey levels on smooth areas.
    """

    kind: ClassVar[Kind] = "map"
    suffix: ClassVar[str] = "jpg"
    lossless: ClassVar[bool] = False

    def encode(self, value: np.ndarray) -> bytes:
        """A JPEG of quality 95."""
        return codecs.encode_jpeg(value)

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (h, w, 3) of a JPEG or PNG; the orientation of EXIF is ignored, as stored images are upright."""
        return codecs.decode_rgb(data)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """uint8 (h, w, 3)."""
        expect.array(self.name, value, np.uint8, (*size, 3))

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """Black."""
        return np.zeros((*size, 3), dtype=np.uint8)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Two colours and what lies between them, from corner to corner."""
        ramp = np.add.outer(np.linspace(0, 0.5, size[0]), np.linspace(0, 0.5, size[1]))[:, :, None]
        first, last = rng.integers(0, 256, (2, 3))
        return np.rint(first + ramp * (last - first)).astype(np.uint8)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """uint8 (side, side, 3)."""
        return crop_map(value, crop, side, nearest=False)

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """Itself."""
        return Picture(image=_draw.enlarged(value, 1))
