"""Dense features of CLIP ViT-B/16."""

from __future__ import annotations

from dataengine.modalities._features import FeatureGrid


class ClipB16(FeatureGrid):
    """float16 (14, 14, 512): the projected patch tokens of the whole image at 224 pixels."""

    spelling = "CLIP-B16"
    grid = (14, 14)
    channels = 512
