"""4M-21's tokenizer of COCO's classes: `dataengine train-tokenizer ml4m_semseg`."""

from __future__ import annotations

from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """4,096 codes, ViT to ViT."""
    return _tokenizers.first("semseg", "semseg_4k_224", batch_size=80, epochs=20)


def adapted() -> TrainTokenizer:
    """The second stage, at every size that its name says."""
    return _tokenizers.adapted(recipe(), "semseg_4k_224-448", batch_size=10)
