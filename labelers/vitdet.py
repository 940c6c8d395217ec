"""Boxes of objects by ViTDet-H with a cascade of heads (Li et al. 2022), from detectron2's published file."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataengine import coco, weights
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.weights import Weights
from labelers import _checkpoints, _networks

if TYPE_CHECKING:
    from labelers._vitdet_heads import Detections

PLACES = 5
"""Decimals of what is written: a hundredth of a pixel at 1000."""


@dataclass(frozen=True, kw_only=True)
class VitDet(Labeler):
    """Objects of COCO's 80 classes as `{"instances": [...]}`, best first.

    Each has `boxes` [x0, y0, x1, y1] in 0..1 of the image (x right, y down), `class_name` (COCO's own) and `score`, the
    mean probability of the class over the three heads, in 0..1: what ml-4m's threshold of 0.6 is meant for. All above
    `min_score` are kept, so that the threshold stays a choice of the training; of one class none overlaps a better one
    by more than `max_overlap` (intersection over union).

    The image is scaled so that its longer side is the network's (1024), and padded to a square, as detectron2's own
    configuration has it. ViT-B, L and H are told apart by their tensors.
    """

    inputs = ("rgb",)
    emits = ("det",)
    batch_size = 8
    gpus = 1.0

    checkpoint: str = "https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/cascade_mask_rcnn_vitdet_h/f328730692/model_final_f05665.pkl"
    min_score: float = 0.05
    max_overlap: float = 0.5
    max_instances: int = 100
    precision: _networks.Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.min_score < 1 and 0 <= self.max_overlap <= 1 and self.max_instances >= 1):
            raise ValueError(
                "vitdet: expected min_score in 0..1, max_overlap in 0..1 and max_instances of at least 1, "
                f"got {self.min_score}, {self.max_overlap} and {self.max_instances}"
            )

    def weights(self) -> Weights:
        """The published weights, CC-BY-SA-3.0 (detectron2's model zoo)."""
        return weights.describe(self.checkpoint, licence="CC-BY-SA-3.0")

    def load(self, device: str) -> Loaded:
        """Read the network, without its head for masks, and put it on the device."""
        import torch

        from labelers import _vitdet_network

        network = _vitdet_network.network(_checkpoints.read(weights.resolve(self.checkpoint)))
        classes = network.roi_heads.classes
        if classes != len(coco.THINGS):
            raise ValueError(f"vitdet: expected weights for COCO's {len(coco.THINGS)} classes, these have {classes}")
        _networks.placed(network, device, self.precision)
        # What comes after it depends on how much is found: nothing to compile for good.
        _networks.placed(network.backbone, device, self.precision, compiled=self.compiled)
        side = network.backbone.side

        def label(images: Sequence[Any]) -> list[dict[str, Any]]:
            sizes = [image.shape[:2] for image in images]
            with torch.inference_mode():
                pixels = _vitdet_network.batch(images, side, device)
                found = network(pixels, sizes, self.min_score, self.max_overlap, self.max_instances)
            return [{"det": {"instances": _instances(one, *size)}} for one, size in zip(found, sizes, strict=True)]

        return Staged(lambda sample: _vitdet_network.resized(sample.rgb, side), label)

    def tiny(self, folder: Path) -> VitDet:
        """A random network for 64 x 64 pixels that mostly sees persons, in the format of the published checkpoint."""
        file = folder / "vitdet.pkl"
        if not file.exists():
            from labelers import _vitdet_random

            state = _vitdet_random.state(_vitdet_random.TINY, seed=3)
            model = {name: value.numpy() for name, value in state.items()}
            for stage in range(3):  # mostly persons, so that what reads persons has something to do
                model[f"roi_heads.box_predictor.{stage}.cls_score.bias"][0] += 5
            file.write_bytes(pickle.dumps({"model": model, "__author__": "random"}))
            weights.mark_random(file, seed=3)
        # Few, for their order: most of what a random network finds is about as sure as the rest.
        return replace(self, checkpoint=str(file), max_instances=12)


def _instances(found: Detections, height: int, width: int) -> list[dict[str, Any]]:
    """Detections in an input of (height, width) as det has them; those without an area once rounded are left out."""
    boxes = found.boxes.double().cpu().numpy() / [width, height, width, height]
    out = []
    for box, score, name in zip(
        np.round(boxes, PLACES).tolist(), found.scores.tolist(), found.classes.tolist(), strict=True
    ):
        x0, y0, x1, y1 = box
        if x0 < x1 and y0 < y1:
            out.append({"boxes": box, "class_name": coco.THINGS[name], "score": round(score, PLACES)})
    return out
