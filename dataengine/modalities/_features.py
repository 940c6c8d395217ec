"""What dense feature grids share."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Modality, Picture
from dataengine.modalities._maps import enlarged, principal_components


class FeatureGrid(Modality):
    """Features of the whole image, float16 (rows, columns, channels), stored as npy. A crop leaves them as they are."""

    kind: ClassVar[Kind] = "grid"
    suffix: ClassVar[str] = "npy"
    grid: ClassVar[tuple[int, int]]
    channels: ClassVar[int]
    """Of the published network; a smaller network of the same family may give fewer."""

    def encode(self, value: np.ndarray) -> bytes:
        """A plain .npy."""
        return codecs.encode_npy(value)

    def decode(self, data: bytes) -> np.ndarray:
        """float16 (rows, columns, channels)."""
        return codecs.decode_npy(data)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """float16 with three axes, all finite."""
        if not isinstance(value, np.ndarray) or value.dtype != np.float16 or value.ndim != 3 or 0 in value.shape:
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"{self.name}: expected float16 (rows, columns, channels), got {found}")
        if not np.isfinite(value).all():
            raise ValueError(f"{self.name}: {(~np.isfinite(value)).sum()} values are not finite")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """Zeros."""
        return np.zeros((*self.grid, self.channels), np.float16)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Normal deviates."""
        return rng.standard_normal((*self.grid, self.channels)).astype(np.float16)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """Unchanged: features of a crop are computed from the cropped image."""
        return value

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """The three principal components of the image's own features."""
        return Picture(image=enlarged(principal_components(value.astype(np.float32))))
