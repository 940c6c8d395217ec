"""The class of every pixel."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dataengine import coco, codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Kind, Modality, Picture
from dataengine.modalities import _checks as expect

_NUM_SHOWN = 12


class Semseg(Modality):
    """COCO panoptic contiguous ids uint8 (h, w): 0..132 (`coco.NAMES`), 255 unlabelled; an 8-bit grey PNG."""

    kind: ClassVar[Kind] = "map"
    suffix: ClassVar[str] = "png"

    def encode(self, value: np.ndarray) -> bytes:
        """An 8-bit grey PNG."""
        return codecs.encode_png(value)

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (h, w)."""
        return codecs.decode_png(data, np.uint8)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """uint8 (h, w), 0..132 or 255."""
        expect.array(self.name, value, np.uint8, size)
        expect.ids(self.name, value, len(coco.NAMES) - 1, "ids 0..132 or 255")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """All unlabelled."""
        return np.full(size, coco.UNLABELLED, dtype=np.uint8)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Any ids, and unlabelled."""
        ids = rng.integers(-1, len(coco.NAMES), size)
        return np.where(ids < 0, coco.UNLABELLED, ids).astype(np.uint8)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """uint8 (side, side), the nearest pixel's id; outside of the image is unlabelled."""
        # 255 + 1 wraps to the 0 that the crop is padded with.
        return crop_map(value + np.uint8(1), crop, side, nearest=True) - np.uint8(1)

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """COCO's colours, and a legend of the classes by area."""
        ids, counts = np.unique(value, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:_NUM_SHOWN]
        names = [coco.name(ids[i]).removesuffix("-merged") for i in order]
        shares = [f"{100 * counts[i] / value.size:.0f} %" for i in order]
        legend = tuple(
            (f"{name} {share}", coco.colour(ids[i])) for name, share, i in zip(names, shares, order, strict=True)
        )
        return Picture(image=coco.COLOURS[value], legend=legend)
