"""Palettes: equal to PyPalette's own where that is asked for, as good where it is not; edges by their definitions."""

from __future__ import annotations

import importlib.util
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from dataengine.sample import Sample
from labelers import pypalette
from labelers.canny_edge import Canny
from labelers.color_palette import NUM_PALETTES, Palette
from labelers.pypalette import PyPalette
from labelers.sam_edge import SamEdge

GOLDEN = Path(__file__).parent / "golden"
SIZES = range(2, NUM_PALETTES + 1)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "palette.npz", allow_pickle=False) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def photographs() -> dict[str, np.ndarray]:
    """The pixels (n, 3) that the reference was given, by the script that gave them."""
    spec = importlib.util.spec_from_file_location("make_palette", GOLDEN / "make_palette.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return {name: script.pixels(name) for name in script.PHOTOS}


def distance(a: Any, b: Any) -> float:
    """Mean distance of two palettes' colours in levels, each colour paired with one of the other palette."""
    apart = np.linalg.norm(np.asarray(a, float)[:, None] - np.asarray(b, float)[None], axis=2)
    return float(apart[linear_sum_assignment(apart)].mean())


def error(pixels: np.ndarray, colours: Any) -> float:
    """Root mean square distance of the pixels from their nearest colour, in levels."""
    apart = ((pixels[:, None].astype(float) - np.asarray(colours, float)[None]) ** 2).sum(axis=2)
    return float(np.sqrt(apart.min(axis=1).mean()))


def ours(pixels: np.ndarray, k: int) -> list[list[int]]:
    return Palette()._palette(pixels.astype(np.float32), k)


def test_pypalette_is_pypalette_to_the_last_bit(
    golden: dict[str, np.ndarray], photographs: dict[str, np.ndarray]
) -> None:
    for name, pixels in photographs.items():
        for k in SIZES:
            for seed, expected in enumerate(golden[f"{name} {k}"]):
                centres, counts = pypalette.clustered(pixels.astype(np.float64), k, seed)
                np.testing.assert_array_equal(centres, expected)
                assert counts.sum() == len(pixels)
        (mean,) = pypalette.clustered(pixels.astype(np.float64), 1, 0)[0]
        np.testing.assert_array_equal(np.rint(mean), golden[f"{name} 1"])
        assert ours(pixels, 1) == [golden[f"{name} 1"].astype(int).tolist()]


def test_the_default_differs_from_pypalette_as_it_does_from_itself_and_fits_as_well(
    golden: dict[str, np.ndarray], photographs: dict[str, np.ndarray]
) -> None:
    """Why it is not equal: k-means has many ends, and PyPalette comes to another one for every seed."""
    to_it, to_itself, fits = [], [], []
    for name, pixels in photographs.items():
        for k in SIZES:
            found, references = ours(pixels, k), golden[f"{name} {k}"]
            to_it += [distance(found, reference) for reference in references]
            to_itself += [distance(a, b) for a, b in combinations(references, 2)]
            fits.append(error(pixels, found) / np.mean([error(pixels, reference) for reference in references]))
    assert np.mean(to_it) < 1.1 * np.mean(to_itself)
    assert 10 < np.mean(to_itself) < 20
    assert np.mean(fits) < 1
    assert max(fits) < 1.03


def test_the_published_palette_is_among_those_of_its_photograph(golden: dict[str, np.ndarray]) -> None:
    """One photograph and one prediction of 4M-21: enough to tell channels and levels, not to tell methods apart."""
    pixels = np.repeat(golden["photo"], golden["photo counts"], axis=0)
    assert len(pixels) == 224 * 224
    predicted = golden["predicted"]
    thinned = pixels[::7]
    seeds = range(4)
    as_pypalette = [distance(pypalette.clustered(thinned.astype(float), 5, s)[0], predicted) for s in seeds]
    as_default = [distance(Palette(seed=s)._palette(thinned, 5), predicted) for s in seeds]
    swapped = [distance(Palette(seed=s)._palette(thinned[:, ::-1].copy(), 5), predicted) for s in seeds]
    assert min(as_pypalette) < 20
    assert min(as_default) < 25
    assert max(as_default) < 40 < min(swapped)


@pytest.mark.parametrize("kind", [Palette, PyPalette])
def test_images_of_few_colours_and_odd_shapes_have_palettes(kind: type[Palette] | type[PyPalette]) -> None:
    flat = np.full((50, 70, 3), (9, 200, 30), np.uint8)
    (labels,) = kind().load("cpu")([Sample("a", {"rgb": flat})])
    assert labels["color_palette"] == [{str(k): [[9, 200, 30]] * k for k in range(1, 8)}]
    halves = np.zeros((1, 90, 3), np.uint8)
    halves[:, 60:] = 255
    (labels,) = kind().load("cpu")([Sample("a", {"rgb": halves})])
    assert labels["color_palette"][0]["2"][0] in ([0, 0, 0], [1, 1, 1], [2, 2, 2])
    with pytest.raises(ValueError, match="at least 3 pixels, got 2"):
        kind(side=2)


def step(height: float) -> np.ndarray:
    """A grey step down the middle of an image, of this many levels."""
    rgb = np.zeros((40, 40, 3), np.uint8)
    rgb[:, 20:] = np.uint8(height)
    return rgb


def canny(rgb: np.ndarray, **settings: Any) -> np.ndarray:
    (labels,) = Canny(**settings).load("cpu")([Sample("a", {"rgb": rgb})])
    edges: np.ndarray = labels["canny_edge"]
    return edges


def test_canny_thresholds_are_four_times_the_step_in_grey() -> None:
    """The 3 x 3 Sobel filter makes 4 c of c levels: 200 takes more than 50 of them, 100 more than 25."""
    assert not canny(step(50)).any()
    assert canny(step(51)).any(axis=1).all()
    assert (canny(step(51)) > 0).sum(axis=1).max() == 1
    fading = step(0)
    fading[:, 20:] = np.linspace(60, 0, 40).astype(np.uint8)[:, None, None]
    rows = np.flatnonzero(canny(fading).any(axis=1))
    assert rows.tolist() == list(range(rows[0], rows[-1] + 1))
    assert fading[rows[-1], 20, 0] in (24, 25, 26)  # 24: that it fades downwards adds to |gx| + |gy|
    assert not canny(fading, low=200).any(axis=1)[10:].any()


def discs(size: tuple[int, int], *places: tuple[int, int, int]) -> list[dict[str, Any]]:
    masks = []
    for y, x, radius in places:
        filled = np.zeros(size, np.uint8)
        cv2.circle(filled, (x, y), radius, 1, -1)
        rle = coco_mask.encode(np.asfortranarray(filled))
        masks.append({"size": list(size), "counts": rle["counts"].decode()})
    return masks


@pytest.mark.parametrize("mode", ["gradient", "canny"])
def test_sam_edges_are_those_of_each_mask_alone(mode: Any) -> None:
    size = (90, 120)
    masks = discs(size, (40, 40, 25), (45, 80, 18), (0, 110, 20), (40, 40, 6), (80, 3, 9))
    rgb = np.zeros((*size, 3), np.uint8)
    (labels,) = SamEdge(mode=mode).load("cpu")([Sample("a", {"rgb": rgb, "sam_instance": masks})])
    expected = np.zeros(size, np.uint8)
    for mask in masks:
        filled = coco_mask.decode({**mask, "counts": mask["counts"].encode()}) * np.uint8(255)
        if mode == "canny":
            expected |= cv2.Canny(filled, 100, 200)
        else:
            beside = np.pad(filled, 1, mode="edge")
            least = np.min([beside[1:-1, :-2], beside[1:-1, 2:], beside[:-2, 1:-1], beside[2:, 1:-1]], axis=0)
            expected |= np.where(least < filled, 255, 0).astype(np.uint8)
    np.testing.assert_array_equal(labels["sam_edge"], expected)
    assert set(np.unique(expected)) == {0, 255}
