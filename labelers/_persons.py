"""Persons among detections, and the pixels around each that a network of one person looks at."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

CROP = 256
"""Side in pixels of the square that a person's box is warped to."""
MARGIN = 32
"""Columns that are cut off the square at either side: the network sees 256 x 192 pixels."""
BLUR_FROM = np.float32(1.1)
"""From which factor of shrinking, halved, an image is blurred first (4D-Humans)."""
TRUNCATE = 4.0
"""Standard deviations at which the filter ends (scipy's and scikit-image's default)."""


def boxes_of(det: dict[str, Any], size: tuple[int, int], min_score: float) -> np.ndarray:
    """float32 (n, 4): x0 y0 x1 y1 in pixels of an image of (h, w), of the persons with a score above `min_score`.

    Boxes that have no area in hundredths of a pixel, as which they are written, are left out.
    """
    height, width = size
    shares = [i["boxes"] for i in det["instances"] if i["class_name"] == "person" and i["score"] > min_score]
    boxes = np.array(shares, dtype=np.float64).reshape(-1, 4) * (width, height, width, height)
    written = boxes.round(2)
    return boxes[(written[:, :2] < written[:, 2:]).all(axis=1)].astype(np.float32)


def side_of(box: np.ndarray) -> np.float32:
    """The longer side in pixels of a box (4,) once it is grown to 3:4 about its centre."""
    width, height = box[2:] - box[:2]
    return max(height, width * np.float32(CROP) / np.float32(CROP - 2 * MARGIN))


def crop(rgb: np.ndarray, box: np.ndarray) -> np.ndarray:
    """float32 (256, 192, 3), levels 0..255: what HMR2 sees of an image uint8 (h, w, 3) of the person in a box (4,).

    The square of `side_of` about the centre of the box, bilinear, black outside of the image, and its middle columns;
    where it shrinks to less than 1 / 2.2 the image is blurred before. 4D-Humans blurs the whole of it, in double
    precision, for each person; here only what the square shows is blurred, and as far as the filter reaches.
    """
    side = side_of(box)
    to_image = _inverse((box[:2] + box[2:]) / np.float32(2), side)
    shrinks = side / np.float32(2 * CROP)
    if shrinks > BLUR_FROM:
        rgb, left, top = _blurred(rgb, to_image, sigma=float((shrinks - 1) / 2))
        to_image[:, 2] -= (left, top)
    # The whole square, although its outer columns are not seen: OpenCV rounds by where a column starts.
    square = cv2.warpAffine(rgb, to_image, (CROP, CROP), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return square[:, MARGIN:-MARGIN].astype(np.float32)


def _inverse(center: np.ndarray, side: np.float32) -> np.ndarray:
    """The affine map (2, 3) from pixels of the square to those of the image."""
    half = side * np.float32(0.5)
    image = center + np.array([(0, 0), (0, half), (half, 0)], dtype=np.float32)
    middle = CROP / 2
    square = np.array([(middle, middle), (middle, CROP), (CROP, middle)], dtype=np.float32)
    inverse: np.ndarray = cv2.invertAffineTransform(cv2.getAffineTransform(image, square))
    return inverse


def _blurred(rgb: np.ndarray, to_image: np.ndarray, sigma: float) -> tuple[np.ndarray, int, int]:
    """The part of an image that the seen columns show, blurred, float32, and at which column and row it begins."""
    radius = int(TRUNCATE * sigma + 0.5)
    height, width = rgb.shape[:2]
    corners = to_image @ np.array([(MARGIN, 0, 1), (CROP - MARGIN, CROP, 1)], dtype=np.float64).T
    (x0, x1), (y0, y1) = corners
    # One pixel more on either side is read by the interpolation, and one more may be by its rounding.
    seen = [_within(x0 - 2, x1 + 2, width), _within(y0 - 2, y1 + 2, height)]
    (left, right), (top, bottom) = [
        (max(low - radius, 0), min(high + radius, whole))
        for (low, high), whole in zip(seen, (width, height), strict=True)
    ]
    kernel = cv2.getGaussianKernel(2 * radius + 1, sigma, cv2.CV_32F)
    # Beyond the image its border goes on, as scikit-image has it; the borders of the part lie beyond what is seen.
    part = rgb[top:bottom, left:right]
    return cv2.sepFilter2D(part, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REPLICATE), left, top


def _within(low: float, high: float, whole: int) -> tuple[int, int]:
    start = min(max(math.floor(low), 0), whole - 1)
    return start, min(max(math.ceil(high), start + 1), whole)
