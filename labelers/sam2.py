"""Instance masks by Segment Anything 2.1 (Ravi et al. 2024), queried with a grid of points, by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.weights import Weights
from labelers import _huggingface, _networks, _sam, _sam_two
from labelers._sam_generator import Generator, Prepared, Settings


@dataclass(frozen=True, kw_only=True)
class Sam2(Labeler):
    """All masks of an image as COCO run lengths, largest first, as `labelers/sam.py` describes them.

    By its authors Hiera-L is faster and more accurate than ViT-H. The settings and
    their defaults are those of their automatic mask generator; its crops, and its second pass over the masks, are not
    here. The image is squeezed to the network's square and its masks are stretched back.
    """

    inputs = ("rgb",)
    emits = ("sam_instance",)
    batch_size = 8
    gpus = 1.0
    alternative = True

    checkpoint: str = "facebook/sam2.1-hiera-large"
    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.8
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    precision: _networks.Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.points_per_side < 1 or self.points_per_batch < 1:
            points = f"{self.points_per_side} a side and {self.points_per_batch} a batch"
            raise ValueError(f"sam2: expected at least one point, got {points}")

    def weights(self) -> Weights:
        """The published weights, Apache-2.0."""
        return _huggingface.describe(self.checkpoint, "Apache-2.0")

    def load(self, device: str) -> Loaded:
        """Read the network and put it on the device."""
        import torch

        model = _sam_two.network(self.checkpoint)
        predictor = _sam_two.Predictor(model, device, self.precision, compiled=self.compiled)
        generator = Generator(
            predictor,
            Settings(
                points_per_side=self.points_per_side,
                points_per_batch=self.points_per_batch,
                pred_iou_thresh=self.pred_iou_thresh,
                stability_score_thresh=self.stability_score_thresh,
                stability_score_offset=self.stability_score_offset,
                box_nms_thresh=self.box_nms_thresh,
            ),
        )

        def label(images: Sequence[Prepared]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                return [{"sam_instance": _sam.records(found)} for found in generator(images)]

        return Staged(lambda sample: predictor.prepare(sample.rgb), label)

    def tiny(self, folder: Path) -> Sam2:
        """A random network for 128 x 128 pixels in the published format, and a grid of 5 x 5 points."""
        file = _sam_two.save_tiny(folder / "sam2", seed=2)
        return replace(
            self,
            checkpoint=str(file),
            points_per_side=5,
            pred_iou_thresh=0.0,
            stability_score_thresh=0.3,
            stability_score_offset=0.05,
            box_nms_thresh=0.9,
        )
