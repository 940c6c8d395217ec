"""The outline of everything that has one, as one polygon each."""

from __future__ import annotations

from typing import Any, ClassVar

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect

Polygon = list[list[int]]
"""Corners [x, y] in pixels of the stored image, the last joined to the first."""


class SamMask(Modality):
    """A list of polygons `{"points": [[x, y], ...]}` in whole pixels of the stored image, as JSON.

    x right, y down; one polygon an instance, the largest outer contour of its mask, through the centres of the mask's
    outermost pixels (OpenCV's convention). A thing of one pixel or one row of them has a polygon of one or two corners.

    In ml-4m a member is a pickled `.npy`: an object array of as many dicts `{"points": int32 (n, 1, 2)}`, an OpenCV
    contour each. `np.array(points, np.int32)[:, None]` is that contour; here nothing that is read is a pickle.
    """

    kind: ClassVar[Kind] = "instances"
    suffix: ClassVar[str] = "json"

    def encode(self, value: list[dict[str, Any]]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[dict[str, Any]]:
        """The list of polygons."""
        value = codecs.decode_json(data)
        if not isinstance(value, list):
            raise ValueError(f"{self.name}: expected a list of polygons, got {type(value).__name__}")
        return value

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """Every polygon of at least one corner, whole numbers within the image."""
        if not isinstance(value, list):
            raise ValueError(f"{self.name}: expected a list of polygons, got {type(value).__name__}")
        height, width = size
        for polygon in value:
            expect.dictionary(self.name, polygon, ("points",))
            points = polygon["points"]
            if not isinstance(points, list) or not points:
                raise ValueError(f"{self.name}: expected a list of at least one point, got {points!r:.80}")
            for point in points:
                whole = isinstance(point, list) and len(point) == 2 and all(type(v) is int for v in point)
                if not whole or not (0 <= point[0] < width and 0 <= point[1] < height):
                    within = f"whole pixels within {width} x {height}"
                    raise ValueError(f"{self.name}: expected points [x, y] of {within}, got {point!r:.80}")

    def placeholder(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """No polygon."""
        return []

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Two triangles."""
        height, width = size
        corners = rng.integers((0, 0), (width, height), size=(2, 3, 2))
        return [{"points": triangle.tolist()} for triangle in corners]

    def crop(self, value: list[dict[str, Any]], crop: Crop, size: tuple[int, int], side: int) -> list[dict[str, Any]]:
        """Polygons in pixels of the (side, side) crop; what is cut is the outline of what is left of the thing.

        Of a thing in several pieces the largest piece is kept; those that no pixel is left of are gone.
        """
        if (crop.top, crop.left, crop.height, crop.width) == (0, 0, *size) and size == (side, side):
            return [
                {**p, "points": [[side - 1 - x, y] if crop.hflip else [x, y] for x, y in p["points"]]} for p in value
            ]
        out = []
        for polygon in value:
            # Pixel centres of the image are half a pixel inside of its border, and so are those of the crop.
            scale = np.array([side / crop.width, side / crop.height])
            moved = (np.array(polygon["points"]) + 0.5 - (crop.left, crop.top)) * scale - 0.5
            points = outline(_filled(np.rint(moved).astype(np.int32), (side, side)))
            if points:
                mirrored = [[side - 1 - x, y] for x, y in points] if crop.hflip else points
                out.append({**polygon, "points": mirrored})
        return out

    def picture(self, value: list[dict[str, Any]], rgb: np.ndarray) -> Picture:
        """Every polygon in a colour of its own over the greyed image, the largest at the bottom."""
        height, width = rgb.shape[:2]
        _, factor = _draw.canvas(rgb)
        grey = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
        image = _draw.enlarged(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), factor)
        masks = [_filled(np.array(polygon["points"], np.int32), (height, width)) for polygon in value]
        for i, mask in enumerate(sorted(masks, key=lambda m: -int(m.sum()))):
            image = _draw.overlay(image, _draw.enlarged(mask, factor).astype(bool), _draw.distinct(i))
        corners = sum(len(polygon["points"]) for polygon in value)
        return Picture(image=image, text=f"{len(value)} polygon{'' if len(value) == 1 else 's'}, {corners} corners")


def outline(mask: np.ndarray, *, every_pixel: bool = False) -> Polygon:
    """The largest outer contour of a mask uint8 (h, w), the first of equally large ones; none of an empty mask.

    Large is the area that the contour encloses, then the number of its points: corners, unless every pixel is asked.
    """
    kind = cv2.CHAIN_APPROX_NONE if every_pixel else cv2.CHAIN_APPROX_SIMPLE
    contours, _ = cv2.findContours(np.ascontiguousarray(mask), cv2.RETR_EXTERNAL, kind)
    if not contours:
        return []
    largest = max(contours, key=lambda contour: (cv2.contourArea(contour), len(contour)))
    points: Polygon = largest[:, 0].tolist()
    return points


def _filled(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w) 0/1: a polygon int32 (n, 2) and all it encloses, its corners perhaps outside of the map."""
    return cv2.fillPoly(np.zeros(size, np.uint8), [points], 1)
