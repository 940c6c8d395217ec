"""SAM: the architecture from the tensors, the masks as the package makes them, and their edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry

from dataengine.sample import Sample
from labelers import _checkpoints, _sam
from labelers.sam import Sam
from labelers.sam_edge import SamEdge

PHOTO = np.ascontiguousarray(skimage.data.chelsea()[60:210, 60:300])


def rle(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode()}


def decoded(record: dict) -> np.ndarray:
    return coco_mask.decode({"size": record["size"], "counts": record["counts"].encode()})


@pytest.mark.parametrize("model_type", ["vit_b", "vit_l", "vit_h"])
def test_published_architectures_are_told_by_their_tensors(model_type: str) -> None:
    with torch.device("meta"):
        published = sam_model_registry[model_type]()
        state = published.state_dict()
        built = _sam.build(_sam.shape_of(state))
    assert {n: t.shape for n, t in built.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert repr(built) == repr(published)
    windows = [block.window_size for block in published.image_encoder.blocks]
    assert [block.window_size for block in built.image_encoder.blocks] == windows
    assert built.image_encoder.blocks[0].attn.num_heads == published.image_encoder.blocks[0].attn.num_heads
    assert built.mask_decoder.transformer.layers[0].self_attn.num_heads == 8
    assert built.image_encoder.img_size == published.image_encoder.img_size == 1024
    if model_type == "vit_h":
        assert _sam.shape_of(state) == _sam.Shape()


def test_masks_are_those_of_the_package(tmp_path: Path) -> None:
    sam = Sam().tiny(tmp_path)
    (labels,) = sam.load("cpu")([Sample("a", {"rgb": PHOTO})])
    found = labels["sam_instance"]
    network = _sam.network(torch.load(sam.checkpoint, weights_only=True))
    expected = SamAutomaticMaskGenerator(
        network,
        points_per_side=sam.points_per_side,
        pred_iou_thresh=sam.pred_iou_thresh,
        stability_score_thresh=sam.stability_score_thresh,
        stability_score_offset=sam.stability_score_offset,
        box_nms_thresh=sam.box_nms_thresh,
    ).generate(PHOTO)
    assert len(found) == len(expected) > 2
    remaining = [mask["segmentation"] for mask in expected]
    for record in found:
        mask = decoded(record)
        assert mask.shape == tuple(record["size"]) == PHOTO.shape[:2]
        assert mask.sum() == record["area"] > 0
        x, y, w, h = record["bbox"]
        ys, xs = np.nonzero(mask)
        assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        index = next(i for i, other in enumerate(remaining) if np.array_equal(other, mask))
        remaining.pop(index)
    areas = [record["area"] for record in found]
    assert areas == sorted(areas, reverse=True)


def test_defaults_are_those_of_the_package() -> None:
    import inspect

    defaults = {n: p.default for n, p in inspect.signature(SamAutomaticMaskGenerator).parameters.items()}
    sam = Sam()
    shared = set(defaults) & set(vars(sam))
    assert len(shared) == 11
    assert {name: getattr(sam, name) for name in shared} == {name: defaults[name] for name in shared}
    with pytest.raises(ValueError, match="at least one point"):
        Sam(points_per_side=0)


def test_records_come_in_one_order_and_none_is_empty() -> None:
    masks = [np.zeros((4, 5), bool) for _ in range(3)]
    masks[0][1, 1], masks[1][:, 2:] = True, True
    found = [
        {
            "segmentation": rle(mask),
            "area": int(mask.sum()),
            "bbox": [0, 0, 0, 0],
            "predicted_iou": 0.912345,
            "stability_score": float("nan") if not mask.any() else 0.96,
            "point_coords": [[1.25, 2.0]],
        }
        for mask in masks
    ]
    records = _sam.records(found)
    assert records == _sam.records(found[::-1])
    assert [record["area"] for record in records] == [12, 1]
    assert [record["bbox"] for record in records] == [[2, 0, 3, 4], [1, 1, 1, 1]]
    assert records[0]["predicted_iou"] == 0.9123
    assert records[0]["point"] == [1.25, 2.0]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    state = _sam.random_state(seed=0)
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="iou_token"):
        Sam(checkpoint=str(tmp_path / "broken.pth")).load("cpu")


def test_pickled_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    torch.save({"a": Path("x")}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        _checkpoints.read(tmp_path / "evil.pth")


def test_edges_are_one_pixel_wide_and_stay_inside_each_mask() -> None:
    left, right = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
    left[10:30, 5:25], right[10:30, 25:55] = True, True
    sample = Sample("a", {"rgb": np.zeros((40, 60, 3), np.uint8), "sam_instance": [rle(left), rle(right)]})
    edges = SamEdge().load("cpu")([sample])[0]["sam_edge"]
    assert edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    assert edges[20, [5, 24, 25, 54]].tolist() == [255] * 4
    assert edges[20, [4, 6, 23, 26, 53, 55]].tolist() == [0] * 6
    assert np.count_nonzero(edges) == (20 * 20 - 18 * 18) + (20 * 30 - 18 * 28)
    canny = SamEdge(mode="canny").load("cpu")([sample])[0]["sam_edge"]
    assert np.count_nonzero(canny[20]) == 3  # the neighbours share the edge between them
    assert canny[20, 23:27].any()


def test_edges_do_not_follow_the_border_of_the_image() -> None:
    whole, half = np.ones((20, 30), bool), np.zeros((20, 30), bool)
    half[:, :10] = True
    rgb = np.zeros((20, 30, 3), np.uint8)
    for mode in ("gradient", "canny"):
        label = SamEdge(mode=mode).load("cpu")  # type: ignore[arg-type]
        found = label(
            [
                Sample(n, {"rgb": rgb, "sam_instance": m})
                for n, m in (("a", [rle(whole)]), ("b", [rle(half)]), ("c", []))
            ]
        )
        sums = [np.count_nonzero(labels["sam_edge"]) for labels in found]
        assert sums[0] == sums[2] == 0
        assert sums[1] == 20


def test_edges_of_a_mask_of_another_size_are_refused() -> None:
    sample = Sample("a", {"rgb": np.zeros((8, 8, 3), np.uint8), "sam_instance": [rle(np.ones((4, 4), bool))]})
    with pytest.raises(ValueError, match="a mask of"):
        SamEdge().load("cpu")([sample])
    with pytest.raises(ValueError, match="gradient or canny"):
        SamEdge(mode="sobel")  # type: ignore[arg-type]


def test_canny_of_a_mask_in_its_box_equals_canny_of_the_whole() -> None:
    import cv2

    mask = cv2.circle(np.zeros((50, 70), np.uint8), (60, 20), 14, 1, -1)
    sample = Sample("a", {"rgb": np.zeros((50, 70, 3), np.uint8), "sam_instance": [rle(mask)]})
    edges = SamEdge(mode="canny").load("cpu")([sample])[0]["sam_edge"]
    np.testing.assert_array_equal(edges, cv2.Canny(mask * 255, 100, 200))
