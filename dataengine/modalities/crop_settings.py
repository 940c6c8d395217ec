"""Where each sample is cut for tokens and training."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from dataengine import codecs, geometry
from dataengine.geometry import Crop
from dataengine.modalities import Modality, Picture


class CropSettings(Modality):
    """int64 (n_crops, 5): top, left, height, width, hflip in pixels of the stored image; row 0 the centre square."""

    kind = "crops"
    suffix = "npy"

    def encode(self, value: np.ndarray) -> bytes:
        """A plain .npy."""
        return codecs.encode_npy(value)

    def decode(self, data: bytes) -> np.ndarray:
        """int64 (n_crops, 5)."""
        return codecs.decode_npy(data)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """int64 (n, 5), positive extents, hflip 0 or 1, row 0 the centre square without a mirror."""
        if not isinstance(value, np.ndarray) or value.dtype != np.int64 or value.ndim != 2 or value.shape[1:] != (5,):
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"crop_settings: expected int64 (n_crops, 5), got {found}")
        center = geometry.center_crop(*size)
        if not len(value) or geometry.crops_of(value)[0] != center:
            raise ValueError(f"crop_settings: expected {center} in row 0, got {value[:1].tolist()}")
        if (value[:, 2:4] < 1).any() or not np.isin(value[:, 4], (0, 1)).all():
            raise ValueError(f"crop_settings: expected positive extents and hflip 0 or 1, got {value.tolist()}")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """The centre square alone."""
        return self.example(np.random.default_rng(0), size)[:1]

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Three crops."""
        return geometry.crop_settings(rng, *size, num_crops=3, min_scale=0.5)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """Unchanged."""
        return value

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """The rectangles on the image; mirrored ones are orange."""
        shown = rgb.copy()
        line = max(1, max(rgb.shape[:2]) // 150)
        for crop in reversed(geometry.crops_of(value)):
            colour = (255, 150, 0) if crop.hflip else (0, 230, 255)
            corner = (crop.left + crop.width - 1, crop.top + crop.height - 1)
            cv2.rectangle(shown, (crop.left, crop.top), corner, colour, line)
        return Picture(image=shown, text=f"{len(value)} crops" if len(value) > 1 else "1 crop")
