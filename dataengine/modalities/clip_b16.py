"""Patch features of CLIP ViT-B/16."""

from __future__ import annotations

from typing import ClassVar

from dataengine.modalities._features import FeatureGrid


class ClipB16(FeatureGrid):
    """CLIP's patch tokens in the space of its embeddings: float16 (14, 14, 512) at 224 pixels, not normalised."""

    spelling: ClassVar[str] = "CLIP-B16"
    shape: ClassVar[tuple[int, int, int]] = (14, 14, 512)
