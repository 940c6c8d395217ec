"""4M-21's tokenizer of ImageBind-H14 features: `dataengine train-tokenizer ml4m_imagebind_h14`."""

from __future__ import annotations

from labelers.imagebind_h14 import ImageBindH14
from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """8,192 codes, ViT to ViT; the features are made of each crop on the way."""
    return _tokenizers.first(
        "ImageBind-H14",
        "ImageBind-H14_8k_224",
        batch_size=128,
        epochs=20,
        min_crop_scale=_tokenizers.FEATURES,
        teacher=ImageBindH14(),
    )


def adapted() -> TrainTokenizer:
    """The second stage, at every size that its name says."""
    return _tokenizers.adapted(recipe(), "ImageBind-H14_8k_224-448", side_step=14)
