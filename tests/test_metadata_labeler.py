"""Each number of the metadata against a value that can be worked out by hand or by another library."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageStat

from dataengine import coco, modalities
from dataengine.modalities.metadata import KINDS as BINS
from dataengine.sample import Sample
from labelers import _statistics as stats
from labelers.canny_edge import Canny
from labelers.color_palette import Palette
from labelers.metadata import KINDS, SOURCES, Metadata
from labelers.opencv_persons import OpenCvPersons, _person_boxes

PHOTO = skimage.data.astronaut()
RED = np.full((4, 6, 3), (255, 0, 0), dtype=np.uint8)


def boxes(*found: tuple[str, float]) -> dict:
    return {"instances": [{"boxes": [0, 0, 1, 1], "class_name": name, "score": score} for name, score in found]}


def test_size_and_colour_of_a_plain_image() -> None:
    assert (stats.original_width(RED), stats.original_height(RED)) == (6, 4)
    # |R - G| = 255 and |(R + G) / 2 - B| = 127.5 everywhere: no spread, and 0.3 of the length of the mean.
    assert stats.colorfulness(RED) == pytest.approx(0.3 * np.hypot(255, 127.5))
    assert stats.brightness(RED) == 76  # round(0.299 * 255)
    assert stats.contrast(RED) == 0
    assert stats.saturation(RED) == 255


def test_colorfulness_takes_absolute_channels() -> None:
    # Red and cyan: signed opponent channels would spread by 255, absolute ones do not spread at all.
    rgb = np.array([[(255, 0, 0), (0, 255, 255)]], dtype=np.uint8)
    assert stats.colorfulness(rgb) == pytest.approx(0.3 * np.hypot(255, 127.5))


def test_statistics_of_a_photograph_agree_with_pillow() -> None:
    image = Image.fromarray(PHOTO)
    grey = ImageStat.Stat(image.convert("L"))
    assert stats.brightness(PHOTO) == pytest.approx(grey.mean[0])
    assert stats.contrast(PHOTO) == pytest.approx(grey.stddev[0], rel=1e-6)
    assert stats.saturation(PHOTO) == pytest.approx(ImageStat.Stat(image.convert("HSV")).mean[1])
    histogram = np.array(image.histogram(), dtype=np.float64) / (3 * image.width * image.height)
    bits = -(histogram[histogram > 0] * np.log2(histogram[histogram > 0])).sum()
    assert stats.entropy(PHOTO) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("captions", "chars", "words", "sentences"),
    [
        ([], 0, 0, 0),
        ([""], 0, 0, 0),
        (["a cat"], 5, 2, 1),
        (["A cat. It is 3.5 kg!", "never read"], 20, 6, 2),
        (["What?! Well..."], 14, 2, 2),
        (["..."], 3, 1, 1),
    ],
)
def test_counts_of_captions(captions: list[str], chars: int, words: int, sentences: int) -> None:
    assert stats.caption_n_chars(captions) == chars
    assert stats.caption_n_words(captions) == words
    assert stats.caption_n_sentences(captions) == sentences


def test_counts_of_detections_start_at_the_score_that_is_trained_on() -> None:
    det = boxes(("person", 0.9), ("person", 0.6), ("person", 0.59), ("dog", 0.7))
    assert (stats.n_persons(det), stats.n_coco_instances(det), stats.coco_instance_diversity(det)) == (2, 3, 2)
    assert (stats.n_persons(boxes()), stats.n_coco_instances(boxes()), stats.coco_instance_diversity(boxes())) == (
        0,
        0,
        0,
    )


def test_humans_are_those_with_a_pose_or_else_those_detected() -> None:
    poses = modalities.load("human_poses").example(np.random.default_rng(0), (40, 60))
    values = {"rgb": RED, "human_poses": poses, "det": boxes(("person", 0.9))}
    for sources, expected in ((("human_poses",), 2), (("det", "human_poses"), 2), (("det",), 1)):
        (found,) = Metadata(from_modalities=sources).load("cpu")([Sample("a", values)])
        assert found["metadata"]["n_humans"] == expected
        assert list(found["metadata"]) == [kind for kind in KINDS if kind in found["metadata"]]
    (found,) = Metadata(from_modalities=("human_poses",)).load("cpu")([Sample("a", {"rgb": RED, "human_poses": []})])
    assert found["metadata"] == {"n_humans": 0}
    assert "n_humans" not in Metadata(from_modalities=("rgb",)).load("cpu")([Sample("a", values)])[0]["metadata"]


def test_shares_of_classes() -> None:
    semseg = np.array([[0, 102, 119, 255]], dtype=np.uint8)  # person, sand, sky, unlabelled
    assert stats.walkability(semseg) == pytest.approx(1 / 3)
    assert stats.objectness(semseg) == pytest.approx(1 / 3)
    assert stats.semantic_diversity(semseg) == 3
    nothing = np.full((3, 3), 255, dtype=np.uint8)
    assert (stats.walkability(nothing), stats.objectness(nothing), stats.semantic_diversity(nothing)) == (0, 0, 0)


def test_geometric_complexity_is_zero_for_a_plane_and_one_for_opposite_sides() -> None:
    plane = np.zeros((4, 4, 3), dtype=np.float32)
    plane[..., 2] = 1
    assert stats.geometric_complexity(plane) == pytest.approx(0)
    both = plane.copy()
    both[:2] *= -1
    assert stats.geometric_complexity(both) == pytest.approx(1)
    corner = np.eye(3, dtype=np.float32)[None]
    assert stats.geometric_complexity(corner) == pytest.approx(1 - 1 / np.sqrt(3))


def test_occlusion_score_counts_the_pixels_at_steps() -> None:
    depth = np.zeros((224, 224), dtype=np.float32)
    assert stats.occlusion_score(depth) == 0
    depth[:, 112:] = 0.5
    assert stats.occlusion_score(depth) == pytest.approx(2 / 224)
    ramp = np.tile(np.linspace(0, 1, 224, dtype=np.float32), (224, 1))
    assert stats.occlusion_score(ramp) == 0
    assert stats.occlusion_score(np.kron(depth, np.ones((2, 2), np.float32))) == pytest.approx(2 / 224)


SHOWN = json.loads((Path(__file__).parent / "golden" / "metadata_sample.json").read_text())
"""Counts over the pictures that 4M-21 was shown with; what made them stands in the file."""


def spread(counts: list[int]) -> np.ndarray:
    """Levels in rising order, as often as they are counted: what depends on counts alone is the same of them."""
    return np.repeat(np.arange(len(counts)), counts)


def printed(kind: str, value: float) -> float:
    """A value as ml-4m's demonstrations print it: the lower end of its bin."""
    (bins,) = (b for b in BINS if b.key == kind)
    return round(bins.from_bin(bins.to_bin(value)), 2)


def test_the_published_photograph_has_the_printed_colours() -> None:
    levels = {name: spread(counts).astype(np.uint8) for name, counts in SHOWN["levels"].items()}
    coloured = np.stack([levels[c] for c in "RGB"], axis=-1)[None]  # entropy asks which levels there are, not where
    assert printed("entropy", stats.entropy(coloured)) == 8.4
    grey = np.repeat(levels["L"][None, :, None], 3, axis=2)
    assert printed("brightness", stats.brightness(grey)) == 147.9
    saturated = np.stack([np.full_like(levels["S"], 255), *[255 - levels["S"]] * 2], axis=-1)[None]
    assert printed("saturation", stats.saturation(saturated)) == 102.0
    # The one that is a bin off: 25.40 is printed. Of all levels of R, G and B together it would be eight bins off.
    assert stats.contrast(grey) == pytest.approx(28.94, abs=0.005)
    assert printed("contrast", stats.contrast(grey)) == 27.94


def test_the_published_photograph_has_the_printed_colorfulness() -> None:
    rg, yb2 = spread(SHOWN["opponent"]["rg"]), spread(SHOWN["opponent"]["yb2"])
    # Pixels with these opponent channels: R - G = rg and R + G - 2 B = yb2, paired so that both have the same parity.
    odd = [np.sort(rg[rg % 2 == 1])[::-1], np.sort(yb2[yb2 % 2 == 1])]
    even = [np.sort(rg[rg % 2 == 0])[::-1], np.sort(yb2[yb2 % 2 == 0])]
    rg, yb2 = np.concatenate([odd[0], even[0]]), np.concatenate([odd[1], even[1]])
    green = np.maximum(0, (yb2 - rg) // 2)
    rgb = np.stack([green + rg, green, (2 * green + rg - yb2) // 2], axis=-1)[None]
    assert rgb.min() >= 0
    assert rgb.max() <= 255
    assert printed("colorfulness", stats.colorfulness(rgb.astype(np.uint8))) == 48.0


def test_the_published_segmentation_has_the_printed_shares() -> None:
    ids = [coco.NAMES.index(name) for name in SHOWN["classes"]]
    semseg = np.repeat(np.array(ids, dtype=np.uint8), list(SHOWN["classes"].values()))[None]
    assert printed("walkability", stats.walkability(semseg)) == 0.06
    assert printed("objectness", stats.objectness(semseg)) == 0.0


def test_the_published_boxes_and_caption_have_the_printed_counts() -> None:
    drawn = boxes(*[("person", 0.9)] * 3, *[("backpack", 0.7)] * 2)
    assert (stats.n_coco_instances(drawn), stats.coco_instance_diversity(drawn)) == (5, 2)
    caption = ["the view from the top of the hill at the top of the lake."]
    assert (stats.caption_n_words(caption), stats.caption_n_sentences(caption)) == (14, 1)


def test_the_setting_decides_the_kinds() -> None:
    sample = Sample("a", {"rgb": PHOTO, "caption": ["An astronaut."], "det": boxes(("person", 0.9)), "depth": None})
    (default,) = Metadata().load("cpu")([sample])
    assert list(default["metadata"]) == [kind for kind, (source, _) in KINDS.items() if source in ("rgb", "caption")]
    (counted,) = Metadata(from_modalities=("det",)).load("cpu")([sample])
    assert counted["metadata"] == {"n_humans": 1, "n_coco_instances": 1, "coco_instance_diversity": 1}
    assert json.loads(json.dumps(default)) == default


def test_a_plan_adapts_it_to_the_modalities_that_exist() -> None:
    assert Metadata().adapted({"rgb", "det", "depth", "CLIP-B16"}).inputs == ("rgb", "det", "depth")
    assert SOURCES == ("rgb", "caption", "det", "sam_instance", "semseg", "normal", "depth", "human_poses")
    assert Metadata(from_modalities=("rgb",)).adapted(SOURCES).inputs == ("rgb",)
    with pytest.raises(ValueError, match="expected some of"):
        Metadata(from_modalities=("rgb", "clip"))


def test_palettes_are_exact_for_an_image_of_few_colours() -> None:
    rgb = np.zeros((64, 64, 3), dtype=np.uint8)
    rgb[:16], rgb[16:32] = (200, 10, 30), (0, 255, 0)
    palette = Palette().load("cpu")([Sample("a", {"rgb": rgb})])[0]["color_palette"][0]
    assert list(palette) == list("1234567")
    assert all(len(colours) == int(k) for k, colours in palette.items())
    assert palette["1"] == [[50, 66, 8]]
    assert palette["3"][0] == [0, 0, 0]
    assert sorted(palette["3"]) == [[0, 0, 0], [0, 255, 0], [200, 10, 30]]
    assert {tuple(c) for c in palette["7"]} <= {(0, 0, 0), (0, 255, 0), (200, 10, 30)}


def test_palettes_do_not_depend_on_threads_or_on_what_ran_before() -> None:
    label, before = Palette().load("cpu"), cv2.getNumThreads()
    found = []
    for threads in (1, 4):
        cv2.setNumThreads(threads)
        cv2.setRNGSeed(threads)
        found.append(label([Sample("a", {"rgb": PHOTO})]))
    cv2.setNumThreads(before)
    assert found[0] == found[1]
    for colours in found[0][0]["color_palette"][0].values():
        assert all(0 <= c <= 255 and isinstance(c, int) for colour in colours for c in colour)


def test_canny_works_on_grey() -> None:
    edges = Canny().load("cpu")([Sample("a", {"rgb": PHOTO})])[0]["canny_edge"]
    assert set(np.unique(edges)) == {0, 255}
    assert 0.05 < (edges > 0).mean() < 0.12
    # Two colours of equal luma have an edge in colour and none in grey.
    rgb = np.zeros((32, 32, 3), dtype=np.uint8)
    rgb[:, :16], rgb[:, 16:] = (100, 0, 0), (0, 51, 0)
    assert not Canny().load("cpu")([Sample("a", {"rgb": rgb})])[0]["canny_edge"].any()
    with pytest.raises(ValueError, match="low <= high"):
        Canny(low=3, high=2)


def test_person_boxes_lose_the_margin_of_the_window_and_stay_in_the_image() -> None:
    got = _person_boxes(np.array([[10.0, 20, 100, 200], [-20, -10, 50, 100]]), width=200, height=400)
    np.testing.assert_allclose(got[0], [20 / 200, 34 / 400, 100 / 200, 194 / 400])
    assert got.min() == 0


@pytest.mark.skipif(not hasattr(cv2, "HOGDescriptor"), reason="this OpenCV has no HOGDescriptor")
def test_people_are_not_found_where_there_are_none() -> None:
    samples = [Sample(name, {"rgb": getattr(skimage.data, name)()}) for name in ("coffee", "chelsea")]
    for labels in OpenCvPersons().load("cpu")([*samples, Sample("small", {"rgb": RED})]):
        assert not [i for i in labels["det"]["instances"] if i["score"] >= stats.MIN_SCORE]


def test_overlapping_persons_are_one() -> None:
    kept = OpenCvPersons()._kept(
        [0.9, 0.8, 0.7, 0.01], [[0, 0, 0.5, 1], [0, 0, 0.5, 0.9], [0.6, 0, 1, 1], [0, 0, 1, 1]]
    )
    assert [(k["score"], k["boxes"]) for k in kept] == [(0.9, [0, 0, 0.5, 1]), (0.7, [0.6, 0, 1, 1])]
