"""The global feature of SigLIP 2 ViT-B/16."""

from __future__ import annotations

from typing import ClassVar

from dataengine.modalities._features import FeatureVector


class SigLip2B16Global(FeatureVector):
    """SigLIP 2's image embedding, pooled by attention, not normalised: float16 (768,)."""

    spelling: ClassVar[str] = "SigLIP2-B16-global"
    width: ClassVar[int] = 768
