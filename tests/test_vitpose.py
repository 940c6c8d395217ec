"""ViTPose against transformers' own preprocessing, network and reading of heatmaps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from transformers import VitPoseForPoseEstimation, VitPoseImageProcessor
from transformers.models.vitpose.modeling_vitpose import VitPoseEstimatorOutput

from dataengine import modalities
from dataengine.geometry import Crop
from dataengine.modalities.human_keypoints import MIRRORED, NAMES
from dataengine.sample import Sample
from labelers import _huggingface, _keypoints, _persons
from labelers.vitpose import VitPose

COFFEE, CAT = skimage.data.coffee(), skimage.data.chelsea()
SIZE = (256, 192)
PROCESSOR = VitPoseImageProcessor()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def detections(*boxes: tuple[list[float], str, float]) -> dict[str, Any]:
    return {"instances": [{"boxes": b, "class_name": name, "score": score} for b, name, score in boxes]}


PAIR = detections(([0.35, 0.1, 0.4513, 0.475], "person", 0.9), ([0, 0, 1, 1], "person", 0.6))
NOBODY = detections(([0, 0, 1, 1], "person", 0.5), ([0, 0, 1, 1], "cat", 1.0))
SAMPLES = [
    Sample("two", {"rgb": COFFEE, "det": PAIR}),
    Sample("nobody", {"rgb": CAT, "det": NOBODY}),
    Sample("one", {"rgb": CAT, "det": detections(([0.7, 0.3017, 1, 0.92], "person", 0.7))}),
]


def boxes_of(sample: Sample) -> list[list[float]]:
    """Boxes x y w h in pixels, as transformers wants them."""
    found = _persons.boxes_of(sample.values["det"], sample.size, 0.5).astype(np.float64)
    return [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in found.tolist()]


@pytest.mark.parametrize("sample", [SAMPLES[0], SAMPLES[2]], ids=["two", "one"])
def test_crops_are_those_of_transformers(sample: Sample) -> None:
    expected = PROCESSOR(
        sample.rgb, boxes=[boxes_of(sample)], do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"]
    for box, theirs in zip(_persons.boxes_of(sample.values["det"], sample.size, 0.5), expected, strict=True):
        ours = _keypoints.crop(sample.rgb, _keypoints.frame_of(box, SIZE), SIZE)
        np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0))


def blobs(seed: int, num_persons: int) -> np.ndarray:
    """Heatmaps (n, 17, 64, 48) such as a trained network gives: a smooth peak each, some at a border or a corner."""
    rng = np.random.default_rng(seed)
    at = rng.uniform(-0.4, (47.4, 63.4), (num_persons, len(NAMES), 2))
    at[0, :4] = [(0, 0), (47, 63), (0.3, 30.2), (20.7, 63)]
    rows, cols = np.mgrid[:64, :48]
    squared = (cols - at[..., 0, None, None]) ** 2 + (rows - at[..., 1, None, None]) ** 2
    heights = rng.uniform(0.1, 1, (num_persons, len(NAMES), 1, 1))
    noise = 0.02 * heights * rng.random(squared.shape)
    return (heights * np.exp(-squared / 8) + noise).astype(np.float32)


@pytest.mark.parametrize("num_persons", [1, 3])
def test_peaks_are_read_as_transformers_reads_them(num_persons: int) -> None:
    heatmaps = torch.from_numpy(blobs(num_persons, num_persons))
    boxes = [[10.5 * i, 20.25, 50.0 + 90 * i, 180.0] for i in range(num_persons)]
    (expected,) = PROCESSOR.post_process_pose_estimation(VitPoseEstimatorOutput(heatmaps=heatmaps), boxes=[boxes])
    points, scores = _keypoints.peaks(heatmaps)
    for i, ((x, y, w, h), theirs) in enumerate(zip(boxes, expected, strict=True)):
        frame = _keypoints.frame_of(np.array([x, y, x + w, y + h]), SIZE)
        ours = _keypoints.in_image(points[i].numpy(), frame, (64, 48))
        np.testing.assert_allclose(ours, theirs["keypoints"].numpy(), atol=5e-4)  # pixels
        np.testing.assert_allclose(scores[i].numpy(), theirs["scores"].numpy(), rtol=1e-6)


def test_a_peak_between_cells_is_found_between_them() -> None:
    rows, cols = np.mgrid[:64, :48]
    heatmap = np.exp(-((cols - 20.3) ** 2 + (rows - 40.6) ** 2) / 8)[None, None]
    points, scores = _keypoints.peaks(torch.from_numpy(heatmap))
    np.testing.assert_allclose(points[0, 0], (20.3, 40.6), atol=1e-3)
    assert scores.item() == heatmap.max()


def test_a_heatmap_without_a_peak_says_so() -> None:
    heatmaps = torch.stack([torch.full((64, 48), -0.1), torch.full((64, 48), 0.2)])[None]
    points, scores = _keypoints.peaks(heatmaps)
    assert points[0].tolist() == [[-1, -1], [0, 0]]
    assert scores[0].tolist() == pytest.approx([-0.1, 0.2])


def test_labels_are_those_of_transformers(tmp_path: Path) -> None:
    labeler = VitPose().tiny(tmp_path)
    model = _huggingface.network(labeler.checkpoint, VitPoseForPoseEstimation, "test")
    two, nobody, one = (found["human_keypoints"] for found in labeler.load("cpu")(SAMPLES))
    assert nobody == []
    for sample, found in ((SAMPLES[0], two), (SAMPLES[2], one)):
        boxes = boxes_of(sample)
        inputs = PROCESSOR(sample.rgb, boxes=[boxes], return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        (expected,) = PROCESSOR.post_process_pose_estimation(outputs, boxes=[boxes])
        modalities.load("human_keypoints").check(found, sample.size)
        for ours, theirs in zip(found, expected, strict=True):
            scores = theirs["scores"].numpy()
            np.testing.assert_allclose(ours["scores"], scores, atol=1e-4)
            # Where a heatmap is nowhere positive, transformers reads cells of the one before it.
            positive = scores > 0
            assert positive.sum() > 5
            near = np.abs(np.array(ours["keypoints"]) - theirs["keypoints"].numpy()).max(axis=1)
            assert near[positive].max() < 0.02  # pixels; they are written in hundredths


def test_persons_do_not_depend_on_how_they_are_batched(tmp_path: Path) -> None:
    labeler = VitPose().tiny(tmp_path)
    one_by_one = VitPose(checkpoint=labeler.checkpoint, chunk=1).load("cpu")
    assert [one_by_one([s])[0] for s in SAMPLES] == labeler.load("cpu")(SAMPLES)


def test_other_sets_of_keypoints_and_settings_are_refused(tmp_path: Path) -> None:
    labeler = VitPose().tiny(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"vitpose"', '"vit"'))
    with pytest.raises(ValueError, match="expected model_type 'vitpose', found 'vit'"):
        labeler.load("cpu")
    with pytest.raises(ValueError, match="vitpose: expected min_score"):
        VitPose(chunk=0)


KEYPOINTS = modalities.load("human_keypoints")


def test_a_mirror_exchanges_left_and_right() -> None:
    assert [NAMES[i] for i in MIRRORED[:5]] == ["nose", "right_eye", "left_eye", "right_ear", "left_ear"]
    assert [NAMES[i].split("_")[-1] for i in MIRRORED] == [name.split("_")[-1] for name in NAMES]
    (person, _) = KEYPOINTS.example(np.random.default_rng(0), (60, 100))
    (mirrored,) = KEYPOINTS.crop([person], Crop(0, 0, 60, 100, hflip=True), (60, 100), 200)
    eye, ear = NAMES.index("left_eye"), NAMES.index("right_ear")
    x, y = person["keypoints"][eye]
    assert mirrored["keypoints"][NAMES.index("right_eye")] == pytest.approx([200 - 2 * x, y * 200 / 60])
    assert mirrored["scores"][NAMES.index("left_ear")] == person["scores"][ear]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox_xyxy": [0, 0, 101, 10]}, "within 100 x 60|4 numbers"),
        ({"bbox_xyxy": [5, 0, 5, 10]}, "a box within"),
        ({"keypoints": [[0, 0]]}, "17 keypoints"),
        ({"keypoints": [[0, float("nan")]] * 17}, "keypoint: expected 2 numbers"),
        ({"scores": [1] * 16}, "scores: expected 17 numbers"),
    ],
)
def test_check_of_keypoints(change: dict[str, Any], message: str) -> None:
    (person, _) = KEYPOINTS.example(np.random.default_rng(0), (60, 100))
    with pytest.raises(ValueError, match=message):
        KEYPOINTS.check([{**person, **change}], (60, 100))
