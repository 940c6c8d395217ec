"""Random weights of ViTDet in the layout of the published checkpoints, of any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataengine import coco
from labelers import _checkpoints, _vitdet, _vitdet_heads
from labelers._vitdet_network import Detector

GAINS = {
    "pos_embed": 10.0,
    "objectness_logits": 3.0,
    "anchor_deltas": 0.5,
    "cls_score": 2.0,
    "bbox_pred": 0.4,
    "simfp_3.2.norm.weight": 1.4,
    "simfp_4.1.norm.weight": 1.9,
    "simfp_5.2.norm.weight": 2.4,
}
"""By what tensors of such names are multiplied: so that positions matter, boxes keep near their anchors, some class of
a box stands out from the others, and the coarser maps are heard beside the many cells of the finest."""


@dataclass(frozen=True)
class Shape:
    """The widths of a detector; the published ones are ViTDet-H's."""

    width: int = 1280
    heads: int = 16
    hidden: int = 5120
    grid: int = 64
    window: int = 14
    depth: int = 32
    every: int = 8
    """Each so many blocks one attends over the whole grid."""
    patch: int = 16
    pretrained: int = 14
    """Cells across of the positions that it was pretrained with."""
    channels: int = 256
    convolutions: int = 4
    full: int = 1024
    classes: int = len(coco.THINGS)


TINY = Shape(8, 1, 16, grid=4, window=3, depth=2, every=2, pretrained=2, channels=8, convolutions=1, full=16)


def layout(shape: Shape) -> dict[str, Tensor]:
    """The tensors of a published checkpoint, but for those of masks: names and shapes (on the meta device)."""
    sides = [shape.grid if (i + 1) % shape.every == 0 else shape.window for i in range(shape.depth)]
    stages = range(len(_vitdet_heads.WEIGHTS))
    with torch.device("meta"):
        net = _vitdet.Transformer(shape.width, shape.heads, shape.hidden, shape.patch, shape.grid, sides)
        convolutions = [shape.channels] * shape.convolutions
        detector = Detector(
            _vitdet.Backbone(net, shape.channels),
            _vitdet_heads.ProposalNetwork(shape.channels, 2),
            _vitdet_heads.CascadeHeads(
                [_vitdet_heads.BoxHead(shape.channels, convolutions, [shape.full]) for _ in stages],
                [_vitdet_heads.BoxPredictor(shape.full, shape.classes) for _ in stages],
            ),
        )
        positions = torch.empty(1, 1 + shape.pretrained**2, shape.width)
    return detector.state_dict() | {"backbone.net.pos_embed": positions}


def state(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Seeded random tensors by their published names, with something of a head for masks beside the rest."""
    masks = {"roi_heads.mask_head.predictor.weight": torch.empty(shape.classes, shape.channels, 1, 1)}
    random = _checkpoints.randomised(layout(shape) | masks, seed)
    return {name: value * _gain(name) for name, value in random.items()}


def _gain(name: str) -> float:
    return next((gain for part, gain in GAINS.items() if part in name), 1.0)
