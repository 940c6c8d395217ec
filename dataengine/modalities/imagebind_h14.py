"""Patch features of ImageBind ViT-H/14."""

from __future__ import annotations

from typing import ClassVar

from dataengine.modalities._features import FeatureGrid


class ImageBindH14(FeatureGrid):
    """The patch tokens of ImageBind's image trunk: float16 (16, 16, 1280) at 224 pixels, not normalised."""

    spelling: ClassVar[str] = "ImageBind-H14"
    shape: ClassVar[tuple[int, int, int]] = (16, 16, 1280)
