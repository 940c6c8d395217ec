"""The way through a labeler, with a network that knows the truth: boxes, masks, points, maps and grids end up in place.

Scenes are painted in flat colours, one a thing or a class, so that a stand-in for the network can read the truth off
the very pixels it is given, at their size, with their padding and normalisation. What comes out is held to the truth
of the scene at its own size. Depth and normals are in tests/test_depth_normals.py, crops and mirrors of every
modality in tests/test_modalities.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F

import labelers.dfine
from dataengine import coco, plugins
from dataengine.corpora.scenes import Scene, render
from dataengine.labeler import Labeler
from dataengine.sample import Sample
from labelers import _images, _persons, _sam, _vitdet_network, eomt, mask2former
from labelers._sam_decoder import Shared
from labelers._vitdet_heads import Detections

SIZE = 160
WINDOWS = {"landscape": np.s_[30:130, :], "portrait": np.s_[:, 40:135]}
GREY = (124, 116, 104)
"""ImageNet's mean, which is what images are padded with: what it covers is nothing."""


def palette(count: int) -> np.ndarray:
    """uint8 (count, 3): the grey of nothing, then corners of the colour cube, of which no two blend into a third."""
    corners = np.array([(r, g, b) for r in (255, 0) for g in (0, 255) for b in (0, 255)])
    assert count <= len(corners) + 1
    return np.concatenate([[GREY], corners])[:count].astype(np.uint8)


def seen(pixels: Tensor, statistics: _images.Statistics, count: int) -> Tensor:
    """int64 (n, h, w): which colour each pixel of a normalised batch (n, 3, h, w) has, 0 for none (and for grey)."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in statistics)
    levels = ((pixels.float() * std + mean) * 255).permute(0, 2, 3, 1)
    distance, nearest = (levels[..., None, :] - torch.from_numpy(palette(count)).float()).abs().sum(-1).min(-1)
    return torch.where(distance < 200, nearest, 0)


@pytest.fixture(params=list(WINDOWS))
def view(request: pytest.FixtureRequest) -> tuple[Scene, Any]:
    """A scene with several things, and the part of it that is the image."""
    return render(18, SIZE), WINDOWS[request.param]


def label(labeler: Labeler, painted: np.ndarray, **values: Any) -> dict[str, Any]:
    (found,) = labeler.load("cpu")([Sample("scene", {"rgb": np.ascontiguousarray(painted), **values})])
    return found


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


class Oracle(nn.Module):
    """What a labeler puts on a device in the place of its network."""

    def __init__(self, answer: Any, **attributes: Any) -> None:
        super().__init__()
        self.answer = answer
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)


def things(instance: np.ndarray, least: int = 12) -> dict[int, np.ndarray]:
    """The masks of all things of which at least so many pixels are in the image."""
    found = {i: instance == i for i in np.unique(instance) if i}
    return {i: mask for i, mask in found.items() if mask.sum() >= least}


def box(mask: np.ndarray) -> np.ndarray:
    """x0 y0 x1 y1 of a mask (h, w), in pixels; the last ones lie just outside."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float64)


def corners(found: Tensor) -> tuple[list[int], Tensor]:
    """The things in a map (h, w) as a network is given it, and their boxes float32 (n, 4) in its pixels."""
    ids = [int(i) for i in found.unique() if i and (found == i).sum() > 12]
    return ids, torch.from_numpy(np.array([box((found == i).numpy()) for i in ids])).float()


@pytest.mark.parametrize("name", ["vitdet", "dfine"])
def test_boxes_of_detectors(
    view: tuple[Scene, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, window = view
    instance = scene.instance[window]
    count = int(scene.instance.max()) + 1

    def vitdet(pixels: Tensor, sizes: Any, *thresholds: Any) -> list[Detections]:
        out = []
        for found, (height, width) in zip(seen(pixels, _images.IMAGENET, count), sizes, strict=True):
            assert not found[height:].any()
            assert not found[:, width:].any()
            ids, boxes = corners(found)
            out.append(Detections(boxes, torch.ones(len(ids)), torch.tensor(ids)))
        return out

    def dfine(pixel_values: Tensor) -> Any:
        (found,) = seen(pixel_values, ((0, 0, 0), (1, 1, 1)), count)
        ids, boxes = corners(found)
        height, width = found.shape
        x0, y0, x1, y1 = (boxes / torch.tensor([width, height, width, height])).unbind(-1)
        logits = torch.full((1, len(ids), len(coco.THINGS)), -9.0)
        logits[0, range(len(ids)), ids] = 9
        middles = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
        return SimpleNamespace(logits=logits, pred_boxes=middles[None])

    labeler = plugins.load("labelers", name, Labeler)().tiny(tmp_path)
    backbone, heads = Oracle(None, side=320), Oracle(None, classes=80)
    monkeypatch.setattr(_vitdet_network, "network", lambda _: Oracle(vitdet, backbone=backbone, roi_heads=heads))
    monkeypatch.setattr(labelers.dfine, "network", lambda _: Oracle(dfine))
    found = {i["class_name"]: i["boxes"] for i in label(labeler, palette(count)[instance])["det"]["instances"]}
    height, width = instance.shape
    expected = {coco.THINGS[i]: box(mask) for i, mask in things(instance).items()}
    assert len(expected) >= 2
    for kind, truth in expected.items():
        # The image was enlarged; interpolation blurs an outline by one pixel of either size.
        np.testing.assert_allclose(np.array(found[kind]) * (width, height, width, height), truth, atol=1.3)


@pytest.mark.parametrize("name", ["mask2former", "eomt"])
def test_maps_of_segmenters(
    view: tuple[Scene, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, window = view
    classes = np.unique(scene.semseg)
    truth = scene.semseg[window]
    painted = palette(len(classes) + 1)[np.searchsorted(classes, truth) + 1]
    module = {"mask2former": mask2former, "eomt": eomt}[name]
    labeler = plugins.load("labelers", name, Labeler)().tiny(tmp_path)
    config = module.network(labeler.checkpoint).config  # type: ignore[attr-defined]
    config.image_size = 192
    if name == "mask2former":
        labeler = type(labeler)(**{**vars(labeler), "shortest_edge": 192, "longest_edge": 320})
    else:
        monkeypatch.setattr(eomt, "geometry", lambda checkpoint, side: (192, 192, 2, _images.IMAGENET))
    places = {label: int(place) for place, label in config.id2label.items()}

    def segment(pixel_values: Tensor) -> Any:
        found = seen(pixel_values, _images.IMAGENET, len(classes) + 1)
        inside = torch.stack([(found == i + 1).float() for i in range(len(classes))], dim=1)
        masks = 20 * F.avg_pool2d(inside, 4) - 10  # as coarse as the real ones
        logits = torch.full((len(found), len(classes), len(places) + 1), -10.0)
        for query, one in enumerate(classes):
            logits[:, query, places[coco.NAMES[one]]] = 10
        return SimpleNamespace(masks_queries_logits=masks, class_queries_logits=logits)

    monkeypatch.setattr(module, "network", lambda checkpoint: Oracle(segment, config=config))
    found = label(labeler, painted)["semseg"]
    assert found.shape == truth.shape
    assert (found == truth).mean() > 0.96
    for one in classes:
        if (truth == one).sum() > 150:
            assert iou(found == one, truth == one) > 0.8, coco.NAMES[one]
    for shift in (-2, 2):  # moved by as little as two pixels, it would fit worse
        for axis in (0, 1):
            assert (np.roll(found, shift, axis) == truth).mean() < (found == truth).mean() - 0.005


def test_masks_and_points_of_sam(view: tuple[Scene, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, window = view
    instance = scene.instance[window]
    count = int(scene.instance.max()) + 1
    statistics: Any = tuple(tuple(v / 255 for v in values) for values in (_sam.PIXEL_MEAN, _sam.PIXEL_STD))

    class Decoder:
        """At a point, the mask of the thing that is there; nothing where there is none."""

        def share(self, features: Tensor) -> Any:
            return Shared(features, features, features, features)

        def attend(self, shared: Any, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            images, points, _ = places.shape
            side = shared.source.shape[-1]
            column, row = (places * side).long().clamp(0, side - 1).unbind(-1)
            owner = shared.source[torch.arange(images)[:, None], row, column].flatten()
            maps = shared.source[:, None].expand(-1, points, -1, -1).flatten(0, 1)
            scores = torch.where(owner > 0, 1.0, 0.0)[:, None] * torch.tensor([1.0, 0.0, 0.0])
            return scores, owner[:, None].expand(-1, 3), maps

        def draw(self, maps: Tensor, owners: Tensor, high: Any = ()) -> Tensor:
            return torch.where(maps[:, None] == owners[:, :, None, None], 10.0, -10.0)

    class Predictor(_sam.Predictor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.device, self.dtype, self.side = "cpu", torch.float32, 320
            self.decoder: Any = Decoder()
            self.encoder = lambda pixels: seen(pixels[:, :, 2::4, 2::4], statistics, count)

        def code(self, places: Tensor) -> Tensor:
            return places

    monkeypatch.setattr(_sam, "Predictor", Predictor)
    labeler = plugins.load("labelers", "sam", Labeler)().tiny(tmp_path)
    labeler = type(labeler)(checkpoint=labeler.checkpoint, points_per_side=24)  # type: ignore[attr-defined, call-arg]
    found = label(labeler, palette(count)[instance])["sam_instance"]
    expected = things(instance, least=40)
    assert len(expected) >= 2
    for truth in expected.values():
        masks = [coco_mask.decode({**m, "counts": m["counts"].encode()}).astype(bool) for m in found]
        best = int(np.argmax([iou(mask, truth) for mask in masks]))
        assert iou(masks[best], truth) > 0.75
        for shift in ((2, 0), (-2, 0), (0, 2), (0, -2)):
            assert iou(np.roll(masks[best], shift, (0, 1)), truth) < iou(masks[best], truth)
        x, y = found[best]["point"]
        # A cell of the mask is two pixels wide here.
        assert truth[max(int(y) - 2, 0) : int(y) + 3, max(int(x) - 2, 0) : int(x) + 3].any()
        x0, y0, w, h = found[best]["bbox"]
        np.testing.assert_allclose([x0, y0, x0 + w, y0 + h], box(truth), atol=2)


TEACHERS = {
    "clip_b16": "CLIP-B16",
    "dinov2_b14": "DINOv2-B14",
    "dinov3": "DINOv3-B16",
    "imagebind_h14": "ImageBind-H14",
    "openclip_h14": "OpenCLIP-H14",
    "siglip2": "SigLIP2-B16",
}


@pytest.mark.parametrize("name", TEACHERS)
def test_grids_of_features_lie_on_the_image(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _images.featured

    def featured(run: Any, side: int, statistics: Any, device: str, *rest: Any) -> Any:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in statistics)

        def mean_colours(pixels: Tensor) -> dict[str, Tensor]:
            cells = {name: round(value.shape[1] ** 0.5) for name, value in run(pixels).items() if value.ndim == 3}
            levels = pixels.float() * std + mean
            made = {n: F.adaptive_avg_pool2d(levels, c).flatten(2).transpose(1, 2) for n, c in cells.items()}
            return made | {name: levels.mean((2, 3)) for name, value in run(pixels).items() if value.ndim == 2}

        return real(mean_colours, side, statistics, device, *rest)

    monkeypatch.setattr(_images, "featured", featured)
    labeler = plugins.load("labelers", name, Labeler)().tiny(tmp_path)
    height, width = 90, 150
    y, x = np.mgrid[:height, :width] + 0.5
    ramps = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 64)], axis=2).round().astype(np.uint8)
    grid = label(labeler, ramps)[TEACHERS[name]].astype(np.float32)
    rows, columns, _ = grid.shape
    np.testing.assert_allclose(grid[..., 0], np.tile((np.arange(columns) + 0.5) / columns, (rows, 1)), atol=0.02)
    np.testing.assert_allclose(grid[..., 1], np.tile((np.arange(rows) + 0.5) / rows, (columns, 1)).T, atol=0.02)
    np.testing.assert_allclose(grid[..., 2], 64 / 255, atol=0.01)


def test_a_person_fills_the_crop_that_is_made_of_its_box(view: tuple[Scene, Any]) -> None:
    scene, window = view
    instance = scene.instance[window]
    tallest = max(things(instance).values(), key=lambda mask: np.ptp(box(mask)[1::2]))
    corners = box(tallest)
    height, width = instance.shape
    det = {"boxes": (corners / (width, height, width, height)).tolist(), "class_name": "person", "score": 0.9}
    (person,) = _persons.boxes_of({"instances": [det]}, (height, width), 0.5)
    np.testing.assert_allclose(person, corners, atol=1e-3)
    crop = _persons.crop(palette(2)[tallest.astype(int)], person)
    inside = np.abs(crop - palette(2)[1]).sum(-1) < np.abs(crop - palette(2)[0]).sum(-1)
    inside &= np.abs(crop).sum(-1) > 0  # black beyond the image
    scale = _persons.CROP / _persons.side_of(person)
    half = (corners[2:] - corners[:2]) / 2 * scale
    middle = np.array([crop.shape[1], crop.shape[0]]) / 2
    np.testing.assert_allclose(box(inside), np.concatenate([middle - half, middle + half]), atol=1.5 * scale)
