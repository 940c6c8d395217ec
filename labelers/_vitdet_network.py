"""ViTDet as a whole: made of a published checkpoint, fed with images of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from labelers import _networks, _vitdet, _vitdet_heads
from labelers._vitdet_heads import Detections

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of R, G and B in 0..255."""

UNUSED = ("roi_heads.mask_head.", "pixel_mean", "pixel_std", "proposal_generator.anchor_generator.")
"""What a checkpoint holds beside what boxes need: the masks' own head, and constants (above, and the anchors) that
detectron2 saved in some of its versions."""


class Detector(nn.Module):
    """Boxes of objects: backbone, proposals, cascade."""

    def __init__(
        self,
        backbone: _vitdet.Backbone,
        proposal_generator: _vitdet_heads.ProposalNetwork,
        roi_heads: _vitdet_heads.CascadeHeads,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads

    def forward(
        self,
        pixels: Tensor,
        sizes: Sequence[tuple[int, int]],
        min_score: float,
        max_overlap: float,
        most: int,
    ) -> list[Detections]:
        """What is in each image of a `batch`; `sizes` are heights and widths within the padding.

        FloatingPointError when scores are not finite: they would only look as if nothing had been found.
        """
        maps = self.backbone(pixels.to(self.backbone.net.pos_embed.dtype))
        limits = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32, device=pixels.device)
        proposals = [boxes for boxes, _ in self.proposal_generator(maps, limits)]
        boxes, scores = self.roi_heads(maps[:4], proposals, limits)
        _networks.finite(scores, "vitdet"), _networks.finite(boxes, "vitdet")
        counts = [len(some) for some in proposals]
        return [
            _vitdet_heads.detections(b, s, min_score, max_overlap, most)
            for b, s in zip(boxes.split(counts), scores.split(counts), strict=True)
        ]


def network(state: Mapping[str, Tensor]) -> Detector:
    """The detector whose tensors these are, float32, on the CPU.

    Widths, depths, windows and the size of the input are read off the tensors: ViT-B, L and H alike. ValueError when
    they are not those of a ViTDet with a cascade of box heads.
    """
    state = {name: value for name, value in state.items() if not name.startswith(UNUSED)}
    positions = "backbone.net.pos_embed"
    try:
        # Nothing is initialised, or even allocated, before its values are there to be copied.
        with torch.device("meta"):
            proposals, heads = _vitdet_heads.heads(state)
            part = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
            detector = Detector(_vitdet.backbone(part), proposals, heads)
        state[positions] = _vitdet.resized_positions(state[positions], detector.backbone.net.pos_embed.shape[1])
    except KeyError as error:
        raise ValueError(f"vitdet: the checkpoint is not that of this network: it has no {error.args[0]}") from error
    detector = detector.to_empty(device=state[positions].device)
    _networks.fill(detector, state, "vitdet")
    return detector


def shape_within(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of an image that is scaled so that its longer side is `side`, rounded as detectron2 does."""
    # In its two steps, for the same rounding: the shorter side to `side`, then the longer one down to it.
    scale = side / min(height, width)
    h, w = (side * 1.0, scale * width) if height < width else (scale * height, side * 1.0)
    if max(h, w) > side:
        scale = side / max(h, w)
        h, w = h * scale, w * scale
    return max(int(h + 0.5), 1), max(int(w + 0.5), 1)


def resized(rgb: np.ndarray, side: int) -> np.ndarray:
    """An image uint8 (h, w, 3) as large as fits into `side` x `side` (Pillow's bilinear)."""
    height, width = shape_within(rgb.shape[0], rgb.shape[1], side)
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))


def batch(images: Sequence[np.ndarray], side: int, device: str) -> Tensor:
    """`resized` images as a normalised batch float32 (n, 3, side, side) on a device, zero to the right and below.

    They cross over once, as bytes and from pinned memory, and become floats there.
    """
    stacked = np.zeros((len(images), side, side, 3), np.uint8)
    covered = np.zeros((len(images), side, side, 1), np.bool_)
    for i, image in enumerate(images):
        height, width = image.shape[:2]
        stacked[i, :height, :width] = image
        covered[i, :height, :width] = True
    pixels, inside = torch.from_numpy(stacked), torch.from_numpy(covered)
    if device.startswith("cuda"):
        pixels = pixels.pin_memory().to(device, non_blocking=True)
        inside = inside.pin_memory().to(device, non_blocking=True)
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    # Zero after normalising, which is the mean colour, not black.
    return torch.where(inside, (pixels - mean) / std, 0.0).permute(0, 3, 1, 2)
