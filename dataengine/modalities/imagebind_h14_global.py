"""The global feature of ImageBind ViT-H/14."""

from __future__ import annotations

from typing import ClassVar

from dataengine.modalities._features import FeatureVector


class ImageBindH14Global(FeatureVector):
    """The class token of ImageBind's image trunk (not the embedding of 1024): float16 (1280,), not normalised."""

    spelling: ClassVar[str] = "ImageBind-H14-global"
    width: ClassVar[int] = 1280
