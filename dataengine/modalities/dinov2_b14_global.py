"""The class token of DINOv2 ViT-B/14."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Modality, Picture


class DinoV2B14Global(Modality):
    """float16 (768,), stored as npy: one vector for the whole image; a crop leaves it as it is."""

    spelling = "DINOv2-B14-global"
    kind = "vector"
    suffix = "npy"

    def encode(self, value: np.ndarray) -> bytes:
        """A plain .npy."""
        return codecs.encode_npy(value)

    def decode(self, data: bytes) -> np.ndarray:
        """float16 (channels,)."""
        return codecs.decode_npy(data)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """float16 with one axis, all finite."""
        if not isinstance(value, np.ndarray) or value.dtype != np.float16 or value.ndim != 1 or not len(value):
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"{self.name}: expected float16 (channels,), got {found}")
        if not np.isfinite(value).all():
            raise ValueError(f"{self.name}: {(~np.isfinite(value)).sum()} values are not finite")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """Zeros."""
        return np.zeros(768, np.float16)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Normal deviates."""
        return rng.standard_normal(768).astype(np.float16)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """Unchanged."""
        return value

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """The vector as a strip of colours, row by row."""
        columns = int(np.ceil(np.sqrt(len(value))))
        padded = np.zeros(columns * int(np.ceil(len(value) / columns)), np.float32)
        padded[: len(value)] = value
        scale = max(float(np.abs(padded).max()), 1e-6)
        grey = (padded.reshape(-1, columns) / scale * 127 + 128).astype(np.uint8)
        coloured = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
        return Picture(image=cv2.resize(coloured, (112, 112), interpolation=cv2.INTER_NEAREST))
