"""Semantic segmentation into the classes of COCO panoptic."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataengine import coco, codecs
from dataengine.geometry import Crop, crop_map
from dataengine.modalities import Modality, Picture
from dataengine.modalities._maps import check_array

_COLOURS = np.array([coco.colour(i) for i in range(256)], np.uint8)


class Semseg(Modality):
    """uint8 (h, w): COCO panoptic contiguous ids 0..132, 255 unlabelled; stored as 8-bit PNG."""

    kind = "map"
    suffix = "png"

    def encode(self, value: np.ndarray) -> bytes:
        """An 8-bit PNG."""
        return codecs.encode_png(value)

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (h, w)."""
        return codecs.decode_png(data, np.uint8, 1)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """uint8 (h, w) of known ids."""
        check_array(self.name, value, np.uint8, size)
        unknown = np.setdiff1d(value, (*range(len(coco.NAMES)), coco.UNLABELLED))
        if len(unknown):
            raise ValueError(f"semseg: expected ids 0..{len(coco.NAMES) - 1} or 255, got {unknown[:5]}")

    def placeholder(self, size: tuple[int, int]) -> np.ndarray:
        """All unlabelled."""
        return np.full(size, coco.UNLABELLED, np.uint8)

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        """Random ids."""
        return rng.choice(np.array([*range(len(coco.NAMES)), 255], np.uint8), size)

    def crop(self, value: np.ndarray, crop: Crop, size: tuple[int, int], side: int) -> np.ndarray:
        """(side, side), nearest pixel."""
        return crop_map(value, crop, side, nearest=True)

    def picture(self, value: np.ndarray, rgb: np.ndarray) -> Picture:
        """A colour for each class; the legend has the largest first."""
        ids, counts = np.unique(value, return_counts=True)
        largest = ids[np.argsort(-counts, kind="stable")][:8]
        names = [coco.NAMES[i] if i < len(coco.NAMES) else "unlabelled" for i in largest]
        legend = tuple((n.removesuffix("-merged"), coco.colour(int(i))) for n, i in zip(names, largest, strict=True))
        return Picture(image=_COLOURS[value], legend=legend)
