"""The crops that all token columns of a sample share."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dataengine import codecs, geometry
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect


class CropSettings(Modality):
    """int64 (n_crops, 5): top, left, height, width in pixels of the stored image, hflip 0 or 1; stored as .npy.

    Row 0 is the largest centred square, not mirrored.
    """

    kind: ClassVar[Kind] = "crops"
    suffix: ClassVar[str] = "npy"

    def encode(self, value: np.ndarray) -> bytes:
        """A NumPy file."""
        return codecs.encode_npy(value)

    def decode(self, data: bytes) -> np.ndarray:
        """int64 (n_crops, 5)."""
        value = codecs.decode_npy(data)
        expect.array(self.name, value, np.int64, ("n_crops", 5))
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """int64 (n_crops, 5), every crop within the image, row 0 the centre."""
        expect.array(self.name, value, np.int64, ("n_crops", 5))
        top, left, height, width, hflip = value.T
        if not np.isin(hflip, (0, 1)).all():
            raise ValueError(f"{self.name}: expected hflip 0 or 1, got {hflip.tolist()}")
        inside = (top >= 0) & (left >= 0) & (height > 0) & (width > 0)
        inside &= (top + height <= size[0]) & (left + width <= size[1])
        if not inside.all():
            row = value[int(np.argmin(inside))].tolist()
            raise ValueError(f"{self.name}: expected crops within {size[0]} x {size[1]} pixels, got {row}")
        center = geometry.center_crop(*size)
        if geometry.crops_of(value)[0] != center:
            raise ValueError(f"{self.name}: expected row 0 to be {center}, got {value[0].tolist()}")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """The centre crop alone."""
        return geometry.crop_settings(np.random.default_rng(0), *size, num_crops=1, min_scale=1.0)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Four crops."""
        return geometry.crop_settings(rng, *size, num_crops=4, min_scale=0.2)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """Unchanged: crops are of the stored image."""
        return value

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """Every crop as a rectangle on the image."""
        image, factor = _draw.canvas(rgb)
        crops = geometry.crops_of(value)
        colours = [(255, 255, 255), *(_draw.distinct(i) for i in range(len(crops) - 1))]
        for crop, colour in zip(crops, colours, strict=True):
            left, top, right, bottom = crop.left, crop.top, crop.left + crop.width, crop.top + crop.height
            image = _draw.rectangle(image, factor * left, factor * top, factor * right, factor * bottom, colour)
        legend = []
        for i, (crop, colour) in enumerate(zip(crops, colours, strict=True)):
            # Crops often share a corner: the numbers stand side by side.
            image = _draw.tag(image, str(i), factor * crop.left + 16 * i, factor * crop.top, colour)
            legend.append((f"crop {i}: {crop.height} x {crop.width}{', mirrored' if crop.hflip else ''}", colour))
        return Picture(image=image, legend=tuple(legend))
