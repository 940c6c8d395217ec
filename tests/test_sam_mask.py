"""Outlines of instances: one polygon each, in pixels of the image, and what crops leave of it."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from dataengine import modalities
from dataengine.geometry import Crop
from dataengine.modalities.sam_instance import record
from dataengine.sample import Sample
from labelers.sam_mask import SamMask


def polygons(*masks: np.ndarray, **settings: Any) -> list[dict[str, Any]]:
    size = masks[0].shape
    sample = Sample("a", {"rgb": np.zeros((*size, 3), np.uint8), "sam_instance": [record(mask) for mask in masks]})
    found: list[dict[str, Any]] = SamMask(**settings).load("cpu")([sample])[0]["sam_mask"]
    modalities.load("sam_mask").check(found, size)
    return found


def filled(polygon: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    return cv2.fillPoly(np.zeros(size, np.uint8), [np.array(polygon["points"], np.int32)], 1).astype(bool)


def disc(size: tuple[int, int], x: int, y: int, radius: int) -> np.ndarray:
    return cv2.circle(np.zeros(size, np.uint8), (x, y), radius, 1, -1).astype(bool)


@pytest.mark.parametrize("every_pixel", [False, True])
def test_a_polygon_encloses_exactly_its_mask_and_is_an_opencv_contour(every_pixel: bool) -> None:
    size = (60, 90)
    masks = [disc(size, 70, 20, 14), np.zeros(size, bool)]
    masks[1][30:41, 5:33] = True
    found = polygons(*masks, every_pixel=every_pixel)
    for polygon, mask in zip(found, masks, strict=True):
        np.testing.assert_array_equal(filled(polygon, size), mask)
    kind = cv2.CHAIN_APPROX_NONE if every_pixel else cv2.CHAIN_APPROX_SIMPLE
    (contour,), _ = cv2.findContours(masks[1].astype(np.uint8), cv2.RETR_EXTERNAL, kind)
    np.testing.assert_array_equal(np.array(found[1]["points"], np.int32)[:, None], contour)
    assert len(found[1]["points"]) == (74 if every_pixel else 4)


def test_holes_are_filled_and_the_largest_piece_is_kept() -> None:
    size = (60, 90)
    ring, two = disc(size, 40, 30, 20) & ~disc(size, 40, 30, 8), disc(size, 20, 30, 10) | disc(size, 70, 30, 15)
    found = polygons(ring, two)
    np.testing.assert_array_equal(filled(found[0], size), disc(size, 40, 30, 20))
    np.testing.assert_array_equal(filled(found[1], size), disc(size, 70, 30, 15))


def test_a_pixel_and_a_row_of_pixels_have_outlines_too() -> None:
    pixel, row = np.zeros((9, 12), bool), np.zeros((9, 12), bool)
    pixel[8, 11], row[3, 2:7] = True, True
    found = polygons(pixel, row)
    assert found[0] == {"points": [[11, 8]]}
    assert sorted(found[1]["points"]) == [[2, 3], [6, 3]]


def test_an_image_without_masks_has_no_polygons() -> None:
    sample = Sample("a", {"rgb": np.zeros((8, 8, 3), np.uint8), "sam_instance": []})
    assert SamMask().load("cpu")([sample]) == [{"sam_mask": []}]


@pytest.mark.parametrize("crop", [Crop(10, 20, 40, 40), Crop(10, 20, 40, 40, hflip=True), Crop(0, 0, 60, 60)])
def test_a_crop_of_a_polygon_is_the_polygon_of_the_crop(crop: Crop) -> None:
    size, side = (60, 90), 80
    masks = [disc(size, 45, 30, 18), disc(size, 85, 5, 3)]
    value = polygons(*masks)
    modality, instances = modalities.load("sam_mask"), modalities.load("sam_instance")
    cut = modality.crop(value, crop, size, side)
    modality.check(cut, (side, side))
    expected = instances.crop([record(mask) for mask in masks], crop, size, side)
    assert len(cut) == len(expected) == 1
    from dataengine.modalities.sam_instance import pixels

    one, other = filled(cut[0], (side, side)), pixels(expected[0])
    assert (one & other).sum() / (one | other).sum() > 0.95  # a polygon grows by its corners, a mask by its pixels


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least one point"),
        ([[1, 2], [3]], r"\[x, y\]"),
        ([[1.0, 2]], r"whole pixels"),
        ([[12, 2]], r"within 12 x 9"),
        ([[0, -1]], r"within 12 x 9"),
        ([[True, 1]], r"whole pixels"),
    ],
)
def test_other_points_are_refused(points: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modalities.load("sam_mask").check([{"points": points}], (9, 12))
