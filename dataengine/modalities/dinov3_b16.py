"""Patch features of DINOv3 ViT-B/16."""

from __future__ import annotations

from typing import ClassVar

from dataengine.modalities._features import FeatureGrid


class DinoV3B16(FeatureGrid):
    """DINOv3's patch tokens after its last norm: float16 (14, 14, 768) at 224 pixels."""

    spelling: ClassVar[str] = "DINOv3-B16"
    shape: ClassVar[tuple[int, int, int]] = (14, 14, 768)
