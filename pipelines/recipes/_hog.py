"""Features that no network has to be trained for: histograms of oriented gradients (Dalal and Triggs 2005).

They are exact on any machine, so a small tokenizer of features can be trained where there are no weights of CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from dataengine.geometry import Crop, crop_map
from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample

CELL = 8
CHANNELS = 36
"""Nine directions in each of the two by two cells of a block."""


@dataclass(frozen=True, kw_only=True)
class Hog(Labeler):
    """`HOG`: float16 (side / 8, side / 8, 36), a block around each cell of 8 pixels. `HOG-global`: float16 (144,).

    The global one is the mean of the blocks of each quarter. Neither is a modality that is stored.
    """

    inputs = ("rgb",)
    emits = ("HOG", "HOG-global")

    side: int = 64

    def load(self, device: str) -> Loaded:
        """Nothing to load; the device is not used."""
        size = self.side + CELL  # half a cell more on all sides: as many blocks as cells
        grid = self.side // CELL
        descriptor = cv2.HOGDescriptor((size, size), (2 * CELL, 2 * CELL), (CELL, CELL), (CELL, CELL), 9)

        def one(rgb: np.ndarray) -> dict[str, Any]:
            height, width = rgb.shape[:2]
            pixels = crop_map(rgb, Crop(0, 0, height, width), self.side, nearest=False)
            half = CELL // 2
            pixels = cv2.copyMakeBorder(pixels, half, half, half, half, cv2.BORDER_REFLECT_101)
            # OpenCV goes down the columns.
            blocks = np.asarray(descriptor.compute(pixels)).reshape(grid, grid, CHANNELS).transpose(1, 0, 2)
            quarters = blocks.reshape(2, grid // 2, 2, grid // 2, CHANNELS).mean(axis=(1, 3))
            return {"HOG": blocks.astype(np.float16), "HOG-global": quarters.ravel().astype(np.float16)}

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [one(sample.rgb) for sample in samples]

        return label
