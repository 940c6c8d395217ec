"""Semantic segmentation by queries: the networks against transformers', the rest against what the reference does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate
from transformers import (
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
)

from dataengine import coco
from dataengine.sample import Sample
from labelers import _images, _panoptic, eomt, mask2former
from labelers.eomt import Eomt
from labelers.mask2former import Mask2Former


def photograph(name: str, height: int, width: int) -> Sample:
    image = Image.fromarray(getattr(skimage.data, name)()).resize((width, height))
    return Sample(name, {"rgb": np.asarray(image)})


def literal(masks: Any, classes: Any, places: Any, padded: Any, inner: Any, size: Any) -> torch.Tensor:
    """Scores (classes, *size), step by step as detectron2's Mask2Former makes them."""
    whole = interpolate(masks[None], size=padded, mode="bilinear", align_corners=False)
    cut = whole[:, :, : inner[0], : inner[1]]
    own = interpolate(cut, size=size, mode="bilinear", align_corners=False)[0]
    shares = classes.softmax(-1)[..., :-1][:, places]
    return torch.einsum("qc,qhw->chw", shares, own.sigmoid())


@pytest.mark.parametrize(
    ("small", "padded", "inner", "size"),
    [
        ((56, 56), (224, 224), (224, 224), (224, 224)),
        ((50, 67), (200, 268), (197, 265), (480, 641)),
        ((67, 38), (268, 152), (251, 150), (133, 79)),
        ((40, 8), (160, 32), (160, 17), (301, 33)),
        ((8, 8), (64, 64), (64, 3), (9, 500)),
    ],
)
def test_each_pixel_gets_the_class_that_the_reference_gives_it(
    small: _panoptic.Size,
    padded: _panoptic.Size,
    inner: _panoptic.Size,
    size: _panoptic.Size,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_panoptic, "_AT_ONCE", 100_000)  # several pieces even for a small image
    generator = torch.Generator().manual_seed(sum(size))
    masks = 3 * torch.randn(30, *small, generator=generator)
    classes = 4 * torch.randn(30, 134, generator=generator)
    places = torch.randperm(133, generator=generator).tolist()
    scores = literal(masks, classes, places, padded, inner, size)
    found = _panoptic.semantic(masks, classes, places, padded, inner, size)
    assert found.dtype == torch.uint8
    assert found.shape == size
    best = scores.max(0).values
    lost = best - scores.gather(0, found[None].long())[0]
    assert lost.max() / best.max() <= 1e-5
    assert (found == scores.argmax(0)).float().mean() > 0.9999
    assert len(found.unique()) >= 3


def test_memory_stays_small_whatever_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_panoptic, "_AT_ONCE", 2**21)
    largest = 0
    sigmoid = torch.Tensor.sigmoid_

    def watched(values: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, values.numel())
        return sigmoid(values)

    monkeypatch.setattr(torch.Tensor, "sigmoid_", watched)
    found = _panoptic.semantic(
        torch.randn(100, 20, 30), torch.randn(100, 134), range(133), (80, 120), (80, 120), (600, 900)
    )
    assert found.shape == (600, 900)
    assert 0 < largest <= _panoptic._AT_ONCE


def test_classes_are_told_by_name() -> None:
    assert _panoptic.order(dict(enumerate(coco.NAMES)), "x") == list(range(133))
    backwards = {str(i): name for i, name in enumerate(coco.NAMES[::-1])}
    assert _panoptic.order(backwards, "x")[0] == 132
    with pytest.raises(ValueError, match=r"eomt: .* unknown: LABEL_0, .* missing: person, "):
        _panoptic.order({i: f"LABEL_{i}" for i in range(133)}, "eomt")
    with pytest.raises(ValueError, match=r"found 132; unknown: none; missing: rug-merged"):
        _panoptic.order(dict(enumerate(coco.NAMES[:-1])), "eomt")


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((300, 1000), (400, 1333)), ((64, 64), (800, 800))],
)
def test_sizes_are_those_of_detectron2(size: _panoptic.Size, wanted: _panoptic.Size) -> None:
    # By hand: 640 * 800 / 480 = 1066.67; 1000 * 800 / 300 > 1333, so the long side is 1333 and 300 * 1.333 = 399.9.
    assert mask2former.fitted(*size, 800, 1333) == wanted


def test_mask2former_is_transformers_network_with_the_reference_around_it(tmp_path: Path) -> None:
    labeler = Mask2Former().tiny(tmp_path)
    sample = photograph("astronaut", 97, 131)
    folder = Path(labeler.checkpoint).parent
    network = Mask2FormerForUniversalSegmentation.from_pretrained(folder, local_files_only=True).eval()
    processor = Mask2FormerImageProcessor(do_resize=False, pad_size={"height": 64, "width": 96})
    resized = Image.fromarray(sample.rgb).resize((86, 64), Image.Resampling.BILINEAR)
    inputs = processor(images=resized, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 96)
    with torch.no_grad():
        out = network(**inputs)
    scores = literal(
        out.masks_queries_logits[0], out.class_queries_logits[0], range(133), (64, 96), (64, 86), (97, 131)
    )
    found = torch.from_numpy(labeler.load("cpu")([sample])[0]["semseg"])
    lost = scores.max(0).values - scores.gather(0, found[None].long())[0]
    assert lost.max() / scores.max() <= 1e-5


def test_eomt_is_transformers_network_with_its_own_image_processor_around_it(tmp_path: Path) -> None:
    labeler = Eomt().tiny(tmp_path)
    sample = photograph("coffee", 131, 97)
    folder = Path(labeler.checkpoint).parent
    network = EomtForUniversalSegmentation.from_pretrained(folder, local_files_only=True).eval()
    processor = EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True)
    with torch.no_grad():
        out = network(pixel_values=processor(images=sample.rgb.copy(), return_tensors="pt")["pixel_values"])
    places = list(range(133))[::-1]
    scores = literal(out.masks_queries_logits[0], out.class_queries_logits[0], places, (64, 64), (64, 47), (131, 97))
    found = torch.from_numpy(labeler.load("cpu")([sample])[0]["semseg"])
    lost = scores.max(0).values - scores.gather(0, found[None].long())[0]
    assert lost.max() / scores.max() <= 1e-5
    assert len(found.unique()) > 5


@pytest.mark.parametrize("kind", [Mask2Former, Eomt])
def test_a_batch_of_many_sizes_gives_what_each_image_gives_alone(
    kind: type[Mask2Former] | type[Eomt], tmp_path: Path
) -> None:
    loaded = kind().tiny(tmp_path).load("cpu")
    sizes = [(96, 128), (95, 120), (128, 96), (64, 64), (90, 128), (40, 200)]
    samples = [photograph("astronaut", *size) for size in sizes]
    together = [value["semseg"] for value in loaded(samples)]
    for sample, one in zip(samples, together, strict=True):
        assert one.shape == sample.rgb.shape[:2]
        alone = loaded([sample])[0]["semseg"]
        assert (alone == one).mean() > 0.999  # a tie may fall otherwise in another batch


def test_padding_would_change_what_mask2former_sees(tmp_path: Path) -> None:
    # The reason for batching by padded size: the network attends to padding as to the image.
    network = mask2former.network(Mask2Former().tiny(tmp_path).checkpoint)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        classes = [
            network(
                pixel_values=_panoptic.padded([image], size, "cpu", _images.IMAGENET, "mean"),
                pixel_mask=torch.zeros(1, *size, dtype=torch.long).index_fill_(2, torch.arange(64), 1),
            ).class_queries_logits
            for size in ((64, 64), (64, 96))
        ]
    assert (classes[0] - classes[1]).abs().max() > 1e-3


def test_eomt_refuses_what_it_would_compute_wrongly(tmp_path: Path) -> None:
    labeler = Eomt().tiny(tmp_path)
    processor = Path(labeler.checkpoint).parent / "preprocessor_config.json"
    with pytest.raises(ValueError, match="expected images fitted into 32 x 32"):
        eomt.geometry(labeler.checkpoint, 32)
    processor.write_text(json.dumps({"size": {"shortest_edge": 64, "longest_edge": 64}, "do_split_image": True}))
    with pytest.raises(ValueError, match="do_split_image"):
        labeler.load("cpu")
    processor.unlink()
    assert eomt.geometry(labeler.checkpoint, 64) == (64, 64, 2, _images.IMAGENET)
    state = load_file(labeler.checkpoint)
    save_file({**state, "attn_mask_probs": torch.tensor([0.0, 0.4])}, labeler.checkpoint)
    with pytest.raises(ValueError, match=r"attn_mask_probs .* found 0, 0.4"):
        labeler.load("cpu")


def test_a_network_of_other_classes_is_refused(tmp_path: Path) -> None:
    labeler = Mask2Former().tiny(tmp_path)
    config = Path(labeler.checkpoint).parent / "config.json"
    found = json.loads(config.read_text())
    found["id2label"]["5"] = "omnibus"
    config.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"mask2former: .* unknown: omnibus; missing: bus"):
        labeler.load("cpu")
