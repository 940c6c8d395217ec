"""SAM 2.1: the masks of its network under the rules of its authors' generator, and how it is read."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from segment_anything.utils import amg
from torchvision.ops import batched_nms
from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2.image_processing_sam2 import Sam2ImageProcessor

from dataengine.sample import Sample
from labelers import _sam_two
from labelers._sam_generator import point_grid
from labelers.sam2 import Sam2

PHOTOS = [
    np.ascontiguousarray(photo)
    for photo in (skimage.data.chelsea()[60:210, 60:300], skimage.data.astronaut()[:200, :131])
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Sam2:
    made = Sam2().tiny(tmp_path_factory.mktemp("sam2"))
    return replace(made, pred_iou_thresh=0.3, points_per_batch=10, box_nms_thresh=0.97)


def by_transformers(labeler: Sam2, model: Sam2Model, rgb: np.ndarray) -> dict[str, Any]:
    """The masks of one image: the network by transformers, the rest by the functions of the first generator."""
    side, (h, w) = 128, rgb.shape[:2]
    points = torch.from_numpy(point_grid(labeler.points_per_side)) * torch.tensor([w, h])
    scaled = (points / torch.tensor([w, h]) * side).float()[None, :, None]
    processor = Sam2ImageProcessor(size={"height": side, "width": side}, mask_size={"height": 32, "width": 32})
    pixels = processor(images=rgb, return_tensors="pt")["pixel_values"]
    out = model(pixel_values=pixels, input_points=scaled, multimask_output=True)
    masks, scores = F.interpolate(out.pred_masks[0], (h, w), mode="bilinear").flatten(0, 1), out.iou_scores.flatten()
    points = points.repeat_interleave(3, dim=0)
    stability = amg.calculate_stability_score(masks, 0.0, labeler.stability_score_offset)
    passed = (scores > labeler.pred_iou_thresh) & (stability >= labeler.stability_score_thresh)
    masks, scores, stability, points = (masks > 0)[passed], scores[passed], stability[passed], points[passed]
    boxes = amg.batched_mask_to_box(masks)
    kept = batched_nms(boxes.float(), scores, torch.zeros(len(boxes)), labeler.box_nms_thresh)
    return {"masks": masks[kept], "scores": scores[kept], "points": points[kept], "stability": stability[kept]}


def test_the_same_masks_are_kept_as_with_transformers_network(tiny: Sam2) -> None:
    found = tiny.load("cpu")([Sample(str(i), {"rgb": photo}) for i, photo in enumerate(PHOTOS)])
    model = _sam_two.network(tiny.checkpoint)
    total = 0
    for photo, labels in zip(PHOTOS, found, strict=True):
        with torch.inference_mode():
            wanted = by_transformers(tiny, model, photo)
        records = labels["sam_instance"]
        total += len(records)
        assert len(records) == len(wanted["masks"])
        left = list(range(len(records)))
        for record in records:
            mask = coco_mask.decode({"size": record["size"], "counts": record["counts"].encode()}).astype(bool)
            partner = next(
                i
                for i in left
                if (wanted["masks"][i].numpy() != mask).sum() <= 1 + 1e-5 * mask.sum()
                and wanted["points"][i].round(decimals=2).tolist() == pytest.approx(record["point"])
            )
            left.remove(partner)
            assert record["predicted_iou"] == pytest.approx(float(wanted["scores"][partner]), abs=1e-4)
            assert record["stability_score"] == pytest.approx(float(wanted["stability"][partner]), abs=1e-3)
    assert total > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_decoder_is_that_of_transformers(tiny: Sam2, dtype: torch.dtype) -> None:
    """float64 stands for the half precision of a GPU: every border between the two dtypes is crossed."""
    model = _sam_two.network(tiny.checkpoint)
    predictor = _sam_two.Predictor(copy.deepcopy(model), "cpu")
    decoder = type(predictor.decoder)(predictor.decoder.parts, dtype)
    with torch.inference_mode():
        pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        points = torch.rand(2, 6, 1, 2, generator=torch.Generator().manual_seed(1)) * 128
        wanted = model(pixel_values=pixels, input_points=points, multimask_output=True)
        finest, finer, features = model.get_image_embeddings(pixels)
        shared = decoder.share(features, (finer, finest))
        scores, hyper, image = decoder.attend(shared, predictor.code((points[:, :, 0] + 0.5) / 128))
        masks = decoder.draw(image, hyper, tuple(x.repeat_interleave(6, dim=0) for x in shared.high))
    for found, theirs in ((masks, wanted.pred_masks.flatten(0, 1)), (scores, wanted.iou_scores.flatten(0, 1))):
        assert float((found - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def test_every_published_tensor_is_read_or_left_out_by_name() -> None:
    with torch.device("meta"):
        published = set(Sam2VideoModel(Sam2VideoConfig()).state_dict())
        used = set(Sam2Model(Sam2Config()).state_dict())
    import re

    left_out = {name for name in published if any(re.search(pattern, name) for pattern in _sam_two.VIDEO)}
    assert published - left_out == used
    assert len(left_out) == 160
    assert all(any(re.search(pattern, name) for name in published) for pattern in _sam_two.VIDEO)


def test_the_settings_are_those_of_its_authors_generator() -> None:
    sam = Sam2()
    assert (sam.pred_iou_thresh, sam.stability_score_thresh, sam.stability_score_offset) == (0.8, 0.95, 1.0)
    assert (sam.points_per_side, sam.points_per_batch, sam.box_nms_thresh) == (32, 64, 0.7)
    assert sam.alternative
    with pytest.raises(ValueError, match="at least one point"):
        Sam2(points_per_batch=0)


def test_a_checkpoint_of_another_kind_is_refused(tiny: Sam2, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(Path(tiny.checkpoint).parent, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "sam"}))
    with pytest.raises(ValueError, match="expected model_type 'sam2', found 'sam'"):
        replace(tiny, checkpoint=str(folder)).load("cpu")
