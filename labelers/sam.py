"""Instance masks by Segment Anything (Kirillov et al. 2023), queried with a grid of points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataengine import weights
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.sample import Sample
from dataengine.weights import Weights
from labelers import _checkpoints, _networks, _sam, _sam_encoder
from labelers._sam_generator import Generator, Prepared, Settings


@dataclass(frozen=True, kw_only=True)
class Sam(Labeler):
    """All masks of an image as COCO run lengths, largest first: a list of dicts.

    `size` [h, w] and `counts` are the mask at the resolution of the image; `bbox` [x, y, w, h] its box and `area` its
    size in pixels, both exact; `predicted_iou` the network's own estimate of its quality, `stability_score` the overlap
    of the masks at two thresholds `2 * stability_score_offset` apart; `point` [x, y] the query in pixels. Masks
    overlap: parts and wholes are both there.

    The settings and their defaults are those of the package's automatic mask generator, which 4M-21 queries with
    32 x 32 points; in float32 the same masks are kept. ViT-B, L and H are told apart by their tensors. With crops
    (`crop_n_layers`) or small regions to fill (`min_mask_region_area`) the package's own generator runs, image by image
    and in float32 whatever `precision` says.
    """

    inputs = ("rgb",)
    emits = ("sam_instance",)
    batch_size = 4
    gpus = 1.0

    checkpoint: str = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth"
    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    precision: _networks.Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.points_per_side < 1 or self.points_per_batch < 1:
            points = f"{self.points_per_side} a side and {self.points_per_batch} a batch"
            raise ValueError(f"sam: expected at least one point, got {points}")

    def weights(self) -> Weights:
        """The published weights, Apache-2.0."""
        return weights.describe(self.checkpoint, licence="Apache-2.0")

    def load(self, device: str) -> Loaded:
        """Read the network and put it on the device."""
        import torch

        network = _sam.network(_checkpoints.read(weights.resolve(self.checkpoint)))
        if self.crop_n_layers > 0 or self.min_mask_region_area > 0:
            return self._by_the_package(network, device)
        predictor = _sam.Predictor(network, device, self.precision, compiled=self.compiled)
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

    def _by_the_package(self, network: Any, device: str) -> Loaded:
        import torch
        from segment_anything import SamAutomaticMaskGenerator

        _sam_encoder.fuse(network.image_encoder)
        generator = SamAutomaticMaskGenerator(
            network.to(device),
            points_per_side=self.points_per_side,
            points_per_batch=self.points_per_batch,
            pred_iou_thresh=self.pred_iou_thresh,
            stability_score_thresh=self.stability_score_thresh,
            stability_score_offset=self.stability_score_offset,
            box_nms_thresh=self.box_nms_thresh,
            crop_n_layers=self.crop_n_layers,
            crop_nms_thresh=self.crop_nms_thresh,
            crop_overlap_ratio=self.crop_overlap_ratio,
            crop_n_points_downscale_factor=self.crop_n_points_downscale_factor,
            min_mask_region_area=self.min_mask_region_area,
            output_mode="coco_rle",
        )

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                return [{"sam_instance": _sam.records(generator.generate(sample.rgb))} for sample in samples]

        return label

    def tiny(self, folder: Path) -> Sam:
        """A random network for 64 x 64 pixels in the format of the published checkpoint, and a grid of 5 x 5 points.

        A random network is sure of nothing, so the thresholds are such that some masks pass.
        """
        file = folder / "sam.pth"
        if not file.exists():
            import torch

            torch.save(_sam.random_state(seed=2), file)
            weights.mark_random(file, seed=2)
        return replace(
            self,
            checkpoint=str(file),
            points_per_side=5,
            pred_iou_thresh=0.0,
            stability_score_thresh=0.3,
            stability_score_offset=0.05,
            box_nms_thresh=0.9,
        )
