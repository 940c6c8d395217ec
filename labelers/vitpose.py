"""Keypoints of persons by ViTPose (Xu et al. 2022), by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.modalities.human_keypoints import NAMES
from dataengine.sample import Sample
from dataengine.weights import Weights
from labelers import _huggingface, _images, _keypoints, _networks, _persons

COCO = 0
"""Which of the data sets of a ViTPose++ (with experts) its keypoints are those of."""


@dataclass(frozen=True)
class _Seen:
    """What is taken of one image: boxes (n, 4), their frames, and crops uint8 (n, h, w, 3)."""

    boxes: np.ndarray
    frames: list[_keypoints.Frame]
    crops: list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class VitPose(Labeler):
    """COCO's 17 keypoints of the persons of `det` (score above `min_score`): `[]` without persons.

    Each person has `bbox_xyxy`, `keypoints` (17, 2) and `scores` (17,); positions are in pixels of the image, x right,
    y down; a score is the height of a heatmap, about 0..1. All persons of a batch of images go through the network
    together, at most `chunk` at once, and their heatmaps are read on the device. ViTPose and ViTPose++ of any size.
    """

    inputs = ("rgb", "det")
    emits = ("human_keypoints",)
    batch_size = 16
    gpus = 0.1

    checkpoint: str = "usyd-community/vitpose-base-simple"
    min_score: float = 0.5
    chunk: int = 128
    precision: _networks.Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_score < 1 or self.chunk < 1:
            raise ValueError(
                f"vitpose: expected min_score in 0..1 and a chunk of at least 1, got {self.min_score} and {self.chunk}"
            )

    def weights(self) -> Weights:
        """The published weights, Apache-2.0."""
        return _huggingface.describe(self.checkpoint, "Apache-2.0")

    def load(self, device: str) -> Loaded:
        """Read the network and put it on the device."""
        import torch
        from transformers import VitPoseForPoseEstimation

        network = _huggingface.network(self.checkpoint, VitPoseForPoseEstimation, "vitpose")
        _networks.placed(network, device, self.precision, compiled=self.compiled)
        settings: Any = network.config.backbone_config
        if network.config.num_labels != len(NAMES):
            raise ValueError(f"vitpose: expected {len(NAMES)} keypoints (COCO's), got {network.config.num_labels}")
        height, width = settings.image_size
        dtype = _networks.dtype_on(device, self.precision)

        def prepare(sample: Sample) -> _Seen:
            boxes = _persons.boxes_of(sample.values["det"], sample.size, self.min_score)
            frames = [_keypoints.frame_of(box, (height, width)) for box in boxes]
            return _Seen(boxes, frames, [_keypoints.crop(sample.rgb, frame, (height, width)) for frame in frames])

        def read(crops: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
            pixels = _images.normalised(crops, _images.IMAGENET, device).to(dtype)
            of_experts = {}
            if settings.num_experts > 1:
                of_experts["dataset_index"] = torch.full((len(crops),), COCO, device=device)
            heatmaps = network(pixels, **of_experts).heatmaps
            points, scores = _keypoints.peaks(heatmaps)
            return points.cpu().numpy(), scores.cpu().numpy(), (heatmaps.shape[2], heatmaps.shape[3])

        def label(prepared: Sequence[_Seen]) -> list[dict[str, Any]]:
            crops = [crop for seen in prepared for crop in seen.crops]
            frames = [frame for seen in prepared for frame in seen.frames]
            boxes = [box for seen in prepared for box in seen.boxes]
            persons: list[dict[str, Any]] = []
            with torch.inference_mode():
                for i in range(0, len(crops), self.chunk):
                    points, scores, grid = read(crops[i : i + self.chunk])
                    for j, (of_one, sure) in enumerate(zip(points, scores, strict=True), start=i):
                        persons.append(_person(boxes[j], _keypoints.in_image(of_one, frames[j], grid), sure))
            ends = np.cumsum([len(seen.crops) for seen in prepared]).tolist()
            return [
                {"human_keypoints": persons[end - len(seen.crops) : end]}
                for seen, end in zip(prepared, ends, strict=True)
            ]

        return Staged(prepare, label)

    def tiny(self, folder: Path) -> VitPose:
        """Two random blocks of width 16 in the format of the published checkpoint."""
        from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

        backbone: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        backbone |= {"image_size": [256, 192], "patch_size": [16, 16], "out_indices": [2]}
        settings: dict[str, Any] = {"backbone_config": VitPoseBackboneConfig(**backbone), "num_labels": len(NAMES)}
        model = VitPoseForPoseEstimation(VitPoseConfig(**settings))
        return replace(self, checkpoint=str(_huggingface.save_tiny(model, folder, seed=6)))


def _person(box: np.ndarray, points: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    return {
        "bbox_xyxy": box.astype(np.float64).round(2).tolist(),
        "keypoints": (points.round(2) + 0.0).tolist(),
        "scores": (scores.round(4) + 0.0).tolist(),
    }
