"""The global feature of DINOv3 ViT-B/16."""

from __future__ import annotations

from typing import ClassVar

from dataengine.modalities._features import FeatureVector


class DinoV3B16Global(FeatureVector):
    """DINOv3's class token after its last norm: float16 (768,)."""

    spelling: ClassVar[str] = "DINOv3-B16-global"
    width: ClassVar[int] = 768
