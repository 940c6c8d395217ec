"""Crops of maps and boxes, and the random crops themselves."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataengine import geometry
from dataengine.geometry import Crop


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (240, 320, Crop(0, 40, 240, 240)),
        (321, 240, Crop(40, 0, 240, 240)),
        (240, 240, Crop(0, 0, 240, 240)),
        (1, 4, Crop(0, 1, 1, 1)),
    ],
)
def test_center_crop(height: int, width: int, expected: Crop) -> None:
    assert geometry.center_crop(height, width) == expected


def test_rows_of_crop_settings() -> None:
    rows = geometry.crop_settings(np.random.default_rng(0), 240, 320, num_crops=6, min_scale=0.8)
    assert rows.dtype == np.int64
    assert rows.shape == (6, 5)
    assert rows[0].tolist() == [0, 40, 240, 240, 0]
    again = geometry.crop_settings(np.random.default_rng(0), 240, 320, num_crops=6, min_scale=0.8)
    assert (rows == again).all()
    more = geometry.crop_settings(np.random.default_rng(0), 240, 320, num_crops=9, min_scale=0.8)
    assert (more[:6] == rows).all()
    other = geometry.crop_settings(np.random.default_rng(1), 240, 320, num_crops=6, min_scale=0.8)
    assert (other[1:] != rows[1:]).any()


def test_crops_of_rows() -> None:
    assert geometry.crops_of(np.array([[1, 2, 3, 4, 0], [5, 6, 7, 8, 1]])) == [Crop(1, 2, 3, 4), Crop(5, 6, 7, 8, True)]
    assert geometry.crops_of(np.zeros((0, 5), dtype=np.int64)) == []


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), scale=st.floats(0.05, 1.0), seed=st.integers(0, 2**32))
def test_crops_lie_within_the_image(height: int, width: int, scale: float, seed: int) -> None:
    rows = geometry.crop_settings(np.random.default_rng(seed), height, width, num_crops=5, min_scale=scale)
    top, left, h, w, hflip = rows.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert np.isin(hflip, (0, 1)).all()


def test_the_distribution_is_torchvisions() -> None:
    height, width, low = 480, 640, 0.3
    rows = geometry.crop_settings(np.random.default_rng(0), height, width, num_crops=4001, min_scale=low)[1:]
    top, left, h, w, hflip = rows.T.astype(float)
    area, aspect = h * w / (height * width), w / h
    assert low - 0.01 < area.min() < low + 0.01
    assert 3 / 4 - 0.01 < aspect.min() < 3 / 4 + 0.02
    assert 4 / 3 - 0.02 < aspect.max() < 4 / 3 + 0.01
    assert abs(hflip.mean() - 0.5) < 0.03
    # Offsets are uniform over what room is left, both ends included.
    for offset, room in ((top, height - h), (left, width - w)):
        share = offset[room > 40] / room[room > 40]
        assert abs(share.mean() - 0.5) < 0.02
        assert abs(share.std() - 12**-0.5) < 0.02
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    blank = torch.zeros(1, height, width)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(blank, (low, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)], float
    )
    for ours, reference in (
        (area, theirs[:, 2] * theirs[:, 3] / (height * width)),
        (aspect, theirs[:, 3] / theirs[:, 2]),
    ):
        quantiles = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(reference, quantiles), atol=0.025)


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10)])
def test_extreme_images_get_the_clamped_centre(height: int, width: int) -> None:
    rows = geometry.crop_settings(np.random.default_rng(0), height, width, num_crops=3, min_scale=0.9)
    long = round(10 * 4 / 3)
    place = (1000 - long) // 2
    expected = [0, place, 10, long] if height < width else [place, 0, long, 10]
    assert rows[1, :4].tolist() == expected


def test_identity_and_mirror_of_maps() -> None:
    values = np.arange(7 * 7 * 3, dtype=np.uint8).reshape(7, 7, 3)
    for nearest in (True, False):
        assert (geometry.crop_map(values, Crop(0, 0, 7, 7), 7, nearest=nearest) == values).all()
        mirrored = geometry.crop_map(values, Crop(0, 0, 7, 7, hflip=True), 7, nearest=nearest)
        assert (mirrored == values[:, ::-1]).all()
        assert mirrored.flags["C_CONTIGUOUS"]


def test_shrinking_averages_and_nearest_keeps_ids() -> None:
    values = np.array([[0, 200, 10, 20], [100, 100, 30, 40]] * 2, dtype=np.uint8)
    out = geometry.crop_map(values, Crop(0, 0, 4, 4), 2, nearest=False)
    assert out.tolist() == [[100, 25], [100, 25]]
    ids = np.random.default_rng(0).integers(0, 255, (50, 60), dtype=np.uint8)
    for side in (7, 33, 90):
        out = geometry.crop_map(ids, Crop(5, 5, 40, 50), side, nearest=True)
        assert np.isin(out, ids[5:45, 5:55]).all()
        assert out.shape == (side, side)


def test_growing_is_bilinear() -> None:
    values = np.random.default_rng(0).random((6, 6)).astype(np.float32)
    out = geometry.crop_map(values, Crop(1, 1, 4, 4), 9, nearest=False)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, cv2.resize(values[1:5, 1:5], (9, 9), interpolation=cv2.INTER_LINEAR))


def test_outside_of_the_map_is_zero() -> None:
    values = np.full((4, 4), 9, dtype=np.uint16)
    out = geometry.crop_map(values, Crop(-1, 2, 4, 4), 4, nearest=True)
    assert out.dtype == np.uint16
    assert out.tolist() == [[0] * 4] + [[9, 9, 0, 0]] * 3
    with pytest.raises(ValueError, match="lies outside of a map of 4 x 4 pixels"):
        geometry.crop_map(values, Crop(0, 4, 2, 2), 4, nearest=True)


def test_boxes_move_with_the_crop() -> None:
    boxes = np.array([[0.25, 0.5, 0.75, 1.0], [0, 0, 0.1, 0.1], [0.0, 0.0, 1.0, 1.0]])
    out, kept = geometry.crop_boxes(boxes, Crop(50, 100, 50, 50), 100, 200)
    np.testing.assert_allclose(out, [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]])
    assert kept.tolist() == [True, False, True]
    out, kept = geometry.crop_boxes(boxes[:1], Crop(0, 0, 100, 100, hflip=True), 100, 200)
    np.testing.assert_allclose(out, [[0, 0.5, 0.5, 1.0]])
    out, kept = geometry.crop_boxes(np.zeros((0, 4)), Crop(0, 0, 4, 4), 4, 4)
    assert out.shape == (0, 4)
    assert kept.shape == (0,)


def test_a_box_that_only_touches_the_crop_is_gone() -> None:
    _, kept = geometry.crop_boxes(np.array([[0.0, 0.0, 0.5, 1.0]]), Crop(0, 5, 10, 5), 10, 10)
    assert kept.tolist() == [False]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_boxes_and_maps_agree(seed: int) -> None:
    """A filled rectangle, cropped as a map, fills the cropped box."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 60, 2).tolist()
    x0, x1 = sorted(rng.choice(width + 1, 2, replace=False).tolist())
    y0, y1 = sorted(rng.choice(height + 1, 2, replace=False).tolist())
    mask = np.zeros((height, width), dtype=np.float32)
    mask[y0:y1, x0:x1] = 1
    crop = geometry.crops_of(geometry.crop_settings(rng, height, width, num_crops=2, min_scale=0.3))[1]
    boxes, kept = geometry.crop_boxes(
        np.array([[x0 / width, y0 / height, x1 / width, y1 / height]]), crop, height, width
    )
    out = geometry.crop_map(mask, crop, 240, nearest=True)
    left, top, right, bottom = (boxes[0] * 240).tolist()
    expected = (right - left) * (bottom - top) if kept[0] else 0.0
    assert abs(out.sum() - expected) <= 2 * (right - left + bottom - top) + 4
    if kept[0] and out.any():
        rows, cols = np.nonzero(out)
        assert left - 1 <= cols.min()
        assert cols.max() <= right + 1
        assert top - 1 <= rows.min()
        assert rows.max() <= bottom + 1
