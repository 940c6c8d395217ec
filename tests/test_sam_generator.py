"""The masks of many images at once are those of the package's generator, and cost less."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam as Package
from segment_anything.utils import amg

from benchmarks._labelers_sam import matched_iou, same_set
from dataengine.sample import Sample
from labelers import _checkpoints, _sam, _sam_encoder
from labelers._sam_generator import Generator, Prepared, Settings, point_grid, run_lengths
from labelers.sam import Sam

TOLERANCE = 1e-5
"""Relative, float32."""
PHOTOS = [
    np.ascontiguousarray(photo)
    for photo in (
        skimage.data.chelsea()[60:210, 60:300],
        skimage.data.astronaut()[:200, :131],
        skimage.data.coffee()[100:164, 100:164],
        skimage.data.coffee()[:160, :200],
    )
]
"""Wide, tall, of the network's own size, and larger: of several sizes on purpose."""
SETTINGS = Settings(
    points_per_side=6,
    points_per_batch=64,
    pred_iou_thresh=0.4,
    stability_score_thresh=0.3,
    stability_score_offset=0.05,
    box_nms_thresh=0.97,
)


@pytest.fixture(autouse=True)
def gradients_off() -> Any:
    with torch.inference_mode():
        yield


def network(seed: int = 5) -> Package:
    return _sam.network(_sam.random_state(seed))


def expected(photos: list[np.ndarray], settings: Settings, net: Package, **more: Any) -> list[list[dict[str, Any]]]:
    generator = SamAutomaticMaskGenerator(net, output_mode="coco_rle", **asdict(settings), **more)
    return [generator.generate(photo) for photo in photos]


def ours(photos: list[np.ndarray], settings: Settings, net: Package) -> tuple[list[list[dict[str, Any]]], Generator]:
    predictor = _sam.Predictor(copy.deepcopy(net), "cpu")
    generator = Generator(predictor, settings)
    return generator([predictor.prepare(photo) for photo in photos]), generator


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="one image a tile"),
        pytest.param({"points_per_batch": 7}, id="parts of an image"),
        pytest.param({"points_per_batch": 100}, id="two images a tile"),
        pytest.param({"pred_iou_thresh": 0.0}, id="any score"),
        pytest.param({"stability_score_thresh": 0.0}, id="any stability, empty masks too"),
        pytest.param({"box_nms_thresh": 0.5}, id="fewer duplicates"),
        pytest.param({"points_per_side": 1}, id="one point"),
        pytest.param({"stability_score_offset": 0.4, "stability_score_thresh": 0.05}, id="some masks cannot pass"),
    ],
)
def test_the_same_masks_are_kept_as_by_the_package(change: dict[str, Any]) -> None:
    settings, net = replace(SETTINGS, **change), network()
    wanted = expected(PHOTOS, settings, net)
    found, _ = ours(PHOTOS, settings, net)
    assert sum(map(len, wanted)) > (3 if settings.points_per_side == 1 else 10)
    for masks, theirs in zip(found, wanted, strict=True):
        assert [m["point_coords"] for m in masks] == [m["point_coords"] for m in theirs]
        assert [m["bbox"] for m in masks] == [m["bbox"] for m in theirs]
        assert [m["crop_box"] for m in masks] == [m["crop_box"] for m in theirs]
        columns = [
            [np.array([m[name] for m in side]) for side in (masks, theirs)] for name in ("predicted_iou", "area")
        ]
        np.testing.assert_allclose(*columns[0], rtol=TOLERANCE)
        # A ratio of numbers of pixels, of which rounding may turn one or two that lie at a threshold.
        stability = [np.array([m["stability_score"] for m in side]) for side in (masks, theirs)]
        np.testing.assert_array_equal(np.isnan(stability[0]), np.isnan(stability[1]))
        assert (np.nan_to_num(np.abs(stability[0] - stability[1])) * columns[1][1] <= 2).all()
        pixels = [sum(coco_mask.decode(_bytes(m)) for m in side) for side in (masks, theirs) if side]
        if masks:
            assert np.abs(pixels[0].astype(int) - pixels[1]).sum() <= 1e-5 * sum(m["area"] for m in theirs) + 1
        assert same_set(masks, theirs)


def _bytes(mask: dict[str, Any]) -> dict[str, Any]:
    return {"size": mask["segmentation"]["size"], "counts": mask["segmentation"]["counts"].encode()}


def test_nothing_that_passes_is_nothing() -> None:
    found, generator = ours(PHOTOS, replace(SETTINGS, pred_iou_thresh=1e6), network())
    assert found == [[]] * len(PHOTOS)
    assert generator.work["points_drawn"] == generator.work["masks_upsampled"] == 0


def test_only_masks_that_can_be_kept_are_upsampled() -> None:
    photos, settings = PHOTOS[:2], replace(SETTINGS, points_per_batch=100, stability_score_offset=0.4)
    scores: list[float] = [
        m["predicted_iou"]
        for masks in expected(photos, replace(settings, pred_iou_thresh=0.0, stability_score_thresh=0.0), network())
        for m in masks
    ]
    settings = replace(settings, pred_iou_thresh=float(np.median(scores)), stability_score_thresh=0.05)
    found, generator = ours(photos, settings, network())
    stock = len(photos) * 36
    work = generator.work
    assert work["decoder_calls"] == 1
    assert work["points"] == stock
    assert 0 < work["points_drawn"] < stock
    assert 0 < work["masks_passed"] <= work["masks_upsampled"] < 3 * stock / 2
    assert work["masks_kept"] == sum(map(len, found))


@pytest.mark.parametrize("image", [64, 80])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_fused_attention_is_the_packages(image: int, scale: float) -> None:
    shape = _sam.Shape(**{**vars(_sam.shape_of(_sam.random_state(0))), "image": image, "depth": 3, "heads": 4})
    net = _sam.build(replace(shape, global_blocks=(1,)))
    net.load_state_dict(_checkpoints.randomised(net.state_dict(), 1, scale))
    pixels = torch.randn(3, 3, image, image, generator=torch.Generator().manual_seed(0))
    wanted = net.image_encoder(pixels)
    names = set(net.state_dict())
    _sam_encoder.fuse(net.image_encoder)
    found = net.image_encoder(pixels)
    assert set(net.state_dict()) == names
    assert not torch.equal(found, wanted)  # another order of sums, so it is the fused one that ran
    assert relative(found, wanted) <= TOLERANCE
    # The bias by distance matters.
    net.image_encoder.blocks[1].attn.rel_pos_h.zero_()
    assert relative(net.image_encoder(pixels), wanted) > 100 * TOLERANCE


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.float64, TOLERANCE)])
def test_the_decoder_is_the_packages(layers: int, dtype: torch.dtype, tolerance: float) -> None:
    """float64 stands for the half precision of a GPU: every border between the two dtypes is crossed."""
    shape = replace(_sam.shape_of(_sam.random_state(0)), decoder_depth=layers, prompt=32)
    net = _sam.build(shape)
    net.load_state_dict(_checkpoints.randomised(net.state_dict(), 4, 1.5))
    features = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(1))
    coords = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(2)) * 64
    predictor = _sam.Predictor(net, "cpu")
    decoder = type(predictor.decoder)(predictor.decoder.parts, dtype)
    scores, hyper, image = decoder.attend(decoder.share(features), predictor.code((coords + 0.5) / 64))
    masks = decoder.draw(image, hyper)
    for i in range(2):
        sparse, dense = net.prompt_encoder((coords[i][:, None], torch.ones(5, 1, dtype=torch.int)), None, None)
        wanted = net.mask_decoder(
            image_embeddings=features[i : i + 1],
            image_pe=net.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        assert relative(masks[5 * i : 5 * i + 5], wanted[0]) <= tolerance
        assert relative(scores[5 * i : 5 * i + 5], wanted[1]) <= tolerance


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (64, 64), (150, 240), (41, 17), (64, 63)])
def test_masks_are_enlarged_to_the_same_bits(size: tuple[int, int]) -> None:
    net = network()
    predictor = _sam.Predictor(net, "cpu")
    image = predictor.prepare(np.zeros((*size, 3), np.uint8))
    logits = torch.randn(5, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = net.postprocess_masks(logits[None], image.pixels.shape[:2], size)[0]
    assert torch.equal(predictor.enlarge(logits, image), wanted)


def test_images_are_resized_normalised_and_padded_as_by_the_package() -> None:
    from segment_anything.utils.transforms import ResizeLongestSide

    net = network()
    predictor = _sam.Predictor(copy.deepcopy(net), "cpu")
    batch = [predictor.prepare(photo) for photo in PHOTOS]
    seen: list[torch.Tensor] = []
    encoder = predictor.encoder
    predictor.encoder = lambda pixels: seen.append(pixels) or encoder(pixels)  # type: ignore[assignment, func-returns-value]
    predictor.encode(batch)
    for photo, image, square in zip(PHOTOS, batch, seen[0], strict=True):
        resized = ResizeLongestSide(64).apply_image(photo)
        np.testing.assert_array_equal(image.pixels, resized)
        wanted = net.preprocess(torch.as_tensor(resized).permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(square, wanted, rtol=1e-6, atol=1e-6)
        assert image.size == photo.shape[:2]


def test_run_lengths_and_boxes_are_coco_s() -> None:
    from labelers._sam_generator import _boxes

    masks = torch.rand(6, 13, 7, generator=torch.Generator().manual_seed(0)) > 0.6
    masks[0], masks[1], masks[2, 0, 0] = False, True, True
    masks[3] = F.pad(torch.ones(1, 1, dtype=torch.bool), (6, 0, 12, 0))
    assert torch.equal(_boxes(masks), amg.batched_mask_to_box(masks))
    for mask, counts, theirs in zip(masks, run_lengths(masks), amg.mask_to_rle_pytorch(masks), strict=True):
        assert counts.tolist() == theirs["counts"]
        encoded = coco_mask.frPyObjects({"size": [13, 7], "counts": counts.tolist()}, 13, 7)
        assert encoded["counts"] == coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"]


def test_points_are_the_packages() -> None:
    np.testing.assert_array_equal(point_grid(32), amg.build_point_grid(32))
    predictor = _sam.Predictor(network(), "cpu")
    image = Prepared(np.zeros((27, 64, 3), np.uint8), (100, 240))
    from segment_anything.utils.transforms import ResizeLongestSide

    points = point_grid(5) * (240, 100)
    moved = ResizeLongestSide(64).apply_coords(points, (100, 240))
    np.testing.assert_allclose(predictor.places(points, image), (moved + 0.5) / 64, rtol=1e-14)


def test_crops_and_small_regions_are_left_to_the_package(tmp_path: Path) -> None:
    tiny, photo = replace(Sam().tiny(tmp_path), box_nms_thresh=0.99, crop_nms_thresh=0.99), PHOTOS[0]
    net = _sam.network(torch.load(tiny.checkpoint, weights_only=True))
    settings = Settings(**{name: getattr(tiny, name) for name in vars(SETTINGS)})
    for more in ({"crop_n_layers": 1}, {"min_mask_region_area": 60}):
        labels = replace(tiny, **more).load("cpu")([Sample("a", {"rgb": photo})])
        wanted = _sam.records(expected([photo], settings, net, crop_nms_thresh=0.99, **more)[0])
        found = labels[0]["sam_instance"]
        assert len(found) == len(wanted) > 2
        assert [m["bbox"] for m in found] == [m["bbox"] for m in wanted]
    plain = tiny.load("cpu")([Sample("a", {"rgb": photo})])[0]["sam_instance"]
    assert [m["counts"] for m in found] != [m["counts"] for m in plain]  # regions were filled


def test_agreement_is_measured_and_can_fail() -> None:
    net = network()
    wanted = expected(PHOTOS[:3], SETTINGS, net)
    found, _ = ours(PHOTOS[:3], SETTINGS, net)
    assert min(matched_iou(f, e) for f, e in zip(found, wanted, strict=True)) >= 0.99
    other = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    for weight in other.image_encoder.parameters():
        weight += 0.1 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    perturbed, _ = ours(PHOTOS[:3], SETTINGS, other)
    assert min(matched_iou(f, e) for f, e in zip(perturbed, wanted, strict=True)) < 0.9
    assert not all(same_set(f, e) for f, e in zip(perturbed, wanted, strict=True))
    masks = wanted[0]
    assert matched_iou(masks, masks) == pytest.approx(1.0)
    assert matched_iou(masks[1:], masks) == matched_iou(masks, masks[1:]) < 1
    assert (matched_iou([], masks), matched_iou(masks, []), matched_iou([], [])) == (0.0, 0.0, 1.0)
