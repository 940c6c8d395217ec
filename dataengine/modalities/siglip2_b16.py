"""Patch features of SigLIP 2 ViT-B/16."""

from __future__ import annotations

from typing import ClassVar

from dataengine.modalities._features import FeatureGrid


class SigLip2B16(FeatureGrid):
    """SigLIP 2's patch tokens after its last norm: float16 (14, 14, 768) at 224 pixels."""

    spelling: ClassVar[str] = "SigLIP2-B16"
    shape: ClassVar[tuple[int, int, int]] = (14, 14, 768)
