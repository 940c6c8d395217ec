"""The proposal network and the cascade of box heads (Cai and Vasconcelos 2018) on the maps of ViTDet.

Modules and parameters are named as in the published checkpoints (`proposal_generator.*`, `roi_heads.*`). What is
computed of boxes is float32 in whatever precision the layers run: the step of bfloat16 at 1000 pixels is 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from labelers import _checkpoints, _networks, _vitdet_boxes
from labelers._vitdet import NormedConv

WEIGHTS = ((10.0, 5.0), (20.0, 10.0), (30.0, 15.0))
"""By what the three heads scale the shift and the growth that they predict."""

PROPOSALS = 1000
"""So many of the best anchors of each map are looked at, and so many proposals of an image go on."""

PROPOSAL_OVERLAP = 0.7
"""A proposal that overlaps a better one of the same map by more (intersection over union) is dropped."""


class ProposalHead(nn.Module):
    """Two convolutions, then for each cell and anchor how likely there is something and where exactly."""

    def __init__(self, channels: int, convolutions: int) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        for i in range(convolutions):
            self.conv.add_module(f"conv{i}", nn.Conv2d(channels, channels, 3, padding=1))
        self.objectness_logits = nn.Conv2d(channels, len(_vitdet_boxes.RATIOS), 1)
        self.anchor_deltas = nn.Conv2d(channels, 4 * len(_vitdet_boxes.RATIOS), 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A map (n, channels, h, w) to float32 logits (n, h * w * 3) and deltas (n, h * w * 3, 4)."""
        for layer in self.conv:
            x = F.relu(layer(x))
        logits = self.objectness_logits(x).permute(0, 2, 3, 1).flatten(1)
        deltas = self.anchor_deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
        return logits.float(), deltas.float()


class ProposalNetwork(nn.Module):
    """Where in an image there may be an object."""

    def __init__(self, channels: int, convolutions: int) -> None:
        super().__init__()
        self.rpn_head = ProposalHead(channels, convolutions)

    def forward(self, maps: Sequence[Tensor], limits: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each image boxes (at most 1000, 4) within it and their logits, best first; `limits` (n, 4) is w h w h.

        FloatingPointError when they are not finite: such boxes would be dropped as empty, and nothing be found.
        """
        boxes, logits, levels = [], [], []
        for level, (values, stride) in enumerate(zip(maps, _vitdet_boxes.STRIDES, strict=True)):
            every, deltas = self.rpn_head(values)
            best, where = every.topk(min(PROPOSALS, every.shape[1]), dim=1)
            anchors = _vitdet_boxes.anchors(values.shape[2], values.shape[3], stride, values.device)[where]
            deltas = deltas.gather(1, where.unsqueeze(-1).expand(-1, -1, 4))
            boxes.append(_vitdet_boxes.clipped(_vitdet_boxes.moved(anchors, deltas, (1.0, 1.0)), limits[:, None]))
            logits.append(best)
            levels.append(torch.full_like(where[0], level))
        every_level, every_box, every_logit = torch.cat(levels), torch.cat(boxes, 1), torch.cat(logits, 1)
        _networks.finite(every_logit, "vitdet"), _networks.finite(every_box, "vitdet")
        return [_suppressed(b, s, every_level) for b, s in zip(every_box, every_logit, strict=True)]


def _suppressed(boxes: Tensor, logits: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    some = _vitdet_boxes.filled(boxes)
    boxes, logits = boxes[some], logits[some]
    kept = batched_nms(boxes, logits, level[some], PROPOSAL_OVERLAP)[:PROPOSALS]
    return boxes[kept], logits[kept]


class BoxHead(nn.Module):
    """Convolutions and full layers on what was pooled under a box."""

    def __init__(self, channels: int, convolutions: Sequence[int], layers: Sequence[int]) -> None:
        super().__init__()
        self.convolutions, self.layers = len(convolutions), len(layers)
        for i, outputs in enumerate(convolutions, 1):
            self.add_module(f"conv{i}", NormedConv(channels, outputs, 3))
            channels = outputs
        inputs = channels * _vitdet_boxes.POOLED**2
        for i, outputs in enumerate(layers, 1):
            self.add_module(f"fc{i}", nn.Linear(inputs, outputs))
            inputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """(boxes, channels, 7, 7) to (boxes, outputs)."""
        for i in range(1, self.convolutions + 1):
            x = F.relu(self.get_submodule(f"conv{i}")(x))
        x = x.flatten(1)
        for i in range(1, self.layers + 1):
            x = F.relu(self.get_submodule(f"fc{i}")(x))
        return x


class BoxPredictor(nn.Module):
    """The class of a box (the last one stands for none) and where exactly it is, whatever its class."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.cls_score = nn.Linear(inputs, classes + 1)
        self.bbox_pred = nn.Linear(inputs, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(boxes, inputs) to float32 probabilities (boxes, classes + 1) and deltas (boxes, 4)."""
        return self.cls_score(x).float().softmax(-1), self.bbox_pred(x).float()


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes: Tensor
    """float32 (n, 4), x0 y0 x1 y1 in pixels of the network's input."""
    scores: Tensor
    """float32 (n,), in 0..1."""
    classes: Tensor
    """int64 (n,), from 0."""


class CascadeHeads(nn.Module):
    """Three box heads, each of which starts from the boxes of the one before."""

    def __init__(self, heads: Sequence[BoxHead], predictors: Sequence[BoxPredictor]) -> None:
        super().__init__()
        self.classes = predictors[0].classes
        self.box_head = nn.ModuleList(heads)
        self.box_predictor = nn.ModuleList(predictors)

    def forward(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (all, 4) within their images, by the last head, and probabilities (all, classes + 1), the mean of all.

        `maps` are the four finest, `proposals` the boxes of each image, one after another in what comes back.
        """
        dtype = maps[0].dtype
        # roi_align has no bfloat16, and in half precision its coordinates would be whole pixels.
        maps = [values.float() for values in maps]
        boxes = torch.cat(list(proposals))
        counts = torch.tensor([len(some) for some in proposals], device=boxes.device)
        owners = torch.repeat_interleave(torch.arange(len(counts), device=boxes.device), counts, output_size=len(boxes))
        within = limits[owners]
        total = torch.zeros((), device=boxes.device)
        for head, predictor, weights in zip(self.box_head, self.box_predictor, WEIGHTS, strict=True):
            pooled = _vitdet_boxes.pooled(maps, boxes, owners).to(dtype, memory_format=torch.channels_last)
            probabilities, deltas = predictor(head(pooled))
            boxes = _vitdet_boxes.clipped(_vitdet_boxes.moved(boxes, deltas, weights), within)
            total = total + probabilities
        return boxes, total / len(WEIGHTS)


def detections(boxes: Tensor, scores: Tensor, min_score: float, max_overlap: float, most: int) -> Detections:
    """The best of boxes (n, 4) and their probabilities (n, classes + 1): above a score, suppressed within a class."""
    box, name = (scores[:, :-1] > min_score).nonzero(as_tuple=True)
    boxes, scores = boxes[box], scores[box, name]
    kept = batched_nms(boxes, scores, name, max_overlap)[:most]
    return Detections(boxes[kept], scores[kept], name[kept])


def heads(state: Mapping[str, Tensor]) -> tuple[ProposalNetwork, CascadeHeads]:
    """Unfilled heads of the shape that these tensors are for.

    ValueError when they are not those of a cascade of three heads.
    """
    stages = sorted({name.split(".")[2] for name in state if name.startswith("roi_heads.box_head.")})
    if stages != ["0", "1", "2"]:
        raise ValueError(
            "vitdet: expected a cascade of three box heads (roi_heads.box_head.0, 1 and 2), "
            f"found {', '.join(stages[:5]) or 'none'}: not a Cascade R-CNN's checkpoint"
        )
    proposals = ProposalNetwork(
        state["proposal_generator.rpn_head.objectness_logits.weight"].shape[1],
        _checkpoints.count(state, "proposal_generator.rpn_head.conv.conv"),
    )
    channels = state["roi_heads.box_head.0.conv1.weight"].shape[1]
    box_heads, predictors = [], []
    for i in range(len(WEIGHTS)):
        prefix = f"roi_heads.box_head.{i}."
        box_heads.append(BoxHead(channels, _widths(state, f"{prefix}conv"), _widths(state, f"{prefix}fc")))
        outputs, inputs = state[f"roi_heads.box_predictor.{i}.cls_score.weight"].shape
        predictors.append(BoxPredictor(inputs, outputs - 1))
    return proposals, CascadeHeads(box_heads, predictors)


def _widths(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    """How many outputs the layers `prefix`1, `prefix`2, ... have."""
    widths: list[int] = []
    while (weight := state.get(f"{prefix}{len(widths) + 1}.weight")) is not None:
        widths.append(weight.shape[0])
    return widths
