"""The canonical image."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Modality, Picture


class Rgb(Modality):
    """uint8 (h, w, 3) RGB, upright. Ingest stores a JPEG or PNG; what is encoded here is JPEG at quality 95, 4:4:4."""

    kind = "map"
    suffix = "jpg"
    lossless = False

    def encode(self, value: np.ndarray) -> bytes:
        """A JPEG, within a few grey levels of the image where it is smooth."""
        sink = io.BytesIO()
        Image.fromarray(value).save(sink, "JPEG", quality=95, subsampling=0)
        return sink.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (h, w, 3); orientation tags are not read, a canonical image is upright.

        Pillow, like ingest: another JPEG decoder would give other pixels in the last bit.
        """
        try:
            with Image.open(io.BytesIO(data)) as picture:
                return np.asarray(picture.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"no image in {len(data)} bytes: {error}") from error

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """uint8 (h, w, 3)."""
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.shape != (*size, 3):
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"rgb: expected uint8 {(*size, 3)}, got {found}")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """Black."""
        return np.zeros((*size, 3), np.uint8)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Smooth random colours."""
        return cv2.resize(rng.integers(0, 256, (3, 3, 3), np.uint8), size[::-1], interpolation=cv2.INTER_LINEAR)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """(side, side, 3)."""
        return crop_map(value, crop, side, nearest=False)

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """Itself."""
        return Picture(image=value)
