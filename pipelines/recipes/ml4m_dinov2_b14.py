"""4M-21's tokenizer of DINOv2-B14 features: `dataengine train-tokenizer ml4m_dinov2_b14`."""

from __future__ import annotations

from labelers.dinov2_b14 import DinoV2
from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """8,192 codes, ViT to ViT; the features are made of each crop on the way."""
    return _tokenizers.first(
        "DINOv2-B14",
        "DINOv2-B14_8k_224",
        batch_size=64,
        epochs=20,
        min_crop_scale=_tokenizers.FEATURES,
        teacher=DinoV2(),
    )


def adapted() -> TrainTokenizer:
    """The second stage, at every size that its name says."""
    return _tokenizers.adapted(recipe(), "DINOv2-B14_8k_224-448", side_step=14)
