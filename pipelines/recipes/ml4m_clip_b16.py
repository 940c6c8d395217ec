"""4M-21's tokenizer of CLIP-B16 features: `dataengine train-tokenizer ml4m_clip_b16`."""

from __future__ import annotations

from labelers.clip_b16 import ClipB16
from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """8,192 codes, ViT to ViT; the features are made of each crop on the way."""
    return _tokenizers.first(
        "CLIP-B16", "CLIP-B16_8k_224", batch_size=128, epochs=20, min_crop_scale=_tokenizers.FEATURES, teacher=ClipB16()
    )


def adapted() -> TrainTokenizer:
    """The second stage, at every size that its name says."""
    return _tokenizers.adapted(recipe(), "CLIP-B16_8k_224-448", side_step=16)
