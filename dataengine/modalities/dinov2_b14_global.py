"""The global feature of DINOv2 ViT-B/14."""

from __future__ import annotations

from typing import ClassVar

from dataengine.modalities._features import FeatureVector


class Dinov2B14Global(FeatureVector):
    """DINOv2's class token after its last norm: float16 (channels,), 768 for the published network; stored as .npy."""

    spelling: ClassVar[str] = "DINOv2-B14-global"
    width: ClassVar[int] = 768
