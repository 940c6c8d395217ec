"""Dense features of DINOv2 ViT-B/14."""

from __future__ import annotations

from dataengine.modalities._features import FeatureGrid


class DinoV2B14(FeatureGrid):
    """float16 (16, 16, 768): the normalised patch tokens of the whole image at 224 pixels."""

    spelling = "DINOv2-B14"
    grid = (16, 16)
    channels = 768
