"""ViTDet against detectron2's own (tests/golden/make_vitdet.py), and what its labeler makes of it."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import skimage.data
import torch

from dataengine import coco, modalities
from dataengine.sample import Sample
from labelers import _vitdet_boxes, _vitdet_network, _vitdet_random, vitdet
from labelers._vitdet_heads import Detections
from labelers.vitdet import VitDet

SMALL = _vitdet_random.Shape(32, 2, 64, depth=4, every=2, channels=16, full=64)
"""As the published network but for its widths: 1024 x 1024 pixels, windows of 14, four convolutions a head."""

SEED = 3

BASE = _vitdet_random.Shape(768, 12, 3072, depth=12, every=3)
LARGE = _vitdet_random.Shape(1024, 16, 4096, depth=24, every=6)
HUGE = _vitdet_random.Shape()


def photographs() -> list[np.ndarray]:
    """One that lies and one that stands."""
    return [skimage.data.chelsea(), np.ascontiguousarray(skimage.data.astronaut()[:, 130:430])]


def sampled(values: torch.Tensor) -> np.ndarray:
    """Some of a map (n, channels, h, w): 9 x 9 cells of each channel, or a few more."""
    step = max(values.shape[-1] // 9, 1)
    return values[:, :, ::step, ::step].float().numpy()


class Passed(NamedTuple):
    """What went through the network, stage by stage."""

    maps: list[torch.Tensor]
    proposals: list[tuple[torch.Tensor, torch.Tensor]]
    found: list[Detections]
    sizes: list[tuple[int, int]]


@pytest.fixture(scope="module")
def golden() -> Any:
    with np.load(Path(__file__).parent / "golden" / "vitdet.npz", allow_pickle=False) as values:
        return dict(values)


@pytest.fixture(scope="module")
def passed() -> Passed:
    network = _vitdet_network.network(_vitdet_random.state(SMALL, SEED)).eval()
    seen: dict[str, Any] = {}
    for part in (network.backbone, network.proposal_generator):
        part.register_forward_hook(lambda module, _, out: seen.__setitem__(type(module).__name__, out))
    images = [_vitdet_network.resized(rgb, network.backbone.side) for rgb in photographs()]
    sizes = [image.shape[:2] for image in images]
    with torch.inference_mode():
        pixels = _vitdet_network.batch(images, network.backbone.side, "cpu")
        found = network(pixels, sizes, 0.05, 0.5, 100)
    return Passed(seen["Backbone"], seen["ProposalNetwork"], found, sizes)


def partners(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each row the nearest of the others; each must be taken once. Equal scores leave the order open."""
    nearest = np.abs(rows[:, None] - others[None]).max(-1).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(others)))
    return nearest


def test_features_are_the_reference_s(golden: Any, passed: Passed) -> None:
    for level, values in enumerate(passed.maps, 2):
        expected = golden[f"feature_p{level}"]
        np.testing.assert_allclose(sampled(values), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("i", [0, 1])
def test_proposals_are_the_reference_s(golden: Any, passed: Passed, i: int) -> None:
    boxes, logits = (values.numpy() for values in passed.proposals[i])
    assert len(boxes) == 1000
    assert (np.diff(logits) <= 0).all()
    order = partners(golden[f"proposals_{i}"], boxes)
    np.testing.assert_allclose(boxes[order], golden[f"proposals_{i}"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(logits[order], golden[f"logits_{i}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("i", [0, 1])
def test_objects_are_the_reference_s(golden: Any, passed: Passed, i: int) -> None:
    found, rgb = passed.found[i], photographs()[i]
    height, width = passed.sizes[i]
    scale = np.array([rgb.shape[1] / width, rgb.shape[0] / height] * 2)
    boxes, scores = found.boxes.numpy() * scale, found.scores.numpy()
    assert len(boxes) == 100
    assert (np.diff(scores) <= 0).all()
    classes = found.classes.numpy()
    expected = np.column_stack((golden[f"boxes_{i}"], 1e4 * golden[f"classes_{i}"]))
    order = partners(expected, np.column_stack((boxes, 1e4 * classes)))
    np.testing.assert_allclose(boxes[order], golden[f"boxes_{i}"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(scores[order], golden[f"scores_{i}"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(classes[order], golden[f"classes_{i}"])
    assert len(np.unique(golden[f"classes_{i}"])) > 5

    instances = vitdet._instances(found, height, width)
    assert [coco.THINGS.index(one["class_name"]) for one in instances] == found.classes.tolist()
    shares = np.array([one["boxes"] for one in instances]) * ([rgb.shape[1], rgb.shape[0]] * 2)
    np.testing.assert_allclose(shares, boxes, rtol=0, atol=0.51e-5 * max(rgb.shape))


def test_images_are_scaled_to_the_size_that_the_reference_gives_them(golden: Any) -> None:
    for size, expected in zip(golden["sizes"].tolist(), golden["resized"].tolist(), strict=True):
        assert _vitdet_network.shape_within(*size, 1024) == tuple(expected)


def test_every_published_tensor_has_its_place(golden: Any) -> None:
    published = {
        name: torch.empty([int(n) for n in shape.split("x")], device="meta")
        for name, shape in map(str.split, golden["published"].tolist())
    }
    assert len(published) == 561
    unused = {name for name in published if name.startswith(_vitdet_network.UNUSED)}
    assert {name.split(".")[1] for name in unused} == {"mask_head"}
    known = _vitdet_random.layout(HUGE)
    assert {n: v.shape for n, v in published.items() if n not in unused} == {n: v.shape for n, v in known.items()}
    network = _vitdet_network.network(published)
    assert network.backbone.side == 1024
    assert [i for i, block in enumerate(network.backbone.net.blocks) if block.attn.side == 64] == [7, 15, 23, 31]


def test_a_file_that_lacks_a_tensor_is_refused() -> None:
    whole = _vitdet_random.layout(_vitdet_random.TINY)
    assert _vitdet_network.network(whole).backbone.side == 64
    one_of_a_kind = {re.sub(r"\d+", "", name): name for name in whole}
    assert len(one_of_a_kind) > 30
    for name in one_of_a_kind.values():
        with pytest.raises(ValueError, match=r"vitdet: .*(not that of this network|box heads)"):
            _vitdet_network.network({n: v for n, v in whole.items() if n != name})


@pytest.mark.parametrize(("shape", "heads"), [(BASE, 12), (LARGE, 16), (HUGE, 16)])
def test_the_sizes_are_told_apart_by_their_tensors(shape: _vitdet_random.Shape, heads: int) -> None:
    net = _vitdet_network.network(_vitdet_random.layout(shape)).backbone.net
    attentions = [block.attn for block in net.blocks]
    assert {attention.heads for attention in attentions} == {heads}
    spread = [(i + 1) % shape.every == 0 for i in range(shape.depth)]
    assert [attention.side == 64 for attention in attentions] == spread
    assert {attention.side for attention in attentions} == {14, 64}


def tiny_network() -> _vitdet_network.Detector:
    return _vitdet_network.network(_vitdet_random.state(_vitdet_random.TINY, seed=3)).eval()


def tiny_batch() -> tuple[torch.Tensor, list[tuple[int, int]]]:
    images = [_vitdet_network.resized(rgb, 64) for rgb in photographs()]
    return _vitdet_network.batch(images, 64, "cpu"), [image.shape[:2] for image in images]


def test_boxes_stay_exact_whatever_the_layers_compute_in() -> None:
    pixels, sizes = tiny_batch()
    with torch.inference_mode():
        single = tiny_network()(pixels, sizes, 0.05, 0.5, 10)
        double = tiny_network().double()(pixels, sizes, 0.05, 0.5, 10)
    for one, other in zip(single, double, strict=True):
        assert one.boxes.dtype == other.boxes.dtype == torch.float32
        torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-5)


def test_padding_is_the_mean_colour() -> None:
    pixels, sizes = tiny_batch()
    for values, (height, width) in zip(pixels, sizes, strict=True):
        assert min(height, width) < max(height, width) == 64
        assert not values[:, height:].any()
        assert not values[:, :, width:].any()
        assert values[:, :height, :width].any(dim=0).all()
    white = _vitdet_network.batch([np.full((64, 64, 3), 255, np.uint8)], 64, "cpu")[0, :, 0, 0]
    np.testing.assert_allclose(white, [2.2489083, 2.4285715, 2.64], rtol=1e-6)


def test_what_is_not_finite_is_no_empty_image() -> None:
    network, (pixels, sizes) = tiny_network(), tiny_batch()
    with torch.no_grad():
        network.roi_heads.box_predictor[1].cls_score.bias[0] = torch.nan
        with pytest.raises(FloatingPointError, match="not finite"):
            network(pixels, sizes, 0.05, 0.5, 10)


def test_boxes_are_looked_up_in_the_map_of_their_size() -> None:
    maps = [torch.full((2, 1, 64 >> level, 64 >> level), float(level)) for level in range(4)]
    maps = [values + torch.tensor([0.0, 10.0]).view(2, 1, 1, 1) for values in maps]
    sides = torch.tensor([1.0, 111.0, 112.0, 223.0, 224.0, 447.0, 448.0, 900.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
    owners = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    found = _vitdet_boxes.pooled(maps, boxes, owners)[:, 0, 0, 0]
    assert found.tolist() == [0, 10, 1, 11, 2, 12, 3, 13]


@pytest.mark.parametrize("size", [(1, 300), (500, 2), (1, 1), (64, 64)])
def test_images_of_any_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    labeler = VitDet().tiny(tmp_path)
    modality = modalities.load("det")
    for value in labeler.load("cpu")([Sample("a", {"rgb": rgb})]):
        modality.check(value["det"], size)
        assert len(value["det"]["instances"]) <= labeler.max_instances


def save(file: Path, state: dict[str, torch.Tensor]) -> VitDet:
    file.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in state.items()}}))
    return VitDet(checkpoint=str(file))


def test_other_networks_are_refused(tmp_path: Path) -> None:
    shape = _vitdet_random.TINY
    lvis = save(tmp_path / "lvis.pkl", _vitdet_random.state(dataclasses.replace(shape, classes=1203), seed=0))
    with pytest.raises(ValueError, match="80 classes, these have 1203"):
        lvis.load("cpu")
    state = _vitdet_random.state(shape, seed=0)
    plain = {name.replace("box_head.0.", "box_head."): value for name, value in state.items()}
    with pytest.raises(ValueError, match="cascade of three box heads"):
        save(tmp_path / "plain.pkl", plain).load("cpu")
    more = state | {"backbone.net.norm.weight": torch.ones(8)}
    with pytest.raises(ValueError, match=r"1 tensors unexpected: backbone\.net\.norm\.weight"):
        save(tmp_path / "more.pkl", more).load("cpu")
    with pytest.raises(ValueError, match="max_instances"):
        VitDet(max_instances=0)
