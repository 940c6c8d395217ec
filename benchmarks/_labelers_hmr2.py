"""What HMR2 sees of persons: 4D-Humans' way, which blurs the whole image for each, against blurring what is seen.

Both run on the same photographs and boxes on one thread each. The reference's steps are done with the same functions of
scikit-image and OpenCV that 4D-Humans calls, on the whole image in double precision.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import cv2
import numpy as np
import skimage.data
from skimage.filters import gaussian

from labelers import _persons

SIZES = ((1536, 2304), (2400, 1600))
"""Heights and widths in pixels: 3.5 and 3.8 megapixels, as cameras and CC12M's larger images have them."""
BOXES = (
    (0.30, 0.05, 0.62, 0.98),
    (0.05, 0.20, 0.40, 0.97),
    (0.55, 0.30, 0.95, 0.99),
    (0.02, 0.02, 0.98, 0.98),
    (0.70, 0.10, 0.80, 0.35),
)
"""x0 y0 x1 y1 in 0..1: three persons who fill a good part of the image, one who fills it, one far away."""


def whole_image(rgb: np.ndarray, box: np.ndarray) -> np.ndarray:
    """float32 (256, 192, 3): the crop of a person as 4D-Humans' ViTDetDataset makes it."""
    width, height = box[2:] - box[:2]
    side = max(height, width * 256 / 192)
    image = rgb.copy()
    if side / 512 > np.float32(1.1):
        image = gaussian(image, sigma=(side / 512 - 1) / 2, channel_axis=2, preserve_range=True)
    (x, y), half = (box[:2] + box[2:]) / 2, side / 2
    here, there = [(x, y), (x, y + half), (x + half, y)], [(128, 128), (128, 256), (256, 128)]
    affine = cv2.getAffineTransform(np.array(here, np.float32), np.array(there, np.float32))
    square = cv2.warpAffine(image, affine, (256, 256), flags=cv2.INTER_LINEAR)
    return square[:, 32:-32].astype(np.float32)


def measure(quick: bool) -> dict[str, Any]:
    """Seconds a person, their ratio over all persons and for each box, and the largest difference in levels of 255."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return _measured(SIZES[:1] if quick else SIZES, repeats=1 if quick else 3)
    finally:
        cv2.setNumThreads(threads)


def _measured(sizes: tuple[tuple[int, int], ...], repeats: int) -> dict[str, Any]:
    theirs = np.full((len(sizes), len(BOXES)), np.inf)
    ours = theirs.copy()
    difference = 0.0
    for i, (height, width) in enumerate(sizes):
        photograph = cv2.resize(skimage.data.astronaut(), (width, height), interpolation=cv2.INTER_CUBIC)
        for j, shares in enumerate(BOXES):
            box = np.array(shares, np.float32) * np.array([width, height, width, height], np.float32)
            for _ in range(repeats):
                seconds, expected = _timed(whole_image, photograph, box)
                theirs[i, j] = min(theirs[i, j], seconds)
            for _ in range(3 * repeats):
                seconds, found = _timed(_persons.crop, photograph, box)
                ours[i, j] = min(ours[i, j], seconds)
            difference = max(difference, float(np.abs(found - expected).max()))
    return {
        "persons": theirs.size,
        "reference_seconds_per_person": round(float(theirs.mean()), 5),
        "seconds_per_person": round(float(ours.mean()), 5),
        "ratio": round(float(theirs.sum() / ours.sum()), 2),
        "ratio_by_box": [round(float(r), 2) for r in theirs.sum(axis=0) / ours.sum(axis=0)],
        "max_difference_of_255": round(difference, 6),
        "goal_ratio": 10.0,
    }


def _timed(function: Any, *arguments: np.ndarray) -> tuple[float, np.ndarray]:
    began = perf_counter()
    found: np.ndarray = function(*arguments)
    return perf_counter() - began, found
