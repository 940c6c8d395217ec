"""The demo's rgb tokenizer: `dataengine train-tokenizer scenes_rgb`, half a minute on a core."""

from __future__ import annotations

from model import domains
from pipelines.recipes._scenes import tokenizer
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """Images."""
    return tokenizer("rgb", domains.Rgb(), channels=3, codes=1024)
