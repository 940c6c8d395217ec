"""D-FINE against transformers' own, and the calibration of its scores."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from pydantic import TypeAdapter
from transformers import DFineForObjectDetection, RTDetrImageProcessor

from dataengine import coco, modalities
from dataengine.sample import Sample
from labelers import _calibration, dfine
from labelers.dfine import DFine
from pipelines import config

KNOTS = ((0.0, 0.0), (0.5, 0.6), (1.0, 1.0))


def photographs() -> list[Sample]:
    sources = (("astronaut", 91, 200), ("coffee", 150, 60))
    return [
        Sample(name, {"rgb": np.array(Image.fromarray(getattr(skimage.data, name)()).resize((width, height)))})
        for name, height, width in sources
    ]


@pytest.fixture
def tiny(tmp_path: Path) -> DFine:
    return DFine().tiny(tmp_path)


def instances(labeler: DFine, samples: list[Sample]) -> list[list[dict[str, Any]]]:
    values = [value["det"] for value in labeler.load("cpu")(samples)]
    for value, sample in zip(values, samples, strict=True):
        modalities.load("det").check(value, sample.size)
    return [value["instances"] for value in values]


def test_it_finds_what_transformers_finds(tiny: DFine) -> None:
    samples = photographs()
    folder = Path(tiny.checkpoint).parent
    network = DFineForObjectDetection.from_pretrained(folder, local_files_only=True).eval()
    processor = RTDetrImageProcessor(do_normalize=False, size={"height": 640, "width": 640})
    with torch.no_grad():
        out = network(**processor(images=[sample.rgb for sample in samples], return_tensors="pt"))
    wanted = processor.post_process_object_detection(out, threshold=0.05)
    compared = 0
    for found, theirs in zip(instances(tiny, samples), wanted, strict=True):
        boxes = theirs["boxes"].clamp(0, 1).numpy()
        kept = [i for i, box in enumerate(np.round(boxes, 5)) if box[0] < box[2] and box[1] < box[3]]
        assert [i["class_name"] for i in found] == [coco.THINGS[theirs["labels"][i]] for i in kept]
        np.testing.assert_allclose([i["score"] for i in found], theirs["scores"][kept], atol=2e-5)
        np.testing.assert_allclose([i["boxes"] for i in found], boxes[kept], atol=2e-5)
        compared += len(kept)
    assert compared > 5


def test_the_best_pairs_of_query_and_class_come_first() -> None:
    logits = torch.full((1, 3, 80), -9.0)
    logits[0, 2, 7], logits[0, 2, 5], logits[0, 0, 79] = 3.0, 2.0, 1.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1], [0.25, 0.75, 0.5, 0.1]]])
    scores, classes, corners = dfine.best(logits, boxes)
    assert classes.tolist() == [[7, 5, 79]]
    np.testing.assert_allclose(scores[0], torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    np.testing.assert_allclose(corners[0], [[0, 0.7, 0.5, 0.8], [0, 0.7, 0.5, 0.8], [0.4, 0.3, 0.6, 0.7]], atol=1e-6)


def test_the_checkpoint_s_own_image_processor_is_followed(tiny: DFine) -> None:
    assert dfine.geometry(tiny.checkpoint)[:3] == (640, 640, 2)
    file = Path(tiny.checkpoint).parent / "preprocessor_config.json"
    file.write_text(json.dumps({"size": {"height": 480, "width": 512}, "resample": 3, "do_normalize": True}))
    height, width, resample, (mean, _) = dfine.geometry(tiny.checkpoint)
    assert (height, width, resample) == (480, 512, 3)
    assert mean[0] == 0.485
    file.write_text(json.dumps({"size": {"shortest_edge": 800}}))
    with pytest.raises(ValueError, match="expected a height and a width"):
        tiny.load("cpu")


def test_a_calibrated_score_keeps_the_raw_one(tiny: DFine, tmp_path: Path) -> None:
    samples = photographs()
    _calibration.write(tmp_path / "map.json", KNOTS, "made up")
    labeler = config.override(tiny, [f"calibration={tmp_path / 'map.json'}"])
    assert labeler.calibration == KNOTS
    for raw, found in zip(instances(tiny, samples), instances(labeler, samples), strict=True):
        assert [i["score_raw"] for i in found] == [i["score"] for i in raw]
        wanted = np.interp([i["score"] for i in raw], *zip(*KNOTS, strict=True))
        np.testing.assert_allclose([i["score"] for i in found], wanted, atol=2e-5)
        assert all("score_raw" not in i for i in raw)


def test_the_threshold_is_one_of_calibrated_scores(tiny: DFine, tmp_path: Path) -> None:
    low = config.override(tiny, ["calibration=[[0, 0], [1, 0.04]]"])
    assert instances(low, photographs()) == [[], []]


def test_the_numbers_of_a_calibration_are_part_of_the_identity(tiny: DFine, tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    _calibration.write(first, KNOTS, "one")
    _calibration.write(second, KNOTS, "the same elsewhere")
    calibrated = config.override(tiny, [f"calibration={first}"])
    assert calibrated.identity() == config.override(tiny, [f"calibration={second}"]).identity()
    assert calibrated.identity() != tiny.identity()
    assert pickle.loads(pickle.dumps(calibrated)) == calibrated
    settings = json.loads(json.dumps(calibrated.identity()["settings"]))
    again = TypeAdapter(DFine).validate_python({**settings, "checkpoint": tiny.checkpoint})
    assert again == calibrated
    assert hash(again) == hash(calibrated)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"knots": 3}', '{"knots": [[0, 0.5], [0, 1]]}', '{"knots": [[0, 1], [1, 0]]}']
)
def test_a_file_that_is_no_calibration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ValueError, match=r"calibration .*map\.json: expected"):
        DFine(calibration=str(tmp_path / "map.json"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DFine(calibration="nowhere/map.json")


def imagined(rng: np.random.Generator, num_images: int) -> tuple[list[Any], list[Any], list[Any]]:
    """What two detectors find and what is there: the own one says `sure ** 3` where the reference says `sure`.

    An instance that the reference gives the score s is right with probability s.
    """
    own, reference, truth = [], [], []
    for _ in range(num_images):
        sure = rng.random(10)
        right = rng.random(10) < sure
        boxes = [[0.1 * i, 0.0, 0.1 * i + 0.1, 0.5] for i in range(10)]
        moved = [[x0, y0, x1, 0.45] for x0, y0, x1, _ in boxes]
        own.append(_det(moved, sure**3))
        reference.append(_det(boxes, sure))
        truth.append(_det([box for box, hit in zip(boxes, right, strict=True) if hit], np.ones(right.sum())))
    return own, reference, truth


def _det(boxes: list[list[float]], scores: np.ndarray) -> dict[str, Any]:
    return {
        "instances": [
            {"boxes": box, "class_name": "cat", "score": float(score)} for box, score in zip(boxes, scores, strict=True)
        ]
    }


@pytest.mark.parametrize("with_truth", [True, False])
def test_a_fit_finds_which_scores_mean_the_same(with_truth: bool) -> None:
    own, reference, truth = imagined(np.random.default_rng(0), 1000)
    knots = _calibration.fit(own, reference, truth if with_truth else None)
    levels = np.array([0.3, 0.45, 0.6, 0.75, 0.9])
    found = _calibration.apply(knots, levels**3)
    np.testing.assert_allclose(found, levels, atol=0.05 if with_truth else 0.01)
    rising = _calibration.apply(knots, np.linspace(0, 1, 1001))
    assert (np.diff(rising) >= 0).all()
    assert rising[0] == 0
    assert rising[-1] == 1


def test_a_calibrated_column_is_fitted_by_its_raw_scores() -> None:
    own, reference, _ = imagined(np.random.default_rng(0), 50)
    knots = _calibration.fit(own, reference)
    calibrated = [
        {"instances": [{**i, "score": 0.5, "score_raw": i["score"]} for i in image["instances"]]} for image in own
    ]
    assert _calibration.fit(calibrated, reference) == knots


def test_an_instance_of_another_class_or_seen_twice_is_wrong() -> None:
    box, other = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]
    truth = [_det([box], np.ones(1))]
    seen = {"instances": [*_det([box, box, other], np.array([0.5, 0.9, 0.8]))["instances"]]}
    seen["instances"].append({"boxes": box, "class_name": "dog", "score": 0.7})
    scores, right = _calibration._judged([seen], truth)
    assert dict(zip(scores.tolist(), right.tolist(), strict=True)) == {0.9: 1, 0.8: 0, 0.7: 0, 0.5: 0}


def test_images_must_pair_up_and_hold_something() -> None:
    own, reference, _ = imagined(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match="as many images from each, got 2 and 1"):
        _calibration.fit(own, reference[:1])
    with pytest.raises(ValueError, match="expected instances from both"):
        _calibration.fit([{"instances": []}], reference[:1])
