"""The demo's semseg tokenizer: `dataengine train-tokenizer scenes_semseg`, about a minute on two cores."""

from __future__ import annotations

from model.tokenizers import domains
from pipelines.recipes._scenes import tokenizer
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """COCO panoptic classes."""
    return tokenizer("semseg", domains.Semseg(), channels=8, labels=134, codes=512, steps=400)
