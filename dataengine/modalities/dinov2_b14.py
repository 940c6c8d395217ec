"""Patch features of DINOv2 ViT-B/14."""

from __future__ import annotations

from typing import ClassVar

from dataengine.modalities._features import FeatureGrid


class Dinov2B14(FeatureGrid):
    """DINOv2's patch tokens after its last norm: float16 (16, 16, 768) at 224 pixels."""

    spelling: ClassVar[str] = "DINOv2-B14"
    shape: ClassVar[tuple[int, int, int]] = (16, 16, 768)
